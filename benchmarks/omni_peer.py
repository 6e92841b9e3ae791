"""The any-to-any model in the peer's own setting: MNIST at 32² and the digits' names, 4 layers of 128, 1,400 steps of 32 on a CPU.

    python benchmarks/omni_peer.py [--data ../shared/data] [--steps 1400]

The peer reaches 51 % of 200 held-out pictures named rightly and 13.35 dB image → image (the mean image: 13.0). Measured here on
the first 200 test pictures: the share named exactly, PSNR of image → image by regression and by flow, the mean image and the
mean of the picture's own class as nulls. Writes results/omni_peer.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from omnilatent.omni.config import OmniModelConfig, OmniTraining, PairConfig
from omnilatent.omni.evaluation import psnr
from omnilatent.omni.examples import collate
from omnilatent.omni.recipes import WORLD
from omnilatent.omni.task import OmniTask
from omnilatent.training.config import OptimizerConfig, RunConfig
from omnilatent.training.loop import launch_fabric, train

RESULTS = Path(__file__).parent / "results" / "omni_peer.json"
HELD_OUT = 200
PEER = {"named": 0.51, "psnr": 13.35, "mean image": 13.0, "seconds a step": 0.216, "parameters": 2_110_000}


@dataclass(frozen=True)
class OmniPeer:
    """Train and measure in the peer's setting."""

    data: str = "../shared/data"
    """A folder with mnist/."""
    steps: int = 1_400
    optimizer: OptimizerConfig = OptimizerConfig(optimizer="muon", lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup=70,
                                                 ema_decay=0.98)
    flow_share: float = 0.5
    seed: int = 0
    threads: int = 1
    write: bool = True


def main(options: OmniPeer) -> None:
    torch.set_num_threads(options.threads)
    model = OmniModelConfig(hidden_dim=128, num_layers=4, num_heads=4, gradient_checkpointing=False, modalities=("text", "image"),
                            **WORLD)
    config = OmniTraining(
        recipe="omni-peer", model=model, optimizer=options.optimizer, validation_examples=HELD_OUT,
        pairs=PairConfig(jobs=1, fused_share=0.0, flow_share=options.flow_share),
        run=replace(RunConfig(), steps=options.steps, batch_size=32, seed=options.seed, save_every=10**6, validate_every=10**6,
                    workers=0, device="cpu"))
    task = OmniTask(config, options.data, None, lambda file, reason: None)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        figures = train(task, config.run, Path(folder), launch_fabric(config.run))
        seconds = (time.process_time() - began) / options.steps
    trained = task.ema.average.model
    held = collate([task.held_out.sample(i) for i in range(HELD_OUT)], task.tokenizer)["image"]
    labels = [task.held_out.world.sample(i).label for i in range(HELD_OUT)]
    seen = [task.examples.world.sample(i) for i in range(2_000)]
    means = torch.stack([torch.stack([s.image for s in seen if s.label == digit]).mean(0) for digit in range(10)])
    with torch.no_grad():
        source = trained.read({"image": held})
        made = {str(steps): trained.answer(source, "image", (32, 32), steps=steps).clamp(0, 1) for steps in (0, 4, 8, 16)}
    made |= {"mean image": means.mean(0).expand_as(held), "class mean": means[labels]}
    decibels = {name: float(psnr(pictures, held).mean()) for name, pictures in made.items()}
    mean, class_mean = decibels.pop("mean image"), decibels.pop("class mean")
    result = {"named": figures["image→text"], "image to image, dB, by steps of the flow (0: regression)": decibels,
              "mean image, dB": mean, "class mean, dB": class_mean,
              "parameters": sum(p.numel() for p in trained.parameters()), "CPU seconds a step": round(seconds, 3),
              "steps": options.steps, "optimizer": options.optimizer.optimizer, "seed": options.seed, "peer": PEER,
              "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if options.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(OmniPeer))
