"""What makes a latent space easier to generate in, at a price in reconstruction: options of `LossConfig`.

- `Transform`, `choose_transform`: the τ of one step for equivariance, on images and on latents.
- `LatentTransform`, `transform_latent`: τ on the latent, as tensors, for the model's forward.
- `spectrum_loss`: how far the latent's radial power spectrum is from the image's.

Equivariance (EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509; for scale alone also Skorokhodov et al. 2025, arXiv
2502.14831) replaces the plain reconstruction D(E(x)) ≈ x of some steps by D(τ E(x)) ≈ τ x, pixels, perceptual term and
discriminator alike; the KL term keeps the posterior of x. We differ in shrinking to a fixed set of sides, not by a
uniform factor in [0.25, 1], and in one τ for a whole step, so that a compiled model has few shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.keyed import below, draws, unit
from ..metrics.pixel import radial_power
from .config import LossConfig, shrunk_sides

_NO_POWER = 1e-9  # of a map about 1 in size: rounding, no spectrum to compare
_EMPTY = 1e-4  # share of the power at which a band counts as empty, so that its logarithm stays finite


class LatentTransform(NamedTuple):
    """τ for a model's forward: `side` positions a side, and `turns`, int64 `()`.

    The turn is a tensor, for a compiled model is made anew for every number: so it is made once a shape, whatever the
    turn. And it is the turn, not the matrices that follow from it, since Fabric casts what is given to a forward to
    half precision, and weights so rounded would not sum to 1.
    """

    side: int
    turns: Tensor


def transform_latent(z: Tensor, transform: LatentTransform | None) -> Tensor:
    """τ of latents `(b, c, whole, whole)` → `(b, c, side, side)` fp32; without a transform `z` itself.

    rot90 is J Mᵀ for one turn, J M J for two, Mᵀ J for three, with J the reversal and M = A z Aᵀ the shrunk map.
    """
    if transform is None:
        return z
    with torch.autocast(z.device.type, enabled=False):
        turns, shrink = transform.turns, _shrinking(z.shape[-1], transform.side, z.device)
        rows = torch.where((turns == 1) | (turns == 2), shrink.flip(0), shrink)
        columns = torch.where((turns == 2) | (turns == 3), shrink.flip(0), shrink)
        return rows @ torch.where(turns % 2 == 1, z.mT, z).float() @ columns.T


def _shrinking(whole: int, side: int, device: torch.device) -> Tensor:
    """`(side, whole)`: interpolating each unit vector gives the weights of bilinear interpolation, antialiased."""
    unit_vectors = torch.eye(whole, device=device)
    if side == whole:
        return unit_vectors
    return F.interpolate(unit_vectors[None, None], (side, whole), mode="bilinear", antialias=True)[0, 0]


@dataclass(frozen=True)
class Transform:
    """τ of one step: shrink to `side` latent positions a side (bilinear, antialiased), then turn by `turns` quarters
    counter-clockwise."""

    side: int
    turns: int

    def images(self, images: Tensor, downsampling: int) -> Tensor:
        """τ of square images `(b, 3, h, h)` → `(b, 3, side · f, side · f)`."""
        pixels = self.side * downsampling
        if pixels != images.shape[-1]:
            images = F.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True)
        return torch.rot90(images, self.turns, (2, 3))

    def latents(self, device: torch.device) -> LatentTransform:
        """τ for `transform_latent`."""
        return LatentTransform(self.side, torch.tensor(self.turns, device=device))


def choose_transform(config: LossConfig, seed: int, step: int, whole: int) -> Transform | None:
    """The τ of a step for latents of `whole` positions a side, or None for plain reconstruction.

    A pure function of (seed, step), so every process and every resumed run chooses the same. One draw decides on both
    kinds: with equal shares a step is shrunk and turned or neither, which is EQ-VAE's schedule (its share is 0.5).
    """
    if not (config.scale_equivariance or config.rotation_equivariance):
        return None
    chance, size, turn = draws("equivariance", seed, step, count=3)
    sides, side, turns = shrunk_sides(whole), whole, 0
    if unit(chance) < config.scale_equivariance:
        side = sides[below(size, len(sides))]
    if unit(chance) < config.rotation_equivariance:
        turns = 1 + below(turn, 3)
    return None if (side, turns) == (whole, 0) else Transform(side, turns)


def spectrum_loss(latents: Tensor, images: Tensor) -> Tensor:
    """Mean over channels and radial bands of (log p − log q)², p a latent channel's share of its power in a band and q
    the image's, the image averaged down to the latent's grid.

    Why: Skorokhodov et al. 2025 (arXiv 2502.14831) find more power at high frequencies in latents than in images, and
    diffusion models, which make coarse things first, the worse for it; "Spectrum Matching" (arXiv 2603.14645) compares
    the two spectra as well, with a flattened target. Shares make it blind to each channel's mean and scale. A channel
    without power receives no gradient, an image without power costs nothing.

    Args:
        latents: `(b, c, h/f, w/f)`, at least 8 positions a side.
        images: `(b, 3, h, w)`; all their colours together are one spectrum.

    Returns:
        `(b,)`, 0 where every channel is the downsampled image up to mean and scale.
    """
    grid = latents.shape[-2:]
    bins = min(grid) // 2
    small = F.avg_pool2d(images.float(), (images.shape[-2] // grid[0], images.shape[-1] // grid[1]))
    goal = radial_power(small, bins)  # (b, bins)
    ours = radial_power(latents.flatten(0, 1).unsqueeze(1), bins).unflatten(0, latents.shape[:2])  # (b, c, bins)
    difference = _log_shares(ours) - _log_shares(goal).unsqueeze(1)
    return torch.where(goal.sum(1) > _NO_POWER, difference.square().mean((1, 2)), 0.0)


def _log_shares(power: Tensor) -> Tensor:
    """`(…, bins)` → the logarithm of each band's share of their sum."""
    return (power / power.sum(-1, keepdim=True).clamp(min=_NO_POWER) + _EMPTY).log()
