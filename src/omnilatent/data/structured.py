"""Images with structure and no files: gradients, circles and grids, a pure function of (seed, index).

- `structured_image`: one image.
- `StructuredImages`: the image source called `synthetic`.
"""

from __future__ import annotations

import math

import numpy as np

from .keyed import below, draws, unit

SYNTHETIC_LENGTH = 10_000
SYNTHETIC_SIZE = 256


def structured_image(seed: int, index: int, size: int = SYNTHETIC_SIZE) -> np.ndarray:
    """Draw image `index`: a gradient, on it circles (two of three images) and a grid of lines (two of three).

    Returns:
        uint8 `(size, size, 3)`. Lengths are fractions of `size`, so other sizes show the same picture.
    """
    if size < 1:
        raise ValueError(f"an image of size {size}: the size is at least 1")
    style = below(draws("structured", seed, index, count=1)[0], 3)
    canvas = _gradient(seed, index, size)
    if style != 0:
        _add_circles(canvas, seed, index)
    if style != 1:
        _add_grid(canvas, seed, index)
    pixels = np.rint(canvas, out=canvas).astype(np.uint8)  # blends of colours in [0, 255] stay there
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _colour(draw: int) -> np.ndarray:
    """The low 24 bits of a draw as float32 RGB `(3, 1, 1)` in [0, 255]."""
    return np.array([draw >> shift & 255 for shift in (0, 8, 16)], np.float32).reshape(3, 1, 1)


def _axes(size: int) -> np.ndarray:
    """Pixel centres along one side, in [0, 1]."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def _gradient(seed: int, index: int, size: int) -> np.ndarray:
    """From one colour to another along a random direction, some of them back and forth → float32 `(3, h, w)`."""
    first, second, turn, bend = draws("gradient", seed, index, count=4)
    angle, waves = 2 * math.pi * unit(turn), below(bend, 4)
    x = _axes(size) - 0.5
    along = (math.cos(angle) * x[None, :] + math.sin(angle) * x[:, None]) / math.sqrt(2) + 0.5
    if waves:
        along = 0.5 - 0.5 * np.cos(math.pi * waves * along)
    start, end = _colour(first), _colour(second)
    return start + along * (end - start)


def _add_circles(canvas: np.ndarray, seed: int, index: int) -> None:
    """1 to 8 discs or rings with edges one pixel soft, each drawn only inside its bounding square."""
    size = canvas.shape[-1]
    for circle in range(1 + below(draws("circles", seed, index, count=1)[0], 8)):
        x, y, width, colour, ring = draws("circle", seed, index, circle, count=5)
        radius = (0.03 + 0.22 * unit(width)) * size
        centre_x, centre_y = unit(x) * size, unit(y) * size
        left, right = max(0, int(centre_x - radius - 1)), min(size, int(centre_x + radius + 2))
        top, bottom = max(0, int(centre_y - radius - 1)), min(size, int(centre_y + radius + 2))
        across = np.arange(left, right, dtype=np.float32) + 0.5 - centre_x
        down = np.arange(top, bottom, dtype=np.float32) + 0.5 - centre_y
        distance = np.sqrt(across[None, :] ** 2 + down[:, None] ** 2)
        cover = (radius - distance + 0.5).clip(0, 1)
        if below(ring, 3) == 0:
            cover *= (distance - 0.6 * radius + 0.5).clip(0, 1)
        patch = canvas[:, top:bottom, left:right]
        patch += cover * (_colour(colour) - patch)


def _add_grid(canvas: np.ndarray, seed: int, index: int) -> None:
    """Two families of parallel lines at right angles, turned, with edges one pixel soft."""
    size = canvas.shape[-1]
    spacing, upright, turn, shift, width, colour, strength = draws("grid", seed, index, count=7)
    period = (0.05 + 0.2 * unit(spacing)) * size
    half_width = (0.04 + 0.1 * unit(width)) * period
    angle = below(upright, 2) * unit(turn) * math.pi / 2
    x = np.arange(size, dtype=np.float32) + 0.5
    cover = np.zeros((size, size), np.float32)
    for along, across in ((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))):
        position = (along * x[None, :] + across * x[:, None]) / period + unit(shift)
        to_line = np.abs(position - np.rint(position)) * period
        covered = np.minimum(to_line + 0.5, half_width) - np.maximum(to_line - 0.5, -half_width)  # of a pixel's width
        np.maximum(cover, covered, out=cover)
    cover *= 0.4 + 0.6 * unit(strength)
    canvas += cover * (_colour(colour) - canvas)


class StructuredImages:
    """An image source of `length` structured images; nothing is stored."""

    name = "synthetic"

    def __init__(self, length: int = SYNTHETIC_LENGTH, seed: int = 0, size: int = SYNTHETIC_SIZE) -> None:
        self._length, self._seed, self._size = length, seed, size

    def __len__(self) -> int:
        return self._length

    def key(self, i: int) -> str:
        self._check(i)
        return f"synthetic-{self._seed}-{i:06d}"

    def read(self, i: int) -> np.ndarray:
        self._check(i)
        return structured_image(self._seed, i, self._size)

    def _check(self, i: int) -> None:
        if not 0 <= i < self._length:
            raise IndexError(f"image {i} of {self._length}")
