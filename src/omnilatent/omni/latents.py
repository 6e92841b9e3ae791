"""Pictures and videos as latents of a codec that stays as it is: it encodes what comes in and decodes what is made.

- `open_codecs`: modality → codec: those given, else those that a configuration names. `name_of`: how it is named to find it again.
- `FrozenCodec`: a codec as volumes see it, frame by frame.
- `LatentModality`: a modality whose tokens are patches of the codec's latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hub
from ..codec import Codec
from ..errors import UserError
from .config import OmniModelConfig
from .losses import latent_terms
from .patches import Patches, PatchModality, Size

PIXELS = 2**21  # that a codec sees at once, which bounds its memory


def open_codecs(
    config: OmniModelConfig, given: Mapping[str, Codec] | None = None, where: str = "the configuration"
) -> dict[str, Codec]:
    """Modality → the codec of its tokens; what is given goes before what the configuration, which lies `where`, names.

    Raises:
        UserError: a named codec cannot be opened, or one cannot give tokens.
    """
    found = dict(given or {})
    opened: dict[str, Codec] = {}
    for modality, name in config.codecs.items():
        if modality in found:
            continue
        try:
            found[modality] = opened[name] = opened.get(name) or hub.load(name)
        except UserError as failure:
            reason = str(failure).rstrip(".")
            raise UserError(f"the tokens of {modality} come from the codec {name}, which cannot be opened ({reason}): put it back, "
                            f"or write where it is as {modality}_codec into {where}.") from failure
    for modality, codec in found.items():
        _check(modality, codec)
    return found


def _check(modality: str, codec: Codec) -> None:
    """Refuse what cannot give tokens."""
    if modality not in ("image", "video"):
        raise UserError(f"a codec gives the tokens of image and video; got one for {modality}: leave it out.")
    if not isinstance(codec, Codec):
        raise UserError(f"the tokens of {modality} come from a codec, as omnilatent.load opens it; got {type(codec).__name__}.")
    spec, which = codec.spec, f"{codec.label} cannot give the tokens of {modality}"
    if not spec.decodes:
        raise UserError(f"{which}, since it only encodes: take an autoencoder.")
    if spec.kind == "codes":
        raise UserError(f"{which}, since its latents are codes, which lie apart, and values between them would be made: take an "
                        "autoencoder.")
    if spec.image_channels != 3:
        raise UserError(f"{which}, since its pictures have {spec.image_channels} channels and the model's 3: take another.")
    side = spec.downsampling + 1  # two latent pixels each way
    grid = tuple(codec.encode(torch.zeros(1, 3, side, side)).mode().shape[2:])
    if grid != spec.grid((side, side)):
        raise UserError(f"{which}, since it turns a picture of any size into a latent of {grid[0]}x{grid[1]}, without places that "
                        "could be tokens: take one with a latent map.")


def name_of(codec: Codec) -> str:
    """The name it was loaded by; of a path the whole, so that it is found from any folder."""
    place = Path(codec.provenance.name).expanduser()
    return str(place.resolve()) if place.exists() else codec.provenance.name


class FrozenCodec:
    """A codec as volumes see it: frame by frame, without gradients, in its own precision.

    It is no module: a model that holds it has none of its weights among its own, and the model's copies share it. It moves to
    the device of what it is given.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenCodec:
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """`(b, 3, t, h, w)` in [0, 1] → normalised latents `(b, channels, t, ⌈h / f⌉, ⌈w / f⌉)`, a posterior's mode."""
        height, width = frames.shape[-2:]
        return self._each(lambda part: self.codec.encode(part).mode(), frames, height * width)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse: `(b, 3, t, *size)`, float32, clamped to [0, 1]."""
        return self._each(lambda part: self.codec.decode(part, size), latents, size[0] * size[1])

    def _each(self, run: Callable[[Tensor], Tensor], volume: Tensor, pixels: int) -> Tensor:
        if self.codec.device != volume.device:
            self.codec.to(volume.device)
        frames = volume.transpose(1, 2).flatten(0, 1)
        with torch.autocast(volume.device.type, enabled=False):
            made = torch.cat([run(part) for part in frames.split(max(1, PIXELS // pixels))])
        return made.to(volume.device).unflatten(0, (len(volume), -1)).transpose(1, 2)


class LatentModality(PatchModality):
    """Pictures `(b, 3, h, w)` or videos `(b, 3, t, h, w)` in [0, 1], of any size, by way of a codec's latents.

    Args:
        name, dim, usual: as of `PatchModality`; sizes are pixels.
        codec: that of the latents.
        patch: frames and latent pixels of a token's sides.
    """

    def __init__(self, name: str, dim: int, codec: Codec, patch: tuple[int, int, int], usual: Size) -> None:
        super().__init__(name, dim, Patches(codec.spec.channels, patch), usual, latent_terms)
        self.channels, self.frozen = 3, FrozenCodec(codec)

    @property
    def codec(self) -> Codec:
        return self.frozen.codec

    def volume(self, size: Size) -> tuple[int, int, int]:
        """Pixels → the latents' (t, h, w)."""
        t, h, w = super().volume(size)
        return t, *self.codec.spec.grid((h, w))

    def cut(self, data: Tensor) -> Tensor:
        """A batch → the patches of its latents `(b, n, numbers)`, as the codec normalises them; no gradient."""
        latents = self.frozen.encode(data.reshape(*data.shape[:2], *super().volume(self.size_of(data))))
        return self.patches.cut(latents.to(data.dtype))

    def join(self, patches: Tensor, size: Size) -> Tensor:
        """The inverse of `cut` but for what the codec loses; in [0, 1], no gradient."""
        frames = self.frozen.decode(self.patches.join(patches, self.volume(size)), (size[-2], size[-1]))
        return frames.reshape(*frames.shape[:2], *size)

    def goal(self, data: Tensor) -> Tensor:
        """The latents' patches, since a picture's error would have to come back through the decoder."""
        return self.cut(data)

    def losses(self, patches: Tensor, goal: Tensor) -> dict[str, Tensor]:
        return self.terms(patches, goal)
