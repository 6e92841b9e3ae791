"""What decoding and encoding back and forth shows about a latent space.

- `cycle_error`: ‖E(D(z)) − z‖² / var z on real latents, between them, and on the prior.
- `noise_psnr`: how far noise on the latent moves the picture.
- `equivariance_psnr`: whether transforming the latent transforms the picture.

Latents here are normalised tensors `(n, c, h, w)` in float32 on the codec's device, images `(n, c, H, W)` in [0, 1]
with sides that are multiples of twice the codec's downsampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import Codec
from .pixel import psnr

STRENGTHS = (0.1, 0.5, 1.0)  # of the latent's standard deviation


def encode_mode(codec: Codec, images: Tensor, batch_size: int) -> Tensor:
    """The normalised posterior modes, in batches."""
    return torch.cat([codec.encode(part).mode().float() for part in images.split(batch_size)])


def decode_all(codec: Codec, z: Tensor, batch_size: int) -> Tensor:
    """The images of latents, in batches."""
    return torch.cat([codec.decode(part) for part in z.split(batch_size)])


def cycle_error(codec: Codec, z: Tensor, batch_size: int, decoded: Tensor | None = None) -> float | None:
    """How much of `z` does not survive being decoded and encoded again.

    Continuity asks for a small error between real latents, completeness for a small one on the prior; that on real
    latents is the floor. 0 is a perfect inverse, 1 is as wrong as answering each channel's mean, and more is worse.
    The denominator is the variance of `z` itself about its channels' means, so the three sets compare.

    Returns:
        The ratio of sums over all elements, None where `z` does not vary.
    """
    decoded = decode_all(codec, z, batch_size) if decoded is None else decoded
    error = (encode_mode(codec, decoded, batch_size) - z).square().sum()
    spread = (z - z.mean((0, 2, 3), keepdim=True)).square().sum()
    return float(error / spread) if spread > 0 else None


def cycle_errors(
    codec: Codec, z: Tensor, decoded: Tensor, batch_size: int, generator: torch.Generator
) -> dict[str, float | None]:
    """`cycle_error` on real `z` (whose pictures are `decoded`), on midpoints of neighbours in the list (as Berthelot
    et al. 2019, arXiv 1807.07543, interpolate; None for one image), and on z ~ N(0, I)."""
    prior = torch.randn(z.shape, generator=generator).to(z)
    middle = (z + z.roll(1, 0)) / 2 if len(z) > 2 else z.mean(0, keepdim=True)  # two latents have one midpoint
    return {
        "real": cycle_error(codec, z, batch_size, decoded),
        "interpolated": cycle_error(codec, middle, batch_size) if len(z) > 1 else None,
        "prior": cycle_error(codec, prior, batch_size),
    }


def noise_psnr(
    codec: Codec, z: Tensor, decoded: Tensor, batch_size: int, generator: torch.Generator
) -> dict[str, float]:
    """Mean PSNR in dB of D(z + ε σ n) against D(z), n ~ N(0, I), σ each channel's standard deviation over real z.

    High means that neighbours in the latent space are neighbours as pictures, which is what a diffusion model's
    small errors need (compare Yang et al. 2025, arXiv 2507.15856).
    """
    deviation = z.std((0, 2, 3), correction=0, keepdim=True)
    noise = torch.randn(z.shape, generator=generator).to(z)
    return {
        str(strength): float(psnr(decode_all(codec, z + strength * deviation * noise, batch_size), decoded).mean())
        for strength in STRENGTHS
    }


def equivariance_psnr(codec: Codec, images: Tensor, z: Tensor, batch_size: int) -> dict[str, float]:
    """Mean PSNR in dB of D(T z) against T x (Kouzelis et al. 2025, EQ-VAE, arXiv 2502.09509).

    T is downscaling to half (bilinear, antialiased) and turning by 90°. `…_reference` is D(E(T x)) against T x: what
    the codec reaches on the transformed picture itself, hence the mark to compare with.
    """
    transforms: dict[str, Callable[[Tensor], Tensor]] = {"scale": _halve, "rotation": _turn}
    found = {}
    for name, transform in transforms.items():
        target = transform(images)
        found[name] = float(psnr(decode_all(codec, transform(z), batch_size), target).mean())
        again = decode_all(codec, encode_mode(codec, target, batch_size), batch_size)
        found[f"{name}_reference"] = float(psnr(again, target).mean())
    return found


def _halve(maps: Tensor) -> Tensor:
    size = maps.shape[-2] // 2, maps.shape[-1] // 2
    return F.interpolate(maps, size, mode="bilinear", antialias=True)


def _turn(maps: Tensor) -> Tensor:
    return torch.rot90(maps, 1, (2, 3))
