"""A network on an image of any size in bounded memory, with the result of the whole image up to rounding.

- `run_tiled`: segments of layers (tile_layers.py, tile_plan.py) from a source to an output (tile_maps.py).

Two things make a tile differ from the same place in the whole image. Convolutions look over its edge: so it is read
with a halo, and padded only at the border of the image. Group normalisation and attention look at everything: so the
statistics of each norm are gathered in a pass of their own over all tiles, and attention gets its whole map. Between
segments maps are kept whole; within one, a pass over its tiles goes one norm deeper each time, and the
last one writes. Nothing is blended, and there are no seams to hide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Statistics
from .tile_geometry import Box, Layer, Tile, run
from .tile_maps import KeptMap, Output, Sink, Source
from .tile_plan import Segment

SLABS = 8  # of a kept map for each row of tiles that is written


@torch.no_grad()
def run_tiled(segments: Sequence[Segment], source: Source, out: Tensor) -> None:
    """Run one image through a network, tile by tile.

    Args:
        segments: the network for an image of this size, from `tile_plan.plan`.
        source: the image, on the device on which the network lies.
        out: `(1, c, h, w)`, what the network makes of it is written here.
    """
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        side = segment.grid[0][1]
        sink: Output | KeptMap = Output(out) if last else KeptMap(segment.out_size, max(1, side // SLABS))
        run_segment(segment, source, sink)
        if isinstance(sink, KeptMap):
            source = sink


def run_segment(segment: Segment, source: Source, sink: Sink) -> None:
    """All passes of one segment. What it has read the last time is freed."""
    everything: Box = (0, segment.size[0]), (0, segment.size[1])
    if segment.whole is not None:
        x = source.read(everything)
        source.drop(segment.size[0])
        sink.write(Tile(segment.whole(x), everything, segment.size))
        return
    statistics = {norm: Statistics(segment.tiles) for norm in segment.norms}
    for number in range(segment.passes):
        writes = number == segment.passes - 1
        for row, rows in enumerate(segment.rows.spans):
            for column, columns in enumerate(segment.columns.spans):
                tile = Tile(source.read((rows, columns)), (rows, columns), segment.size,
                            _cores(segment, row, column), statistics)
                if segment.tiles == 1:
                    source.drop(segment.size[0])  # the tile is the map, and lets go of it on its way
                finished = run(segment.layers, tile)
                assert finished == writes, "a pass went another way than its norms say"
                if finished:
                    tile.crop(_core(segment.grid, row, column))
                    sink.write(tile)
                del tile
            if writes:
                following = segment.rows.spans[row + 1 :]
                source.drop(min((lo for lo, _ in following), default=segment.size[0]))


def _cores(segment: Segment, row: int, column: int) -> dict[Layer, Box]:
    """The tile's core at each norm."""
    return {norm: _core((segment.rows.norms[norm], segment.columns.norms[norm]), row, column)
            for norm in segment.norms}


def _core(cuts: tuple[list[int], list[int]], row: int, column: int) -> Box:
    return (cuts[0][row], cuts[0][row + 1]), (cuts[1][column], cuts[1][column + 1])
