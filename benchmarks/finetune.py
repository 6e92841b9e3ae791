"""Does fine-tuning pay? The bundled kl-f8-small on two kinds of picture it has never seen, minutes of CPU each.

    python benchmarks/finetune.py                    train what is missing, measure, write results/finetune.json, .png
    python benchmarks/finetune.py --steps 60         a shorter trial (into other folders; the results are replaced)

- `Run`, `RUNS`: fine-tuned on a domain, with the encoder kept, and the null: the same steps on everyday photos.
- `main`: `omnilatent train` for each run, one thread; PSNR and SSIM on held-out pictures of every set.

The pictures are those of domains.py. What tuning costs on the photos is forgetting. A killed benchmark goes on where it
was.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from domains import SETS, build
from variants import busiest, crop, grid

import omnilatent
from omnilatent.data import EvaluationImages, open_images
from omnilatent.errors import UserError
from omnilatent.hub import file_hash, new_folder
from omnilatent.metrics.protocol import Picture, evaluate
from omnilatent.report.record import replace_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "kl-f8-small"


@dataclass(frozen=True)
class Finetune:
    """Fine-tune the bundled model on microscopy and on text, and measure before and after."""

    steps: int = 120
    """Optimiser steps of every run."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """What takes the steps; muon got further in few of them."""
    lr: float = 4e-4
    """Peak learning rate."""
    size: int = 128
    """Side of the training crops."""
    batch_size: int = 4
    """Crops a step."""
    seed: int = 0
    """Of crops and noise."""
    work: Path = Path(tempfile.gettempdir()) / "omnilatent-finetune"
    """Where pictures and runs are kept, so that a killed benchmark goes on."""


@dataclass(frozen=True)
class Run:
    """One training: its name in the table, the sets it learns from, and the half that it keeps."""

    name: str
    learned: tuple[str, ...]
    freeze: str | None = None


NULL = "photos continued (null)"
RUNS = (
    Run(NULL, ("photos",)),
    Run("tuned on microscopy", ("microscopy",)),
    Run("tuned on microscopy, encoder kept", ("microscopy",), "encoder"),
    Run("tuned on text", ("text",)),
    Run("tuned on text, encoder kept", ("text",), "encoder"),
    Run("tuned on text and photos", ("text", "photos")),
)


def train(run: Run, options: Finetune, data: Path) -> tuple[Path, float | None]:
    """The run's folder, trained to its end, and its CPU seconds; None where it was killed before and went on."""
    what = (*run.learned, run.freeze or "whole")
    how = (options.steps, options.optimizer, f"{options.lr:g}", options.size, options.batch_size, options.seed)
    folder = options.work / "-".join(map(str, what + how))
    spent = folder / "cpu-seconds.txt"
    if (folder / "final" / "config.json").exists():
        return folder, float(spent.read_text()) if spent.exists() else None
    begun = (folder / "run.json").exists()
    words = ["--resume", str(folder)] if begun else [
        MODEL, "--init", MODEL, *(["--freeze", run.freeze] if run.freeze else []),
        "--data", ",".join(str(data / name / "train") for name in run.learned),
        "--val", str(data / run.learned[0] / "val"), "--out", str(folder),
        *_settings(options)]
    before = _children_seconds()
    done = subprocess.run([sys.executable, "-m", "omnilatent", "train", *words],
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"the training of {run.name!r} ended with {done.returncode}: see above.")
    if not begun:
        spent.write_text(f"{_children_seconds() - before:.1f}")
    return folder, None if begun else _children_seconds() - before


def _settings(options: Finetune) -> list[str]:
    # Crops at the pictures' own scale: the recipe's, which vary it, would learn another size of letters.
    each = {"steps": options.steps, "optimizer": options.optimizer, "lr": f"{options.lr:g}", "warmup": 20,
            "size": options.size, "min-scale": 1, "batch-size": options.batch_size, "seed": options.seed, "workers": 0,
            "device": "cpu", "save-every": 40, "validate-every": options.steps}
    return [word for name, value in each.items() for word in (f"--{name}", str(value))]


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, data: Path) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
    """Set → figures, and set → pictures: microscopy and text in their own sizes, photos as 256² squares."""
    codec = omnilatent.load(name)
    figures: dict[str, Any] = {"weights_hash": codec.provenance.weights_hash}
    pictures = {}
    for domain in SETS:
        source = open_images(str(data / domain / "val"))
        images = EvaluationImages(source, 256 if domain == "photos" else None)
        measured, pictures[domain] = evaluate(codec, images, batch_size=4, metrics=("psnr", "ssim"), keep=len(images),
                                              health=False, speed=False)
        figures[domain] = {key: round(figure.value, 4) for key, figure in measured.figures.items()} | {
            "n": len(measured.keys),
            "psnr_per_image": dict(zip(measured.keys, (round(v, 2) for v in measured.per_image["psnr"]), strict=True))}
    return figures, pictures


def main(options: Finetune) -> None:
    data = options.work / "pictures"
    if not data.exists():  # once: the README may have changed since, and the text with it
        with new_folder(data) as folder:
            build(folder)
    rows = {"before (bundled)": {"cpu_seconds": 0.0}}
    seen: dict[str, dict[str, list[Picture]]] = {}
    rows["before (bundled)"]["figures"], seen["before (bundled)"] = measure(MODEL, data)
    for run in RUNS:
        folder, seconds = train(run, options, data)
        figures, seen[run.name] = measure(str(folder), data)
        rows[run.name] = {"trained_on": run.learned, "freeze": run.freeze, "cpu_seconds": seconds, "figures": figures}
    settings = {name: value for name, value in asdict(options).items() if name != "work"}
    flags = " ".join(_settings(options))
    record = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"), "model": MODEL, "settings": settings,
        "command": f"omnilatent train {MODEL} --init {MODEL} --data SET/train --val SET/val {flags}",
        "pictures": file_hash(*sorted(data.glob("*/*/*"))), "conditions": "one CPU thread, fp32, posterior mode, 8 bits; one seed",
        "versions": {name: version(name) for name in ("torch", "scikit-image", "matplotlib", "pillow")},
        "rows": rows,
    }
    replace_file(RESULTS / "finetune.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draw(seen, RESULTS / "finetune.png")
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """PSNR / SSIM of each row on each set's held-out pictures, in Markdown."""
    first = next(iter(rows.values()))["figures"]
    heads = " | ".join(f"{domain} (N = {first[domain]['n']})" for domain in SETS)
    lines = [f"| | CPU [s] | {heads} |", "| --- | ---: |" + " ---: |" * len(SETS)]
    for name, row in rows.items():
        cells = [f"{row['figures'][d]['psnr']:.2f} dB / {row['figures'][d]['ssim']:.3f}" for d in SETS]
        spent = "–" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}"
        lines.append(f"| {name} | {spent} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(seen: dict[str, dict[str, list[Picture]]], file: Path, side: int = 80) -> None:
    """Crops of two held-out pictures a domain: original, before, the null, after."""
    columns: dict[str, list[np.ndarray]] = {"original": [], "before": [], "photos continued": [], "tuned": []}
    for domain, keys in (("microscopy", ("ihc-0.png", "cell-1.png")), ("text", ("page.png", "rendered-00.png"))):
        labels = {"before": "before (bundled)", "photos continued": NULL, "tuned": f"tuned on {domain}"}
        for key in keys:
            found = {label: next(p for p in seen[row][domain] if p.key == key) for label, row in labels.items()}
            corner = busiest(found["before"].original, side)
            columns["original"].append(crop(found["before"].original, corner, side))
            for label, picture in found.items():
                columns[label].append(crop(picture.reconstruction, corner, side))
    grid(columns, {}, 2).save(file, optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    try:
        main(tyro.cli(Finetune))
    except UserError as mistake:
        raise SystemExit(f"finetune.py: {mistake}") from None
