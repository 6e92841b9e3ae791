"""Pixels from several workers → batches of one shape.

- `Batcher`: gathers images by size; a batch is one tensor, page-locked where a GPU waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
WAITING = 1 << 26  # pixels, 200 MB: what waits for its batch to be full


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
        pixels: what all of them may have together.
        pin: page-locked memory.
    """

    def __init__(
        self, batch_size: int, fill: bool, most: int, pixels: int = WAITING, pin: bool = False
    ) -> None:
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
        done = 0
        while done < count:
            part = parts[0]
            some = min(len(part), count - done)
            batch[done : done + some] = part[:some]
            done += some
            if some == len(part):
                parts.pop(0)
            else:
                parts[0] = part[some:]
        batch[count:] = batch[count - 1]
        items = waiting[:count]
        del waiting[:count]
        self._count -= count
        self._pixels -= count * math.prod(shape[:2])
        if not waiting:
            del self._waiting[shape]
        return ImageBatch(batch, items)
