"""What a Gaussian autoencoder looks like: its filters, its reconstructions, and its widths in numbers.

- `sigma_figures`: the widths of the first layer's Gaussians.
- `filter_sheet`: the first layer's filters as pixels and, below, as the smooth surfaces they are samples of.
- `reconstruction_sheet`: originals over reconstructions. `save_picture`: a picture to a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..nn.gaussian_conv import GaussianConv2d
from ..nn.gaussian_kernels import PIXEL, gaussian_kernels

FINE = 12  # pixels of the picture for one of the filter's
GAP = 4
COLUMNS = 8  # filters a row


def sigma_figures(layer: nn.Module) -> dict[str, float]:
    """Mean, standard deviation, least and greatest width in pixels, and the mean ratio of a Gaussian's long to its
    short axis; nothing for a plain convolution."""
    if not isinstance(layer, GaussianConv2d):
        return {}
    sigma = layer.sigmas().double().cpu()
    ratio = sigma.amax(-1) / sigma.amin(-1)
    return {"sigma_mean": float(sigma.mean()), "sigma_std": float(sigma.std()), "sigma_min": float(sigma.min()),
            "sigma_max": float(sigma.max()), "sigma_ratio": float(ratio.mean())}


def sigma_sentence(figures: dict[str, float]) -> str:
    """The figures in words."""
    return ("First layer's σ: {sigma_mean:.2f} ± {sigma_std:.2f} px ({sigma_min:.2f} to {sigma_max:.2f}), long axis / "
            "short axis {sigma_ratio:.2f}.").format(**figures)


@torch.no_grad()
def filter_sheet(layer: nn.Module) -> Tensor:
    """The filters of the first input channel, red above 0, blue below, white at 0, each scaled to its largest value:
    `(3, h, w)` in [0, 1]. A plain convolution has no smooth surfaces below."""
    smooth = None
    if isinstance(layer, GaussianConv2d):
        weight, smooth = layer.kernel().float().cpu()[:, 0], _smooth(layer)
    else:
        weight = layer.weight.float().cpu()[:, 0]
    pixels = weight.repeat_interleave(FINE, 1).repeat_interleave(FINE, 2)
    rows = []
    for start in range(0, len(pixels), COLUMNS):
        for kind in (pixels, smooth) if smooth is not None else (pixels,):
            tiles = [F.pad(_coloured(tile), (GAP,) * 4, value=1.0) for tile in kind[start : start + COLUMNS]]
            tiles += [torch.ones_like(tiles[0])] * (min(COLUMNS, len(pixels)) - len(tiles))
            rows.append(torch.cat(tiles, 2))
    return torch.cat(rows, 1)


def reconstruction_sheet(originals: list[np.ndarray], reconstructions: list[np.ndarray], enlarged: int = 3) -> Tensor:
    """Pictures uint8 `(h, w, 3)` side by side over their reconstructions → `(3, 2 · h, n · w)` in [0, 1], enlarged."""
    rows = [np.concatenate(row, 1) for row in (originals, reconstructions)]
    sheet = torch.from_numpy(np.concatenate(rows, 0)).permute(2, 0, 1) / 255
    return sheet.repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2)


def save_picture(picture: Tensor, path: Path) -> None:
    """`(3, h, w)` in [0, 1] → an image file."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def _smooth(layer: GaussianConv2d) -> Tensor:
    """The surfaces that the filters are samples of, on a grid FINE times as fine `(out, h · FINE, w · FINE)`."""
    variance = (2 * layer.log_sigma[:, 0]).exp() + PIXEL**2  # with the pixel's window, which is not FINE times smaller
    log_sigma = (FINE**2 * variance - PIXEL**2).log() / 2
    size = (layer.kernel_size[0] * FINE, layer.kernel_size[1] * FINE)
    parts = (layer.mu[:, 0] * FINE, log_sigma, layer.theta[:, 0], layer.amplitude[:, 0])
    return gaussian_kernels(*parts, size).cpu()


def _coloured(tile: Tensor) -> Tensor:
    """`(h, w)` of both signs → `(3, h, w)`."""
    value = tile / tile.abs().max().clamp(min=1e-12)
    up, down = value.clamp(min=0), (-value).clamp(min=0)
    return torch.stack([1 - down, 1 - up - down, 1 - up])
