"""The contract between everything that makes latents and everything that uses them.

- `LatentSpec`: what a latent space looks like and how it is normalised.
- `DiagonalGaussian`, `Point`, `Codes`: what `Codec.encode` returns. Each has `.mode()`, the normalised
  latent tensor, and `.size`, the height and width of the images it came from.
- `Codec`: a model wrapped for use. Any image size in, the same size out; images RGB in [0, 1];
  latents normalised on both sides. A family implements `_encode` and `_decode` on padded images.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

Size = tuple[int, int]  # height, width in pixels
Result = TypeVar("Result")
_log = logging.getLogger("omnilatent")


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
        bits = 16 * self.channels if self.codebook_size is None else math.ceil(math.log2(self.codebook_size))
        return bits / self.downsampling**2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

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


@dataclass(frozen=True)
class Provenance:
    """Where a codec came from: the name it was loaded by, the first 16 hex digits of the SHA-256 of its
    weight files ("none" without weights), its licence, and whatever its card states."""

    name: str
    kind: str
    weights_hash: str = "none"
    licence: str = "not stated"
    path: str | None = None
    card: str = ""


class Codec(ABC):
    """A model wrapped for use: `encode` images into a latent, `decode` it back.

    Subclasses set `module` and `spec`, and implement `_encode` and `_decode`, which see images padded
    to a multiple of `spec.downsampling`, in [0, 1], in the module's dtype.

    Attributes:
        tile: side of a tile in pixels, a multiple of `spec.downsampling`. A codec that knows how to (KL, tiny, TAEF2)
            runs an image of more than 4 · tile² pixels tile by tile, in a fraction of the memory; the result is that
            of the whole image up to rounding. None: always whole.
    """

    module: nn.Module
    spec: LatentSpec
    provenance: Provenance
    tile: int | None = 512

    def __init__(self, module: nn.Module, spec: LatentSpec, provenance: Provenance) -> None:
        self.module = module.eval().requires_grad_(False)
        self.spec = spec
        self.provenance = provenance
        self.label = provenance.name

    @abstractmethod
    def _encode(self, images: Tensor) -> Latent:
        """Padded images `(b, c, h, w)` in [0, 1] → latent; its `size` is filled in by `encode`."""

    def _decode(self, raw: Tensor) -> Tensor:
        """Un-normalised latent `(b, c, h, w)` → images `(b, c, h, w)` in [0, 1], not yet clamped."""
        raise UserError(f"{self.label} only encodes: it has no decoder.")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Latent:
        """Encode images of any size.

        Args:
            images: `(b, c, h, w)` float in [0, 1] or uint8 in 0..255, on any device; `c` as in
                `spec.image_channels`.

        Returns:
            A `DiagonalGaussian`, `Point` or `Codes` that remembers the images' size.

        Raises:
            ValueError: the tensor's shape or type is not that of images.
            UserError: the values are not finite, in float16 and in the wider type alike.
        """
        self._check(images)
        size = images.shape[-2], images.shape[-1]

        def run() -> Latent:
            if self._in_tiles(size):
                return self._encode_in_tiles(images)
            return self._encode(self._pad(self._floats(images)))

        return replace(self._finite(run, _tensors), size=size)

    @torch.no_grad()
    def decode(self, latent: Latent | Tensor, size: Size | None = None) -> Tensor:
        """Decode a latent, or a normalised tensor `(b, c, h, w)`, to float32 images in [0, 1].

        Args:
            latent: what `encode` returned (its mode is decoded), or a tensor.
            size: height and width to crop to; by default the latent's own, for a tensor the whole grid.

        Raises:
            ValueError: the latent's shape is not that of this codec's, or `size` is not within what it decodes to.
            UserError: the codec only encodes, or its values are not finite, in float16 and in the wider type alike.
        """
        if not self.spec.decodes:
            raise UserError(f"{self.label} only encodes: it has no decoder.")
        if isinstance(latent, Tensor):
            z = latent
        else:
            z, size = latent.mode(), size or latent.size
        if z.ndim != 4 or z.shape[1] != self.spec.channels:
            raise ValueError(
                f"a latent of {self.label} has shape (b, {self.spec.channels}, h, w); got {tuple(z.shape)}"
            )
        whole = z.shape[-2] * self.spec.downsampling, z.shape[-1] * self.spec.downsampling
        if size is not None and not (1 <= size[0] <= whole[0] and 1 <= size[1] <= whole[1]):
            raise ValueError(f"a latent of {z.shape[-2]}×{z.shape[-1]} decodes to images of at most "
                             f"{whole[0]}×{whole[1]}; size asks for {size[0]}×{size[1]}")

        def run() -> Tensor:
            raw = self.spec.denormalise(z.to(self.device)).to(self.dtype)
            return self._decode_in_tiles(raw) if self._in_tiles(whole) else self._decode(raw)

        images = self._finite(run, lambda images: [images])  # before the clamp, which would hide an infinity
        images = images.float().clamp(0, 1)
        return images if size is None else images[..., : size[0], : size[1]]

    def reconstruct(self, images: Tensor) -> Tensor:
        """`decode(encode(images))`: the posterior's mode, in the images' own size."""
        return self.decode(self.encode(images))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Codec:
        """Move the module in place, and return this codec."""
        # Not the module's own `to`: diffusers' warns of "modules that should be kept in float32: []" at every dtype.
        nn.Module.to(self.module, device=device, dtype=dtype)
        return self

    def compile(self) -> Codec:
        """Make many calls with images of one size fast, and return this codec. On a CUDA GPU the weights go to the
        channels-last layout, cuDNN tries its kernels out, and each half is compiled at its first call, which takes half
        a minute, and anew for every other shape; elsewhere nothing changes."""
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            nn.Module.to(self.module, memory_format=torch.channels_last)
            for half in ("_encode", "_decode"):
                setattr(self, half, torch.compile(getattr(self, half), dynamic=False))
        return self

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def _check(self, images: Tensor) -> None:
        channels = self.spec.image_channels
        if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
            raise ValueError(f"images have shape (b, {channels}, h, w); got {tuple(images.shape)}")
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise ValueError(f"images are floats in [0, 1] or uint8 in 0..255; got {images.dtype}")

    def _floats(self, images: Tensor) -> Tensor:
        """On this codec's device, in its dtype, in [0, 1]. 8-bit values are small enough to move as they are."""
        moved = images.to(self.device)
        return moved.to(self.dtype) / 255 if moved.dtype == torch.uint8 else moved.to(self.dtype)

    def _finite(self, run: Callable[[], Result], tensors: Callable[[Result], list[Tensor]]) -> Result:
        """`run()`; where float16 overflowed (SDXL's is the known model), the codec moves to a wider type for good,
        says so once, and runs again. Values that are not finite in another type are returned as they are."""
        result = run()
        if self.dtype != torch.float16 or all(part.isfinite().all() for part in tensors(result)):
            return result
        wide = torch.bfloat16 if self._has_bfloat16() else torch.float32
        self.to(dtype=wide)
        name = str(wide).removeprefix("torch.")
        result = run()
        if not all(part.isfinite().all() for part in tensors(result)):
            raise UserError(f"{self.label} gives infinite values or NaN in float16 and in {name}: check its weights "
                            "and the images, or load it with --dtype float32.")
        # A logger, since a warning of the same text is shown once a process, not once a codec.
        _log.warning("omnilatent: %s overflows in float16; it now runs in %s.", self.label, name)
        return result

    def _has_bfloat16(self) -> bool:
        """Whether the device computes bfloat16 itself. CPUs mostly emulate it, slower than float32."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def _in_tiles(self, size: Size) -> bool:
        """Whether images of this size run tile by tile. A codec that can says so, and has the next two."""
        return False

    def _encode_in_tiles(self, images: Tensor) -> Latent:
        """Images as `encode` takes them → latent, its `size` still to be filled in."""
        raise NotImplementedError

    def _decode_in_tiles(self, raw: Tensor) -> Tensor:
        """What `_decode` does."""
        raise NotImplementedError

    def _pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column up to a multiple of the downsampling."""
        multiple = self.spec.downsampling
        bottom, right = -images.shape[-2] % multiple, -images.shape[-1] % multiple
        return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def _tensors(latent: Latent) -> list[Tensor]:
    """What must be finite in a latent."""
    return [latent.mean, latent.logvar] if isinstance(latent, DiagonalGaussian) else [latent.mode()]
