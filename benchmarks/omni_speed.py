"""Speed and memory of the any-to-any model at its default size, 768 × 12: training steps by pair, and text token by token.

    python benchmarks/omni_speed.py [--batch-size 16] [--steps 30]          on a GPU; writes results/omni_speed.json
    python benchmarks/omni_speed.py --tiny                                  a trial on a CPU, which writes nothing

Inputs as the peer's: pictures of 224², videos of 16 frames of 112², mel spectrograms 128 × 500, texts of 128 tokens. Tokens are
those of source and target together. A step is forward, backward, clipping and AdamW (fused), bf16 autocast, layers compiled;
medians of CUDA-event timings after warm-up. Memory: the peak of training steps at batch 4 with checkpointing, in a process that
may take 8 GB.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from omnilatent.omni.config import OmniModelConfig, PairConfig
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.model import OmniLatentModel
from omnilatent.nn.replay import Replayed
from omnilatent.omni.pairs import Job

RESULTS = Path(__file__).parent / "results" / "omni_speed.json"
PAIRS = (("image", "image"), ("image", "text"), ("text", "image"), ("video", "audio"), ("audio", "video"))
PEER = {"on": (61, 92), "off": (89, 124), "generate_ms": 540}  # thousand tokens a second; one H200, fp16, not compiled
CAP = 8e9


@dataclass(frozen=True)
class OmniSpeed:
    """Time training steps and generation."""

    batch_size: int = 16
    steps: int = 30
    tiny: bool = False
    flowing: bool = False
    """Flow matching instead of regression."""
    memory: bool = False
    """Only the memory of training steps in this process."""


def inputs(batch: int, device: torch.device, tiny: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, video, mel, text = ((32, 32), (4, 16, 16), 16, 8) if tiny else ((224, 224), (16, 112, 112), 500, 128)
    made = {"image": torch.rand(batch, 3, *image, generator=generator), "video": torch.rand(batch, 3, *video, generator=generator),
            "audio": torch.rand(batch, 128, mel, generator=generator),
            "text": torch.randint(3, 259, (batch, text), generator=generator)}
    return {name: t.to(device) for name, t in made.items()}


def timed(step: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Median milliseconds."""
    for _ in range(4):  # compiled, then recorded
        step()
    times = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def training(config: OmniModelConfig, device: torch.device, compiled: bool) -> tuple[OmniLearning, torch.optim.AdamW]:
    learning = OmniLearning(OmniLatentModel(config), PairConfig()).to(device).train()
    if compiled:
        learning.model.backbone.compile_layers()
    fused = {"fused": True} if device.type == "cuda" else {}
    return learning, torch.optim.AdamW(learning.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.01, **fused)


def step_of(learning: OmniLearning, optimizer: torch.optim.AdamW, job: Job, data: dict[str, Tensor]) -> Callable[[], None]:
    """As the recipe's task does it."""
    device = next(learning.parameters()).device
    generator = torch.Generator(device)

    def learn(_: Hashable, needed: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            loss = learning(job, needed)["loss"]
        loss.backward()
        return {"loss": loss.detach()}

    replayed = Replayed(learn, learning.parameters(), eager=2)

    def step() -> None:
        replayed.clear()
        replayed(None, learning.needs(job, data, generator.manual_seed(0)))
        replayed.drop_untouched()
        torch.nn.utils.clip_grad_norm_(learning.parameters(), 1.0, foreach=True)
        optimizer.step()

    return step


def main(options: OmniSpeed) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    if options.memory:
        print(json.dumps(memory(OmniModelConfig(), device)))
        return
    config = replace(OmniModelConfig(), **({"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 300} if options.tiny else {}))
    data = inputs(options.batch_size, device, options.tiny)
    record: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
                              "batch_size": options.batch_size, "flowing": options.flowing, "peer": PEER, "rows": []}
    for checkpointing in (False, True):
        learning, optimizer = training(replace(config, gradient_checkpointing=checkpointing), device, device.type == "cuda")
        record["parameters"] = sum(p.numel() for p in learning.model.parameters())
        for source, target in PAIRS:
            tokens = sum(learning.model.read({name: data[name]}).tokens - 1 for name in (source, target))
            job = Job((source,), target, options.flowing and target != "text")
            ms = timed(step_of(learning, optimizer, job, data), device, options.steps)
            rate = tokens * options.batch_size / ms  # thousand a second
            record["rows"].append({"pair": f"{source}→{target}", "checkpointing": checkpointing, "tokens": tokens, "ms": ms, "k_tokens": rate})
            print(f"{source}→{target}, checkpointing {'on' if checkpointing else 'off'}: {ms:.2f} ms, {rate:.0f} k tokens/s", flush=True)
    model = learning.model.eval()
    model.zero_grad(set_to_none=True)
    one = {name: t[:1] for name, t in data.items()}
    for compiled in (False, True) if device.type == "cuda" else (False,):
        with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
            ms = timed(lambda: model.generate("image", one["image"], max_len=64), device, 5)
        record["generate_ms" if compiled else "generate_uncompiled_ms"] = ms
        print(f"64 tokens of text, batch 1: {ms:.1f} ms", flush=True)
        model.backbone.compile_layers()
    if device.type == "cuda":
        done = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
        record["memory"] = json.loads(done.stdout.splitlines()[-1])
        print(record["memory"])
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def memory(config: OmniModelConfig, device: torch.device) -> dict[str, float]:
    """Peak GB of two steps of each pair at batch 4 with checkpointing; fails where 8 GB do not suffice."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.reset_peak_memory_stats()
    learning, optimizer = training(replace(config, gradient_checkpointing=True), device, compiled=False)
    data = inputs(4, device, tiny=False)
    for pair in PAIRS * 2:
        step_of(learning, optimizer, Job((pair[0],), pair[1], False), data)()
    return {"peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9, "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "cap_gb": CAP / 1e9}


if __name__ == "__main__":
    main(tyro.cli(OmniSpeed))
