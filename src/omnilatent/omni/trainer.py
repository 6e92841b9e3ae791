"""The door from Python into the one loop: `Trainer(model, config, dataloader).train()`.

    dataloader = DataLoader(dataset, batch_size=config.batch_size, collate_fn=collate_multimodal, shuffle=True)
    Trainer(model, config, dataloader).train()

A data set gives dictionaries of any of the model's modalities: `text` int64 ids `(n,)`, `audio` `(bands, frames)`, `image`
`(3, h, w)`, `video` `(3, frames, h, w)`. Every step draws a pair of source and target among those of its batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..training.config import OptimizerConfig, RunConfig
from ..training.loop import launch_fabric, train
from .card import card
from .config import OmniLatentConfig, OmniTraining, PairConfig
from .examples import OmniBatch
from .model import OmniLatentModel
from .pairs import Plan
from .saving import save
from .task import OmniTask
from .text import PAD
from .tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def collate_multimodal(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples → modality → batch; texts, `(n,)` int64, are padded with 0 to the longest."""
    longest = max((len(e["text"]) for e in examples if "text" in e), default=0)
    return {name: torch.stack([torch.nn.functional.pad(e[name], (0, longest - len(e[name])), value=PAD) if name == "text"
                               else e[name] for e in examples]) for name in examples[0]}


class Trainer:
    """
    Args:
        model: learns in place.
        config: of which `batch_size` is what the loader gives, and learning_rate, weight_decay, max_steps, mixed_precision
            and gradient_checkpointing are taken.
        dataloader: gives batches by modality; it is begun again when it ends.
        out: the run's folder, by default runs/omni-TIME.
        tokenizer: saved with the model; by default bytes, if the model's vocabulary holds them.
        run: more settings of the run.
        pairs: which pairs are drawn; by default every one among a batch's modalities as likely as any other.
    """

    def __init__(
        self, model: OmniLatentModel, config: OmniLatentConfig, dataloader: Iterable[Mapping[str, Tensor]], *,
        out: str | Path | None = None, tokenizer: Tokenizer | None = None, run: RunConfig = RunConfig(),
        pairs: PairConfig = PairConfig(jobs=1, fused_share=0.0),
    ) -> None:
        run = replace(run, steps=config.max_steps, batch_size=config.batch_size, amp=config.mixed_precision)
        optimizer = OptimizerConfig(lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay,
                                    warmup=max(1, min(2_000, config.max_steps // 20)))
        self.config = OmniTraining(model=model.config, pairs=pairs, optimizer=optimizer, run=run)
        model.backbone.checkpointing = config.gradient_checkpointing
        self.out = Path(out) if out is not None else Path("runs") / f"omni-{time.strftime('%Y%m%d-%H%M%S')}"
        self.task = LoaderTask(self.config, model, dataloader, tokenizer or ByteTokenizer())

    def train(self, resume: str | Path | None = None) -> dict[str, float]:
        """Train to `max_steps`; the run's folder then holds `final/`. Returns the last figures."""
        from ..training.checkpoint import resume_point

        fabric = launch_fabric(self.config.run)
        return train(self.task, self.config.run, self.out, fabric, resume_point(Path(resume)) if resume else None)


class LoaderTask(OmniTask):
    """`OmniTask` over the user's own model and loader. `fit`, what decides what is best, is the training loss's running mean,
    negated, since nothing is held out."""

    def __init__(self, config: OmniTraining, model: OmniLatentModel, dataloader: Iterable[Mapping[str, Tensor]],
                 tokenizer: Tokenizer) -> None:
        self.config, self.given, self.dataloader, self.tokenizer = config, model, dataloader, tokenizer
        self.running: Tensor | None = None

    def __str__(self) -> str:
        return "batches of a data loader"

    def build(self) -> OmniLatentModel:
        return self.given

    def setup(self, fabric: Fabric) -> None:
        super().setup(fabric)
        self._picture = None

    def batches(self, start: int, stop: int) -> Iterator[OmniBatch]:
        loader = iter(self.dataloader)
        for step in range(start, stop):
            data = next(loader, None)
            if data is None:
                loader = iter(self.dataloader)
                data = next(loader, None)
                if data is None:
                    raise UserError("the data loader gives no batch: its data set is empty, or smaller than a batch.")
            unknown = [name for name in data if name not in self.config.model.modalities]
            if unknown or not data:
                raise UserError(f"a batch holds modalities of the model, {', '.join(self.config.model.modalities)}; got "
                                f"{', '.join(data) or 'nothing'}.")
            known = tuple(name for name in self.config.model.modalities if name in data)
            count = len(next(iter(data.values())))
            jobs = Plan(self.config.pairs, known, self.config.run.seed, self.config.run.steps).jobs(step, count)
            parts = [(job, {name: data[name][i * count // len(jobs) : (i + 1) * count // len(jobs)] for name in job.names})
                     for i, job in enumerate(jobs)]
            yield OmniBatch(parts)

    def step(self, batch: OmniBatch, position: int) -> dict[str, Any]:
        logged = super().step(batch, position)
        loss = torch.as_tensor(logged["loss"])
        self.running = loss if self.running is None else self.running.lerp(loss, 0.02)
        return logged

    def validate(self) -> dict[str, float]:
        return {"fit": -float(self.running) if self.running is not None else 0.0}

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        config = self.config
        training = {"recipe": config.recipe, "step": step}
        save(folder, self.ema.average.model, self.tokenizer, None,
             card(config, "a data loader", "the training data itself", figures, step, self.command), training=training)
