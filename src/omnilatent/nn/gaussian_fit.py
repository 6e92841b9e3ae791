"""Filters of an `nn.Conv2d` → the sums of Gaussians nearest to them.

- `fit_conv2d`: a whole layer, and what is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .gaussian_kernels import PIXEL, best_amplitudes, gaussian_kernels

Layer = TypeVar("Layer", bound=nn.Module)


def fit_conv2d(
    kind: Callable[..., Layer], conv: nn.Conv2d, num_gaussians: int, steps: int, starts: int
) -> tuple[Layer, float]:
    """Fit every filter by itself: Adam moves the Gaussians, least squares gives their heights at every step.

    That is variable projection (Golub & Pereyra 1973): the heights enter linearly, so they need no search.

    Args:
        kind: the class of the Gaussian layer.
        starts: how many starts each filter gets; the best is kept. They are drawn from torch's global generator.

    Returns:
        The layer, with `conv`'s stride, padding, groups, bias, device and dtype; and the residual Σ(w − ŵ)² / Σw²
        over the layer, 0 for a perfect fit.

    Raises:
        ValueError: `conv` is dilated or pads with other than zeros, which the Gaussian layer does not know.
    """
    if any(d != 1 for d in conv.dilation) or conv.padding_mode != "zeros":
        raise ValueError(f"the convolution has dilation {conv.dilation} and padding_mode {conv.padding_mode!r}; "
                         "only dilation 1 and zeros can be fitted")
    layer = kind(conv.in_channels, conv.out_channels, conv.kernel_size, num_gaussians, conv.stride, conv.padding,
                 conv.groups, conv.bias is not None)
    target = conv.weight.detach().float().cpu().flatten(0, 1)[None]  # (1, n, h, w), n filters
    shape, size = (starts, target.shape[1], num_gaussians), target.shape[-2:]
    mu, log_sigma, theta = (p.requires_grad_() for p in _start(target, shape))
    optimizer = torch.optim.Adam([mu, log_sigma, theta], lr=0.1, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, errors = None, torch.full(shape[:2], math.inf)
    with torch.enable_grad():
        for step in range(steps + 1):
            fitted, amplitude = _fitted(mu, log_sigma, theta, target)
            error = (fitted - target).square().sum((-2, -1))  # (starts, n)
            found = [p.detach() for p in (mu, log_sigma, theta, amplitude)]
            better = error.detach() < errors
            best = found if best is None else [
                torch.where(better.view(*better.shape, *[1] * (new.ndim - 2)), new, old)
                for new, old in zip(found, best, strict=True)]
            errors = torch.minimum(errors, error.detach())
            if step < steps:
                (error / target.square().sum((-2, -1)).clamp(min=1e-12)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    chosen, rows = errors.argmin(0), torch.arange(shape[1])
    with torch.no_grad():
        for name, values in zip(("mu", "log_sigma", "theta", "amplitude"), best, strict=True):
            getattr(layer, name).copy_(values[chosen, rows].view_as(getattr(layer, name)))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
        left = (layer.kernel() - conv.weight.float().cpu()).square().sum() / conv.weight.float().square().sum().cpu()
    return layer.to(conv.weight.device, conv.weight.dtype).train(conv.training), float(left)


def _fitted(mu: Tensor, log_sigma: Tensor, theta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(filters `(starts, n, h, w)`, amplitudes `(starts, n, k)`)."""
    size = (target.shape[-2], target.shape[-1])
    one = torch.ones_like(theta)[..., None]
    units = gaussian_kernels(mu[..., None, :], log_sigma[..., None, :], theta[..., None], one, size).flatten(-2)
    amplitude = best_amplitudes(units, target.flatten(-2).expand(*units.shape[:2], -1))
    return (amplitude[..., None, :] @ units)[..., 0, :].unflatten(-1, size), amplitude


def _start(target: Tensor, shape: tuple[int, int, int]) -> list[Tensor]:
    """Centres drawn from where the filter is large, widths and turns at random: `(starts, n, k, …)`."""
    _, n, height, width = target.shape
    weights = target[0].abs().flatten(1) + 1e-9
    cells = torch.multinomial(weights, shape[0] * shape[2], replacement=True)  # (n, starts · k)
    cells = cells.view(n, shape[0], shape[2]).transpose(0, 1)
    centre = torch.stack([cells % width - (width - 1) / 2, cells // width - (height - 1) / 2], -1)
    sigma = torch.empty(*shape, 2).uniform_(math.log(PIXEL), math.log(max(height, width) / 3))
    return [centre + 0.3 * torch.randn(*shape, 2), sigma, torch.empty(shape).uniform_(-math.pi / 2, math.pi / 2)]
