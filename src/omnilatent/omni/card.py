"""A model's README.md: what it was trained on, what it reached, and how."""

from __future__ import annotations

from .config import OmniTraining


def card(config: OmniTraining, training: str, held_out: str, figures: dict[str, float], step: int, command: str) -> str:
    """Markdown; `figures` are the last validation's."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items())
    table = f"| on {held_out} | |\n| --- | ---: |\n{rows}\n\n" if figures else ""
    latents = "".join(f" Tokens of {modality}: latents of {codec}." for modality, codec in config.model.codecs.items())
    return (f"---\nlibrary_name: omnilatent\n---\n# {config.recipe}\n\nAny-to-any model of {', '.join(config.model.modalities)}: "
            f"{config.model.num_layers} layers of {config.model.hidden_dim}.{latents} Trained on {training}, {step} steps of "
            f"{config.run.batch_size}.\n\n{table}Licence: not stated. Command: `{command or 'not recorded'}`.\n")
