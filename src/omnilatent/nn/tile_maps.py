"""Where tiles are read from and written to.

- `Source`, `Sink`: what a segment needs.
- `Picture`: an image or latent that somebody else holds, on any device; converted tile by tile.
- `KeptMap`: a whole map in slabs of rows, so that its memory goes as soon as its rows are done.
- `Output`: the tensor of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .tile_geometry import Box, Size, Tile


class Source(Protocol):
    """A map to read from."""

    def read(self, box: Box) -> Tensor:
        """The rectangle `(1, c, h, w)`; nobody writes to it."""

    def drop(self, row: int) -> None:
        """The rows above `row` are not read again."""


class Sink(Protocol):
    """A map to write to."""

    def write(self, tile: Tile) -> None:
        """Store a tile, which holds its core only."""


@dataclass(frozen=True)
class Picture:
    """`tensor` `(1, c, h, w)`, read through `convert`. `size`, if larger, repeats its last row and column."""

    tensor: Tensor
    size: Size
    convert: Callable[[Tensor], Tensor]

    def read(self, box: Box) -> Tensor:
        (top, bottom), (left, right) = box
        first, start = min(top, self.tensor.shape[-2] - 1), min(left, self.tensor.shape[-1] - 1)
        part = self.convert(self.tensor[..., first:bottom, start:right])
        below, beside = bottom - first - part.shape[-2], right - start - part.shape[-1]
        if below or beside:
            part = F.pad(part, (0, beside, 0, below), mode="replicate")
        return part[..., top - first :, left - start :]

    def drop(self, row: int) -> None:
        pass  # it is the caller's


class KeptMap:
    """A map of `size`, stored in slabs of `slab` rows; written once, read many times, freed from the top."""

    def __init__(self, size: Size, slab: int) -> None:
        self.size = size
        self.slab = slab
        self.slabs: list[Tensor | None] = [None] * -(-size[0] // slab)

    def write(self, tile: Tile) -> None:
        if tile.x.shape[-2:] == self.size:
            self.slab, self.slabs = self.size[0], [tile.x]
            return
        (top, bottom), (left, right) = tile.box
        for number, first, last in self._slabs(top, bottom):
            if self.slabs[number] is None:
                rows = min(self.slab, self.size[0] - number * self.slab)
                self.slabs[number] = tile.x.new_empty(1, tile.x.shape[1], rows, self.size[1])
            at = number * self.slab
            self.slabs[number][..., first - at : last - at, left:right] = tile.x[..., first - top : last - top, :]

    def read(self, box: Box) -> Tensor:
        (top, bottom), (left, right) = box
        pieces = []
        for number, first, last in self._slabs(top, bottom):
            slab = self.slabs[number]
            assert slab is not None, "rows are read that were dropped or never written"
            pieces.append(slab[..., first - number * self.slab : last - number * self.slab, left:right])
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0].contiguous()

    def drop(self, row: int) -> None:
        for number in range(min(len(self.slabs), row // self.slab if row < self.size[0] else len(self.slabs))):
            self.slabs[number] = None

    def _slabs(self, top: int, bottom: int) -> list[tuple[int, int, int]]:
        """(number, first row, one past the last) of every slab that the rows touch."""
        touched = range(top // self.slab, -(-bottom // self.slab))
        return [(n, max(top, n * self.slab), min(bottom, (n + 1) * self.slab)) for n in touched]


@dataclass(frozen=True)
class Output:
    """`tensor` `(1, c, h, w)`, of any floating type."""

    tensor: Tensor

    def write(self, tile: Tile) -> None:
        (top, bottom), (left, right) = tile.box
        self.tensor[..., top:bottom, left:right] = tile.x
