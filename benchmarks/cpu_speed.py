"""kl-f8-small on a CPU beside diffusers' `AutoencoderTiny`, as published and widened to as many parameters.

    python benchmarks/cpu_speed.py [--threads 1] [--size 256] [--calls 9]

One 8-bit picture → normalised latent, and latent → picture, calls of all models in turn, so that whatever else the
machine does meets all of them; medians, and ratios to kl-f8-small. Random weights where there are none: speed does not
depend on them. Writes results/cpu_speed.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import omnilatent
from omnilatent.autoencoders.config import TinyConfig
from omnilatent.autoencoders.tiny import TinyCodec, build_vae
from omnilatent.codec import Codec, Provenance
from omnilatent.latent import LatentSpec

RESULTS = Path(__file__).parent / "results"
FIRST = "kl-f8-small"


@dataclass(frozen=True)
class CpuSpeed:
    """Time the small models on a CPU in one run."""

    threads: int = 1
    """Threads of PyTorch."""
    size: int = 256
    """Side of the picture in pixels."""
    calls: int = 9
    """Calls of each, of which the median counts."""


def tiny(width: int, spec: LatentSpec) -> Codec:
    vae = build_vae(TinyConfig(encoder_width=width, decoder_width=width), spec)
    return TinyCodec(vae, spec, Provenance("AutoencoderTiny", "tiny"))


def widened(parameters: int, spec: LatentSpec) -> Codec:
    """An AutoencoderTiny of about so many parameters."""
    return min((tiny(width, spec) for width in range(64, 97, 2)), key=lambda c: abs(c.parameter_count() - parameters))


def main(options: CpuSpeed) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    small = omnilatent.load(FIRST)
    spec = LatentSpec(4, 8, "point")
    codecs = {FIRST: small, "AutoencoderTiny (TAESD's widths)": tiny(64, spec),
              "AutoencoderTiny, widened": widened(small.parameter_count(), spec)}
    picture = torch.randint(0, 256, (1, 3, options.size, options.size), dtype=torch.uint8)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, codec in codecs.items():
        latent = codec.encode(picture).mode()
        calls[name, "encode"] = lambda c=codec: c.encode(picture)
        calls[name, "decode"] = lambda c=codec, z=latent: c.decode(z)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(options.calls + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first is the warm-up
                seconds[key].append(time.perf_counter() - start)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [{"model": name, "parameters": codec.parameter_count(),
             **{f"{what}_ratio": median[FIRST, what] / median[name, what] for what in ("encode", "decode")},
             **{f"{what}_seconds": median[name, what] for what in ("encode", "decode")}}
            for name, codec in codecs.items()]
    record = {"command": "python benchmarks/cpu_speed.py", "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
              "threads": options.threads, "size": options.size, "calls": options.calls, "rows": rows}
    (RESULTS / "cpu_speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['model']:<34} {row['parameters']:>10,} parameters   encode {row['encode_seconds'] * 1000:8.1f} ms "
              f"{row['encode_ratio']:5.2f} ×   decode {row['decode_seconds'] * 1000:8.1f} ms {row['decode_ratio']:5.2f} ×")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(tyro.cli(CpuSpeed))
