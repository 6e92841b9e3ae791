"""`omnilatent demo`: the main job on embedded photos, or on yours: fine-tune, learn one without gradients, reconstruct,
compare, report."""

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

BASE = "kl-f8-small"
STEPS, BATCH, CROP = 24, 4, 128  # about twenty seconds of training on two cores
ORGANIC, VIEWS, SITES, NEURONS = 16, 96, 12_000, 32  # channels, crops, positions and neurons: ten seconds
TRAINED_MOST, SHOWN_MOST = 500, 6  # photos of a large folder that the demo looks at: to train on, to measure on


@dataclass(frozen=True)
class Demo:
    """Fine-tune the bundled autoencoder on photos, learn a tiny one without gradients, and compare both with the bundled
    one on photos held out."""

    data: str = "photos"
    """your photos: a folder, a .tar or several; by default the embedded ones"""
    out: Path = Path("reports/demo")
    """folder for the report and the two models; an earlier demo's are replaced"""
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
    organic = _organic(options, training, held_out)

    from .compare import Measuring, measure, show

    measuring = Measuring(data=options.data, out=options.out, pictures=SHOWN_MOST, batch_size=2)
    names = ["pixels", BASE, f"fine-tuned:{tuned}", f"organic:{organic}"]
    notes = [f"The decoder of {BASE} was fine-tuned for {options.steps} steps on {len(training)} photos; every figure "
             f"is measured on {len(held_out)} other photos, none of which it was trained on. The organic one was learned "
             f"on the same {len(training)} photos without gradients; its latent has {ORGANIC} channels, four times as many. "
             "With so few photos the figures show that the job runs, not which codec is better."]
    evaluations, page = measure(measuring, names, "demo", argv, source=held_out, notes=notes)
    show(evaluations, [page, page.with_name("report.json"), tuned, organic], published=False)


def parts(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """(photos to train on, photos to measure on), no photo in both."""
    from ..data import split, subset

    training, held_out = split(source, held_out=0.25, minimum=min(4, len(source) // 2) or 1)
    return (subset(training, range(min(len(training), TRAINED_MOST)), training.name),
            subset(held_out, range(min(len(held_out), SHOWN_MOST)), held_out.name))


def _organic(options: Demo, training: ImageSource, held_out: ImageSource) -> Path:
    """Learn a tiny codec from the same photos without gradients. Returns the checkpoint's folder."""
    from ..hub import load
    from ..organic.clone_config import CloneConfig
    from ..organic.cloning import clone, write

    config = CloneConfig("native", channels=ORGANIC, neurons=NEURONS, sites=SITES, size=CROP,
                         crops=max(1, VIEWS // len(training)))
    print(f"learning an organic codec of {ORGANIC} channels without gradients on the same photos", flush=True)
    found = clone(load(BASE), training, held_out, config, lambda line: print(f"  {line}", flush=True))
    folder = options.out / "organic"
    write(folder, found, config, f"# organic\n\nMade by `omnilatent demo`. Held out: {found.reached}.\n")
    return folder


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
