"""The README.md of a trained autoencoder's checkpoint."""

from __future__ import annotations

from ..metrics.catalogue import METRICS
from .config import AutoencoderTraining
from .vqgan_config import VQGANConfig


def model_card(
    config: AutoencoderTraining, parameters: int, trained: str, measured: str, figures: dict[str, float], command: str
) -> str:
    """What the model is, what it learned from, what it reached, whose licence it needs.

    It has no `license:` entry, for we cannot know it and the hub refuses a made-up one; `hub.card_licence` reads that
    as "not stated".

    Args:
        trained: one sentence about steps and data.
        measured: what `figures` rest on.
        figures: keys of `METRICS` → values.
    """
    model = config.model
    rows = [f"| {METRICS[key].name} | {value:.{METRICS[key].digits}f} {METRICS[key].unit}".rstrip() + " |"
            for key, value in figures.items()]
    table = "\n".join(rows or ["| not measured yet | |"])
    kind = f"tokenizer ({model.description})" if isinstance(model, VQGANConfig) else "autoencoder"
    how = "posterior mode, 8 bits" if model.variational else "8 bits"
    return (
        f"---\nlibrary_name: omnilatent\n---\n# {config.recipe}\n\n"
        f"Image {kind}, f{model.downsampling}, {model.latent_channels} channels, {parameters:,} parameters; "
        f"{trained}\n\n"
        f"Measured on {measured}, {how}:\n\n| metric | value |\n| --- | --- |\n{table}\n\n"
        "Licence: not stated. It is yours to state, within what the training images (and the model that it started "
        "from) allow: add a line `license: …` to the head of this file before you publish it.\n\n"
        f"Command: `{command}`\n"
    )
