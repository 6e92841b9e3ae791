"""The registry: one row a modality. A fifth is one more row, and a file if it is neither text nor patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..codec import Codec
from . import losses
from .config import OmniModelConfig
from .latents import LatentModality
from .patches import Patches, PatchModality
from .text import TextModality

# name → how the model's part is built: encoder, decoder, usual size, losses
REGISTRY: dict[str, Callable[[OmniModelConfig], nn.Module]] = {
    "text": lambda c: TextModality(c.hidden_dim, c.vocab_size),
    "audio": lambda c: PatchModality(
        "audio", c.hidden_dim, Patches(c.mel_bands, (c.mel_patch, 1, 1)), (c.mel_frames,), losses.audio_terms),
    "image": lambda c: PatchModality(
        "image", c.hidden_dim, Patches(3, (1, c.image_patch, c.image_patch)), c.image_size, losses.image_terms),
    "video": lambda c: PatchModality(
        "video", c.hidden_dim, Patches(3, (c.video_patch[0], c.video_patch[1], c.video_patch[1])),
        (c.video_frames, *c.video_size), losses.video_terms),
}

# the same of those whose tokens may be a codec's latents
LATENT: dict[str, Callable[[OmniModelConfig, Codec], nn.Module]] = {
    "image": lambda c, codec: LatentModality(
        "image", c.hidden_dim, codec, (1, c.latent_patch, c.latent_patch), c.image_size),
    "video": lambda c, codec: LatentModality(
        "video", c.hidden_dim, codec, (c.video_patch[0], c.latent_patch, c.latent_patch), (c.video_frames, *c.video_size)),
}


def build(config: OmniModelConfig, codecs: Mapping[str, Codec]) -> nn.ModuleDict:
    """The parts of the modalities that the configuration names; `codecs` as `latents.open_codecs` gives them.

    Raises:
        ValueError: there is no such modality.
    """
    unknown = [name for name in config.modalities if name not in REGISTRY]
    if unknown:
        raise ValueError(f"there is no modality {unknown[0]!r}; there are {', '.join(REGISTRY)}")
    return nn.ModuleDict({name: LATENT[name](config, codecs[name]) if name in codecs else REGISTRY[name](config)
                          for name in config.modalities})
