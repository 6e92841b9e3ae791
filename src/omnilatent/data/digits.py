"""Handwritten digits with their labels: MNIST's files, and scikit-learn's, which need no download.

- `Digits`: an image source of grey pictures of one size, held in memory.
- `open_idx`: a folder with idx files, or one of them. `embedded_digits`: scikit-learn's. `mnist`: MNIST.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from ..download import cache_folder
from ..errors import UserError
from .idx import IMAGES, LABELS, SUFFIXES, find_idx, read_idx
from .mirror import FILES, MIRRORS, fetch_mnist

SIDE, MARGIN = 28, 4  # of MNIST's pictures; its digits fill the 20×20 within the margin
TRAIN, TEST = "train", "t10k"
_log = logging.getLogger("omnilatent")


class Digits:
    """An image source of grey pictures.

    Attributes:
        name: what a report calls it.
        pixels: uint8 `(n, h, w)`, white on black.
        labels: uint8 `(n,)`, or None where the label file is not there.
        test: the pictures that were set aside for testing when the set was made, or None.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None, name: str, test: Digits | None = None) -> None:
        if labels is not None and len(labels) != len(pixels):
            raise UserError(f"{name} holds {len(pixels)} images and {len(labels)} labels: its files do not belong "
                            "together; fetch them again.")
        self.name, self.pixels, self.labels, self.test = name, pixels, labels, test

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, i: int) -> str:
        self._check(i)
        return f"{self.name}/{i:05d}"

    def read(self, i: int) -> np.ndarray:
        """uint8 `(h, w, 3)`, the grey value three times."""
        self._check(i)
        return np.repeat(self.pixels[i][..., None], 3, -1)

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")


def open_idx(path: Path) -> Digits:
    """A file of images, or a folder with train-images-idx3-ubyte, t10k-images-idx3-ubyte and their idx1 labels, each
    plain, .gz or .xz. The folder's t10k images are its `test`.

    Raises:
        UserError: a file is damaged, or images and labels do not belong together.
    """
    if path.is_file():
        plain = path.name.removesuffix(".gz").removesuffix(".xz")
        labels = find_idx(path.parent, plain.replace("images", "labels").replace(IMAGES, LABELS))
        return Digits(read_idx(path, 3), None if labels is None else read_idx(labels, 1), plain)
    name = path.resolve().name or str(path)
    parts = {part: find_idx(path, f"{part}-images-{IMAGES}") for part in (TRAIN, TEST)}
    opened = {part: open_idx(file) for part, file in parts.items() if file is not None}
    if not opened:
        raise UserError(f"{path} holds no digits: expected {TRAIN}-images-{IMAGES}, plain or with {SUFFIXES[1]} or "
                        f"{SUFFIXES[2]}.")
    for part, digits in opened.items():
        digits.name = f"{name}/{part}"
    first = opened.get(TRAIN) or opened[TEST]
    first.test = opened.get(TEST) if TRAIN in opened else None
    return first


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds MNIST's files of images."""
    return any(find_idx(folder, f"{part}-images-{IMAGES}") for part in (TRAIN, TEST))


def embedded_digits(name: str = "digits") -> Digits:
    """scikit-learn's 1,797 digits of 8×8 pixels and 17 greys (Alpaydin & Kaynak 1998, UCI), enlarged to 20×20 by
    bicubic resampling and laid into 28×28 as MNIST's are.

    The first 1,500 are to learn from, the other 297, in the file's order, are the `test`.

    Raises:
        UserError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("The embedded digits come with scikit-learn: pip install scikit-learn, or give a folder with "
                        "MNIST's files.")
    from sklearn.datasets import load_digits

    found = load_digits()
    inner = SIDE - 2 * MARGIN
    pixels = np.zeros((len(found.images), SIDE, SIDE), np.uint8)
    for canvas, small in zip(pixels, np.rint(found.images * (255 / 16)).astype(np.uint8), strict=True):
        large = Image.fromarray(small).resize((inner, inner), Image.Resampling.BICUBIC)
        canvas[MARGIN:-MARGIN, MARGIN:-MARGIN] = np.asarray(large)
    labels = found.target.astype(np.uint8)
    test = Digits(pixels[1500:], labels[1500:], f"{name}/test")
    return Digits(pixels[:1500], labels[:1500], f"{name}/train", test)


def mnist() -> Digits:
    """MNIST from the cache, else from its mirror, else, said aloud, the embedded digits in its place.

    Raises:
        UserError: the mirror sent something else than MNIST, or the disk is full.
    """
    folder = cache_folder() / "mnist"
    failure = fetch_mnist(folder)
    if failure is None:
        return open_idx(folder)
    _log.warning(
        "omnilatent: MNIST could not be downloaded (%s), so the 1,797 digits that come with scikit-learn stand in for "
        "it. For MNIST fetch %s from %s into %s, or into a folder that you give as DATA.",
        failure, ", ".join(FILES), MIRRORS[0], folder)
    return embedded_digits("digits in place of MNIST")
