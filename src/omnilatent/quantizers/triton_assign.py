"""What follows the search on a GPU, one launch for what codebook.py and vq.py do in several.

- `turn`: the gradients of `assign`. `add`: each code's number of vectors and their sum. `average`: VQ's moving averages.

All books are taken at once. Import this only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(z_pointer, c_pointer, grad_pointer, pulled_pointer, pulling_pointer, grad_z_pointer, grad_c_pointer, n, share,
          ROTATION: tl.constexpr, WANTED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    place, inside = rows[:, None] * d + columns[None, :], (rows < n)[:, None] & (columns < d)[None, :]
    z = tl.load(z_pointer + place, mask=inside, other=0.0)
    c = tl.load(c_pointer + place, mask=inside, other=0.0)
    grad = tl.load(grad_pointer + place, mask=inside, other=0.0)
    apart = share * (z - c)
    if ROTATION:
        length = tl.maximum(tl.sqrt(tl.sum(z * z, axis=1)), 1e-6)[:, None]
        code_length = tl.maximum(tl.sqrt(tl.sum(c * c, axis=1)), 1e-6)[:, None]
        start, end = z / length, c / code_length
        middle = start + end
        middle = middle / tl.maximum(tl.sqrt(tl.sum(middle * middle, axis=1)), 1e-6)[:, None]
        along, turned = tl.sum(middle * grad, axis=1)[:, None], tl.sum(end * grad, axis=1)[:, None]
        grad = (grad - 2.0 * middle * along + 2.0 * start * turned) * (code_length / length)
    tl.store(grad_z_pointer + place, grad + tl.load(pulled_pointer) * apart, mask=inside)
    if WANTED:
        tl.store(grad_c_pointer + place, -tl.load(pulling_pointer) * apart, mask=inside)


@triton.jit
def _add(z_pointer, index_pointer, sums_pointer, places, n, k, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    inside = (rows < places)[:, None]
    z = tl.load(z_pointer + rows[:, None] * d + columns[None, :], mask=inside & (columns < d)[None, :], other=1.0)
    code = tl.load(index_pointer + rows, mask=rows < places, other=0) + rows // n * k
    place = sums_pointer + code[:, None] * (d + 1) + columns[None, :]
    tl.atomic_add(place, z, mask=inside & (columns <= d)[None, :], sem="relaxed")


@triton.jit
def _average(batch_pointer, counts_pointer, total_pointer, sums_pointer, codes_pointer, places, k, decay, smoothing,
             d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    place, inside = rows[:, None] * d + columns[None, :], (rows < places)[:, None] & (columns < d)[None, :]
    batch = tl.load(batch_pointer + rows[:, None] * (d + 1) + columns[None, :], mask=inside, other=0.0)
    sums = tl.load(sums_pointer + place, mask=inside, other=0.0)
    sums += (1.0 - decay) * (batch - sums)
    total = tl.load(total_pointer + rows // k, mask=rows < places, other=1.0)
    smooth = (tl.load(counts_pointer + rows, mask=rows < places, other=1.0) + smoothing) / (total + k * smoothing) * total
    tl.store(sums_pointer + place, sums, mask=inside)
    tl.store(codes_pointer + place, sums / smooth[:, None], mask=inside)


def rows_at_once(d: int) -> int:
    return max(1, 1024 // triton.next_power_of_2(d))


def turn(
    vectors: Tensor, codes: Tensor, grad: Tensor, pulled: Tensor, pulling: Tensor, rotation: bool, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_gradients` in codebook.py for float32 `(…, d)`; the second only where it is `wanted`."""
    vectors, codes, grad = vectors.contiguous(), codes.contiguous(), grad.contiguous()
    d, size = vectors.shape[-1], rows_at_once(vectors.shape[-1])
    n = vectors.numel() // d
    grad_vectors, grad_codes = torch.empty_like(vectors), torch.empty_like(codes) if wanted else None
    with torch.cuda.device_of(vectors):
        _turn[(triton.cdiv(n, size),)](vectors, codes, grad, pulled, pulling, grad_vectors,
                                       grad_codes if wanted else grad_vectors, n, 2 / vectors.numel(), rotation, wanted, d,
                                       triton.next_power_of_2(d), size)
    return grad_vectors, grad_codes


def add(parts: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """As `sums_of_codes` in codebook.py, for float32."""
    parts, places = parts.contiguous(), indices.T.contiguous()
    books, n, d = parts.shape
    sums, size = parts.new_zeros(books, codebook_size, d + 1), rows_at_once(d)
    with torch.cuda.device_of(parts):
        _add[(triton.cdiv(books * n, size),)](parts, places, sums, books * n, n, codebook_size, d,
                                              triton.next_power_of_2(d + 1), size)
    return sums


def average(codebook: Tensor, sums: Tensor, counts: Tensor, batch: Tensor, decay: float, smoothing: float) -> None:
    """As `_average` in vq.py, in place, for float32; `batch` `(books, K, d + 1)` is what `add` gave."""
    books, k, d = codebook.shape
    size, total = rows_at_once(d), counts.sum(1)
    with torch.cuda.device_of(codebook):
        _average[(triton.cdiv(books * k, size),)](batch, counts, total, sums, codebook, books * k, k, decay, smoothing, d,
                                                  triton.next_power_of_2(d), size)
