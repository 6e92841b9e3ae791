"""Files → pixels, in worker processes: each file is read once, hashed, decoded from what was read, and prepared.

- `Reading`: batches of files of a source, as a data set for `made_in_workers`.
- `Handful`, `File`: what one batch comes to.
- `PixelSize`: height and width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.images import UnreadableImage, resize_and_crop
from ..data.protocols import ImageSource, StoredImages
from ..errors import UserError
from .contents import Digests

PixelSize = tuple[int, int]


@dataclass(frozen=True, slots=True)
class File:
    """One file, read or not.

    Attributes:
        index: its number in the source.
        stamp: bytes, and nanoseconds of the last change, from before it was read.
        digest: SHA-256 of its contents; None where it could not be opened.
        size: height and width after preprocessing; None where there are no pixels of it.
        skipped: why it could not be read; None where it could, or where its contents are known.
    """

    index: int
    stamp: tuple[int, int]
    digest: bytes | None
    size: PixelSize | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Handful:
    """What a worker made of some files.

    Attributes:
        files: in order.
        pixels: size → uint8 `(n, h, w, 3)`, of the files with that size, in order.
        seconds: of each stage.
    """

    files: list[File]
    pixels: dict[PixelSize, Tensor]
    seconds: dict[str, float]


class Reading(Dataset[Handful | UserError]):
    """The files `indices` of a source, `count` at a time.

    Contents that are known already are hashed, not decoded.
    """

    def __init__(
        self, source: ImageSource, indices: np.ndarray, count: int, size: int | None, known: Digests
    ) -> None:
        """
        Args:
            size: side of the centre square; None leaves every image as it is.
            known: their digests.
        """
        self.source, self.indices, self.count, self.size, self.known = source, indices, count, size, known

    def __len__(self) -> int:
        return -(-len(self.indices) // self.count)

    def __getitem__(self, batch: int) -> Handful | UserError:
        seconds = {"read": 0.0, "decode": 0.0, "resize": 0.0}
        files: list[File] = []
        prepared: dict[PixelSize, list[np.ndarray]] = {}
        try:
            for i in self.indices[batch * self.count : (batch + 1) * self.count].tolist():
                file, pixels = self._one(i, seconds)
                files.append(file)
                if pixels is not None and file.size is not None:
                    prepared.setdefault(file.size, []).append(pixels)
        except UserError as mistake:  # as a value: see `made_in_workers`
            return mistake
        start = time.perf_counter()
        pixels_of = {size: _stacked(images) for size, images in prepared.items()}
        seconds["resize"] += time.perf_counter() - start
        return Handful(files, pixels_of, seconds)

    def _one(self, i: int, seconds: dict[str, float]) -> tuple[File, np.ndarray | None]:
        source, start = self.source, time.perf_counter()
        stamp, digest = (0, 0), None
        try:
            if isinstance(source, StoredImages):
                try:
                    stamp = source.stored_stamp(i)
                except OSError:
                    stamp = (-1, -1)
                contents = source.stored_bytes(i)
                digest = hashlib.sha256(contents).digest()
                start = _passed(seconds, "read", start)
                if self.known.find(digest) is not None:
                    return File(i, stamp, digest), None
                pixels = source.decode(i, contents)
            else:
                pixels = source.read(i)
                digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
                if self.known.find(digest) is not None:
                    return File(i, stamp, digest), None
        except UnreadableImage as unreadable:
            return File(i, stamp, digest, skipped=unreadable.reason), None
        start = _passed(seconds, "decode", start)
        if self.size is not None:
            pixels = resize_and_crop(pixels, self.size)
        _passed(seconds, "resize", start)
        return File(i, stamp, digest, (pixels.shape[0], pixels.shape[1])), pixels


def _stacked(images: Sequence[np.ndarray]) -> Tensor:
    """One tensor, in memory that another process can take over without a copy."""
    height, width = images[0].shape[:2]
    stack = torch.empty((len(images), height, width, 3), dtype=torch.uint8)
    if torch.utils.data.get_worker_info() is not None:
        stack.share_memory_()
    for row, image in zip(stack.numpy(), images, strict=True):
        row[...] = image
    return stack


def _passed(seconds: dict[str, float], stage: str, start: float) -> float:
    now = time.perf_counter()
    seconds[stage] += now - start
    return now
