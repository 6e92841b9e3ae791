"""Variants of a recipe trained side by side on this machine's GPUs, each measured under the protocol.

    python benchmarks/trials.py '8 groups' '32 groups' --data ../shared/data --runs runs/trials --at-once 3

Every NAME is a row of `TRIALS` or `NAME=RECIPE OPTIONS`, which is trained for as long as its options say, in a process
of its own, `--at-once` of them on each GPU: a small model leaves a GPU waiting for Python. Then it is measured on the
100 val photos at 256², on the 8 Kodak photos at their own size, and its latent's health on 16 of the val photos. The
figures are merged into `--results`, a trial of the same name replaced; a trial that is there already is not repeated
without `--again`. After `--seconds` what still trains is asked to stop, and measured as it stands.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

SHORT = "--steps 1500 --batch-size 32"  # 48,000 crops: far from converged, to be compared with each other only
TRIALS = {
    "32 groups": f"kl-f8-small {SHORT} --norm-groups 32 --min-scale 0.6",
    "8 groups": f"kl-f8-small {SHORT} --norm-groups 8 --min-scale 0.6",
    "4 groups": f"kl-f8-small {SHORT} --norm-groups 4 --min-scale 0.6",
    "8 groups, no attention": f"kl-f8-small {SHORT} --norm-groups 8 --no-mid-attention --min-scale 0.6",
}
METRICS = ("psnr", "ssim", "vif", "spectrum_high")


@dataclass(frozen=True)
class Trials:
    """Train and measure variants side by side."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Rows of TRIALS, or NAME=RECIPE OPTIONS."""
    data: Path
    """Folder with imagenet-1k-sample/ and kodak/."""
    runs: Path = Path("runs/trials")
    """Folder for the runs."""
    results: Path = Path("benchmarks/results/trials.json")
    """The file that the figures are merged into."""
    gpus: tuple[int, ...] = (0,)
    """Numbers of the GPUs to use; -1 is the CPU."""
    at_once: int = 1
    """Trials on a GPU at the same time."""
    seconds: float = 86_400.0
    """After so long, what still trains is stopped and measured as it stands."""
    again: bool = False
    """Repeat trials that have figures already."""
    one: bool = False
    """Train and measure the only NAME in this process: how the others are started."""


def train_and_measure(options: Trials, name: str, recipe: str) -> None:
    """One trial, in a process of its own."""
    import torch

    from omnilatent import hub
    from omnilatent.cli.main import main as command
    from omnilatent.data import EvaluationImages, open_images
    from omnilatent.metrics.protocol import evaluate

    run, sample = folder_of(options, name), options.data / "imagenet-1k-sample"
    start = time.perf_counter()
    ended = command(["train", *recipe.split(), "--data", str(sample / "train.tar"), "--val", str(sample / "val.tar"),
                     "--out", str(run)])
    seconds = time.perf_counter() - start
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is trained is measured
    if ended not in (0, 130):
        raise SystemExit(ended)
    training = hub.read_config(hub.locate(str(run)))["training"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = hub.load(str(run), device)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    record: dict[str, Any] = {
        "trial": name, "command": f"omnilatent train {recipe}", "date": time.strftime("%Y-%m-%d"), "device": where,
        "seed": training["run"]["seed"], "parameters": codec.parameter_count(), "steps": training["step"],
        "seconds": round(seconds),
    }
    if device == "cuda":
        record["training_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    val = EvaluationImages(open_images(str(sample / "val.tar")), 256)
    measured, _ = evaluate(codec, val, metrics=METRICS, health=True, speed=False)
    record |= {f"val_{key}": measured.figures[key].value for key in METRICS} | {"health": measured.health}
    kodak = EvaluationImages(open_images(str(options.data / "kodak")), None)
    measured, _ = evaluate(codec, kodak, metrics=("psnr", "ssim"), health=False, speed=False)
    record |= {f"kodak_native_{key}": measured.figures[key].value for key in ("psnr", "ssim")}
    (run / "trial.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def folder_of(options: Trials, name: str) -> Path:
    return options.runs / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def merged(file: Path, record: dict[str, Any]) -> None:
    """Write the file with this trial in it, one of the same name replaced."""
    whole = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"trials": []}
    whole["trials"] = [t for t in whole["trials"] if t["trial"] != record["trial"]] + [record]
    file.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def started(options: Trials, name: str, recipe: str, gpu: int) -> subprocess.Popen[bytes]:
    folder = folder_of(options, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, f"{name}={recipe}", "--data", str(options.data), "--runs", str(options.runs),
               "--one"]
    with Path(f"{folder}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)})


def main(options: Trials) -> None:
    wanted = dict((text.split("=", 1) if "=" in text else (text, TRIALS[text])) for text in options.names)
    if options.one:
        for name, recipe in wanted.items():
            train_and_measure(options, name, recipe)
        return
    there = json.loads(options.results.read_text(encoding="utf-8"))["trials"] if options.results.exists() else []
    if not options.again:
        wanted = {name: recipe for name, recipe in wanted.items() if name not in {t["trial"] for t in there}}
    waiting, slots, began = list(wanted.items()), [*options.gpus] * options.at_once, time.monotonic()
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    done: list[dict[str, Any]] = []
    stopping = False
    while waiting or running:
        if not stopping and time.monotonic() - began > options.seconds:
            stopping, waiting = True, []
            for process, _ in running.values():
                process.send_signal(signal.SIGTERM)
        while waiting and slots:
            (name, recipe), gpu = waiting.pop(0), slots.pop(0)
            running[name] = started(options, name, recipe, gpu), gpu
        for name, (process, gpu) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            slots.append(gpu)
            if process.returncode:
                last = Path(f"{folder_of(options, name)}.log").read_text(errors="replace").strip().splitlines()[-3:]
                print(f"{name}: failed with {process.returncode}: {' / '.join(last)}", flush=True)
                continue
            record = json.loads((folder_of(options, name) / "trial.json").read_text(encoding="utf-8"))
            merged(options.results, record)
            done.append(record)
            print(row(record), flush=True)
        time.sleep(0.5)
    print("\n| trial | parameters | steps | s | val dB | SSIM | high-frequency power | Kodak dB |")
    print("| --- |" + " ---: |" * 7)
    for record in done:
        print(row(record))


def row(record: dict[str, Any]) -> str:
    return (f"| {record['trial']} | {record['parameters'] / 1e6:.2f} M | {record['steps']:,} | {record['seconds']} | "
            f"{record['val_psnr']:.2f} | {record['val_ssim']:.3f} | {record['val_spectrum_high']:.3f} | "
            f"{record['kodak_native_psnr']:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Trials))
