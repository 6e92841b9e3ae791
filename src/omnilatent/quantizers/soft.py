"""Soft assignment of vectors to codes, with its gradient, without ever holding vectors × codes.

- `soft_assignment`: what LGQ learns from; an autograd function that computes its probabilities again in the backward
  pass: in tiles with an online softmax (Milakov & Gimelshein 2018) on the CPU, in fused Triton kernels on CUDA.
- `plain_soft_assignment`: the definition in a few lines, which holds everything; what tests compare with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .search import Tiles, centred, distances, fused, tile_elements


class SoftAssignment(NamedTuple):
    """With d_ik = ‖z_i − c_k‖² and p_ik = softmax_k(−d_ik / τ):"""

    average: Tensor
    """Σ_k p_ik c_k `(n, d)`."""
    energy: Tensor
    """−τ log Σ_k exp(−d_ik / τ) `(n,)`: the free energy without its constant τ log K; min_k d_ik as τ → 0."""
    peak: Tensor
    """Σ_k p_ik² `(n,)`."""
    usage: Tensor
    """mean_i p_ik `(k,)`."""
    indices: Tensor
    """argmin_k d_ik `(n,)`, int64."""


def plain_soft_assignment(vectors: Tensor, codes: Tensor, tau: float, alive: Tensor | None = None) -> SoftAssignment:
    """The definition, by autograd."""
    squared = (vectors[:, None] - codes[None]).square().sum(-1)
    if alive is not None:
        squared = squared.masked_fill(~alive, torch.inf)
    p = torch.softmax(-squared / tau, dim=1)
    energy = -tau * torch.logsumexp(-squared / tau, dim=1)
    return SoftAssignment(p @ codes, energy, p.square().sum(1), p.mean(0), squared.argmin(1))


def soft_assignment(
    vectors: Tensor, codes: Tensor, tau: float | Tensor, alive: Tensor | None = None, elements: int | None = None
) -> SoftAssignment:
    """Vectors `(n, d)` and codes `(k, d)` at temperature `tau`; the first four results have gradients (once).

    Args:
        tau: a number or a 0-dimensional tensor, which gets no gradient.
        alive: bool `(k,)`; the other codes have p = 0.
        elements: probabilities held at once on the CPU.
    """
    return SoftAssignment(*_Soft.apply(vectors, codes, tau, alive, elements))


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors, codes, tau, alive, elements):  # noqa: ANN001, ANN205
        tau = tau if isinstance(tau, Tensor) else codes.new_full((), tau)
        ctx.fused = fused(vectors)
        if ctx.fused:
            from .triton_soft import forward

            vectors, centre = vectors.contiguous(), codes.mean(0)
            with torch.cuda.device_of(vectors):
                found, (packed, log_sum) = forward(vectors, codes.contiguous(), centre, tau, alive)
            average, _, peak, usage, _ = found
            ctx.save_for_backward(vectors, centre, tau, average, peak, usage, log_sum, *packed)  # renewal writes into the codes
        else:
            # Both about the codes' mean: p does not change when they move alike, so the mean needs no gradient.
            vectors, codes, norms, centre = centred(vectors, codes, alive)
            ctx.tiles = Tiles(len(vectors), len(codes), elements or tile_elements(vectors))
            average, low, log_sum, peak, usage, indices = _forward(vectors, codes, norms, tau, ctx.tiles)
            ctx.save_for_backward(vectors, codes, norms, low, log_sum, average, peak, usage, tau)
            found = average + centre, low - tau * log_sum + vectors.square().sum(1), peak, usage, indices
        ctx.mark_non_differentiable(found[4])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: ANN001, ANN002, ANN205
        if ctx.fused:
            from .triton_pack import Packed
            from .triton_soft import backward

            vectors, centre, tau, average, peak, usage, log_sum, *packed = ctx.saved_tensors
            wanted = [grad.contiguous() for grad in grads[:4]]
            with torch.cuda.device_of(vectors):
                found = backward(vectors, centre, tau, average, peak, usage, Packed(*packed), log_sum, *wanted)
        else:
            vectors, codes, norms, low, log_sum, average, peak, usage, tau = ctx.saved_tensors
            known = _known(average, peak, usage, *grads[:4])
            found = _backward(vectors, codes, norms, low, log_sum, average, tau, ctx.tiles, *known)
        return *found, None, None, None


def _known(
    average: Tensor, peak: Tensor, usage: Tensor, grad_average: Tensor, grad_energy: Tensor, grad_peak: Tensor,
    grad_usage: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g, e, q, u and the offset of `_backward`.

    dL/dp_ik = h_ik = g_i·c_k + q_i p_ik + u_k. Only h_ik − Σ_j p_ij h_ij counts; most of that sum is known beforehand and
    is taken off here, so that little is left to cancel where 1/τ is large.
    """
    u = grad_usage / len(average)
    offset = (grad_average * average).sum(1) + 2 * grad_peak * peak + (usage * u).sum()
    return grad_average.contiguous(), grad_energy.contiguous(), 2 * grad_peak, u, offset


def _forward(
    vectors: Tensor, codes: Tensor, norms: Tensor, tau: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Average, least distance − ‖z‖², log Σ exp((least − d)/τ), peak, usage, indices."""
    n = len(vectors)
    average, usage = torch.empty_like(vectors), torch.zeros_like(norms)
    low, log_sum, peak = (vectors.new_empty(n) for _ in range(3))
    indices = torch.empty(n, dtype=torch.int64, device=vectors.device)
    for rows in tiles.rows():
        z = vectors[rows]
        least = z.new_full((len(z),), torch.finfo(z.dtype).max / 4)  # finite: a tile may hold no code that is alive
        total, squares, mean = z.new_zeros(len(z)), z.new_zeros(len(z)), torch.zeros_like(z)
        best = indices.new_zeros(len(z))
        for part in tiles.codes():
            d = distances(z, codes[part], norms[part])
            tile_least, tile_best = d.min(1)
            best = torch.where(tile_least < least, tile_best + part.start, best)
            least, before = torch.minimum(least, tile_least), least
            keep = torch.exp((least - before) / tau)
            p = d.neg_().add_(least[:, None]).div_(tau).exp_()
            total = total * keep + p.sum(1)
            squares = squares * keep.square() + torch.einsum("nk,nk->n", p, p)
            mean = mean * keep[:, None] + p @ codes[part]
        average[rows], low[rows], indices[rows] = mean / total[:, None], least, best
        log_sum[rows], peak[rows] = total.log(), squares / total.square()
        if tiles.width == tiles.k:  # the last tile's p are all of this row's
            usage += (1 / total) @ p
        else:
            for part in tiles.codes():
                usage[part] += _probabilities(z, codes[part], norms[part], least, log_sum[rows], tau).sum(0)
    return average, low, log_sum, peak, usage / n, indices


def _backward(
    vectors: Tensor, codes: Tensor, norms: Tensor, low: Tensor, log_sum: Tensor, average: Tensor, tau: Tensor, tiles: Tiles,
    g: Tensor, e: Tensor, q: Tensor, u: Tensor, offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of vectors and codes, for those of average `g` (n, d), energy `e` (n,), 2·(peak) `q`, usage/n `u` (k,).

    With v = p (h − offset) and t = Σ_k v, the weight of ∂d_ik is w = p e − (v − p t) / τ, and ∂d_ik = 2 (z_i − c_k) dz_i.
    """
    grad_vectors, grad_codes = torch.empty_like(vectors), torch.zeros_like(codes)
    for rows in tiles.rows():
        z, e_row = vectors[rows], e[rows][:, None]
        known = (codes, norms, low[rows], log_sum[rows], tau, g[rows], q[rows], u, offset[rows])
        total, pulled = z.new_zeros(len(z)), torch.zeros_like(z)
        for part in tiles.codes():
            p, v = _weights(z, part, *known)
            total += v.sum(1)
            pulled += v @ codes[part]
        towards = e_row * average[rows] - (pulled - total[:, None] * average[rows]) / tau
        grad_vectors[rows] = 2 * (e_row * z - towards)
        for part in tiles.codes():
            if tiles.width < tiles.k:
                p, v = _weights(z, part, *known)
            grad_codes[part] += p.T @ g[rows]
            w = p.mul_(e_row + total[:, None] / tau).sub_(v.div_(tau))
            grad_codes[part] += 2 * (codes[part] * w.sum(0)[:, None] - w.T @ z)
    return grad_vectors, grad_codes


def _weights(
    z: Tensor, part: slice, codes: Tensor, norms: Tensor, low: Tensor, log_sum: Tensor, tau: Tensor,
    g: Tensor, q: Tensor, u: Tensor, offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """p and v = p (h − offset) of one tile."""
    p = _probabilities(z, codes[part], norms[part], low, log_sum, tau)
    h = torch.addmm(u[part], g, codes[part].T).sub_(offset[:, None]).addcmul_(p, q[:, None])
    return p, h.mul_(p)


def _probabilities(z: Tensor, codes: Tensor, norms: Tensor, low: Tensor, log_sum: Tensor, tau: Tensor) -> Tensor:
    return distances(z, codes, norms).neg_().add_(low[:, None]).div_(tau).sub_(log_sum[:, None]).exp_()
