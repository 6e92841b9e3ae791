"""The health of a latent space: is it used, Gaussian, smooth, and does it know its pictures' geometry?

- `latent_health`: all of it, as a nested dictionary of numbers; see there for the keys.
- `channel_statistics`: moments of the normalised latent; KL and active units of a Gaussian posterior.
- `spectrum_slope`: the exponent of a radial power spectrum.
- `common_crop`: pictures of any sizes → one batch that every probe is defined on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..codec import Codec
from ..latent import Codes, DiagonalGaussian
from .pixel import radial_power, radius
from .probes import cycle_errors, decode_all, equivariance_psnr, noise_psnr

ACTIVE = 0.01  # variance of the posterior mean, Burda et al. 2016


def latent_health(
    codec: Codec, images: Tensor | Iterable[Tensor], seed: int = 0, limit: int = 16, size: int = 256,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Measure the latent space on a few pictures.

    Args:
        codec: one that decodes.
        images: in [0, 1]: one tensor `(b, c, h, w)`, or any number of `(c, h, w)` or `(b, c, h, w)` of any sizes.
        seed: of the noise and of the prior's draws, made on the CPU, so that devices agree.
        limit: at most so many pictures, the first ones.
        size: pictures are centre-cropped to a common square of at most this side.
        batch_size: pictures that pass through the codec at a time.

    Returns:
        `n`, `size`, `seed`, `notes` (sentences about what could not be measured), and
        `channels`: `mean`, `std`, `skew`, `kurtosis` (excess), a number a channel of the normalised latent; for a
        Gaussian posterior also `kl` (nats, un-normalised, mean over positions) and `active` (true or false);
        `kl` (nats an image at this size) and `active_units`, for a Gaussian posterior;
        `spectrum`: `latent_slope` and `image_slope`;
        `cycle`: `real`, `interpolated`, `prior`; `noise_psnr`: by strength; `equivariance`: `scale`,
        `scale_reference`, `rotation`, `rotation_reference` (see probes.py).
        A number that is not defined is None. With `n` 0 there is nothing but the note.
    """
    multiple = 2 * codec.spec.downsampling  # the half-size picture has to fill the latent grid too
    batch = common_crop(images, limit, size, multiple)
    if batch is None:
        note = f"Latent health needs pictures with sides of at least {multiple} pixels."
        return {"n": 0, "size": 0, "seed": seed, "notes": [note]}
    batch = batch.to(codec.device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    latents = [codec.encode(part) for part in batch.split(batch_size)]
    z = torch.cat([latent.mode().float() for latent in latents])
    decoded = decode_all(codec, z, batch_size)
    notes = []
    if isinstance(latents[0], Codes):
        notes.append("Interpolated, noisy and prior latents are not on the codebook.")
    if len(batch) == 1:
        notes.append("One picture has no pairs: no interpolation and no active units.")
    return {
        "n": len(batch), "size": batch.shape[-1], "seed": seed, "notes": notes,
        **channel_statistics(z, [latent for latent in latents if isinstance(latent, DiagonalGaussian)]),
        "spectrum": {"latent_slope": spectrum_slope(z), "image_slope": spectrum_slope(batch)},
        "cycle": cycle_errors(codec, z, decoded, batch_size, generator),
        "noise_psnr": noise_psnr(codec, z, decoded, batch_size, generator),
        "equivariance": equivariance_psnr(codec, batch, z, batch_size),
    }


def channel_statistics(z: Tensor, posteriors: list[DiagonalGaussian]) -> dict[str, Any]:
    """Moments of the normalised latent `(n, c, h, w)` by channel, over pictures and positions; and of the posteriors,
    un-normalised, the KL to N(0, I) and the active units.

    A unit is a channel. It is active when Var_x(E[z|x]) > 0.01 (Burda et al. 2016, arXiv 1509.00519, section 5.1):
    the variance over pictures at each position, mean over positions. It needs two pictures.
    """
    values = z.transpose(0, 1).flatten(1).cpu().double()  # (c, n·h·w)
    mean, deviation = values.mean(1), values.std(1, correction=0)
    standard = (values - mean[:, None]) / deviation[:, None]
    channels: dict[str, list[Any]] = {
        "mean": _numbers(mean), "std": _numbers(deviation),
        "skew": _numbers(standard.pow(3).mean(1)), "kurtosis": _numbers(standard.pow(4).mean(1) - 3),
    }
    if not posteriors:
        return {"channels": channels}
    mu = torch.cat([q.mean.cpu().double() for q in posteriors])
    logvar = torch.cat([q.logvar.cpu().double() for q in posteriors])
    terms = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    channels["kl"] = _numbers(terms.mean((0, 2, 3)))
    found: dict[str, Any] = {"channels": channels, "kl": float(terms.sum((1, 2, 3)).mean()), "active_units": None}
    if len(mu) > 1:
        active = mu.var(0).mean((1, 2)) > ACTIVE
        channels["active"] = active.tolist()
        found["active_units"] = int(active.sum())
    return found


def spectrum_slope(maps: Tensor) -> float | None:
    """The exponent α of power ∝ |f|^α over `(n, c, h, w)`, by least squares on the radial bands in log–log.

    Photographs have about −2 (Field 1987). A latent that is much flatter than its images carries power at high
    frequencies that a diffusion model finds hard (Skorokhodov et al. 2025, arXiv 2502.14831). The lowest band (what
    is left of the mean) and the last (with the corners) are left out; None below 8 positions a side, or without power.
    """
    height, width = maps.shape[-2:]
    if min(height, width) < 8:
        return None
    bins = min(height, width) // 2
    band = (radius(height, width) * bins).long().clamp(max=bins - 1)
    size = torch.bincount(band.flatten(), minlength=bins).double()
    power = (radial_power(maps, bins).cpu().double().mean(0) / size)[1:-1]
    if not bool((power > 1e-12).all()):
        return None
    frequency = ((torch.arange(bins).double() + 0.5) / bins)[1:-1].log()
    centred = frequency - frequency.mean()
    return float((centred * power.log()).sum() / centred.square().sum())


def common_crop(images: Tensor | Iterable[Tensor], limit: int, size: int, multiple: int) -> Tensor | None:
    """The first `limit` pictures with sides of at least `multiple`, centre-cropped to one square `(n, c, s, s)`.

    `s` is the largest multiple of `multiple` within `size` and within the smallest of them; None if there is none.
    """
    kept: list[Tensor] = []
    for part in images:
        for image in part if part.ndim == 4 else [part]:
            if len(kept) < limit and min(image.shape[-2:]) >= multiple:
                kept.append(image)
        if len(kept) == limit:
            break
    if not kept:
        return None
    # A `size` below the multiple still gets one cell of the grid.
    side = max(multiple, min(size, *(min(image.shape[-2:]) for image in kept)) // multiple * multiple)
    corners = [((image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2) for image in kept]
    return torch.stack([image[..., y : y + side, x : x + side] for image, (y, x) in zip(kept, corners, strict=True)])


def _numbers(values: Tensor) -> list[float | None]:
    """A list for JSON: what is not finite becomes None."""
    return [value if abs(value) != float("inf") and value == value else None for value in values.tolist()]
