"""Handwritten digits: idx files in three encodings, broken ones, the embedded digits, and MNIST without a network."""

import gzip
import hashlib
import io
import logging
import lzma
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from omnilatent.data import EvaluationImages, open_images
from omnilatent.data.digits import Digits, embedded_digits, mnist
from omnilatent.data.idx import read_idx
from omnilatent.data.mirror import FILES, MIRRORS
from omnilatent.errors import UserError

ENCODINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_set(folder: Path, suffix: str = "", n: int = 6, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The two files of a part; returns (pictures, labels)."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(n)
    pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)
    for name, values in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
        (folder / f"{name}{suffix}").write_bytes(ENCODINGS[suffix](idx(values)))
    return pixels, labels


@pytest.mark.parametrize("suffix", ENCODINGS)
def test_a_folder_of_idx_files_in_any_encoding(suffix: str, tmp_path: Path) -> None:
    pixels, labels = write_set(tmp_path / "set", suffix)
    test, _ = write_set(tmp_path / "set", suffix, n=3, part="t10k")
    source = open_images(tmp_path / "set")
    assert isinstance(source, Digits) and source.name == "set/train" and len(source) == 6
    assert np.array_equal(source.labels, labels) and np.array_equal(source.test.pixels, test)
    assert source.read(4).shape == (28, 28, 3)
    assert all(np.array_equal(source.read(4)[..., c], pixels[4]) for c in range(3))
    assert len({source.key(i) for i in range(6)}) == 6 and source.key(0) != source.test.key(0)
    with pytest.raises(IndexError):
        source.read(6)
    alone = open_images(tmp_path / "set" / f"t10k-images-idx3-ubyte{suffix}")
    assert np.array_equal(alone.pixels, test) and len(alone.labels) == 3 and alone.test is None
    shown = [image for _, image in EvaluationImages(source, 28)]
    assert np.array_equal((shown[2][0] * 255).round().numpy(), pixels[2]), "28 pixels stay as they are"


def test_compression_is_told_by_the_contents(tmp_path: Path) -> None:
    (tmp_path / "x-idx1-ubyte").write_bytes(gzip.compress(idx(np.arange(5, dtype=np.uint8))))
    assert read_idx(tmp_path / "x-idx1-ubyte", 1).tolist() == [0, 1, 2, 3, 4]


GOOD = idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(("contents", "sentence"), [
    (b"", r"is no idx file of bytes \(it begins with nothing"), (b"<html>no</html>", "it begins with 3c 68 74 6d"),
    (GOOD[:-1], "states 2 × 3 × 3 values and holds 17"), (GOOD + b"x", "states 2 × 3 × 3 values and holds 19"),
    (GOOD[:9], "is no idx file"), (gzip.compress(GOOD)[:-6], "is damaged or cut short"),
    (lzma.compress(GOOD)[:-9], "is damaged or cut short"), (gzip.compress(GOOD)[:12] + b"?", "is damaged or cut sho"),
    (idx(np.zeros(4, np.uint8)), "is no idx file|has 1 dimensions, and images have 3"),
    (idx(np.zeros((1, 2, 2, 2), np.uint8)), "has 4 dimensions, and images have 3"),
    (b"\0\0\x0d\x03" + GOOD[4:], "it begins with 00 00 0d 03, expected 00 00 08 03"),
    (idx(np.zeros((0, 3, 3), np.uint8)), "states 0 × 3 × 3"), (idx(np.zeros(20, np.uint8)), "has 1 dimensions"),
])
def test_a_broken_file_is_named(contents: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(contents)
    with pytest.raises(UserError, match=sentence) as raised:
        open_images(tmp_path)
    assert str(file) in str(raised.value) and str(raised.value).endswith(".")


def test_labels_of_another_set_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, n=6)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(UserError, match="holds 6 images and 5 labels"):
        open_images(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert open_images(tmp_path).labels is None


def test_the_embedded_digits_look_like_mnist() -> None:
    digits = open_images("digits")
    assert (len(digits), len(digits.test)) == (1500, 297) and digits.pixels.shape[1:] == (28, 28)
    assert set(digits.labels) == set(range(10)) == set(digits.test.labels)
    assert not digits.pixels[:, :4].any() and not digits.pixels[:, :, -4:].any(), "the margin is black"
    assert digits.pixels.max() == 255 and 20 < digits.pixels.mean() < 60


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network; the folder where MNIST would be kept."""
    def unreachable(url: str, timeout: float) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "omnilatent" / "mnist"


def test_without_a_network_the_embedded_digits_stand_in_and_say_so(
    offline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        source = open_images("mnist")
    assert np.array_equal(source.pixels, embedded_digits().pixels) and source.name == "digits in place of MNIST/train"
    said = caplog.text
    assert "no route to host" in said and str(offline) in said and MIRRORS[0] in said and all(f in said for f in FILES)


def test_mnist_from_the_cache_needs_no_network(offline: Path) -> None:
    offline.parent.mkdir(parents=True)
    pixels, _ = write_set(offline, ".xz")
    write_set(offline, ".gz", n=3, part="t10k")
    assert np.array_equal(open_images("mnist").pixels, pixels)


def test_downloads_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_set(tmp_path / "there", ".gz", n=6)
    write_set(tmp_path / "there", ".gz", n=3, part="t10k")
    sent = {name: (tmp_path / "there" / name).read_bytes() for name in FILES}
    asked = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if url.startswith(MIRRORS[0]):
            raise URLError("down")
        return io.BytesIO(sent[url.rsplit("/", 1)[1]])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"train-images.*not the file expected \(9912422 bytes"):
        mnist()
    assert not list((tmp_path / "omnilatent").rglob("*.gz")), "nothing wrong is kept"
    for name, content in sent.items():
        monkeypatch.setitem(FILES, name, (len(content), hashlib.sha256(content).hexdigest()))
    assert len(mnist()) == 6 and len(asked) == 2 + 8, "the second mirror has all four"
    assert len(mnist()) == 6 and len(asked) == 10, "once"
