"""Filters as sums of oriented 2-D Gaussians, in closed form.

- `gaussian_kernels`: six numbers a Gaussian (μx, μy, log σx, log σy, θ, amplitude) → filters.
- `best_amplitudes`: the amplitudes that come nearest to given filters.

The filter from input channel i to output channel o is, at the pixel whose centre lies at p (px from the filter's own),

    w(p) = Σₖ aₖ exp(−½ (p − μₖ)ᵀ Cₖ⁻¹ (p − μₖ)),    C = R(θ) diag(σx², σy²) R(θ)ᵀ + PIXEL² I.

**Anti-aliasing.** A Gaussian narrower than half a pixel falls between the pixels: sampled at their centres its sum
swings with μ, by ±2 exp(−2π²σ²) along each axis: ±39 % at σ = 0.29 (all that a pixel's box of variance 1/12 would
give), everything at σ → 0, and away from a pixel it has no gradient. So a pixel is a Gaussian window of PIXEL = 0.5 px:
what it sees of a Gaussian is its convolution with that window, whose covariance is simply the sum of the two, exactly.
The narrowest filter then has C = PIXEL² I, and the sum swings by ±1.4 % at most. A box would need a bivariate normal
integral where the Gaussian is turned; the price of the window is that no filter is sharper than it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXEL = 0.5  # standard deviation of the window through which a pixel sees, in pixels
_RIDGE = 1e-6  # of the mean energy of a filter's Gaussians: two equal ones share what they fit
Pair = tuple[int, int]


def gaussian_kernels(mu: Tensor, log_sigma: Tensor, theta: Tensor, amplitude: Tensor, size: Pair) -> Tensor:
    """Sums of Gaussians on a grid of pixels.

    Args:
        mu: centres `(…, k, 2)`, x (to the right) and y (down), in pixels from the middle of the filter.
        log_sigma: `(…, k, 2)`, logarithms of the widths in pixels along the Gaussian's own axes.
        theta: `(…, k)`, the turn of its first axis from x towards y, in radians.
        amplitude: `(…, k)`, the height.
        size: the filter's height and width in pixels.

    Returns:
        Filters `(…, height, width)`.
    """
    y, x = ((torch.arange(n, device=mu.device, dtype=mu.dtype) - (n - 1) / 2) for n in size)
    dx, dy = x - mu[..., :1], y - mu[..., 1:]  # (…, k, width), (…, k, height)
    variance = (2 * log_sigma).exp() + PIXEL**2
    precision = variance.reciprocal()
    mean, half = precision.mean(-1), (precision[..., 0] - precision[..., 1]) / 2
    along, across = half * torch.cos(2 * theta), half * torch.sin(2 * theta)  # C⁻¹ by double angles: no squares
    xx, yy = (mean + along)[..., None] * dx**2, (mean - along)[..., None] * dy**2
    xy = (2 * across)[..., None] * dy
    exponent = xx[..., None, :] + yy[..., :, None] + xy[..., :, None] * dx[..., None, :]  # (…, k, height, width)
    return torch.einsum("...k,...kyx->...yx", amplitude, torch.exp(-0.5 * exponent))


def best_amplitudes(units: Tensor, target: Tensor) -> Tensor:
    """The heights `(…, k)` with which the Gaussians `units` `(…, k, p)` come nearest to `target` `(…, p)`."""
    gram = units @ units.mT
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    gram = gram + (ridge + 1e-12) * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, (units @ target[..., None]))[..., 0]
