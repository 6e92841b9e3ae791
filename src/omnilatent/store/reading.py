"""Files → pixels → batches. In worker processes each file is read once, hashed, decoded from what was read, and
prepared; the main process gathers pictures of one size.

- `Reading`: batches of files of a source, as a data set for `made_in_workers`.
- `Handful`, `File`: what one batch comes to.
- `Batcher`, `ImageBatch`: handfuls' pictures → batches of one shape, page-locked where a GPU waits for them.
- `PixelSize`: height and width.

A handful waits in shared memory until the main process comes to it, so its size is limited: in images, and in pixels,
beyond which the remaining files are left for another round.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.images import UnreadableImage, resize_and_crop
from ..data.protocols import ImageSource, StoredImages
from ..errors import UserError
from .planning import Digests

Item = TypeVar("Item")
PixelSize = tuple[int, int]
READY = 1 << 28  # pixels, 800 MB: what all workers together hold ready; each a picture at least
WAITING = 1 << 26  # pixels, 200 MB: what waits for its batch to be full
_AHEAD = 2  # handfuls that a worker makes before they are asked for: PyTorch's default


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
        left: files that were not looked at, since the others have as many pixels as a handful may hold.
    """

    files: list[File]
    pixels: dict[PixelSize, Tensor]
    seconds: dict[str, float]
    left: list[int]


def pixels_of_a_handful(workers: int) -> int:
    """Pixels after which a handful takes no further file."""
    return READY // (_AHEAD * max(1, workers))


class Reading(Dataset[Handful | UserError]):
    """The files `indices` of a source, `count` at a time.

    Contents that are known already are hashed, not decoded.
    """

    def __init__(
        self, source: ImageSource, indices: np.ndarray, count: int, size: int | None, known: Digests, pixels: int
    ) -> None:
        """
        Args:
            size: side of the centre square; None leaves every image as it is.
            known: their digests.
            pixels: after which a handful takes no further file.
        """
        self.source, self.indices, self.count, self.size, self.known = source, indices, count, size, known
        self.pixels = pixels

    def __len__(self) -> int:
        return -(-len(self.indices) // self.count)

    def __getitem__(self, batch: int) -> Handful | UserError:
        seconds = {"read": 0.0, "decode": 0.0, "resize": 0.0}
        files: list[File] = []
        prepared: dict[PixelSize, list[np.ndarray]] = {}
        todo, full = self.indices[batch * self.count : (batch + 1) * self.count].tolist(), 0
        try:
            while todo and full < self.pixels:
                file, pixels = self._one(todo.pop(0), seconds)
                files.append(file)
                if pixels is not None and file.size is not None:
                    prepared.setdefault(file.size, []).append(pixels)
                    full += file.size[0] * file.size[1]
        except UserError as mistake:  # as a value: see `made_in_workers`
            return mistake
        start = time.perf_counter()
        pixels_of = {size: _stacked(images) for size, images in prepared.items()}
        seconds["resize"] += time.perf_counter() - start
        return Handful(files, pixels_of, seconds, todo)

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


class ImageBatch(NamedTuple, Generic[Item]):
    """uint8 pixels `(b, h, w, 3)`, of which the first `len(items)` count; the others fill the batch up."""

    pixels: Tensor
    items: list[Item]


class Batcher(Generic[Item]):
    """Gathers images until a batch of one size is full.

    Args:
        batch_size: images of a full batch.
        fill: give the last batch the full shape too, with the last image repeated: a compiled codec keeps its shape,
            and an image's latent does not depend on how many came with it.
        most: images of all sizes that may wait; then the group with the most pixels goes, full or not.
        pixels: what all of them may have together, unless batches are filled up.
        pin: page-locked memory.
    """

    def __init__(self, batch_size: int, fill: bool, most: int, pixels: int, pin: bool = False) -> None:
        self._batch_size, self._fill, self._most, self._most_pixels, self._pin = batch_size, fill, most, pixels, pin
        self._waiting: dict[tuple[int, ...], tuple[list[Tensor], list[Item]]] = {}
        self._count = self._pixels = 0

    def add(self, pixels: Tensor, items: list[Item]) -> Iterator[ImageBatch[Item]]:
        """Take in images `(n, h, w, 3)` of one size, and yield the batches that are full now."""
        parts, waiting = self._waiting.setdefault(tuple(pixels.shape[1:]), ([], []))
        parts.append(pixels)
        waiting += items
        self._count += len(items)
        self._pixels += len(items) * math.prod(pixels.shape[1:3])
        while len(waiting) >= self._batch_size:
            yield self._take(tuple(pixels.shape[1:]))
        if parts:
            parts[-1] = parts[-1].clone()  # what waits should not keep a worker's shared memory
        while self._count > self._most or (self._pixels > self._most_pixels and not self._fill):
            yield self._take(max(self._waiting, key=lambda shape: len(self._waiting[shape][1]) * math.prod(shape)))

    def rest(self) -> Iterator[ImageBatch[Item]]:
        """What is left, in batches that may not be full."""
        for shape in list(self._waiting):
            while shape in self._waiting:
                yield self._take(shape)

    def _take(self, shape: tuple[int, ...]) -> ImageBatch[Item]:
        parts, waiting = self._waiting[shape]
        count = min(self._batch_size, len(waiting))
        batch = torch.empty((self._batch_size if self._fill else count, *shape), dtype=torch.uint8,
                            pin_memory=self._pin)
        rows = batch.numpy()  # copied by one thread: torch's many wait for cores that the workers have
        done = 0
        while done < count:
            part = parts[0]
            some = min(len(part), count - done)
            rows[done : done + some] = part[:some].numpy()
            done += some
            if some == len(part):
                parts.pop(0)
            else:
                parts[0] = part[some:]
        rows[count:] = rows[count - 1]
        items = waiting[:count]
        del waiting[:count]
        self._count -= count
        self._pixels -= count * math.prod(shape[:2])
        if not waiting:
            del self._waiting[shape]
        return ImageBatch(batch, items)
