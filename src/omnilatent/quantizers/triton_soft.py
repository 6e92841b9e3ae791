"""The soft assignment on a GPU, forward and backward, in kernels that hold one tile at a time.

- `forward`: packs vectors and codes (triton_pack.py); averages, energies, peaks and places by an online softmax over the
  codes; then the usage, by code. `backward`: what is known beforehand; gradients of the vectors, by vector; then of
  the codes, by code. No atomics: the same numbers every time. The formulas are soft.py's, whose tiles these kernels
  must match; so are the names. Exponents are of 2, and −log₂ Σ exp is kept of each vector.

Where there are few codes, several programs share their vectors and leave partial sums (`_splits`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_pack import (NONE, Packed, Tile, doubled, exponents, folded, inner, load_packed, pack, padded, rows_at_once,
                          store_halves, weighted_sum, whole)
from .triton_search import load_centred, load_rows, store_rows

FORWARD, USAGE, VECTORS, CODES = Tile(64, 128), Tile(128, 64), Tile(64, 128, stages=2), Tile(64, 32)
_PROGRAMS = 1056  # eight for each of an H100's 132 processors


@triton.jit
def _forward(z_wide, c_wide, c_half, z_pointer, c_pointer, centre_pointer, average_pointer, energy_pointer, peak_pointer,
             log_pointer, index_pointer, n, k, tau_pointer, d: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
             STREAMED: tl.constexpr, PART: tl.constexpr):
    first = tl.program_id(0) * HELD
    rows = first + tl.arange(0, HELD)
    z = load_packed(z_wide, first, HELD, 4 * D)
    top = tl.full((HELD,), -8e37, tl.float32)  # below any exponent: a tile may hold no code that is alive
    best = tl.zeros((HELD,), tl.int32)  # where the tile of the nearest code starts
    total = tl.zeros((HELD,), tl.float32)
    squares = tl.zeros((HELD,), tl.float32)
    mean = tl.zeros((HELD, 2 * D), tl.float32)
    for start in range(0, k, STREAMED):
        x = exponents(z, load_packed(c_wide, start, STREAMED, 4 * D))
        tile_top = tl.max(x, axis=1)
        best = tl.where(tile_top > top, start, best)
        most = tl.maximum(top, tile_top)
        keep = tl.exp2(top - most)
        p = tl.exp2(x - most[:, None])
        total = total * keep + tl.sum(p, axis=1)
        squares = squares * (keep * keep) + tl.sum(p * p, axis=1)
        mean = weighted_sum(mean, keep[:, None], p, load_packed(c_half, start, STREAMED, 2 * D))
        top = most
    tl.store(index_pointer + rows, best.to(tl.int64), mask=rows < n)
    columns = tl.arange(0, D)
    centre = tl.load(centre_pointer + columns, mask=columns < d, other=0.0)[None, :]
    store_rows(average_pointer, rows, n, folded(mean, HELD, D) / total[:, None] + centre, d, D)
    log_sum = top + tl.log2(total)
    tl.store(log_pointer + rows, tl.where(rows < n, log_sum, -NONE))  # so that p = 0 beyond the last vector
    z = load_centred(z_pointer, centre_pointer, rows, n, d, D)
    energy = tl.sum(z * z, axis=1) - tl.load(tau_pointer) * 0.6931471805599453 * log_sum
    tl.store(energy_pointer + rows, energy, mask=rows < n)
    tl.store(peak_pointer + rows, squares / (total * total), mask=rows < n)
    _find(z_pointer, c_pointer, c_wide, index_pointer, first, n, d, D, HELD, STREAMED, PART)


@triton.jit
def _find(z_pointer, c_pointer, c_wide, index_pointer, first, n, d: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
          STREAMED: tl.constexpr, PART: tl.constexpr):
    """From where the tile of each vector's nearest code starts to that code, by differences; `PART` vectors at a time."""
    tl.debug_barrier()  # other threads wrote what is read here
    columns = tl.arange(0, D)
    for part in range(0, HELD, PART):
        rows = first + part + tl.arange(0, PART)
        start = tl.load(index_pointer + rows, mask=rows < n, other=0)
        index = start[:, None] + tl.arange(0, STREAMED)[None, :]
        alive = tl.load(c_wide + index * (4 * D) + 3 * D) > NONE * 0.5
        inside = alive[:, :, None] & (columns < d)[None, None, :]
        c = tl.load(c_pointer + index[:, :, None] * d + columns[None, None, :], mask=inside, other=0.0)
        apart = load_rows(z_pointer, rows, n, d, D)[:, None, :] - c
        distance = tl.where(alive, tl.sum(apart * apart, axis=2), float("inf"))
        tl.store(index_pointer + rows, start + tl.argmin(distance, axis=1), mask=rows < n)


@triton.jit
def _usage(z_wide, c_wide, log_pointer, usage_pointer, n, k, part, d: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
           STREAMED: tl.constexpr):
    index = tl.program_id(0) * HELD + tl.arange(0, HELD)
    split = tl.program_id(1)
    c = load_packed(c_wide, tl.program_id(0) * HELD, HELD, 4 * D)
    usage = tl.zeros((HELD,), tl.float32)
    for start in range(split * part, tl.minimum(n, (split + 1) * part), STREAMED):
        log_sum = tl.load(log_pointer + start + tl.arange(0, STREAMED))
        x = exponents(c, load_packed(z_wide, start, STREAMED, 4 * D))
        usage += tl.sum(tl.exp2(x - log_sum[None, :]), axis=1)
    tl.store(usage_pointer + split * k + index, usage / n, mask=index < k)


@triton.jit
def _known(g_pointer, average_pointer, centre_pointer, peak_pointer, grad_peak_pointer, spent_pointer, g_half, offset_pointer,
           n, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """As `_known` in soft.py; the average's gradient halved."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = load_rows(g_pointer, rows, n, d, D)
    store_halves(g_half, rows, g, D)
    average = load_centred(average_pointer, centre_pointer, rows, n, d, D)
    peak = tl.load(peak_pointer + rows, mask=rows < n, other=0.0) * tl.load(grad_peak_pointer + rows, mask=rows < n, other=0.0)
    offset = tl.sum(g * average, axis=1) + 2.0 * peak + tl.load(spent_pointer)
    tl.store(offset_pointer + rows, offset, mask=rows < n)


@triton.jit
def _vectors(z_wide, c_wide, c_half, g_half, log_pointer, z_pointer, centre_pointer, average_pointer, e_pointer,
             grad_peak_pointer, grad_usage_pointer, offset_pointer, grad_pointer, level_pointer, n, k, tau_pointer,
             d: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr):
    """Also leaves `level`, e + (offset + t) / τ, of which the codes' gradient is made: w = p (level − h / τ)."""
    inverse_tau = 1.0 / tl.load(tau_pointer)
    first = tl.program_id(0) * HELD
    rows = first + tl.arange(0, HELD)
    z = load_packed(z_wide, first, HELD, 4 * D)
    g_high, g_low = doubled(g_half, rows, D)
    log_sum = tl.load(log_pointer + rows)
    q = 2.0 * tl.load(grad_peak_pointer + rows, mask=rows < n, other=0.0)
    offset = tl.load(offset_pointer + rows, mask=rows < n, other=0.0)
    share = 1.0 / n
    total = tl.zeros((HELD,), tl.float32)
    pulled = tl.zeros((HELD, 2 * D), tl.float32)
    for start in range(0, k, STREAMED):
        index = start + tl.arange(0, STREAMED)
        u = tl.load(grad_usage_pointer + index, mask=index < k, other=0.0) * share
        c = load_packed(c_half, start, STREAMED, 2 * D)
        p = tl.exp2(exponents(z, load_packed(c_wide, start, STREAMED, 4 * D)) - log_sum[:, None])
        v = p * (inner(g_high, g_low, c) + (u[None, :] - offset[:, None]) + q[:, None] * p)
        total += tl.sum(v, axis=1)
        pulled = weighted_sum(pulled, 1.0, v, c)
    z = load_centred(z_pointer, centre_pointer, rows, n, d, D)
    average = load_centred(average_pointer, centre_pointer, rows, n, d, D)
    e = tl.load(e_pointer + rows, mask=rows < n, other=0.0)
    towards = e[:, None] * average - (folded(pulled, HELD, D) - total[:, None] * average) * inverse_tau
    store_rows(grad_pointer, rows, n, 2.0 * (e[:, None] * z - towards), d, D)
    tl.store(level_pointer + rows, e + (offset + total) * inverse_tau, mask=rows < n)


@triton.jit
def _codes(z_wide, z_half, c_wide, c_half, g_half, log_pointer, grad_peak_pointer, grad_usage_pointer, level_pointer,
           grad_pointer, n, k, tau_pointer, part, d: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr, STREAMED: tl.constexpr):
    """h is made of the same halves as in `_vectors`: what it lacks in digits then cancels against `level`."""
    inverse_tau = 1.0 / tl.load(tau_pointer)
    first = tl.program_id(0) * HELD
    index = first + tl.arange(0, HELD)
    split = tl.program_id(1)
    c = load_packed(c_wide, first, HELD, 4 * D)
    c_high, c_low = doubled(c_half, index, D)
    u = inverse_tau * tl.load(grad_usage_pointer + index, mask=index < k, other=0.0) / n
    gained = tl.zeros((HELD, 2 * D), tl.float32)
    moved = tl.zeros((HELD, 2 * D), tl.float32)
    weight = tl.zeros((HELD,), tl.float32)
    for start in range(split * part, tl.minimum(n, (split + 1) * part), STREAMED):
        rows = start + tl.arange(0, STREAMED)
        log_sum = tl.load(log_pointer + rows)
        q = (-2.0 * inverse_tau) * tl.load(grad_peak_pointer + rows, mask=rows < n, other=0.0)
        level = tl.load(level_pointer + rows, mask=rows < n, other=0.0)
        g = load_packed(g_half, start, STREAMED, 2 * D)
        p = tl.exp2(exponents(c, load_packed(z_wide, start, STREAMED, 4 * D)) - log_sum[None, :])
        gained = weighted_sum(gained, 1.0, p, g)
        w = p * ((level[None, :] - u[:, None]) - inverse_tau * inner(c_high, c_low, g) + q[None, :] * p)
        weight += tl.sum(w, axis=1)
        moved = weighted_sum(moved, 1.0, w, load_packed(z_half, start, STREAMED, 2 * D))
    place = c_wide + index.to(tl.int64)[:, None] * (4 * D) + tl.arange(0, D)[None, :]
    c = tl.load(place) + tl.load(place + D)
    grad = folded(gained, HELD, D) + 2.0 * (c * weight[:, None] - folded(moved, HELD, D))
    store_rows(grad_pointer + tl.cast(split, tl.int64) * k * d, index, k, grad, d, D)


def _splits(n: int, k: int, tile: Tile) -> tuple[int, int]:
    """Programs that share one block of codes, and the vectors of each (whole tiles)."""
    blocks, tiles = triton.cdiv(k, tile.held), triton.cdiv(n, tile.streamed)
    part = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // blocks))) * tile.streamed
    return triton.cdiv(n, part), part


def forward(
    vectors: Tensor, codes: Tensor, centre: Tensor, tau: Tensor, alive: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Packed, Tensor]]:
    """Contiguous float32 as for `pack` → the fields of a `SoftAssignment`; what `backward` wants besides."""
    packed = pack(vectors, codes, centre, tau, alive)
    average, energy, peak, log_sum, indices = assign(vectors, codes, centre, tau, packed)
    return (average, energy, peak, used(len(vectors), codes, packed, log_sum), indices), (packed, log_sum)


def assign(vectors: Tensor, codes: Tensor, centre: Tensor, tau: Tensor, packed: Packed) -> tuple[Tensor, ...]:
    """Average, energy, peak, log₂ Σ exp(…) `(n′,)`, indices."""
    (n, d), k, tile = vectors.shape, len(codes), FORWARD.at(vectors.shape[1])
    average, energy, peak = torch.empty_like(vectors), vectors.new_empty(n), vectors.new_empty(n)
    log_sum = vectors.new_empty(whole(n))
    indices = torch.empty(n, dtype=torch.int64, device=vectors.device)
    part = max(1, min(tile.held, 8192 // (tile.streamed * padded(d))))
    _forward[(whole(n) // tile.held,)](packed.z_wide, packed.c_wide, packed.c_half, vectors, codes, centre, average, energy,
                                       peak, log_sum, indices, n, k, tau, PART=part, **tile.sizes(d))
    return average, energy, peak, log_sum, indices


def used(n: int, codes: Tensor, packed: Packed, log_sum: Tensor) -> Tensor:
    """Mean probabilities `(k,)`."""
    (k, d), tile = codes.shape, USAGE.at(codes.shape[1])
    splits, part = _splits(n, k, tile)
    usage = log_sum.new_empty(splits, k)
    _usage[(triton.cdiv(k, tile.held), splits)](packed.z_wide, packed.c_wide, log_sum, usage, n, k, part, **tile.sizes(d))
    return usage.sum(0) if splits > 1 else usage[0]


def backward(
    vectors: Tensor, centre: Tensor, tau: Tensor, average: Tensor, peak: Tensor, usage: Tensor, packed: Packed, log_sum: Tensor,
    g: Tensor, e: Tensor, grad_peak: Tensor, grad_usage: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of vectors and codes for those of average, energy, peak and usage, all contiguous. The codes are read from
    `packed`: they themselves may have moved since."""
    g_half, offset = known(average, centre, peak, usage, g, grad_peak, grad_usage)
    grad_vectors, level = of_vectors(vectors, centre, tau, average, packed, log_sum, g_half, offset, e, grad_peak, grad_usage)
    return grad_vectors, of_codes(vectors, tau, packed, log_sum, g_half, level, grad_peak, grad_usage)


def known(
    average: Tensor, centre: Tensor, peak: Tensor, usage: Tensor, g: Tensor, grad_peak: Tensor, grad_usage: Tensor
) -> tuple[Tensor, Tensor]:
    (n, d), size = average.shape, rows_at_once(average.shape[1])
    half = torch.bfloat16 if average.is_cuda else torch.float32
    g_half = torch.empty(whole(n), 2 * padded(d), dtype=half, device=average.device)
    offset, spent = average.new_empty(n), torch.dot(usage, grad_usage) / n
    _known[(whole(n) // size,)](g, average, centre, peak, grad_peak, spent, g_half, offset, n, d, padded(d), size)
    return g_half, offset


def of_vectors(
    vectors: Tensor, centre: Tensor, tau: Tensor, average: Tensor, packed: Packed, log_sum: Tensor, g_half: Tensor,
    offset: Tensor, e: Tensor, grad_peak: Tensor, grad_usage: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient `(n, d)` and level `(n,)`."""
    (n, d), tile = vectors.shape, VECTORS.at(vectors.shape[1])
    grad, level = torch.empty_like(vectors), vectors.new_empty(n)
    _vectors[(triton.cdiv(n, tile.held),)](packed.z_wide, packed.c_wide, packed.c_half, g_half, log_sum, vectors, centre,
                                           average, e, grad_peak, grad_usage, offset, grad, level, n, len(grad_usage), tau,
                                           **tile.sizes(d))
    return grad, level


def of_codes(
    vectors: Tensor, tau: Tensor, packed: Packed, log_sum: Tensor, g_half: Tensor, level: Tensor, grad_peak: Tensor,
    grad_usage: Tensor,
) -> Tensor:
    (n, d), k, tile = vectors.shape, len(grad_usage), CODES.at(vectors.shape[1])
    splits, part = _splits(n, k, tile)
    grad = level.new_empty(splits, k, d)
    _codes[(triton.cdiv(k, tile.held), splits)](*packed, g_half, log_sum, grad_peak, grad_usage, level, grad, n, k, tau, part,
                                                **tile.sizes(d))
    return grad.sum(0) if splits > 1 else grad[0]
