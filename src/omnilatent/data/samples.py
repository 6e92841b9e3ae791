"""Training samples: a pure function of (source, seed, position).

- `TrainingImages`: every image once an epoch in a random order; a random square crop of each, mirrored or not.
- `Sample`: one crop, the file it is from, and the files that were passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .images import UnreadableImage
from .keyed import EpochOrder, below, draws, unit
from .protocols import ImageSource


@dataclass(frozen=True)
class Sample:
    """One training image.

    Attributes:
        image: uint8 `(3, size, size)` RGB.
        key: the file that it was cut from.
        skipped: (key, reason) of the unreadable files whose place it took.
    """

    image: Tensor
    key: str
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingImages:
    """Square crops of a source's images for training.

    Position p is image p mod n of epoch p // n, whose order is a random permutation keyed by (seed, epoch). Crop and
    mirroring are keyed by (seed, position). So any process can make any sample, and resuming needs no state.

    Attributes:
        source: the images.
        size: side of the samples in pixels.
        flip: mirror one half of the samples left to right.
        min_scale: 1 cuts `size` pixels at the image's own resolution and enlarges only images that are smaller.
            Below 1 the side of the crop is uniform in [min_scale, 1] of the short side, resized to `size` with
            antialiasing (bicubic).
    """

    source: ImageSource
    size: int
    seed: int = 0
    flip: bool = True
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"The training size is {self.size}: give at least 1 pixel.")
        if not 0 < self.min_scale <= 1:
            raise UserError(f"The smallest crop scale is {self.min_scale}: give a number above 0, at most 1.")
        if len(self.source) == 0:
            raise UserError(f"{self.source.name} holds no image to train on: give more data.")

    def sample(self, position: int) -> Sample:
        """The sample at `position` ≥ 0.

        A file that cannot be read is passed over: its place takes the next readable image of the epoch's order.

        Raises:
            UserError: no image of the source can be read.
        """
        n = len(self.source)
        epoch, place = divmod(position, n)
        order = _order(n, self.seed, epoch)
        skipped: list[tuple[str, str]] = []
        for ahead in range(n):
            index = order[(place + ahead) % n]
            try:
                pixels = self.source.read(index)
            except UnreadableImage as unreadable:
                skipped.append((self.source.key(index), unreadable.reason))
                continue
            return Sample(self.crop(pixels, position), self.source.key(index), skipped)
        raise UserError(f"None of the {n} images of {self.source.name} can be read; the first: "
                        f"{skipped[0][0]} {skipped[0][1]}.")

    def crop(self, pixels: np.ndarray, position: int) -> Tensor:
        """The square that `position` cuts from an image: uint8 `(h, w, 3)` → uint8 `(3, size, size)`."""
        scale, down, across, mirror = draws("crop", self.seed, position, count=4)
        height, width = pixels.shape[:2]
        short = min(height, width)
        if self.min_scale == 1:
            side = min(self.size, short)
        else:
            side = max(1, round(short * (self.min_scale + (1 - self.min_scale) * unit(scale))))
        top, left = below(down, height - side + 1), below(across, width - side + 1)
        square = pixels[top : top + side, left : left + side]
        if side != self.size:
            resized = Image.fromarray(square).resize((self.size, self.size), Image.Resampling.BICUBIC)
            square = np.asarray(resized)
        if self.flip and below(mirror, 2):
            square = square[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))


@lru_cache(maxsize=8)
def _order(n: int, seed: int, epoch: int) -> EpochOrder:
    return EpochOrder(n, seed, epoch)
