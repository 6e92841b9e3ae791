"""The picture of benchmarks/gaussian.py: MSE by training images and by scale, reconstructions, filters.

- `draw`: all of it into one file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnilatent.autoencoders.gaussian import GaussianAutoencoder
from omnilatent.autoencoders.gaussian_pictures import filter_sheet

COLOURS = {"gaussian": "#0b6e99", "plain": "#c2571a"}
NAMES = {"gaussian": "Gaussian filters", "plain": "plain filters, equal parameters"}
SHOWN = 14


def draw(results: dict[str, Any], models: dict[str, GaussianAutoencoder], test: Tensor,
         rescaled: Callable[[Tensor, float], Tensor], path: Path) -> None:
    """Args: the benchmark's JSON, one model a name, test pictures `(n, 1, 28, 28)`, how they are rescaled, the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), height_ratios=(1, 1.05))
    few, scales = axes[0]
    for name, colour in COLOURS.items():
        for axis, curve in ((few, "few"), (scales, "rescaled")):
            rows = results["summary"].get(curve, {}).get(name, {})
            x = [float(key) for key in rows]
            axis.errorbar(x, [r["mean"] for r in rows.values()], [r["std"] for r in rows.values()], color=colour,
                          marker="o", markersize=4, capsize=2, label=NAMES[name])
    few.set(xscale="log", yscale="log", xlabel="training images", ylabel="test MSE", title="782 steps of 64, by data")
    scales.set(xscale="log", yscale="log", xlabel="scale of the test pictures", ylabel="test MSE",
               title="Trained at scale 1 only")
    scales.set_xticks([0.5, 0.7, 1, 1.4, 2], ["½", "0.7", "1", "1.4", "2"], minor=False)
    scales.minorticks_off()
    for axis in (few, scales):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[1, 0].imshow(_sheet(models, test[:SHOWN], rescaled), cmap="gray", vmin=0, vmax=1)
    axes[1, 0].set_title("½, 1, 2: original, Gaussian, plain", fontsize=10)
    axes[1, 1].imshow(filter_sheet(models["gaussian"].encoder[0]).permute(1, 2, 0))
    axes[1, 1].set_title("Gaussian first layer: filters, and the surfaces below them", fontsize=10)
    for axis in axes[1]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


@torch.no_grad()
def _sheet(
    models: dict[str, GaussianAutoencoder], images: Tensor, rescaled: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Rows of pictures: for each scale the original and what each model makes of it."""
    rows = []
    for scale in (0.5, 1.0, 2.0):
        original = rescaled(images, scale)
        rows += [original, *(model(original)[0] for model in models.values())]
    return torch.cat([torch.cat(list(row[:, 0]), 1) for row in rows])
