"""The soft assignment on a GPU, forward and backward, in four kernels that hold one tile at a time.

- `forward`: averages, least distances, sums, peaks and places by an online softmax over the codes; then the usage,
  by code. `backward`: gradients of the vectors, by vector; then of the codes, by code. No atomics: the same numbers
  every time. The formulas are soft.py's, whose tiles these kernels must match; so are the names.

Where there are few codes, several programs share their vectors and leave partial sums (`_splits`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_search import Launch, load_rows, tile_distances

FORWARD, USAGE, VECTORS, CODES = Launch(), Launch(), Launch(), Launch()
_PROGRAMS = 528  # four for each of an H100's 132 processors


@triton.jit
def _forward(z_pointer, c_pointer, norm_pointer, average_pointer, low_pointer, sum_pointer, peak_pointer, index_pointer,
             n, k, tau_pointer, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
             PRECISION: tl.constexpr):
    inverse_tau = 1.0 / tl.load(tau_pointer)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = load_rows(z_pointer, rows, n, d, D)
    low = tl.full((ROWS,), 8e37, tl.float32)  # finite: a tile may hold no code that is alive
    best = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, k, CODES):
        index = start + tl.arange(0, CODES)
        c = load_rows(c_pointer, index, k, d, D)
        distance = tile_distances(z, c, norm_pointer, index, k, PRECISION)
        tile_low, tile_best = tl.min(distance, axis=1, return_indices=True)
        best = tl.where(tile_low < low, tile_best + start, best)
        least = tl.minimum(low, tile_low)
        keep = tl.exp((least - low) * inverse_tau)
        p = tl.exp((least[:, None] - distance) * inverse_tau)
        total = total * keep + tl.sum(p, axis=1)
        squares = squares * keep * keep + tl.sum(p * p, axis=1)
        mean = mean * keep[:, None] + tl.dot(p, c, input_precision=PRECISION)
        low = least
    columns = tl.arange(0, D)
    place = average_pointer + rows.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(place, mean / total[:, None], mask=(rows < n)[:, None] & (columns < d)[None, :])
    tl.store(low_pointer + rows, low, mask=rows < n)
    tl.store(sum_pointer + rows, tl.log(total), mask=rows < n)
    tl.store(peak_pointer + rows, squares / (total * total), mask=rows < n)
    tl.store(index_pointer + rows, best.to(tl.int64), mask=rows < n)


@triton.jit
def _probabilities(z, c, norm_pointer, low_pointer, sum_pointer, rows, index, n, k, inverse_tau, PRECISION: tl.constexpr):
    """p of a tile; 0 beyond the last code and the last vector."""
    low = tl.load(low_pointer + rows, mask=rows < n, other=0.0)
    log_sum = tl.load(sum_pointer + rows, mask=rows < n, other=float("inf"))
    distance = tile_distances(z, c, norm_pointer, index, k, PRECISION)
    return tl.exp((low[:, None] - distance) * inverse_tau - log_sum[:, None])


@triton.jit
def _usage(z_pointer, c_pointer, norm_pointer, low_pointer, sum_pointer, usage_pointer, n, k, tau_pointer, part,
           d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr):
    inverse_tau = 1.0 / tl.load(tau_pointer)
    index = tl.program_id(0) * CODES + tl.arange(0, CODES)
    split = tl.program_id(1)
    c = load_rows(c_pointer, index, k, d, D)
    usage = tl.zeros((CODES,), tl.float32)
    for start in range(split * part, tl.minimum(n, (split + 1) * part), ROWS):
        rows = start + tl.arange(0, ROWS)
        z = load_rows(z_pointer, rows, n, d, D)
        usage += tl.sum(_probabilities(z, c, norm_pointer, low_pointer, sum_pointer, rows, index, n, k, inverse_tau, PRECISION), axis=0)
    tl.store(usage_pointer + split * k + index, usage, mask=index < k)


@triton.jit
def _vectors(z_pointer, c_pointer, norm_pointer, low_pointer, sum_pointer, average_pointer, g_pointer, e_pointer, q_pointer,
             u_pointer, offset_pointer, grad_pointer, total_pointer, n, k, tau_pointer, d: tl.constexpr, D: tl.constexpr,
             ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr):
    inverse_tau = 1.0 / tl.load(tau_pointer)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = load_rows(z_pointer, rows, n, d, D)
    g = load_rows(g_pointer, rows, n, d, D)
    q = tl.load(q_pointer + rows, mask=rows < n, other=0.0)
    offset = tl.load(offset_pointer + rows, mask=rows < n, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    pulled = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, k, CODES):
        index = start + tl.arange(0, CODES)
        c = load_rows(c_pointer, index, k, d, D)
        u = tl.load(u_pointer + index, mask=index < k, other=0.0)
        p = _probabilities(z, c, norm_pointer, low_pointer, sum_pointer, rows, index, n, k, inverse_tau, PRECISION)
        h = tl.dot(g, tl.trans(c), input_precision=PRECISION) + u[None, :] + q[:, None] * p - offset[:, None]
        v = p * h
        total += tl.sum(v, axis=1)
        pulled += tl.dot(v, c, input_precision=PRECISION)
    e = tl.load(e_pointer + rows, mask=rows < n, other=0.0)
    average = load_rows(average_pointer, rows, n, d, D)
    towards = e[:, None] * average - (pulled - total[:, None] * average) * inverse_tau
    columns = tl.arange(0, D)
    place = grad_pointer + rows.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(place, 2.0 * (e[:, None] * z - towards), mask=(rows < n)[:, None] & (columns < d)[None, :])
    tl.store(total_pointer + rows, total, mask=rows < n)


@triton.jit
def _codes(z_pointer, c_pointer, norm_pointer, low_pointer, sum_pointer, g_pointer, e_pointer, q_pointer, u_pointer,
           offset_pointer, total_pointer, grad_pointer, n, k, tau_pointer, part, d: tl.constexpr, D: tl.constexpr,
           ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr):
    inverse_tau = 1.0 / tl.load(tau_pointer)
    index = tl.program_id(0) * CODES + tl.arange(0, CODES)
    split = tl.program_id(1)
    c = load_rows(c_pointer, index, k, d, D)
    u = tl.load(u_pointer + index, mask=index < k, other=0.0)
    gained = tl.zeros((CODES, D), tl.float32)
    weight = tl.zeros((CODES,), tl.float32)
    for start in range(split * part, tl.minimum(n, (split + 1) * part), ROWS):
        rows = start + tl.arange(0, ROWS)
        z = load_rows(z_pointer, rows, n, d, D)
        g = load_rows(g_pointer, rows, n, d, D)
        q = tl.load(q_pointer + rows, mask=rows < n, other=0.0)
        e = tl.load(e_pointer + rows, mask=rows < n, other=0.0)
        offset = tl.load(offset_pointer + rows, mask=rows < n, other=0.0)
        total = tl.load(total_pointer + rows, mask=rows < n, other=0.0)
        p = _probabilities(z, c, norm_pointer, low_pointer, sum_pointer, rows, index, n, k, inverse_tau, PRECISION)
        h = tl.dot(g, tl.trans(c), input_precision=PRECISION) + u[None, :] + q[:, None] * p - offset[:, None]
        w = p * (e[:, None] - (h - total[:, None]) * inverse_tau)
        weight += tl.sum(w, axis=0)
        gained += tl.dot(tl.trans(p), g, input_precision=PRECISION)
        gained -= 2.0 * tl.dot(tl.trans(w), z, input_precision=PRECISION)
    columns = tl.arange(0, D)
    place = grad_pointer + (split * k + index).to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(place, gained + 2.0 * c * weight[:, None], mask=(index < k)[:, None] & (columns < d)[None, :])


def _splits(n: int, k: int, launch: Launch) -> tuple[int, int]:
    """Programs that share one block of codes, and the vectors of each (whole tiles)."""
    blocks, tiles = triton.cdiv(k, launch.codes), triton.cdiv(n, launch.rows)
    part = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // blocks))) * launch.rows
    return triton.cdiv(n, part), part


def forward(vectors: Tensor, codes: Tensor, norms: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_forward` in soft.py, for contiguous float32."""
    (n, d), k = vectors.shape, len(codes)
    average = torch.empty_like(vectors)
    low, log_sum, peak = (vectors.new_empty(n) for _ in range(3))
    indices = torch.empty(n, dtype=torch.int64, device=vectors.device)
    launch = FORWARD.at(d)
    _forward[(triton.cdiv(n, launch.rows),)](vectors, codes, norms, average, low, log_sum, peak, indices, n, k, tau,
                                             **launch.sizes(d))
    launch = USAGE.at(d)
    splits, part = _splits(n, k, launch)
    usage = vectors.new_empty(splits, k)
    _usage[(triton.cdiv(k, launch.codes), splits)](vectors, codes, norms, low, log_sum, usage, n, k, tau, part,
                                                   **launch.sizes(d))
    return average, low, log_sum, peak, usage, indices


def backward(
    vectors: Tensor, codes: Tensor, norms: Tensor, low: Tensor, log_sum: Tensor, average: Tensor, tau: Tensor,
    g: Tensor, e: Tensor, q: Tensor, u: Tensor, offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `_backward` in soft.py, for contiguous float32."""
    (n, d), k = vectors.shape, len(codes)
    grad_vectors, total = torch.empty_like(vectors), vectors.new_empty(n)
    known, launch = (vectors, codes, norms, low, log_sum), VECTORS.at(d)
    _vectors[(triton.cdiv(n, launch.rows),)](*known, average, g, e, q, u, offset, grad_vectors, total, n, k, tau,
                                             **launch.sizes(d))
    launch = CODES.at(d)
    splits, part = _splits(n, k, launch)
    grad_codes = vectors.new_empty(splits, k, d)
    _codes[(triton.cdiv(k, launch.codes), splits)](*known, g, e, q, u, offset, total, grad_codes, n, k, tau, part,
                                                   **launch.sizes(d))
    return grad_vectors, grad_codes.sum(0)
