"""How a network runs on an image too large for it: which maps are kept whole, and in tiles of which size.

- `Whole`: a layer that must see all of its map, such as attention.
- `Segment`: neighbouring blocks that run tile by tile, from one kept map to the next.
- `plan`: a network as segments: of all ways to cut it that fit into memory, the one with the least work.

A segment runs its tiles once more for each group normalisation in it, so short segments save work, and the maps kept
between them cost memory. The largest map that a whole-image run would make, L, sets the scale, for such a run peaks
at about 3 L: what is kept and three maps of a tile shall fit into `SHARE` · L. So maps of low resolution are kept
block by block, and tiles run through several blocks only where the image is large or wide in channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .tile_geometry import Layer, Reach, Size, Step, back, channels, sizes, steps

SHARE = 0.55  # of the largest map: about a sixth of a whole run's peak
MOST_BYTES = 18 * 2**30  # at all events
SMALLEST = 4  # tiles are halved down to a quarter of their side where the memory is better spent on kept maps
TILE_MAPS = 3  # at once: a residual block holds its input, the input of a convolution and that one's output
NEAREST = 1.1  # where the limit cannot be kept, so much of the least memory that will do


@dataclass(frozen=True)
class Whole:
    """`(1, c, h, w)` → the same shape, from the whole map at once."""

    function: Callable[[Tensor], Tensor]


Block = Sequence[Layer] | Whole  # a segment ends with a block


@dataclass(frozen=True)
class Segment:
    """Blocks that run together.

    Attributes:
        layers: all of theirs; empty for a `Whole`.
        whole: the function of a `Whole`.
        size, out_size: of the map that it reads and of the one that it writes; `out_channels` of the latter.
        rows, columns: the grid of tiles, at the map that it reads; `grid`: its cuts at the one that it writes.
        kept: bytes of the two maps while it runs, at most; the image before the first segment is not counted.
        working: bytes of a tile's maps.
    """

    layers: tuple[Layer, ...]
    whole: Callable[[Tensor], Tensor] | None
    size: Size
    out_size: Size
    out_channels: int
    rows: Reach
    columns: Reach
    grid: tuple[list[int], list[int]]
    kept: int
    working: int

    @property
    def norms(self) -> tuple[Layer, ...]:
        return tuple(self.rows.norms)

    @property
    def tiles(self) -> int:
        return len(self.rows.spans) * len(self.columns.spans)

    @property
    def passes(self) -> int:
        """Times that the tiles run through: once for each norm's statistics, then once for the output."""
        return 1 if self.tiles == 1 else len(self.norms) + 1


def plan(
    blocks: Sequence[Block], c: int, size: Size, tile: int, itemsize: int = 4, limit: int | None = None
) -> list[Segment]:
    """Split a network into segments.

    Args:
        blocks: the network.
        c: channels of its input.
        size: height and width of its input.
        tile: side of a tile's core, in pixels of the largest of all maps; halved, once or twice, where that saves
            work, and larger where there is room.
        itemsize: bytes of one value.
        limit: bytes for kept maps and a tile's, at most; by default `MOST_BYTES`. Where the network cannot run
            within it, the plan is one that comes near.
    """
    planner = _Planner(blocks, c, size, tile, itemsize)
    room = min(limit or MOST_BYTES, round(SHARE * planner.largest))
    ways = planner.ways()
    least = _best({span: min(way.bytes for way in found) for span, found in ways.items()}, len(blocks), max)[0]
    room = max(room, round(NEAREST * least))
    fitting = {span: [way.work for way in found if way.bytes <= room] for span, found in ways.items()}
    ends = _best({span: min(work) for span, work in fitting.items() if work}, len(blocks), lambda a, b: a + b)[1]
    return [planner.grown(i, j, room) for i, j in pairwise([0, *ends])]


def _best(
    costs: dict[tuple[int, int], int], count: int, join: Callable[[int, int], int]
) -> tuple[int, list[int]]:
    """The cheapest way from 0 to `count` over spans `(i, j)`, costs joined by sum or maximum: cost, ends."""
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for end in range(1, count + 1):
        ways = [(join(best[i][0], cost), [*best[i][1], end])
                for (i, j), cost in costs.items() if j == end and i in best]
        if ways:
            best[end] = min(ways, key=lambda way: way[0])
    return best[count]


class _Way(NamedTuple):
    """To run a segment: bytes at once, and products in all."""

    bytes: int
    work: int


class _Planner:
    """What is known of a network, and its segments `(i, j)`: blocks i to j − 1."""

    def __init__(self, blocks: Sequence[Block], c: int, size: Size, tile: int, itemsize: int) -> None:
        self.blocks, self.tile, self.itemsize = blocks, tile, itemsize
        self.maps: list[tuple[int, Size]] = [(c, size)]  # between the blocks
        self.steps: list[list[Step]] = []  # of each block
        for block in blocks:
            layers = _layers(block)
            self.steps.append(list(steps(layers, c, size)))
            c, size = channels(layers, c), sizes(layers, size)
            self.maps.append((c, size))
        made = [step for block_steps in self.steps for step in block_steps]
        self.largest = max((step.channels * step.size[0] * step.size[1] * itemsize for step in made), default=0)
        self.finest = max(max(shape) for shape in [self.maps[0][1], *(step.size for step in made)])

    def ways(self) -> dict[tuple[int, int], list[_Way]]:
        """Of every segment that there could be: as one tile, and in tiles of some sides."""
        found: dict[tuple[int, int], list[_Way]] = {}
        for j in range(1, len(self.blocks) + 1):
            if isinstance(self.blocks[j - 1], Whole):  # a segment of its own
                c, size = self.maps[j]
                found[j - 1, j] = [_Way(self._working(c, size, []), 0)]
                continue
            self._add(found, j, None)
            for side in self._sides(j):
                self._add(found, j, side)
        return found

    def _add(self, found: dict[tuple[int, int], list[_Way]], j: int, side: int | None) -> None:
        """The segments that end with block j − 1, in tiles of one side; None: as one tile. They are judged by a tile
        in the middle, walked back block by block: exact spans are for what is chosen."""
        out = self.maps[j][1]
        counts = [1 if side is None else -(-n // side) for n in out]
        if side is not None and max(counts) == 1:
            return
        spans = [_cuts(n, count)[count // 2 : count // 2 + 2] for n, count in zip(out, counts, strict=True)]
        tiles, norms, work, working = counts[0] * counts[1], 0, 0, 0
        for i in range(j - 1, -1, -1):
            block = self.blocks[i]
            if isinstance(block, Whole):
                break
            c, size = self.maps[i]
            for axis in (0, 1):
                lo, hi = spans[axis]
                spans[axis] = list(back(block, Reach([(lo, hi)], [lo, hi]), size[axis], axis).spans[0])
            tile = spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]
            working = max(working, self._working(c, tile, list(steps(block, c, tile))))
            for step in reversed(self.steps[i]):
                norms += step.norm
                work += (1 if tiles == 1 else norms + 1) * step.work
            halo = max(1.0, tiles * tile[0] * tile[1] / (size[0] * size[1]))
            found.setdefault((i, j), []).append(
                _Way(working + self._kept(i, j, counts[0], counts[1]), round(halo * work)))

    def grown(self, i: int, j: int, room: int) -> Segment:
        """The segment in tiles as large as fit: fewer halos, and one pass where the whole map is a tile."""
        side = self._sides(j)[-1]
        segment = self.segment(i, j, side)
        while segment.tiles > 1:
            side *= 2
            larger = self.segment(i, j, side)
            if larger.kept + larger.working > room:
                break
            segment = larger
        return segment

    def segment(self, i: int, j: int, side: int) -> Segment:
        """The segment in tiles whose cores have `side` pixels of the map that it writes."""
        layers = self._of(i, j)
        (c, size), (width, out) = self.maps[i], self.maps[j]
        first = self.blocks[i]
        if isinstance(first, Whole):
            side = max(out)
        grid = _cuts(out[0], -(-out[0] // side)), _cuts(out[1], -(-out[1] // side))
        rows, columns = (back(layers, Reach(list(pairwise(cuts)), cuts), size[axis], axis)
                         for axis, cuts in enumerate(grid))
        tile = max(hi - lo for lo, hi in rows.spans), max(hi - lo for lo, hi in columns.spans)
        return Segment(
            layers, first.function if isinstance(first, Whole) else None, size, out, width, rows, columns, grid,
            self._kept(i, j, len(rows.spans), len(columns.spans)),
            self._working(c, tile, list(steps(layers, c, tile))))

    def _of(self, i: int, j: int) -> tuple[Layer, ...]:
        return tuple(layer for block in self.blocks[i:j] for layer in _layers(block))

    def _sides(self, j: int) -> list[int]:
        """Sides that a tile's core may have at the map after block j − 1, from large to small."""
        side = max(1, self.tile * max(self.maps[j][1]) // self.finest)
        return [side // part for part in (1, 2, SMALLEST) if side // part or part == 1]

    def _working(self, c: int, tile: Size, made: Sequence[Step]) -> int:
        """Bytes of a tile's maps: so many of the largest as there are at once."""
        return TILE_MAPS * self.itemsize * max(
            [c * tile[0] * tile[1], *(step.channels * step.size[0] * step.size[1] for step in made)])

    def _kept(self, i: int, j: int, rows: int, columns: int) -> int:
        """Bytes of both maps at once, at most. A single tile is the map itself; of several rows, those of the input
        are freed as those of the output are written."""
        if rows * columns == 1:
            return 0
        read, written = ((0 if not k else c * size[0] * size[1] * self.itemsize)
                         for k, (c, size) in ((i, self.maps[i]), (j, self.maps[j])))
        return max(read + written // rows, written + read // rows)


def _cuts(n: int, count: int) -> list[int]:
    """`n` pixels in `count` parts of equal length, as far as may be."""
    return [n * part // count for part in range(count + 1)]


def _layers(block: Block) -> Sequence[Layer]:
    return () if isinstance(block, Whole) else block
