"""The layers that can run on a tile of a map and give what the whole map would have given there.

- `Conv`, `Norm`, `Upsample`, `Pointwise`, and `Residual`, which holds others. tile_geometry.py says what each method is.

A convolution pads a tile only where it touches the border of the whole map; elsewhere the tile shrinks, so a tile is
read with a halo. A norm takes the statistics of the whole map, and stops a tile until they are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from .tile_geometry import Layer, Reach, Size, Span, Step, Tile, back, channels, lengths, run, steps


class _SameSize:
    """A layer whose output pixel rests on the same input pixel alone."""

    def channels(self, c: int) -> int:
        return c

    def length(self, n: int, axis: int) -> int:
        return n

    def back(self, reach: Reach, n: int, axis: int) -> Reach:
        return reach

    def steps(self, c: int, size: Size) -> Iterator[Step]:
        yield Step(c, size, c * size[0] * size[1], isinstance(self, Norm))


@dataclass(frozen=True, eq=False)
class Pointwise(_SameSize):
    """A function of each pixel. It may work in place only behind a layer that makes a new tensor."""

    function: Callable[[Tensor], Tensor]

    def run(self, tile: Tile) -> bool:
        tile.x = self.function(tile.x)
        return True


@dataclass(frozen=True, eq=False)
class Norm(_SameSize):
    """Group normalisation over the whole map (Wu & He 2018), not over the tile."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def back(self, reach: Reach, n: int, axis: int) -> Reach:
        """Statistics need the tile's core, which rounding may put outside what the output rests on."""
        reach.norms[self] = reach.cuts
        spans = [_union(span, core) for span, core in zip(reach.spans, reach.cores(), strict=True)]
        return Reach(spans, reach.cuts, reach.norms)

    def run(self, tile: Tile) -> bool:
        statistics = tile.statistics[self]
        if not statistics.ready:
            statistics.add(tile.at(tile.cores[self]), self.groups)
            if statistics.tiles > 1:
                return False
        each = tile.x.shape[1] // self.groups
        mean, variance = (moment.repeat_interleave(each) for moment in statistics.moments())
        # With given statistics a batch norm is the affine map that we need, rounded once from wide arithmetic.
        tile.x = F.batch_norm(tile.x, mean, variance, self.weight.to(mean), self.bias.to(mean), False, 0.0, self.eps)
        return True


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with zero padding, which may differ before and after the map as in `F.pad` + stride 2."""

    weight: Tensor
    bias: Tensor | None
    stride: Size = (1, 1)
    before: Size = (0, 0)
    after: Size = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1

    def channels(self, c: int) -> int:
        return self.weight.shape[0]

    def _extent(self, axis: int) -> int:
        """Input pixels between the first and the last that one output pixel rests on, both counted."""
        return self.dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1

    def length(self, n: int, axis: int) -> int:
        return (n + self.before[axis] + self.after[axis] - self._extent(axis)) // self.stride[axis] + 1

    def _under(self, span: Span, axis: int) -> Span:
        """The input that an output span rests on, padding included."""
        first = span[0] * self.stride[axis] - self.before[axis]
        return first, (span[1] - 1) * self.stride[axis] - self.before[axis] + self._extent(axis)

    def back(self, reach: Reach, n: int, axis: int) -> Reach:
        end = self.length(n, axis)
        under = (self._under(span, axis) for span in reach.spans)
        cuts = [n if cut == end else min(cut * self.stride[axis], n) for cut in reach.cuts]
        return Reach([(max(0, lo), min(n, hi)) for lo, hi in under], cuts, reach.norms)

    def run(self, tile: Tile) -> bool:
        parts: list[slice] = []
        pads: list[Size] = []
        box: list[Span] = []
        for axis, ((lo, hi), n) in enumerate(zip(tile.box, tile.size, strict=True)):
            stride, before, end = self.stride[axis], self.before[axis], self.length(n, axis)
            first = 0 if lo == 0 else -(-(lo + before) // stride)
            last = end if hi == n else min(end, (hi + before - self._extent(axis)) // stride + 1)
            start, stop = self._under((first, last), axis)
            parts.append(slice(max(start, 0) - lo, min(stop, n) - lo))
            pads.append((max(0, -start), max(0, stop - n)))
            box.append((first, last))
        tile.x = tile.x[..., parts[0], parts[1]]
        (top, bottom), (left, right) = pads
        padding = (0, 0)
        if top == bottom and left == right:
            padding = top, left
        else:
            tile.x = F.pad(tile.x, (left, right, top, bottom))  # the unpadded tile is free before the next line
        tile.x = F.conv2d(tile.x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        tile.size = self.length(tile.size[0], 0), self.length(tile.size[1], 1)
        tile.box = box[0], box[1]
        return True

    def steps(self, c: int, size: Size) -> Iterator[Step]:
        height, width = self.length(size[0], 0), self.length(size[1], 1)
        yield Step(self.channels(c), (height, width), self.weight.numel() * height * width)


@dataclass(frozen=True, eq=False)
class Upsample:
    """Every pixel repeated `factor` times along both axes."""

    factor: int = 2

    def channels(self, c: int) -> int:
        return c

    def length(self, n: int, axis: int) -> int:
        return n * self.factor

    def back(self, reach: Reach, n: int, axis: int) -> Reach:
        spans = [(lo // self.factor, -(-hi // self.factor)) for lo, hi in reach.spans]
        return Reach(spans, [-(-cut // self.factor) for cut in reach.cuts], reach.norms)

    def run(self, tile: Tile) -> bool:
        tile.x = F.interpolate(tile.x, scale_factor=float(self.factor), mode="nearest")
        (top, bottom), (left, right) = tile.box
        f = self.factor
        tile.size = tile.size[0] * f, tile.size[1] * f
        tile.box = (top * f, bottom * f), (left * f, right * f)
        return True

    def steps(self, c: int, size: Size) -> Iterator[Step]:
        height, width = size[0] * self.factor, size[1] * self.factor
        yield Step(c, (height, width), c * height * width)


@dataclass(frozen=True, eq=False)
class Residual:
    """`body(x) + shortcut(x)`. The body ends in a layer that makes a new tensor, to which the shortcut is added."""

    body: Sequence[Layer]
    shortcut: Sequence[Layer] = ()

    def channels(self, c: int) -> int:
        return channels(self.body, c)

    def length(self, n: int, axis: int) -> int:
        return lengths(self.body, n, axis)[-1]

    def back(self, reach: Reach, n: int, axis: int) -> Reach:
        body, side = back(self.body, reach, n, axis), back(self.shortcut, reach, n, axis)
        spans = [_union(a, b) for a, b in zip(body.spans, side.spans, strict=True)]
        return Reach(spans, body.cuts, reach.norms)

    def run(self, tile: Tile) -> bool:
        side = replace(tile)
        if not (run(self.body, tile) and run(self.shortcut, side)):
            return False
        rows, columns = (_common(a, b) for a, b in zip(tile.box, side.box, strict=True))
        tile.crop((rows, columns))
        tile.x = tile.x.add_(side.at((rows, columns)))
        return True

    def steps(self, c: int, size: Size) -> Iterator[Step]:
        for layers in (self.body, self.shortcut):
            yield from steps(layers, c, size)


def _union(a: Span, b: Span) -> Span:
    return min(a[0], b[0]), max(a[1], b[1])


def _common(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min(a[1], b[1])
