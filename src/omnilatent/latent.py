"""Latents, as everything that makes them and everything that uses them knows them.

- `LatentSpec`: what a latent space looks like and how it is normalised.
- `DiagonalGaussian`, `Point`, `Codes`: what `Codec.encode` (codec.py) returns. Each has `.mode()`, the normalised
  latent tensor, and `.size`, the height and width of the images it came from.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class LatentSpec:
    """The shape of a latent space and its normalisation, `normalised = (raw - shift) * scale`.

    `shift` and `scale` hold one number for all channels or one a channel. Stable Diffusion's
    `scaling_factor` is `scale=(0.18215,)`; a mean and standard deviation a channel are
    `shift=mean, scale=1/std`.
    """

    channels: int
    downsampling: int
    kind: Literal["gaussian", "point", "codes"] = "gaussian"
    image_channels: int = 3
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    codebook_size: int | None = None
    num_codebooks: int = 1
    decodes: bool = True

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values; expected 1 or {self.channels}, one a channel")
            object.__setattr__(self, name, values)

    def normalise(self, raw: Tensor) -> Tensor:
        """`(b, c, ...)` as the network makes it → mean about 0, standard deviation about 1, at least in float32: bf16
        would round a scale of 0.18215 by 0.26 %, for all latents alike."""
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return (raw - self._channel(self.shift, raw)) * self._channel(self.scale, raw)

    def denormalise(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        normalised = normalised.to(torch.promote_types(normalised.dtype, torch.float32))
        return normalised / self._channel(self.scale, normalised) + self._channel(self.shift, normalised)

    def grid(self, size: Size) -> Size:
        """The latent's height and width for images of `size`; sizes are padded up to a multiple."""
        return math.ceil(size[0] / self.downsampling), math.ceil(size[1] / self.downsampling)

    def bits_per_pixel(self) -> float:
        """Bits of latent for each image pixel as stored: codes as ceil(log2 K) bits, other latents in 16 bits."""
        if self.codebook_size is None:
            bits = 16 * self.channels
        else:
            bits = self.num_codebooks * max(1, (self.codebook_size - 1).bit_length())
        return bits / self.downsampling**2

    def to_json(self) -> dict[str, Any]:
        """One codebook is not stated, so that stores from before there were several still agree with their codec."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("num_codebooks", 1)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LatentSpec:
        return cls(**{**fields, "shift": tuple(fields["shift"]), "scale": tuple(fields["scale"])})

    @staticmethod
    def _channel(values: tuple[float, ...], like: Tensor) -> Tensor | float:
        """One number stays a number: a tensor would be copied to the GPU, which waits for all that runs there."""
        return values[0] if len(values) == 1 else like.new_tensor(values).view(1, -1, *[1] * (like.ndim - 2))


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior q(z|x) = N(mean, exp(logvar)) of a variational autoencoder (Kingma & Welling 2013).

    `mean` and `logvar` `(b, c, h, w)` are un-normalised, as the network made them; `mode` and `sample`
    are normalised by `spec`.
    """

    mean: Tensor
    logvar: Tensor
    spec: LatentSpec
    size: Size | None = None

    def mode(self) -> Tensor:
        """The normalised mean `(b, c, h, w)`."""
        return self.spec.normalise(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One normalised draw `(b, c, h, w)`; `generator` lives on the CPU or on the latent's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self.spec.normalise(self.mean + torch.exp(0.5 * self.logvar) * noise)

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(q ‖ other) in nats, one number an image `(b,)`, summed over the un-normalised latent.

        Without `other` the prior is N(0, I): ½ Σ (μ² + σ² − 1 − log σ²).
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        if other is None:
            terms = mean**2 + logvar.exp() - 1 - logvar
        else:
            mean2, logvar2 = other.mean.float(), other.logvar.float()
            terms = (mean - mean2) ** 2 / logvar2.exp() + (logvar - logvar2).exp() - 1 + logvar2 - logvar
        return 0.5 * terms.flatten(1).sum(1)


@dataclass(frozen=True)
class Point:
    """The latent of a deterministic encoder: `z` `(b, c, h, w)`, normalised."""

    z: Tensor
    size: Size | None = None

    def mode(self) -> Tensor:
        return self.z


@dataclass(frozen=True)
class Codes:
    """The latent of a tokenizer: integer `indices` `(b, h, w)` or `(b, books, h, w)`, and `quantized`
    `(b, c, h, w)`, the normalised codebook vectors that they name."""

    indices: Tensor
    quantized: Tensor
    size: Size | None = None

    def mode(self) -> Tensor:
        return self.quantized


Latent = DiagonalGaussian | Point | Codes
