"""The registry: one row a modality. A fifth that is made of patches is one more row, with a loss of its own or one of these.

One of another kind is a file beside patches.py and text.py, and what asks whether a part is a `PatchModality` (learning.py, task.py,
evaluation.py, model.py) takes anything else for text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from ..codec import Codec
from ..errors import UserError
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


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise a UserError that names the first that has no row."""
    for name in names:
        if name not in REGISTRY:
            raise UserError(f"there is no modality {name!r}; there are {', '.join(REGISTRY)}.")


def build(config: OmniModelConfig, codecs: Mapping[str, Codec]) -> nn.ModuleDict:
    """The parts of the modalities that the configuration names; `codecs` as `latents.open_codecs` gives them.

    Raises:
        UserError: there is no such modality.
    """
    refuse_unknown(config.modalities)
    return nn.ModuleDict({name: LATENT[name](config, codecs[name]) if name in codecs else REGISTRY[name](config)
                          for name in config.modalities})
