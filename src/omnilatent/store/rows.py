"""Random rows out of many memory maps, with one NumPy call a batch.

- `map_tensors`: a .safetensors file → arrays over its memory map.
- `RowTable`: rows of one tensor, wherever in the shards they lie.

A batch of 64 rows may lie in 64 shards, and 64 small copies from Python take several times as long as one fancy index.
So all maps are seen as one array of overlapping windows: window k begins k · unit bytes after the lowest map and is as
long as a row; only windows in which a row lies are ever looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .files import DTYPES
from .index import Shape


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays over the memory map of a .safetensors file; nothing but its head is read.

    PyTorch maps it, since Python's own `mmap` keeps a file descriptor for each map, and a process has 1,024 of these
    by default: a store may have more shards.

    Raises:
        UserError: the file is missing or not whole.
    """
    try:
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        mapped.flags.writeable = False
        length = int.from_bytes(mapped[:8].tobytes(), "little")
        head = json.loads(mapped[8 : 8 + length].tobytes())
        found = {}
        for name, entry in head.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            found[name] = np.frombuffer(mapped, dtype, (end - begin) // dtype.itemsize, 8 + length + begin).reshape(
                entry["shape"])
        return found
    except FileNotFoundError as failure:
        raise UserError(f"{path} is missing, and rows of its store lie in it: restore it, or encode anew.") from failure
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"{path} is not a whole shard ({reason}): restore it, or encode anew.") from failure


@dataclass(frozen=True)
class _Kind:
    """Rows of one shape and type."""

    shape: Shape
    dtype: np.dtype
    windows: np.ndarray  # uint8 (many, bytes of a row)


class RowTable:
    """Where the rows of one tensor begin in memory."""

    def __init__(self, place: np.ndarray, views: Mapping[tuple[int, int], np.ndarray]) -> None:
        """
        Args:
            place: `(n, 3)`: shard, group and row in the group of every row.
            views: (shard, group) → the group's rows, C-contiguous, over the shard's memory map.
        """
        self._views = views  # they keep the maps alive
        by_kind: dict[tuple[Shape, np.dtype], list[tuple[int, int]]] = {}
        for source, view in views.items():
            by_kind.setdefault((view.shape[1:], view.dtype), []).append(source)
        self._window = np.zeros(len(place), np.int64)
        self._kind = np.zeros(len(place), np.int32)
        self.kinds: list[_Kind] = []
        width = 1 + max(group for _, group in views)
        group_of = place[:, 0] * width + place[:, 1]  # one number for each (shard, group)
        for (shape, dtype), sources in by_kind.items():
            length = math.prod(shape) * dtype.itemsize
            begins = {source: views[source].ctypes.data for source in sources}
            base = min(begins.values())
            unit = math.gcd(length, *(begin - base for begin in begins.values())) or 1
            last = max(begin + views[source].nbytes for source, begin in begins.items())
            lowest = views[min(begins, key=begins.__getitem__)].reshape(-1).view(np.uint8)
            windows = np.lib.stride_tricks.as_strided(
                lowest, (max(0, last - base - length) // unit + 1, length), (unit, 1), writeable=False)
            numbers = np.array([shard * width + group for shard, group in sources])
            firsts = np.array([begins[source] - base for source in sources])
            order = np.argsort(numbers)
            at = np.searchsorted(numbers[order], group_of)
            at[at == len(order)] = 0
            mine = numbers[order][at] == group_of
            self._window[mine] = (firsts[order][at[mine]] + place[mine, 2] * length) // unit
            self._kind[mine] = len(self.kinds)
            self.kinds.append(_Kind(shape, dtype, windows))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A new array `(b, …)` of the rows in the order given.

        Raises:
            IndexError: a row outside the table.
            ValueError: they differ in shape or type.
        """
        windows = self._window[rows]
        first = 0
        if len(self.kinds) > 1:
            kinds = self._kind[rows]
            first = kinds[0]
            if (kinds != first).any():
                shapes = sorted({self.kinds[kind].shape for kind in kinds.tolist()})
                raise ValueError(f"rows of the shapes {', '.join(map(str, shapes))} make no batch: choose rows of one "
                                 "shape (Store.shapes)")
        kind = self.kinds[first]
        return kind.windows[windows].view(kind.dtype).reshape(len(windows), *kind.shape)


def used_groups(place: np.ndarray) -> Sequence[tuple[int, int]]:
    """The (shard, group)s in which rows lie."""
    return [(shard, group) for shard, group in np.unique(place[:, :2], axis=0).tolist()]
