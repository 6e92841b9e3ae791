"""Vectors and codes packed once, so that tensor cores take them as they lie: what triton_soft.py multiplies.

- `pack`: `Packed`, the rows less the codes' mean in two forms. Wide, three parts in tf32 whose one product is the exponent of
  a probability to float32's digits; halved, two parts in bf16 that carry 16 bits, for all products with probabilities.
- `Tile`: what a program holds and runs through. For the kernels: `load_packed`, `doubled`, `exponents`, `halves`,
  `weighted_sum`, `folded`.

Tensor cores cut each sum that they carry on, where float32 would round. Hence two rules, without which errors grow tenfold:
what is added to a product must not become its first sum (the compiler makes it so for `product + x`, but not for
`product - x` nor `tl.fma`), and long sums leave the tensor cores at every tile (`weighted_sum`).

Import this only where Triton is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # rows are packed to a multiple of it, which every tile divides
NONE = tl.constexpr(-1e30)  # exponent of a code that is not there


@dataclass(frozen=True)
class Tile:
    """Rows that a program holds, rows of the other side that it takes at a time, warps and stages of loading ahead, for
    vectors up to 8 wide; `at` gives those for any width."""

    held: int = 64
    streamed: int = 64
    warps: int = 4
    stages: int = 3

    def at(self, d: int) -> Tile:
        """Wider rows take smaller tiles, or registers spill and shared memory does not suffice."""
        if d <= 8:
            return self
        if d <= 16:
            return Tile(64, 64, 4, 3)
        return Tile(64, 32, 4, 2) if d <= 32 else Tile(32, 32, 4, 2) if d <= 64 else Tile(16, 16, 4, 2)

    def sizes(self, d: int) -> dict[str, int]:
        """The constants of a kernel."""
        return {"d": d, "D": padded(d), "HELD": self.held, "STREAMED": self.streamed, "num_warps": self.warps,
                "num_stages": self.stages}


class Packed(NamedTuple):
    """With s = log₂e / τ, D the padded width, and rows padded to whole blocks:"""

    z_wide: Tensor
    """Vectors `(n′, 4 D)` float32: [low | high | high | 1 1 1 0 …] of 2 s z in tf32."""
    z_half: Tensor
    """`(n′, 2 D)` bf16: [high | low] of z."""
    c_wide: Tensor
    """Codes `(k′, 4 D)` float32: [high | low | high | −s ‖c‖² in three]; the product with `z_wide` is −s (‖z − c‖² − ‖z‖²)."""
    c_half: Tensor
    """`(k′, 2 D)` bf16: [high | low] of c."""


@triton.jit
def _pack(z_pointer, c_pointer, centre_pointer, alive_pointer, tau_pointer, z_wide, z_half, c_wide, c_half, n, k, blocks,
          PRUNED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    block = tl.program_id(0)
    if block < blocks:
        _pack_rows(z_pointer, centre_pointer, alive_pointer, tau_pointer, z_wide, z_half, n, block, True, False, d, D, ROWS)
    else:
        _pack_rows(c_pointer, centre_pointer, alive_pointer, tau_pointer, c_wide, c_half, k, block - blocks, False, PRUNED,
                   d, D, ROWS)


@triton.jit
def _pack_rows(x_pointer, centre_pointer, alive_pointer, tau_pointer, wide_pointer, half_pointer, count, block,
               VECTORS: tl.constexpr, PRUNED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    scale = 1.4426950408889634 / tl.load(tau_pointer)
    rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    inside = (rows < count)[:, None] & (columns < d)[None, :]
    x = tl.load(x_pointer + rows[:, None] * d + columns[None, :], mask=inside, other=0.0)
    x = tl.where(inside, x - tl.load(centre_pointer + columns, mask=columns < d, other=0.0)[None, :], 0.0)
    store_halves(half_pointer, rows, x, D)
    place = wide_pointer + rows[:, None] * (4 * D) + columns[None, :]
    if VECTORS:
        x *= 2.0 * scale
        high = tf32(x)
        tl.store(place, tf32(x - high))
        tl.store(place + D, high)
        last = tl.where(columns < 3, 1.0, 0.0)[None, :] + tl.zeros_like(x)
    else:
        alive = rows < count
        if PRUNED:
            alive = tl.load(alive_pointer + rows, mask=alive, other=0) != 0
        norm = tl.where(alive, -scale * tl.sum(x * x, axis=1), NONE)[:, None]
        high = tf32(x)
        tl.store(place, high)
        tl.store(place + D, tf32(x - high))
        first = tf32(norm)
        second = tf32(norm - first)
        third = tf32(norm - first - second)
        last = tl.where(columns == 0, first, tl.where(columns == 1, second, tl.where(columns == 2, third, 0.0)))
    tl.store(place + 2 * D, high)
    tl.store(place + 3 * D, last)


@triton.jit
def tf32(x):
    """float32 rounded to tf32's 11 bits."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def halves(x, dtype: tl.constexpr):
    """x as the sum of two bf16, which carry 16 bits; as float32 in the interpreter, which multiplies nothing shorter."""
    high = x.to(tl.bfloat16)
    return high.to(dtype), (x - high.to(tl.float32)).to(tl.bfloat16).to(dtype)


@triton.jit
def store_halves(pointer, rows, x, D: tl.constexpr):
    high, low = halves(x, pointer.dtype.element_ty)
    place = pointer + rows.to(tl.int64)[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    tl.store(place, high)
    tl.store(place + D, low)


@triton.jit
def load_packed(pointer, start, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """`COUNT` whole rows from `start`; there are no ends to look after."""
    tile = tl.arange(0, COUNT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + tl.cast(start, tl.int64) * WIDTH + tile)


@triton.jit
def doubled(half_pointer, rows, D: tl.constexpr):
    """[high | high] and [low | low] of halved rows: their products with [high | low] of others are all four."""
    place = half_pointer + rows.to(tl.int64)[:, None] * (2 * D) + (tl.arange(0, 2 * D) % D)[None, :]
    return tl.load(place), tl.load(place + D)


@triton.jit
def exponents(x, y):
    """Products of wide rows; the same bits in every kernel, since all sum them in the same order."""
    return tl.dot(x, tl.trans(y), input_precision="tf32")


@triton.jit
def inner(high, low, other):
    """Inner products with halved rows of what `doubled` gave."""
    return tl.dot(high, tl.trans(other), tl.dot(low, tl.trans(other)))


@triton.jit
def weighted_sum(total, keep, weights, rows):
    """total · keep + weights @ halved rows. `fma`: the compiler would fold a plain sum into the product."""
    high, low = halves(weights, rows.dtype)
    return tl.fma(total, keep, tl.dot(high, rows, tl.dot(low, rows)))


@triton.jit
def folded(x, COUNT: tl.constexpr, D: tl.constexpr):
    """The sum of both halves `(COUNT, D)`."""
    return tl.sum(tl.reshape(x, (COUNT, 2, D)), axis=1)


def padded(d: int) -> int:
    """The width that a packed part has: a power of two, at least 8."""
    return max(8, triton.next_power_of_2(d))


def whole(count: int) -> int:
    """Rows of whole blocks."""
    return triton.cdiv(count, BLOCK) * BLOCK


def rows_at_once(d: int) -> int:
    """Of the kernels that only pack."""
    return 128 if d <= 16 else 16


def pack(vectors: Tensor, codes: Tensor, centre: Tensor, tau: Tensor, alive: Tensor | None) -> Packed:
    """Contiguous float32 vectors `(n, d)`, codes `(k, d)`, the codes' mean `(d,)`, τ `()`, bool `(k,)` or None."""
    (n, d), k, D = vectors.shape, len(codes), padded(vectors.shape[1])
    half = torch.bfloat16 if vectors.is_cuda else torch.float32
    wide = [vectors.new_empty(whole(count), 4 * D) for count in (n, k)]
    halved = [torch.empty(whole(count), 2 * D, dtype=half, device=vectors.device) for count in (n, k)]
    packed, size = Packed(wide[0], halved[0], wide[1], halved[1]), rows_at_once(d)
    blocks = whole(n) // size
    _pack[(blocks + whole(k) // size,)](vectors, codes, centre, codes if alive is None else alive, tau, *packed, n, k, blocks,
                                        alive is not None, d, D, size)
    return packed
