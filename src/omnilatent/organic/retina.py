"""The retina: projections fitted on inputs alone. No function here takes targets, and only here are eigenvectors used.

- `Axes`, `principal_axes`: mean, spread and principal axes of inputs, which whiten them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .neurons import chunks


@dataclass(frozen=True)
class Axes:
    """The principal axes of standardised inputs: (x − mean) / spread has covariance V diag(variances) Vᵀ.

    mean, spread: `(d,)`; spread is 1 for a constant input. axes V: `(d, r)`, orthonormal columns; variances: `(r,)`,
    falling. All fp64; r ≤ d, since axes along which the inputs do not vary are left out.
    """

    mean: Tensor
    spread: Tensor
    axes: Tensor
    variances: Tensor

    def whitening(self, ridge: float = 0.0) -> Tensor:
        """`(d, r)` fp64: (x − mean) @ it has orthogonal columns, of unit variance where `ridge` is 0."""
        return self.axes / (self.variances + ridge).sqrt() / self.spread[:, None]


def principal_axes(inputs: Tensor, floor: float = 1e-7) -> Axes:
    """Principal axes of inputs `(N, d)`, read twice in chunks; N·d² multiplications.

    Args:
        floor: axes with less than this share of the largest variance are left out.
    """
    count, d = inputs.shape
    mean = torch.zeros(d, dtype=torch.float64)
    for rows in chunks(inputs):
        mean += inputs[rows].sum(0, dtype=torch.float64)
    mean /= count
    second, centre = torch.zeros(d, d, dtype=torch.float64), mean.float()
    for rows in chunks(inputs):
        part = inputs[rows].float() - centre
        second += part.mT @ part  # fp32 within a chunk, fp64 between chunks
    second /= count
    spread = second.diagonal().clamp(min=0).sqrt()
    varies = spread > 1e-6 * mean.abs()  # else rounding of a constant
    spread = torch.where(varies & (spread > 0), spread, 1.0)
    second *= varies[:, None] * varies
    variances, axes = torch.linalg.eigh(second / spread[:, None] / spread)
    variances, axes = variances.flip(0), axes.flip(1)
    kept = variances > floor * variances[:1].clamp(min=1e-30)
    return Axes(mean, spread, axes[:, kept], variances[kept])
