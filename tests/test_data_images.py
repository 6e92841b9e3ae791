"""Any picture comes out upright, RGB, 8 bits; what is none gets one sentence."""

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from PIL import __version__ as pillow_version

from omnilatent.data import IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, read_image, resize_and_crop
from omnilatent.data.images import FORMATS

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def refusal(file: io.BytesIO | Path, **options: int) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(file, "a.png", **options)
    return str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "QOI", "SGI", "JPEG2000", "PCX"])
def test_lossless_formats_round_trip(form: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(form, {})
    pixels = read_image(encoded(Image.fromarray(COLOUR), form, **options), "a")
    np.testing.assert_array_equal(pixels, COLOUR)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    upright = Image.fromarray(np.kron(COLOUR, np.ones((16, 16, 1), np.uint8)))
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    file = encoded(stored, form, exif=exif, **options)
    ours = read_image(file, "a")
    np.testing.assert_allclose(ours.astype(int), np.asarray(upright), atol=8)  # JPEG's own loss at quality 100
    np.testing.assert_array_equal(ours, np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")))


def test_what_is_left_of_cut_exif_still_turns_the_picture() -> None:
    entry = struct.pack("<HHII", 274, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5) + entry + b"\x10\x01"  # one of five entries; Pillow warns
    pixels = read_image(encoded(Image.fromarray(COLOUR), "PNG", exif=exif), "a")
    np.testing.assert_array_equal(pixels, np.rot90(COLOUR, -1))


def test_damaged_exif_leaves_the_picture_readable() -> None:
    file = encoded(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    np.testing.assert_array_equal(read_image(file, "a"), COLOUR)


@pytest.mark.parametrize("form, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I;16"),
                                        ("TIFF", "I"), ("JPEG2000", "I;16")])
def test_16_bits_are_scaled_and_rounded_not_clipped(form: str, mode: str) -> None:
    values = np.arange(65536).reshape(256, 256)
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}
    image = Image.frombytes(mode, (256, 256), values.astype(kinds[mode]).tobytes())
    pixels = read_image(encoded(image, form), "a")
    expected = np.floor(values / 257 + 0.5)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], expected)


def test_12_bit_tiff_white_is_white() -> None:
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x0F, 0xFF])  # 4095 0 | 2048 4095
    tags = [(256, 3, 2), (257, 3, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 2),
            (279, 4, 6)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    file = io.BytesIO(b"II*\0" + struct.pack("<I", 14) + packed + directory + struct.pack("<I", 0))
    assert read_image(file, "a")[..., 0].tolist() == [[255, 0], [128, 255]]


def test_transparent_16_bit_value_is_white() -> None:
    image = Image.frombytes("I;16", (2, 1), np.array([257, 514], "<u2").tobytes())
    assert read_image(encoded(image, "PNG", transparency=257), "a")[0, :, 0].tolist() == [255, 2]


def test_floats_are_brightness_from_0_to_1() -> None:
    values = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert read_image(encoded(Image.fromarray(values), "TIFF"), "a")[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values, reason", [
    (np.array([[0, np.nan]], np.float32), "a.png holds pixels that are NaN or infinite: convert it to an 8-bit PNG."),
    (np.array([[-1, 300]], np.float32),
     "a.png holds floats from -1 to 300, outside [0, 1]: convert it to an 8-bit PNG."),
    (np.array([[0, 70000]], np.int32),
     "a.png holds values from 0 to 70000, and white is 65535 in 16 bits: convert it to an 8-bit PNG."),
])
def test_a_range_that_nobody_knows_is_refused(values: np.ndarray, reason: str) -> None:
    assert refusal(encoded(Image.fromarray(values), "TIFF")) == reason


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_opaque_modes_equal_pillows_conversion(mode: str) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    np.testing.assert_array_equal(read_image(encoded(image, "TIFF"), "a"), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_has_its_colours_the_right_way_round() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    assert np.abs(read_image(encoded(image, "JPEG", quality=95), "a") - np.array([255, 0, 0])).max() <= 3


def test_lab_goes_through_colour_management() -> None:
    lab = Image.merge("LAB", [Image.new("L", (4, 4), v) for v in (255, 128, 128)])
    assert (read_image(encoded(lab, "TIFF"), "a") >= 253).all()


def test_transparency_lies_on_white() -> None:
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], np.uint8))
    np.testing.assert_allclose(
        read_image(encoded(rgba, "PNG"), "a").astype(int), [[[200, 0, 0], [255] * 3, [227, 127, 127]]], atol=1)
    grey = Image.merge("LA", [Image.new("L", (2, 1), 10), Image.frombytes("L", (2, 1), bytes([255, 0]))])
    assert read_image(encoded(grey, "PNG"), "a")[0, :, 0].tolist() == [10, 255]
    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    assert read_image(encoded(palette, "PNG", transparency=1), "a").tolist() == [[[9, 8, 7], [255] * 3]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert read_image(encoded(keyed, "PNG", transparency=(1, 2, 3)), "a").tolist() == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert (read_image(file, "a") == [255, 0, 0]).all()


# ---- what is no image -------------------------------------------------------------------------------------------

NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000"])
@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_truncated(form: str, kept: float) -> None:
    whole = encoded(NOISE, form).getvalue()
    sentence = refusal(io.BytesIO(whole[: int(len(whole) * kept)]))
    assert sentence.startswith("a.png is damaged or truncated (") and sentence.endswith(
        "): delete it or copy it again.") or sentence.startswith("a.png is not an image")


def test_truncated_progressive_jpeg_with_tolerance_switched_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(NOISE, "JPEG", progressive=True).getvalue()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "is damaged or truncated" in refusal(io.BytesIO(whole[: len(whole) // 2]))
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # the other library's setting is as it was


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert refusal(tmp_path / "a.png") == "a.png is empty (0 bytes): delete it or copy it again."


@pytest.mark.parametrize("text", [b"x", b"hello, world\n" * 50, b"P", b"GIF", b"<html><body>404</body></html>\n" * 9])
def test_text_named_png(text: bytes) -> None:
    assert refusal(io.BytesIO(text)) == (
        f"a.png is not an image that Pillow {pillow_version} can read: convert it to PNG or JPEG, or move it away.")


def test_missing_and_forbidden(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.png") == "a.png does not exist (any more): check the path."
    assert refusal(tmp_path) == "a.png is a folder: give one of the images in it."
    forbidden = tmp_path / "a.png"
    NOISE.save(forbidden)
    forbidden.chmod(0)
    if os.access(forbidden, os.R_OK):
        pytest.skip("this user (root?) reads files without the right to: cannot test a forbidden file")
    assert refusal(forbidden) == (
        "a.png may not be read (permission denied): give yourself the right to read it, or move it away.")


def header_only(form: str, width: int, height: int) -> bytes:
    if form == "BMP":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
            + struct.pack(">I", 100) + b"IDAT")


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_of_an_image_above_the_limit_only_the_header_is_read(form: str) -> None:
    # There are no pixels in the file, so reading on would call it truncated.
    assert refusal(io.BytesIO(header_only(form, 60000, 50000))) == (
        f"a.png has 60000 x 50000 pixels, above the limit of {MAX_PIXELS}: raise --max-pixels or make the image "
        "smaller.")
    assert "is damaged or truncated" in refusal(io.BytesIO(header_only(form, 60000, 50000)), max_pixels=60000 * 50000)


def test_our_limit_decides_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow would refuse from 21 pixels on
    file = encoded(Image.fromarray(COLOUR), "PNG")
    assert read_image(file, "a", max_pixels=54).shape == (6, 9, 3)
    file.seek(0)
    assert "has 9 x 6 pixels, above the limit of 53" in refusal(file, max_pixels=53)


@settings(max_examples=150, deadline=None)
@given(form=st.sampled_from(["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "TGA"]), place=st.floats(0, 1),
       junk=st.binary(min_size=1, max_size=8))
def test_damage_anywhere_gives_a_picture_or_the_one_error(form: str, place: float, junk: bytes) -> None:
    content = bytearray(WHOLE[form])
    at = int(place * (len(content) - len(junk)))
    content[at : at + len(junk)] = junk
    try:
        assert read_image(io.BytesIO(bytes(content)), "a", max_pixels=10**6).dtype == np.uint8
    except UnreadableImage as unreadable:
        assert str(unreadable).count("\n") == 0


WHOLE = {form: encoded(NOISE, form).getvalue() for form in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "TGA")}


def test_the_error_travels_by_pickle() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("x.jpg", "is empty: delete it")))
    assert (str(error), error.name, error.reason) == ("x.jpg is empty: delete it.", "x.jpg", "is empty: delete it")


def test_suffixes_are_pictures() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2"} <= IMAGE_SUFFIXES
    assert not {".pdf", ".mpg", ".eps", ".ps", ".h5", ".wmf", ".txt", ".tar"} & IMAGE_SUFFIXES
    assert "EPS" not in FORMATS  # it would start Ghostscript


# ---- resize and crop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(300, 451), (64, 64), (65, 200), (40, 31), (1, 1), (257, 130)])
def test_resize_and_crop_is_adms(height: int, width: int) -> None:
    image = RNG.integers(0, 256, (height, width, 3), np.uint8)
    picture, size = Image.fromarray(image), 64
    short = min(width, height)
    while short >= 2 * size:
        picture = picture.resize((picture.size[0] // 2, picture.size[1] // 2), resample=Image.Resampling.BOX)
        short = min(picture.size)
    factor = size / short
    whole = np.array(picture.resize((round(picture.size[0] * factor), round(picture.size[1] * factor)), 3))
    y, x = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    np.testing.assert_array_equal(resize_and_crop(image, size), whole[y : y + size, x : x + size])


def test_resizing_averages_instead_of_picking_pixels() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_and_crop(stripes, 32).astype(int) - 128).max() <= 1


def test_a_very_long_picture_is_cut_before_it_is_enlarged() -> None:
    line = np.zeros((1, 100_000, 3), np.uint8)
    line[:, 50_000:] = 255
    small = resize_and_crop(line, 256)  # uncut it would pass through 256 x 25,600,000 pixels
    assert small.shape == (256, 256, 3) and small[0, 0, 0] < 128 < small[0, -1, 0]


def test_running_out_of_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NOISE.save(tmp_path / "a.png")

    def fail(image: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png", "a.png")
