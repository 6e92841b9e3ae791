"""Turn a run into bundled weights: fp16, with its card and the figures of the file as it is loaded.

    python benchmarks/bundle.py RUN src/omnilatent/weights/NAME --data ../shared/data --trained-on "…" --licence "…"

Measures the fp16 file under the protocol on the 100 val photos at 256² and on the 8 Kodak images in their own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

from omnilatent import hub
from omnilatent.data import EvaluationImages, open_images
from omnilatent.latent import LatentSpec
from omnilatent.metrics.catalogue import METRICS
from omnilatent.metrics.protocol import evaluate

QUALITY = ("psnr", "ssim", "ms_ssim", "vif", "spectrum_high")
CODES = ("codes_used", "perplexity", "bits_per_pixel")


@dataclass(frozen=True)
class Bundle:
    """Turn a run into bundled weights."""

    run: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    data: Path
    """Folder with imagenet-1k-sample/ and kodak/."""
    trained_on: str
    """One clause: data, hardware and time."""
    licence: str
    """The card's sentence on the licence, without the full stop."""
    command: str | None = None
    """What made the run, where the recipe on the ImageNet sample did not."""


def main(options: Bundle) -> None:
    source = hub.locate(str(options.run))
    saved = hub.read_config(source)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(source / "model.safetensors").items() if not name.endswith("quantizer.counts")}
    more = {key: saved[key] for key in ("training",) if key in saved}

    def write(card: str) -> None:
        with hub.new_folder(options.out) as folder:
            spec = LatentSpec.from_json(saved["spec"])
            hub.write_model(folder, saved["kind"], saved["model"], spec, half, card, **more)

    write("")
    rows = []
    sets = {"ImageNet sample, val, 256²": ("imagenet-1k-sample/val.tar", 256), "Kodak, own size": ("kodak", None)}
    codec = hub.load(options.out)
    tokenizer = codec.spec.codebook_size is not None
    metrics = QUALITY + CODES if tokenizer else QUALITY
    for label, (place, size) in sets.items():
        images = EvaluationImages(open_images(str(options.data / place)), size)
        measured, _ = evaluate(codec, images, batch_size=4, metrics=metrics, health=False, speed=False)
        values = " | ".join(f"{measured.figures[name].value:,.{METRICS[name].digits or 0}f}" for name in metrics)
        rows.append(f"| {label} | {len(images)} | {values} |")
    recipe, steps = more["training"]["recipe"], more["training"]["step"]
    command = options.command or (f"omnilatent train {recipe} --data imagenet-1k-sample/train.tar --val "
                                  f"imagenet-1k-sample/val.tar --steps {steps}")
    heads = [METRICS[name].name + (f" [{METRICS[name].unit}]" if METRICS[name].unit else "") for name in metrics]
    sizes = f"f{codec.spec.downsampling}, {codec.spec.channels} channels"
    what = f"tokenizer, {sizes}, {codec.spec.codebook_size:,} codes" if tokenizer else f"autoencoder, {sizes}"
    form = "the nearest code" if tokenizer else "posterior mode"
    write(
        "---\nlicense: other\nlicense_name: mit-trained-on-imagenet\nlibrary_name: omnilatent\n---\n"
        f"# {recipe}\n\n"
        f"Image {what}, "
        f"{codec.parameter_count():,} parameters, stored as fp16. "
        f"Trained on {options.trained_on}.\n\n"
        f"Measured on the fp16 file as loaded (fp32 arithmetic, {form}, 8 bits):\n\n"
        f"| images | N | {' | '.join(heads)} |\n| --- | --- |{' ---: |' * len(heads)}\n" + "\n".join(rows) + "\n\n"
        f"Licence: {options.licence}.\n\n"
        f"Command: `{command}`, then `python benchmarks/bundle.py`.\n"
    )
    print((options.out / "README.md").read_text(encoding="utf-8"))
    print({p.name: p.stat().st_size for p in options.out.iterdir()})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(tyro.cli(Bundle))
