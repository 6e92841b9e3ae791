"""The nearest code on a GPU: distances, minimum and its place in one kernel that holds one tile at a time.

- `nearest`: the search. `load_rows`, `load_centred`, `store_rows`: what all kernels share.

Import this only where Triton is installed. TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests.
Products are `tf32x3`: three tensor-core products that together carry float32's digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Tile sizes and warps of the search for vectors up to 32 wide; `at` gives those for any width."""

    rows: int = 64
    codes: int = 64
    warps: int = 4
    precision: str = "tf32x3"

    def at(self, d: int) -> Launch:
        """Wider vectors take small tiles, or registers spill and at 128 shared memory does not suffice."""
        return self if d <= 32 else Launch(32, 32, 4, self.precision)

    def sizes(self, d: int) -> dict[str, int | str]:
        """The constants of a kernel."""
        return {"d": d, "D": padded(d), "ROWS": self.rows, "CODES": self.codes, "PRECISION": self.precision,
                "num_warps": self.warps}


SEARCH = Launch()  # of `nearest`


@triton.jit
def load_rows(pointer, index, count, d: tl.constexpr, D: tl.constexpr):
    """Rows `index` of a contiguous (count, d) matrix as (len(index), D), zero beyond either end."""
    columns = tl.arange(0, D)
    inside = (index < count)[:, None] & (columns < d)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * d + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_centred(pointer, centre_pointer, rows, n, d: tl.constexpr, D: tl.constexpr):
    """Rows less the codes' mean, zero beyond the width."""
    columns = tl.arange(0, D)
    return load_rows(pointer, rows, n, d, D) - tl.load(centre_pointer + columns, mask=columns < d, other=0.0)[None, :]


@triton.jit
def store_rows(pointer, rows, n, x, d: tl.constexpr, D: tl.constexpr):
    columns = tl.arange(0, D)
    tl.store(pointer + rows.to(tl.int64)[:, None] * d + columns[None, :], x, mask=(rows < n)[:, None] & (columns < d)[None, :])


@triton.jit
def _nearest(z_pointer, c_pointer, centre_pointer, alive_pointer, index_pointer, n, k, PRUNED: tl.constexpr, d: tl.constexpr,
             D: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    centre = tl.load(centre_pointer + columns, mask=columns < d, other=0.0)[None, :]
    z = load_centred(z_pointer, centre_pointer, rows, n, d, D)
    low = tl.full((ROWS,), float("inf"), tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    for start in range(0, k, CODES):
        index = start + tl.arange(0, CODES)
        c = load_rows(c_pointer, index, k, d, D) - centre
        alive = index < k
        if PRUNED:
            alive = tl.load(alive_pointer + index, mask=alive, other=0) != 0
        norms = tl.where(alive, tl.sum(c * c, axis=1), float("inf"))
        distance = norms[None, :] - 2.0 * tl.dot(z, tl.trans(c), input_precision=PRECISION)
        tile_low, tile_best = tl.min(distance, axis=1, return_indices=True)
        best = tl.where(tile_low < low, tile_best + start, best)
        low = tl.minimum(low, tile_low)
    tl.store(index_pointer + rows, best.to(tl.int64), mask=rows < n)


def padded(d: int) -> int:
    """The width that a tensor-core product takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(d))


def nearest(vectors: Tensor, codes: Tensor, centre: Tensor, alive: Tensor | None) -> Tensor:
    """Contiguous float32 vectors `(n, d)`, codes `(k, d)`, the codes' mean `(d,)`, bool `(k,)` or None → int64 `(n,)`.

    The mean is taken off both on the way in, as `search.centred` does."""
    (n, d), k, launch = vectors.shape, len(codes), SEARCH.at(vectors.shape[1])
    indices = torch.empty(n, dtype=torch.int64, device=vectors.device)
    with torch.cuda.device_of(vectors):  # kernels start on the current device, which need not be the vectors'
        _nearest[(triton.cdiv(n, launch.rows),)](vectors, codes, centre, codes if alive is None else alive, indices, n, k,
                                                 alive is not None, **launch.sizes(d))
    return indices
