"""Losses that look at structure rather than single pixels.

- `perceptual_loss`: by name: `none`, `lpips` (the true network, see lpips.py), `laplacian`.
- `laplacian_pyramid_l1`: L1 between Laplacian pyramids: no network, no download, and not called LPIPS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .weight_files import MissingNetwork

Perceptual = Literal["none", "lpips", "laplacian"]
LEVELS = 4  # the coarsest part of a 256² image is then 16²


def perceptual_loss(name: Perceptual) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The loss `(x, y) → (b,)` of a name; images `(b, 3, h, w)` in [0, 1].

    Returns:
        `lpips` is an `nn.Module`, LPIPS with VGG16: move it to the images' device. `laplacian` is a function, `none`
        is None.

    Raises:
        UserError: there is no such loss.
        MissingNetwork: `lpips` is asked for and its weight file is not on this machine; the sentence says which file
            to fetch.
    """
    if name == "none":
        return None
    if name == "laplacian":
        return partial(laplacian_pyramid_l1, levels=LEVELS)
    if name == "lpips":
        from .lpips import LPIPS

        try:
            return LPIPS("vgg")
        except MissingNetwork as missing:
            alternative = "or choose --perceptual laplacian, which needs no network"
            raise MissingNetwork(f"{str(missing).removesuffix('.')}; {alternative}.") from missing
    raise UserError(f"There is no perceptual loss {name!r}: choose none, lpips or laplacian.")


def laplacian_pyramid_l1(x: Tensor, y: Tensor, levels: int = LEVELS) -> Tensor:
    """L1 between the Laplacian pyramids of two batches of images: Σ_j mean |L_j(x) − L_j(y)|.

    The weights 2^{2j} on the summed differences of Bojanowski et al. 2018 (GLO, arXiv 1707.05776, after Ling &
    Okada 2006, "Diffusion Distance for Histogram Comparison") are what makes each level's *mean* count equally; we
    take the means. Bands are what a 5-tap binomial blur removes (Burt & Adelson 1983), the last level is the blurred
    rest. An error in fine detail counts once, an error that many pixels share counts at its own scale.

    Args:
        x, y: `(b, c, h, w)` in [0, 1], of any size; small images have fewer levels, 1×1 none but the L1 itself.
        levels: the number of bands above the rest, at least 0.

    Returns:
        `(b,)`, 0 for equal images.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two batches of one shape (b, c, h, w); got {tuple(x.shape)} and {tuple(y.shape)}")
    rest = (x - y).float()  # the pyramid is linear: that of the difference is the difference of the two
    total = rest.new_zeros(len(rest))
    for _ in range(min(levels, int(math.log2(min(rest.shape[-2:]))))):
        coarse = _blur(rest)[..., ::2, ::2]
        total = total + (rest - _expand(coarse, rest)).abs().flatten(1).mean(1)
        rest = coarse
    return total + rest.abs().flatten(1).mean(1)


def _blur(images: Tensor) -> Tensor:
    """A separable [1 4 6 4 1]/16 blur with repeated edges; `(b, c, h, w)` in and out."""
    channels = images.shape[1]
    taps = images.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    across = taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, across, groups=channels), across.transpose(2, 3), groups=channels)


def _expand(coarse: Tensor, like: Tensor) -> Tensor:
    """Back to the size of `like`: every second pixel is known, the blur's weights fill in the others.

    Dividing by the weights that fell on known pixels makes constants exact, at the edges and for odd sizes too.
    """
    sparse, known = torch.zeros_like(like), torch.zeros_like(like[:1, :1])
    sparse[..., ::2, ::2] = coarse
    known[..., ::2, ::2] = 1
    return _blur(sparse) / _blur(known)
