"""The README.md of a trained Gaussian autoencoder's checkpoint."""

from __future__ import annotations

from .gaussian_config import SIDE, GaussianTraining
from .gaussian_pictures import sigma_sentence


def gaussian_card(
    config: GaussianTraining, parameters: int, trained: str, measured: str, figures: dict[str, float], command: str
) -> str:
    """What the model is, what it learned from, what it reached.

    Args:
        trained: steps and data.
        measured: what `figures` rest on.
        figures: of `GaussianTask.validate`; empty where nothing was measured on these weights.
    """
    model = config.model
    what = "plain" if model.plain else f"{model.num_gaussians} Gaussians a filter"
    table = "| not measured yet | |"
    if figures:
        table = f"| MSE | {figures['mse']:.5f} |\n| PSNR | {figures['psnr']:.2f} dB |"
    sigma = f"\n{sigma_sentence(figures)}\n" if "sigma_mean" in figures else ""
    pictures = "![originals over reconstructions](samples.png)\n\n" if figures else ""
    return (
        f"---\nlibrary_name: omnilatent\n---\n# {config.recipe}\n\n"
        f"Autoencoder of {SIDE}×{SIDE} pictures, {model.latent_dim} numbers of latent, {parameters:,} parameters; "
        f"encoder of {len(model.widths)} convolutions ({what}), channels {', '.join(map(str, model.encoder_widths))}; "
        f"{trained}.\n\n"
        f"Measured on {measured}; MSE in [0, 1], not rounded, mean over all pixels; PSNR by image on 8 bits, then the "
        f"mean:\n\n| metric | value |\n| --- | --- |\n{table}\n{sigma}\n{pictures}"
        "![filters of the first layer](filters.png)\n\n"
        "Licence: not stated. It is yours to state, within what the training images (and the model that it started "
        "from) allow: add a line `license: …` to the head of this file before you publish it.\n\n"
        f"Command: `{command}`\n"
    )
