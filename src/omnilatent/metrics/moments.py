"""Mean and covariance of features that arrive in batches, and the Fréchet distance between two such Gaussians.

- `RunningMoments`: streaming, mergeable, in float64.
- `frechet_distance`: between N(μ1, C1) and N(μ2, C2).
"""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMoments:
    """Mean and covariance over rows seen so far, by Chan et al.'s (1979) pairwise update: no sum of squares, so no
    cancellation."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Take in rows `(n, dim)`."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape (n, {self.dim}); got {tuple(features.shape)}")
        if len(features) == 0:
            return
        rows = features.detach().cpu().double()
        mean = rows.mean(0)
        self._join(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: RunningMoments) -> None:
        """Take in everything that `other` has seen."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge moments of {other.dim} dimensions into {self.dim}")
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate `(dim, dim)`; needs two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows; got {self.count}")
        return self.scatter / (self.count - 1)

    def distance(self, other: RunningMoments) -> float:
        """The Fréchet distance to `other`."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """‖μ1 − μ2‖² + tr(C1 + C2 − 2 (C1 C2)^½) (Fréchet 1957; Dowson & Landau 1982; Heusel et al. 2017), in float64.

    The trace of the root is Σ √λ over the eigenvalues of C1^½ C2 C1^½, which is symmetric and has the eigenvalues of
    C1 C2: singular covariances (fewer images than features) need no jitter, and nothing becomes complex.

    Args:
        mu1, mu2: `(d,)`.
        cov1, cov2: `(d, d)`, symmetric, positive semi-definite up to rounding.

    Returns:
        At least 0 (rounding below it is cut).
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(t).cpu().double() for t in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (mu1, cov1, mu2, cov2))
        raise ValueError(f"expected two means (d,) and covariances (d, d); got {shapes}")
    values, vectors = torch.linalg.eigh((cov1 + cov1.T) / 2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ ((cov2 + cov2.T) / 2) @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, float(distance))
