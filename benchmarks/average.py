"""The average of two runs' weights, of which one began where the other ended, as a checkpoint.

    python benchmarks/average.py runs/first runs/second --data ../shared/data/imagenet-1k-sample/train.tar --out runs/mean

After a short training on other data the average often has what was gained there and little of what was lost (Wortsman et
al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903). The latent's normalisation is measured anew on
crops of DATA, as a training's end does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

from omnilatent import hub
from omnilatent.autoencoders.task import NORMALISATION_IMAGES
from omnilatent.data import TrainingImages, open_images


@dataclass(frozen=True)
class Average:
    """Average two runs' weights."""

    first: tyro.conf.Positional[Path]
    second: tyro.conf.Positional[Path]
    data: str
    """Photos that the normalisation is measured on."""
    out: Path
    """The new checkpoint's folder."""
    share: float = 0.5
    """Of the second."""
    size: int = 256
    """Side of the crops that are measured."""


def main(options: Average) -> None:
    places = [hub.locate(str(run)) for run in (options.first, options.second)]
    first, second = (load_file(place / "model.safetensors") for place in places)
    mean = {name: torch.lerp(tensor.float(), second[name].float(), options.share) if tensor.is_floating_point() else second[name]
            for name, tensor in first.items()}
    saved = hub.read_config(places[1])
    with hub.new_folder(options.out) as folder:
        codec = hub.load(places[1])
        codec.module.load_state_dict(mean)
        images = TrainingImages(open_images(options.data), options.size)
        raw = replace(codec.spec, shift=(0.0,), scale=(1.0,))
        codec.spec = raw
        crops = torch.stack([images.sample(place).image for place in range(NORMALISATION_IMAGES)])
        z = torch.cat([codec.encode(part).mode() for part in crops.split(8)])
        spec = replace(raw, shift=(float(z.mean()),), scale=(1 / float(z.std()),))
        card = f"# {options.first.name} and {options.second.name}, averaged\n\nLicence: not stated.\n"
        hub.write_model(folder, saved["kind"], saved["model"], spec, mean, card, training=saved["training"])
    print(f"{options.out}: shift {spec.shift[0]:.4f}, scale {spec.scale[0]:.4f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(tyro.cli(Average))
