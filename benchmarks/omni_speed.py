"""Speed and memory of the any-to-any model at its default size, 768 × 12: training steps by pair, and text token by token.

    python benchmarks/omni_speed.py [--batch-size 16] [--steps 30]          on a GPU; writes results/omni_speed.json
    python benchmarks/omni_speed.py --tiny                                  a trial on a CPU, which writes nothing

Inputs as the peer's: pictures of 224², videos of 16 frames of 112², mel spectrograms 128 × 500, texts of 128 tokens. Tokens are
those of source and target together. A step is forward, backward, clipping and AdamW (fused), bf16 autocast, layers compiled,
forward and backward replayed as CUDA graphs, as the recipe's task does them, which also keeps a moving average of the weights;
medians of wall times, the GPU waited for before and after each step, after warm-up. Text is written by a model that is not
compiled. Memory: the peak of training steps at batch 4 with checkpointing, not compiled, in a process that may take 8 GB.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from omnilatent.nn.replay import Replayed
from omnilatent.omni.config import OmniModelConfig, PairConfig
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.pairs import Job

RESULTS = Path(__file__).parent / "results" / "omni_speed.json"
PAIRS = (("image", "image"), ("image", "text"), ("text", "image"), ("video", "audio"), ("audio", "video"))
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


class Training:
    """A model's training steps as the recipe's task does them, one `Replayed` for all jobs."""

    def __init__(self, config: OmniModelConfig, device: torch.device, compiled: bool) -> None:
        self.learning = OmniLearning(OmniLatentModel(config), PairConfig()).to(device).train()
        if compiled:
            self.learning.use_compiled()
        fused = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.learning.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.01, **fused)
        self.replayed = Replayed(self._learn, self.learning.parameters(), eager=2)
        self.generator = torch.Generator(device)

    def _learn(self, job: Job, needed: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(self.generator.device.type, torch.bfloat16):
            loss = self.learning(job, needed)["loss"]
        loss.backward()
        return {"loss": loss.detach()}

    def step(self, job: Job, data: dict[str, Tensor]) -> None:
        self.replayed.clear()
        self.replayed(job, self.learning.needs(job, data, self.generator.manual_seed(0)))
        self.replayed.drop_untouched()
        torch.nn.utils.clip_grad_norm_(self.learning.parameters(), 1.0, foreach=True)
        self.optimizer.step()


def main(options: OmniSpeed) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    if options.memory:
        print(json.dumps(memory(OmniModelConfig(), device)))
        return
    config = replace(OmniModelConfig(), **({"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 300} if options.tiny else {}))
    data = inputs(options.batch_size, device, options.tiny)
    record: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
                              "batch_size": options.batch_size, "flowing": options.flowing, "rows": []}
    for checkpointing in (False, True):
        training = Training(replace(config, gradient_checkpointing=checkpointing), device, device.type == "cuda")
        model = training.learning.model
        record["parameters"] = sum(p.numel() for p in model.parameters())
        for source, target in PAIRS:
            tokens = sum(model.read({name: data[name]}).tokens - 1 for name in (source, target))
            job = Job((source,), target, options.flowing and target != "text")
            ms = timed(partial(training.step, job, data), device, options.steps)
            rate = tokens * options.batch_size / ms  # thousand a second
            record["rows"].append({"pair": f"{source}→{target}", "checkpointing": checkpointing, "tokens": tokens, "ms": ms, "k_tokens": rate})
            print(f"{source}→{target}, checkpointing {'on' if checkpointing else 'off'}: {ms:.2f} ms, {rate:.0f} k tokens/s", flush=True)
    del training, model
    record["generate_ms"] = generation(config, device, data["image"][:1])
    print(f"64 tokens of text, batch 1: {record['generate_ms']:.1f} ms", flush=True)
    if device.type == "cuda":
        done = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
        record["memory"] = json.loads(done.stdout.splitlines()[-1])
        print(record["memory"])
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def generation(config: OmniModelConfig, device: torch.device, image: Tensor) -> float:
    """Milliseconds for 64 tokens of text from a picture, by a model of its own."""
    model = OmniLatentModel(config).to(device).eval()
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        return timed(partial(model.generate, "image", image, max_len=64), device, 5)


def memory(config: OmniModelConfig, device: torch.device) -> dict[str, float]:
    """Peak GB of four steps of each pair, the last two replayed, at batch 4 with checkpointing; fails where 8 GB do not suffice."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(device).total_memory)
    torch.cuda.reset_peak_memory_stats()
    training, data = Training(replace(config, gradient_checkpointing=True), device, compiled=False), inputs(4, device, tiny=False)
    for source, target in PAIRS * 4:
        training.step(Job((source,), target, False), data)
    return {"peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9, "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "cap_gb": CAP / 1e9}


if __name__ == "__main__":
    main(tyro.cli(OmniSpeed))
