"""A model wrapped for use, so that nobody outside a family knows its range, padding or normalisation.

- `Codec`: any image size in, the same size out; images RGB in [0, 1]; latents normalised on both sides. A family
  implements `_encode` and `_decode` on padded images.
- `Provenance`: where a codec came from.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import has_bfloat16
from .errors import UserError
from .latent import DiagonalGaussian, Latent, LatentSpec, Size

Result = TypeVar("Result")
_log = logging.getLogger("omnilatent")


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
    """

    module: nn.Module
    spec: LatentSpec
    provenance: Provenance
    retina: str | None = None
    """What a codec with a fixed eye computes of a picture before anything learned, in a line; stores keep it."""

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

    def _encode_any(self, images: Tensor) -> Latent:
        """Images of any size as `encode` takes them → latent, its `size` still to be filled in."""
        return self._encode(self._pad(self._floats(images)))

    def _decode_any(self, raw: Tensor) -> Tensor:
        """What `_decode` does, for a latent of any size."""
        return self._decode(raw)

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

        return replace(self._finite(lambda: self._encode_any(images), _tensors), size=size)

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
            return self._decode_any(self.spec.denormalise(z.to(self.device)).to(self.dtype))

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
        return moved.to(self.dtype).div_(255) if moved.dtype == torch.uint8 else moved.to(self.dtype)

    def _finite(self, run: Callable[[], Result], tensors: Callable[[Result], list[Tensor]]) -> Result:
        """`run()`; where float16 overflowed (SDXL's is the known model), the codec moves to a wider type for good,
        says so once, and runs again. Values that are not finite in another type are returned as they are."""
        result = run()
        if self.dtype != torch.float16 or _all_finite(tensors(result)):
            return result
        wide = torch.bfloat16 if has_bfloat16(self.device) else torch.float32
        self.to(dtype=wide)
        name = str(wide).removeprefix("torch.")
        result = run()
        if not _all_finite(tensors(result)):
            raise UserError(f"{self.label} gives infinite values or NaN in float16 and in {name}: check its weights "
                            "and the images, or load it with --dtype float32.")
        # A logger, since a warning of the same text is shown once a process, not once a codec.
        _log.warning("omnilatent: %s overflows in float16; it now runs in %s.", self.label, name)
        return result

    def _pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column up to a multiple of the downsampling."""
        multiple = self.spec.downsampling
        bottom, right = -images.shape[-2] % multiple, -images.shape[-1] % multiple
        return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def _all_finite(parts: list[Tensor]) -> bool:
    """Whether every number is finite. Waits for the device once: the least and the greatest value of each part tell,
    NaN among them if there is one."""
    extremes = [extreme.float() for part in parts for extreme in part.aminmax()]
    return bool(torch.stack(extremes).isfinite().all())


def _tensors(latent: Latent) -> list[Tensor]:
    """What must be finite in a latent."""
    return [latent.mean, latent.logvar] if isinstance(latent, DiagonalGaussian) else [latent.mode()]
