"""The identity as a codec: the null against which a latent space has to earn its place.

- `PixelCodec`: the latent is the image itself, in [-1, 1].
- `open_pixels`: the opener of the name `pixels`; it has no weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..codec import Codec, Provenance
from ..latent import Latent, LatentSpec, Point


class PixelCodec(Codec):
    """`encode` and `decode` are the identity; the latent is normalised to `(image - 0.5) * 2`."""

    def __init__(self, provenance: Provenance) -> None:
        spec = LatentSpec(channels=3, downsampling=1, kind="point", shift=(0.5,), scale=(2.0,))
        super().__init__(nn.Identity(), spec, provenance)
        self._device, self._dtype = torch.device("cpu"), torch.float32

    def _encode(self, images: Tensor) -> Latent:
        return Point(self.spec.normalise(images))

    def _decode(self, raw: Tensor) -> Tensor:
        return raw

    # Without parameters the module cannot tell where it is.
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Codec:
        self._device = self._device if device is None else torch.device(device)
        self._dtype = dtype or self._dtype
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype


def open_pixels(path: Path, name: str) -> Codec:
    """The identity codec; `path` is not read."""
    return PixelCodec(Provenance(name=name, kind="pixels", licence="none needed", card="The identity: no weights."))
