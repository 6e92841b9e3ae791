"""Where a tile lies, and what a layer must say so that it can run on one.

- `Tile`: a rectangle cut out of a map, and what it must know about that map.
- `Reach`: one axis of a grid of tiles, at one map.
- `Layer`, `Step`: what a layer says: how large its output is, which part of its input a part of its output rests on
  (`back`), which maps it makes on the way (`steps`); and it runs on a tile (`run`).
- `channels`, `lengths`, `sizes`, `steps`, `back`, `run`: the same for a sequence of layers.

Geometry is separable: axis 0 is rows, axis 1 is columns, and a span is `(first, one past the last)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from .moments import Statistics

Span = tuple[int, int]
Box = tuple[Span, Span]
Size = tuple[int, int]


@dataclass(frozen=True)
class Reach:
    """One axis of a grid of tiles at one map.

    Attributes:
        spans: what each tile must hold of this map, halo included.
        cuts: where the map is cut into the tiles' cores, `len(spans) + 1` numbers from 0 to its length.
        norms: the cuts at each norm further down.
    """

    spans: list[Span]
    cuts: list[int]
    norms: dict[Layer, list[int]] = field(default_factory=dict)

    def cores(self) -> list[Span]:
        return list(zip(self.cuts, self.cuts[1:], strict=False))


@dataclass
class Tile:
    """A rectangle of a map.

    Attributes:
        x: `(1, c, h, w)`, the rectangle.
        box: where it lies in the map.
        size: height and width of the map.
        cores: the tile's core at each norm on its way.
        statistics: of each norm on its way.
    """

    x: Tensor
    box: Box
    size: Size
    cores: dict[Layer, Box] = field(default_factory=dict)
    statistics: dict[Layer, Statistics] = field(default_factory=dict)

    def crop(self, box: Box) -> None:
        """Keep only `box`, given in the map's coordinates."""
        self.x, self.box = self.at(box), box

    def at(self, box: Box) -> Tensor:
        """A view of `box`, which lies within this tile."""
        assert all(have[0] <= want[0] and want[1] <= have[1] for have, want in zip(self.box, box, strict=True))
        (top, bottom), (left, right) = box
        y, x = self.box[0][0], self.box[1][0]
        return self.x[..., top - y : bottom - y, left - x : right - x]


class Step(NamedTuple):
    """A map that a layer makes: its channels and size, the products that it takes, whether it is a norm's."""

    channels: int
    size: Size
    work: int
    norm: bool = False


class Layer(Protocol):
    """What a layer says about itself."""

    def channels(self, c: int) -> int:
        """Channels of the output, of `c` of the input."""

    def length(self, n: int, axis: int) -> int:
        """Length of the output map, of `n` of the input map."""

    def back(self, reach: Reach, n: int, axis: int) -> Reach:
        """The reach at this layer's input, a map of length `n`, from that at its output."""

    def run(self, tile: Tile) -> bool:
        """Turn the tile into one of the output map. False: it stopped at a norm whose statistics are incomplete."""

    def steps(self, c: int, size: Size) -> Iterator[Step]:
        """Every map that this layer makes of one with `c` channels and `size`, in order."""


def channels(layers: Sequence[Layer], c: int) -> int:
    """Channels after the layers."""
    for layer in layers:
        c = layer.channels(c)
    return c


def lengths(layers: Sequence[Layer], n: int, axis: int) -> list[int]:
    """The map's length before the first layer and after each."""
    found = [n]
    for layer in layers:
        found.append(layer.length(found[-1], axis))
    return found


def sizes(layers: Sequence[Layer], size: Size) -> Size:
    """The map's size after the layers."""
    return lengths(layers, size[0], 0)[-1], lengths(layers, size[1], 1)[-1]


def steps(layers: Sequence[Layer], c: int, size: Size) -> Iterator[Step]:
    """Every map on the way."""
    for layer in layers:
        yield from layer.steps(c, size)
        c, size = layer.channels(c), sizes([layer], size)


def back(layers: Sequence[Layer], reach: Reach, n: int, axis: int) -> Reach:
    """The reach at the input, a map of length `n`, from that at the output."""
    for layer, length in zip(reversed(layers), reversed(lengths(layers, n, axis)[:-1]), strict=True):
        reach = layer.back(reach, length, axis)
    return reach


def run(layers: Sequence[Layer], tile: Tile) -> bool:
    """Run the tile through; False where it stopped at a norm."""
    return all(layer.run(tile) for layer in layers)
