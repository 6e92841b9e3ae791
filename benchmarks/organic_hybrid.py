"""Hybrids: organic layers before or behind a few of TAEF2's own, as points on the curve of speed against likeness.

    python benchmarks/organic_hybrid.py --lessons runs/taef2 [--device cuda]

LESSONS is a folder of lessons that `omnilatent clone ../shared/data/taef2 --lessons` has filled. Encoder: organic layers
say what TAEF2's encoder holds at 1/8 of the picture's size, its last three blocks do the rest. Decoder: TAEF2's first
three blocks, then organic layers to pixels. PSNR on the val photos, milliseconds of one thread on the CPU.
Writes results/organic_hybrid.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import omnilatent
from omnilatent.data import EvaluationImages, open_images
from omnilatent.metrics.pixel import psnr
from omnilatent.organic.dropin_learning import DecoderLearning, EncoderLearning
from omnilatent.organic.fovea import Fovea
from omnilatent.organic.grid_learning import GridConfig
from omnilatent.organic.learning import Learning, Pace
from omnilatent.organic.lessons import LessonStore
from omnilatent.organic.peers import ALONE

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Organic layers with a part of the teacher."""

    lessons: Path
    """holds lessons/ and held-out/"""
    data: Path = ROOT.parent / "shared" / "data"
    out: Path = ROOT / "benchmarks" / "results" / "organic_hybrid.json"
    device: str = "cpu"
    layers: int = 3
    neurons: int = 224
    candidates: int = 2_048
    sweeps: int = 100
    sites: int = 1_000_000
    limit: int | None = None
    seed: int = 0


def learned(learning: Learning, train: LessonStore, held: LessonStore, sweeps: int, device: str, name: str) -> object:
    """Go through all rounds; the model."""
    begin = time.perf_counter()
    for number in range(learning.rounds):
        for store, is_held in ((train, False), (held, True)):
            for position, start in enumerate(range(0, len(store), 16)):
                learning.see(store.read(slice(start, start + 16), device), is_held, position)
        for sweep in range(sweeps + 1):
            learning.work(sweep == sweeps)
        print(f"{time.perf_counter() - begin:5.0f} s  {name}, round {number + 1}: left {learning.left:.4f}", flush=True)
    return learning.model()


@torch.no_grad()
def main(options: Options) -> None:
    torch.set_float32_matmul_precision("highest")
    teacher = omnilatent.load(str(options.data / "taef2"), options.device)
    encoder, decoder = teacher.module.encoder, teacher.module.decoder
    train, held = LessonStore(options.lessons / "lessons"), LessonStore(options.lessons / "held-out")
    device = torch.device(options.device)
    pace = Pace(len(train), len(held), options.sites, options.seed)
    grid = GridConfig(options.layers, options.neurons, options.candidates)
    stem = learned(EncoderLearning(Fovea(), grid, pace, ALONE, device, None, lambda x: encoder[:11](x.images)), train, held,
                   options.sweeps, options.device, "stem")
    wide = GridConfig(options.layers, options.neurons, options.candidates, reach=1, context=32)
    head = learned(DecoderLearning(lambda x: decoder[:6](x.taught), 64, 8, wide, pace, ALONE, device), train, held,
                   options.sweeps, options.device, "head")
    rows = {
        "organic stem, TAEF2's last three blocks": (lambda x: encoder[11:](stem(x)), decoder, "encoder"),
        "TAEF2's first three blocks, organic head": (encoder, lambda z: head(decoder[:6](z)), "decoder"),
        "TAEF2": (encoder, decoder, "both"),
    }
    photos = EvaluationImages(open_images(str(options.data / "imagenet-1k-sample" / "val.tar")), 256, options.limit)
    found: dict[str, dict[str, float | str]] = {}
    for label, (encode, decode, half) in rows.items():
        values = [psnr(image[None].to(device), decode(encode(image[None].to(device))).clamp(0, 1)).cpu() for _, image in photos]
        found[label] = {"psnr": round(float(torch.cat(values).mean()), 3), "half": half, "n": len(values)}
    for module in (stem, head, encoder, decoder):
        module.to("cpu")
    torch.set_num_threads(1)
    picture, latent = torch.rand(1, 3, 256, 256), torch.randn(1, 32, 32, 32)
    for label, (encode, decode, _) in rows.items():
        found[label]["encode_ms"], found[label]["decode_ms"] = milliseconds(encode, picture), milliseconds(decode, latent)
    record = {"options": {name: str(value) for name, value in vars(options).items() if name not in ("lessons", "data", "out")},
              "torch": torch.__version__, "rows": found}
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1, ensure_ascii=False))


def milliseconds(call: Callable[[Tensor], Tensor], value: Tensor, times: int = 7) -> float:
    """Median of processor time."""
    call(value)
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call(value)
        seconds.append(time.process_time() - start)
    return round(1000 * sorted(seconds)[times // 2], 2)


if __name__ == "__main__":
    main(tyro.cli(Options))
