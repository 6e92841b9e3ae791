"""LGQ, SimVQ, VQ and FSQ beside KL on one budget: the same encoder and decoder, crops, batches, steps, rates, discriminator.

    python benchmarks/compare_tokenizers.py learn [--each 3] [--gpus 0 1]     every point that is not in the JSON yet
    python benchmarks/compare_tokenizers.py table                             mean ± spread over the seeds

A point is one `omnilatent train` of a small recipe with the options of `SAME`, in a process of its own, measured on the val
photos at 256² by the protocol. f8 with 1,024 and 16,384 codes of 8 numbers and three seeds; KL has the 4 channels of kl-f8-small. At f4,
KL with LDM's 3 channels and the tokenizer that was best at f8 and 16,384 codes. What tells the quantizers apart is theirs
alone: their losses, at the package's defaults. Points are added to results/tokenizers.json as they end; a run that is
stopped goes on where it was. GPUs are shared by `each` processes, so seconds say little.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import tyro

from omnilatent.metrics.catalogue import METRICS
from omnilatent.report.record import replace_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tokenizers.json"
KINDS, SIZES, SEEDS = ("lgq", "simvq", "vq", "fsq"), (1024, 16384), (0, 1, 2)
F4 = "--widths 32 64 96"
STEPS = 1500
SAME = ("--size 128 --batch-size 64 --optimizer muon --lr 2e-3 --warmup 200 --l1 1 --l2 2 --perceptual laplacian "
        "--perceptual-weight 1 --adversarial-weight 0.25 --disc-lr 2e-4 --no-compile")
FIGURES = ("psnr", "ssim", "spectrum_high", "lpips_vgg", "rfid", "active_ratio", "codes_used", "perplexity", "entropy_bits",
           "bits_per_pixel", "compression", "parameters")
SHOWN = ("psnr", "ssim", "lpips_vgg", "rfid", "spectrum_high", "active_ratio", "perplexity", "entropy_bits", "bits_per_pixel",
         "compression", "parameters")


@dataclass(frozen=True)
class Learn:
    """Learn and measure the points that are missing."""

    data: Path = ROOT.parent / "shared" / "data"
    each: int = 3
    """processes a GPU"""
    gpus: tuple[int, ...] = ()
    """numbers of the GPUs; by default all"""
    until: float = 1e9
    """seconds after which no point is begun"""
    steps: int = STEPS
    only: tuple[str, ...] = ()
    """points, as f8/lgq/1024/0; by default all"""
    out: Path = RESULTS


@dataclass(frozen=True)
class Point:
    """Learn and measure one point, and print its figures."""

    name: tyro.conf.Positional[str]
    data: Path
    steps: int = STEPS


@dataclass(frozen=True)
class Table:
    """Print the tables."""

    out: Path = RESULTS


def main(options: Learn | Point | Table) -> None:
    {Learn: learn, Point: point, Table: lambda given: print(tables(read(given.out)), end="")}[type(options)](options)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"points": {}}


def names(points: dict[str, Any]) -> list[str]:
    """All points, seed by seed; the pair at f4 once the points at f8 are known."""
    found = [f"f8/{kind}/{size}/{seed}" for seed in SEEDS for size in SIZES for kind in KINDS]
    found += [f"f8/kl/0/{seed}" for seed in SEEDS]
    if set(found) <= set(points):
        best = max(KINDS, key=lambda kind: statistics.mean(points[f"f8/{kind}/16384/{seed}"]["psnr"] for seed in SEEDS))
        found += [f"f4/{kind}/0" for kind in (f"{best}/16384", "kl/0")]
    return found


def learn(options: Learn) -> None:
    start, lock, record = time.monotonic(), Lock(), read(options.out)
    budget = {"steps": options.steps, "same": SAME, "data": "imagenet-1k-sample: train.tar, val.tar at 256²"}
    for name, value in budget.items():
        if record["points"] and record[name] != value:
            raise SystemExit(f"{options.out} holds points of another budget ({name}: {record[name]}): give another --out.")
    record |= budget
    where = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
    free = list(options.gpus or range(max(1, torch.cuda.device_count()))) * options.each

    def run(name: str) -> None:
        if time.monotonic() - start > options.until:
            return
        with lock:
            gpu = free.pop(0)
        command = [sys.executable, __file__, "point", name, "--data", str(options.data), "--steps", str(options.steps)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)})
        with lock:
            free.append(gpu)
            if done.returncode:
                print(f"{name} failed:\n{done.stdout[-500:]}\n{done.stderr[-2500:]}", flush=True)
                return
            figures = json.loads(done.stdout.strip().splitlines()[-1])
            record["points"][name] = figures | where
            replace_file(options.out, json.dumps(record, indent=1) + "\n")
            print(f"{time.monotonic() - start:5.0f} s  {name}: {figures['psnr']:.2f} dB, {figures['seconds']:.0f} s", flush=True)

    while missing := [name for name in options.only or names(record["points"]) if name not in record["points"]]:
        before = len(record["points"])
        with ThreadPoolExecutor(len(free)) as pool:
            list(pool.map(run, missing))
        if len(record["points"]) == before:
            break
    print(tables(record))


def point(options: Point) -> None:
    import omnilatent
    from omnilatent.cli.train import main as train
    from omnilatent.data import EvaluationImages, open_images
    from omnilatent.metrics.protocol import evaluate

    level, kind, size, seed = options.name.split("/")
    own = "--kl-weight 1e-6" if kind == "kl" else f"--kl-weight 0 --codes {size}"
    own += f" {F4}" if level == "f4" else ""
    own += " --latent-channels 3" if options.name.startswith("f4/kl") else ""
    start, late = options.steps * 3 // 5, options.steps // 10
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        recipe = "kl-f8-small" if kind == "kl" else f"{kind}-small"
        tars = options.data / "imagenet-1k-sample"
        train([recipe, *f"--data {tars / 'train.tar'} --val {tars / 'val.tar'} --out {folder}/run --seed {seed} --steps "
               f"{options.steps} --save-every {options.steps} --validate-every {options.steps} {SAME} {own} "
               f"--disc-start-step {start} --disc-ramp {late} --workers 4".split()])
        seconds = time.monotonic() - began
        codec = omnilatent.load(f"{folder}/run/final", "cuda" if torch.cuda.is_available() else "cpu")
        images = EvaluationImages(open_images(str(tars / "val.tar")), 256, None)
        measured, _ = evaluate(codec, images, batch_size=20, metrics=FIGURES, health=False, speed=False)
    found = {name: round(figure.value, 5) for name, figure in measured.figures.items() if figure.value is not None}
    missing = {name: figure.note.partition(", ")[0] for name, figure in measured.figures.items() if figure.value is None}
    print("\n" + json.dumps(found | {"seconds": round(seconds, 1), "not measured": missing}))


def tables(record: dict[str, Any]) -> str:
    """A row each for quantizer and size: mean ± standard deviation over the seeds."""
    rows: dict[str, list[dict[str, float]]] = {}
    for name, figures in record["points"].items():
        rows.setdefault(name.rpartition("/")[0], []).append(figures)
    shown = [name for name in SHOWN if any(name in figures for figures in record["points"].values())]
    heads = [METRICS[name].name + (f" [{METRICS[name].unit}]" if METRICS[name].unit else "") for name in shown]
    lines = ["| " + " | ".join(["", "codes asked for", "seeds", *heads]) + " |", "| --- |" + " ---: |" * (len(heads) + 2)]
    for name, seeds in sorted(rows.items(), key=lambda row: (row[0].split("/")[0] == "f4", int(row[0].split("/")[2]), row[0])):
        level, kind, size = name.split("/")
        cells = [cell([figures[key] for figures in seeds if key in figures], key) for key in shown]
        codes = f"{int(size):,}" if size != "0" else "–"
        lines.append("| " + " | ".join([f"{kind.upper() if kind != 'simvq' else 'SimVQ'}, {level}", codes, str(len(seeds)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def cell(values: list[float], key: str) -> str:
    if not values:
        return "–"
    digits = METRICS[key].digits
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and max(values) > min(values) else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


if __name__ == "__main__":
    main(tyro.cli(Learn | Point | Table))
