"""The door from Python into the one loop: `Trainer(model, config, dataloader).train()`.

    dataloader = DataLoader(dataset, batch_size=config.batch_size, collate_fn=collate_multimodal, shuffle=True)
    Trainer(model, config, dataloader).train()

A data set gives dictionaries of any of the model's modalities: `text` int64 ids `(n,)`, `audio` `(bands, frames)`, `image`
`(3, h, w)`, `video` `(3, frames, h, w)`. Every step draws a pair of source and target among those of its batch.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.mel import MelSpec
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
from .tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

NO_BATCH: Any = object()  # where a loader has ended


class Trainer:
    """
    Args:
        model: learns in place.
        config: of which `batch_size` is what the loader gives, and learning_rate, weight_decay, max_steps, mixed_precision
            and gradient_checkpointing are taken.
        dataloader: gives batches by modality; it is begun again when it ends.
        out: the run's folder, by default runs/omni-TIME; it must hold no run yet.
        tokenizer: what made the ids, saved with the model; by default bytes, as long as all ids are bytes'. Ids that are not
            are learned too, with a warning: what is saved then lacks its tokenizer and is opened when that lies beside it.
        mel: what the spectrograms are, saved with the model, which hears and makes sound files by it; without it, it does not.
        run: more settings of the run.
        pairs: which pairs are drawn; by default every one among a batch's modalities as likely as any other.

    Raises:
        ValueError: a configuration, a tokenizer or a MelSpec that is none of the model's.
    """

    def __init__(
        self, model: OmniLatentModel, config: OmniLatentConfig, dataloader: Iterable[Mapping[str, Tensor]], *,
        out: str | Path | None = None, tokenizer: Tokenizer | None = None, mel: MelSpec | None = None,
        run: RunConfig = RunConfig(), pairs: PairConfig = PairConfig(jobs=1, fused_share=0.0),
    ) -> None:
        for name in ("hidden_dim", "num_layers", "num_heads", "modalities"):
            if getattr(config, name) != getattr(model.config, name):
                raise ValueError(f"the configuration's {name} is {getattr(config, name)}, and the model's {getattr(model.config, name)}: "
                                 "give the one that the model was made with")
        if not isinstance(dataloader, Iterable):
            raise ValueError(f"dataloader is a DataLoader, or another object that gives batches; got {type(dataloader).__name__}")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids; the model's vocab_size is {model.config.vocab_size}")
        if mel is not None and mel.bands != model.config.mel_bands:
            raise ValueError(f"the MelSpec has {mel.bands} bands; the model's mel_bands is {model.config.mel_bands}")
        run = replace(run, steps=config.max_steps, batch_size=config.batch_size, amp=config.mixed_precision)
        optimizer = OptimizerConfig(lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, warmup=2_000)
        self.config = OmniTraining(model=model.config, pairs=pairs, optimizer=optimizer, run=run)
        model.backbone.checkpointing = config.gradient_checkpointing
        self.out = Path(out) if out is not None else Path("runs") / f"omni-{time.strftime('%Y%m%d-%H%M%S')}"
        self.task = LoaderTask(self.config, model, dataloader, tokenizer, mel)

    def train(self, resume: str | Path | None = None) -> dict[str, float]:
        """Train to `max_steps`; the run's folder then holds `final/`.

        Args:
            resume: a run's folder, or a step-N/ in it, to go on from, in that folder. The loader goes on where it was: what the
                run had of the pass over it that it was in is read again and passed over, in the same order where torch's
                global generator shuffles (`DataLoader(shuffle=True)` without a generator of its own).

        Returns:
            The last figures.

        Raises:
            UserError: `out` holds a run already, or `resume` none.
        """
        from ..report.record import replace_file
        from ..training.checkpoint import forget_start, resume_point

        if resume is not None:
            runs = [folder for folder in (Path(resume), Path(resume).parent) if (folder / "run.json").exists()]
            if not runs:
                raise UserError(f"resume={str(resume)!r}: there is no run; give the folder that holds its run.json.")
            self.out = runs[0]
        elif any(self.out.glob("*/config.json")):
            raise UserError(f"{self.out} holds a run already: go on with train(resume={str(self.out)!r}), or give another out.")
        fabric, is_new = launch_fabric(self.config.run), not self.out.exists()
        if fabric.is_global_zero:
            replace_file(self.out / "run.json", json.dumps({"trainer": asdict(self.config)}, indent=2, default=str) + "\n")
        try:
            return train(self.task, self.config.run, self.out, fabric, resume_point(Path(resume)) if resume else None)
        except ValueError:
            if resume is None and fabric.is_global_zero:
                forget_start(self.out, is_new)
            raise
        finally:
            self.task.close()


class LoaderTask(OmniTask):
    """`OmniTask` over the user's own model and loader. `fit`, what decides what is best, is the training loss's running mean,
    negated, since nothing is held out."""

    def __init__(self, config: OmniTraining, model: OmniLatentModel, dataloader: Iterable[Mapping[str, Tensor]],
                 tokenizer: Tokenizer | None, mel: MelSpec | None) -> None:
        self.config, self.given, self.dataloader, self.mel = config, model, dataloader, mel
        self.tokenizer, self.bytes_assumed = tokenizer or ByteTokenizer(), tokenizer is None
        self.bytes_seen = True
        self.running: Tensor | None = None

    def __str__(self) -> str:
        return "batches of a data loader"

    def build(self) -> OmniLatentModel:
        return self.given

    def setup(self, fabric: Fabric) -> None:
        super().setup(fabric)
        self._picture = None

    def batches(self, start: int, stop: int) -> Iterator[OmniBatch]:
        for step, data in zip(range(start, stop), self._given(start), strict=False):
            _check_form(data)
            unknown = [name for name in data if name not in self.config.model.modalities]
            if unknown or not data:
                raise UserError(f"a batch holds modalities of the model, {', '.join(self.config.model.modalities)}; got "
                                f"{', '.join(data) or 'nothing'}.")
            counts = {name: len(t) for name, t in data.items()}
            count = next(iter(counts.values()))
            if set(counts.values()) != {count} or not count:
                raise UserError(f"a batch has as many examples of every modality, one at least; got {counts}.")
            if "text" in data:
                self._check_text(data["text"])
            known = tuple(name for name in self.config.model.modalities if name in data)
            jobs = Plan(self.config.pairs, known, self.config.run.seed, self.config.run.steps).jobs(step, count)
            share = count // len(jobs)
            yield OmniBatch([(job, {name: data[name][number * share : (number + 1) * share] for name in job.names})
                             for number, job in enumerate(jobs)])

    def remedy(self, fits: int) -> str:
        return f"give batches of {f'{fits}, which fit' if fits else 'fewer examples'}, or set gradient_checkpointing=True"

    def _given(self, start: int) -> Iterator[Mapping[str, Tensor]]:
        """The loader's batches from the `start`-th on, without end. Each pass over it is shuffled by a seed of its own, so that a
        run that goes on gets what it would have got; passes before are not read again where the loader has a length."""
        try:
            length = max(1, len(self.dataloader))  # type: ignore[arg-type]
        except TypeError:
            length = sys.maxsize
        number, over = divmod(start, length)
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.run.seed + number)
                batches = iter(self.dataloader)
                first = next(batches, NO_BATCH)  # with which a shuffling loader draws its order
                passed = 1 + sum(1 for _ in islice(batches, over - 1)) if over else 0
            if first is NO_BATCH and isinstance(self.dataloader, Iterator):
                raise UserError("the data loader is used up, and an iterator or generator cannot be begun again: give a DataLoader, a "
                                "list of batches, or another object with __iter__.")
            if first is NO_BATCH:
                raise UserError("the data loader gives no batch: its data set is empty, or smaller than a batch.")
            if not over:
                yield first
            yield from batches
            number, over = number + 1, over - passed

    def _check_text(self, ids: Tensor) -> None:
        """Raise, or warn once, where an id is none of the tokenizer's."""
        most = int(ids.max()) if ids.numel() else 0
        if most < self.tokenizer.vocab_size or not self.bytes_seen:
            return
        if not self.bytes_assumed:
            raise UserError(f"a text has the id {most}, and the tokenizer has the ids 0 to {self.tokenizer.vocab_size - 1}: give the "
                            "one that made the ids.")
        self.bytes_seen = False
        warnings.warn(f"a text has the id {most}, which is no byte's, and Trainer was given no tokenizer: what it saves lacks one",
                      stacklevel=2)

    def step(self, batch: OmniBatch, position: int) -> dict[str, Any]:
        logged = super().step(batch, position)
        loss = torch.as_tensor(logged["loss"])
        self.running = loss if self.running is None else self.running.lerp(loss, 0.02)
        return logged

    def state(self) -> dict[str, Any]:
        return {**super().state(), "running": self.running}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.running = None if state["running"] is None else state["running"].to(self.fabric.device)

    def validate(self) -> dict[str, float]:
        return {"fit": -float(self.running) if self.running is not None else 0.0}

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        config = self.config
        training = {"recipe": config.recipe, **asdict(config.pairs), "step": step}
        tokenizer = self.tokenizer if self.bytes_seen else None
        save(folder, self.ema.average.model, tokenizer, self.mel,
             card(config, "a data loader", "the training data itself", figures, step, self.command), training=training)


def _check_form(batch: object) -> None:
    """Raise a UserError where a batch of the user's loader is no dictionary of tensors."""
    if not isinstance(batch, Mapping):
        got = type(batch).__name__
    else:
        wrong = {name: t for name, t in batch.items() if not isinstance(t, Tensor) or t.ndim == 0}
        if not wrong:
            return
        name, t = next(iter(wrong.items()))
        got = f"{name} as {'a single number' if isinstance(t, Tensor) else type(t).__name__}"
    raise UserError("a batch of the data loader is a dictionary of modality → tensor, whose first axis are the examples, as "
                    f"collate_multimodal makes it; got {got}.")
