"""One image file → uint8 RGB, or one sentence why not; and the protocol's resize and crop.

- `read_image`: any format Pillow decodes by itself, upright, RGB, 8 bits; `MAX_PIXELS` is its default limit.
- `read_bytes`: a file's contents, for those who hash them before they decode them.
- `UnreadableImage`: what it raises: the file, the reason, the remedy.
- `IMAGE_SUFFIXES`: the suffixes that make a file in a folder or tar count as an image.
- `resize_and_crop`: short side to a size with antialiasing, then the centre square.
"""

from __future__ import annotations

import errno
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile
from PIL import __version__ as pillow_version

from ..errors import UserError
from .modes import UnknownRange, to_rgb

MAX_PIXELS = 2**28

# Formats that Pillow only identifies (BUFR, GRIB, HDF5, MPEG, IPTC), that start another program or need Windows
# (EPS, WMF), or that take nearly any file for theirs (IMT, SPIDER).
_LEFT_OUT = {"BUFR", "EPS", "GRIB", "HDF5", "IMT", "IPTC", "MPEG", "SPIDER", "WMF"}
_COMMON = ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"]


def _formats() -> list[str]:
    """Pillow's formats in the order in which we try them: those without a signature last."""
    Image.init()
    formats = [name for name in Image.ID if name not in _LEFT_OUT]
    return sorted(formats, key=lambda name: (Image.OPEN[name][1] is None, name not in _COMMON, name))


FORMATS = _formats()
IMAGE_SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS or name == "MPO"
)  # MPO: a JPEG with further pictures behind the first


class UnreadableImage(UserError):
    """A file that is no image we can read. In a folder of many it is skipped, counted and listed.

    Attributes:
        name: the file as it was given to `read_image`.
        reason: the rest of the sentence: what is wrong and what to do.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}.")
        self.name, self.reason = name, " ".join(reason.split())

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from the workers by pickle
        return UnreadableImage, (self.name, self.reason)


def read_image(file: BinaryIO | Path, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image: the first frame, EXIF orientation applied.

    Args:
        file: a path, or a seekable binary file whose contents start at 0.
        name: what errors call the file.
        max_pixels: the largest width · height; of a larger image only the header is read.

    Returns:
        uint8 `(h, w, 3)` RGB, writable; `modes.to_rgb` says how each kind of pixel is mapped.

    Raises:
        UnreadableImage: missing or forbidden, empty, no image, damaged or truncated, above `max_pixels`.
    """
    with _opened(file, name) as stream, warnings.catch_warnings():
        # Pillow warns about odd metadata, which changes nothing here, once for each worker; the picture decides.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        image = _read_header(stream, name)
        width, height = image.size
        if width * height > max_pixels:
            raise UnreadableImage(
                name, f"has {width} x {height} pixels, above the limit of {max_pixels}: raise --max-pixels "
                "or make the image smaller"
            )
        orientation = _decode(image, name)
        try:
            pixels = to_rgb(image)
        except UnknownRange as unknown:
            raise UnreadableImage(name, f"{unknown}: convert it to an 8-bit PNG") from unknown
    return np.ascontiguousarray(_upright(pixels, orientation))


def read_bytes(path: Path, name: str) -> bytes:
    """The contents of a file that errors call `name`.

    Raises:
        UnreadableImage: missing, forbidden, or the disk fails.
    """
    with _opened(path, name) as stream:
        try:
            return stream.read()
        except OSError as failure:
            raise UnreadableImage(
                name, f"cannot be read ({failure.strerror or failure}): check the disk that it lies on"
            ) from failure


@contextmanager
def _opened(file: BinaryIO | Path, name: str) -> Iterator[BinaryIO]:
    try:
        opened = file.open("rb") if isinstance(file, Path) else nullcontext(file)
    except OSError as failure:
        if failure.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # ours, not the file's: never a skip
            raise UserError(f"{name} could not be opened ({failure.strerror}): use fewer --workers.") from failure
        raise UnreadableImage(name, _REMEDIES.get(type(failure), f"cannot be opened ({failure.strerror or failure}): "
                                                  "check the disk that it lies on")) from failure
    with opened as stream:
        yield stream


_REMEDIES: dict[type, str] = {
    PermissionError: "may not be read (permission denied): give yourself the right to read it, or move it away",
    FileNotFoundError: "does not exist (any more): check the path",
    IsADirectoryError: "is a folder: give one of the images in it",
}


def _read_header(stream: BinaryIO, name: str) -> Image.Image:
    """Identify the file and read its header.

    This is `Image.open` without Pillow's own limit on pixels, which is one setting for the whole process and
    would refuse or warn where `max_pixels` allows; so the opener that each format registers is called directly.
    """
    try:
        prefix = stream.read(16)
        if not prefix:
            raise UnreadableImage(name, "is empty (0 bytes): delete it or copy it again")
        for form in FORMATS:
            factory, accept = Image.OPEN[form]
            try:
                accepted = accept is None or accept(prefix)
                if not accepted or isinstance(accepted, str):  # a string says why this Pillow cannot open the format
                    continue
                stream.seek(0)
                image = factory(stream, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
            if 0 not in image.size:
                return image
    except UnreadableImage:
        raise
    except MemoryError:  # ours, not the file's: never a skip
        raise
    except Exception as failure:  # a damaged file makes Pillow's readers raise nearly anything
        raise UnreadableImage(name, _damage(failure)) from failure
    raise UnreadableImage(
        name, f"is not an image that Pillow {pillow_version} can read: convert it to PNG or JPEG, or move it away"
    )


def _decode(image: Image.Image, name: str) -> int:
    """Load the pixels. Returns the EXIF orientation, 1 to 8; one that is damaged or missing counts as upright."""
    try:
        with _whole_files_only():
            image.load()
    except MemoryError:
        raise
    except Exception as failure:
        raise UnreadableImage(name, _damage(failure)) from failure
    try:  # after load: Pillow turns TIFF files by itself and then drops their tag
        orientation = image.getexif().get(274, 1)
    except Exception:  # damaged EXIF does not make the picture unreadable, and every viewer shows it as stored
        orientation = 1
    return orientation if orientation in range(1, 9) else 1


def _damage(failure: Exception) -> str:
    cause = " ".join(str(failure).split()).rstrip(".") or type(failure).__name__
    return f"is damaged or truncated ({cause}): delete it or copy it again"


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Other libraries switch Pillow's tolerance for truncated files on; a half-grey picture would go unnoticed."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    if not before:
        yield
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (Exif 2.32, tag 0x0112), by views."""
    if orientation >= 5:  # rows and columns are exchanged
        pixels = pixels.swapaxes(0, 1)
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def resize_and_crop(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """The protocol's preprocessing: the short side becomes `size`, then the centre square is cut out.

    As ADM prepares its ImageNet (Dhariwal & Nichol 2021, "Diffusion models beat GANs", guided-diffusion): while
    the short side is at least twice `size` the picture is halved by averaging, then one bicubic resize with
    antialiasing reaches `size`; smaller pictures are enlarged by the same bicubic resize.

    Args:
        image: uint8 `(h, w, 3)`, or an RGB Pillow image.

    Returns:
        uint8 `(size, size, 3)`.
    """
    picture = _centre_strip(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    new_size = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.array(picture)[top : top + size, left : left + size]


def _centre_strip(picture: Image.Image) -> Image.Image:
    """Cut the far ends off pictures longer than 32:1, which would need gigabytes when enlarged."""
    short, (width, height) = min(picture.size), picture.size
    if max(width, height) <= 32 * short:
        return picture
    trim_x, trim_y = max(width - 8 * short, 0) // 2, max(height - 8 * short, 0) // 2
    return picture.crop((trim_x, trim_y, width - trim_x, height - trim_y))
