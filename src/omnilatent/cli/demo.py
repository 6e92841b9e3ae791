"""`omnilatent demo`: the main job on embedded photos, or on yours: fine-tune, clone and learn without gradients,
reconstruct, compare, report."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..hub import BUNDLED
from .parse import parse

if TYPE_CHECKING:
    from ..data import ImageSource

BASE, TOKENIZER = "kl-f8-small", "lgq-small"
STEPS, BATCH, CROP = 24, 4, 128  # about twenty seconds of training on two cores
VIEWS, SITES, NEURONS, SWEEPS = 96, 12_000, 48, 6  # pictures, positions, neurons and sweeps of each clone: ten seconds
CLONES = {"encoder": {"latent": "grid", "part": "encoder", "layers": 2}, "native": {"latent": "native", "channels": 16, "layers": 1}}
TRAINED_MOST, SHOWN_MOST = 500, 6  # photos of a large folder that the demo looks at: to train on, to measure on


@dataclass(frozen=True)
class Demo:
    """Fine-tune the bundled autoencoder on photos, clone its encoder and learn a tiny autoencoder without gradients, and
    compare all of them and the bundled tokenizer on photos held out."""

    data: str = "photos"
    """your photos: a folder, a .tar or several; by default the embedded ones"""
    out: Path = Path("reports/demo")
    """folder for the report and the models; an earlier demo's are replaced"""
    steps: int = STEPS
    """optimiser steps of the fine-tuning"""


def main(argv: list[str]) -> None:
    options = parse(Demo, "demo", argv)
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} is too small: give at least 1.")
    from ..data import demo_photos, open_images

    source = demo_photos() if options.data == "photos" else open_images(options.data)
    training, held_out = parts(source)
    tuned = _fine_tune(options, training, held_out)
    clones = {name: _clone(name, options, training, held_out) for name in CLONES}

    from .compare import Measuring, measure, show

    measuring = Measuring(data=options.data, out=options.out, pictures=SHOWN_MOST, batch_size=2)
    names = ["pixels", BASE, f"fine-tuned:{tuned}", f"organic encoder:{clones['encoder']}", f"native O-VAE:{clones['native']}",
             TOKENIZER]
    notes = [f"The decoder of {BASE} was fine-tuned for {options.steps} steps on {len(training)} photos; every figure "
             f"is measured on {len(held_out)} other photos, none of which it was trained on. The organic encoder and the "
             f"native O-VAE were learned on the same {len(training)} photos without gradients: the first stands in for the "
             f"encoder of {BASE}, whose decoder reads its latents; the second has a latent of its own, with four times as "
             f"many channels. {TOKENIZER} turns a picture into integer codes, which take a fifth of a bit a pixel. With so "
             "few photos the figures show that the job runs, not which codec is better."]
    evaluations, page = measure(measuring, names, "demo", argv, source=held_out, notes=notes)
    show(evaluations, [page, page.with_name("report.json"), tuned, *clones.values()], published=False)


def parts(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """(photos to train on, photos to measure on), no photo in both."""
    from ..data import split, subset

    training, held_out = split(source, held_out=0.25, minimum=min(4, len(source) // 2) or 1)
    return (subset(training, range(min(len(training), TRAINED_MOST)), training.name),
            subset(held_out, range(min(len(held_out), SHOWN_MOST)), held_out.name))


def _clone(name: str, options: Demo, training: ImageSource, held_out: ImageSource) -> Path:
    """Learn one of `CLONES` from the same photos. Returns the checkpoint's folder."""
    from ..devices import choose_float64_device
    from ..hub import load
    from ..organic.clone_config import CloneConfig
    from ..training.config import RunConfig
    from ..training.loop import launch_fabric
    from .clone import clone_run

    config = CloneConfig(neurons=NEURONS, candidates=4 * NEURONS, sites=SITES, sweeps=SWEEPS, context=16,
                         views=max(1, VIEWS // len(training)), **CLONES[name])
    fabric = launch_fabric(RunConfig(device=choose_float64_device("auto"), amp=False))
    what = f"cloning the encoder of {BASE}" if config.latent == "grid" else "learning a native O-VAE of 16 channels"
    print(f"{what} without gradients on the same photos", flush=True)
    run = options.out / f"organic-{name}"
    shutil.rmtree(run, ignore_errors=True)
    clone_run(load(BASE, str(fabric.device)), training, held_out, config, run, fabric, card=lambda figures: (
        f"# {what}\n\nMade by `omnilatent demo`. Held out: {figures}.\n"))
    return run / "final"


def _fine_tune(options: Demo, training: ImageSource, held_out: ImageSource) -> Path:
    """Train the bundled model's decoder further, its latent space kept. Returns the checkpoint's folder."""
    from ..autoencoders.recipes import kl_f8_small
    from ..autoencoders.task import AutoencoderTask
    from ..training.loop import launch_fabric, train

    if not (BUNDLED / BASE / "model.safetensors").exists():
        raise UserError(f"The bundled weights of {BASE} are missing from this installation: install omnilatent again.")
    recipe = kl_f8_small()
    config = dataclasses.replace(
        recipe,
        optimizer=dataclasses.replace(recipe.optimizer, optimizer="adamw", lr=2e-5, warmup=5, ema_decay=0.9),
        crops=dataclasses.replace(recipe.crops, size=CROP, validation_images=SHOWN_MOST, min_scale=0.5),
        run=dataclasses.replace(recipe.run, steps=options.steps, batch_size=BATCH, save_every=10_000,
                                validate_every=10_000, log_every=10, workers=0, compile=False),
    )
    run = options.out / "fine-tuned"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    fabric = launch_fabric(config.run)

    def skipped(file: str, reason: str) -> None:
        print(f"skipped {file}: {reason}")

    task = AutoencoderTask(config, training, held_out, skipped, BASE, "encoder", command="omnilatent demo")
    print(f"fine-tuning {BASE} on {fabric.device}, {task}", flush=True)
    train(task, config.run, run, fabric)
    return run / "final"
