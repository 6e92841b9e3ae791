"""One training step of the any-to-any model, its validation and its checkpoint, for the one loop."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.workers import own_cores
from ..errors import UserError
from ..hub import RECIPES
from ..nn.replay import Replayed
from ..training.ema import EMA
from ..training.muon import Muon
from ..training.schedule import warmup_cosine
from ..training.task import Logged
from .card import card
from .config import OmniModelConfig, OmniTraining
from .evaluation import present, psnr, written_exactly
from .examples import Examples, OmniBatch, collate, in_steps, omni_batches, open_examples
from .learning import OmniLearning
from .modalities import refuse_unknown
from .model import OmniLatentModel
from .pairs import Job, Plan
from .patches import PatchModality
from .saving import load, save
from .tokenizer import ByteTokenizer, LibraryTokenizer, Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MOST_WORKERS = 16
WARMUP = 20  # a run's steps over those in which the learning rate rises, at most


class OmniTask:
    """Learns from `Examples`.

    Args:
        config: the recipe's.
        data, val: where the examples are (`examples.open_examples`).
        skipped: called with (file, reason) for each file that cannot be read.
        init: a model to start from, whose configuration replaces the recipe's; an option that differs from both is refused.
        freeze: not for these recipes.
        resumed: the checkpoint folder that the run will go on from.
    """

    monitor = "fit"
    command = ""

    def __init__(self, config: OmniTraining, data: str, val: str | None, skipped: Callable[[str, str], None],
                 init: str | None = None, freeze: str | None = None, resumed: Path | None = None, command: str = "") -> None:
        if freeze is not None:
            raise UserError("--freeze is for autoencoders: an any-to-any model has no halves.")
        refuse_unknown(config.model.modalities)
        self.tokenizer = _tokenizer(config, resumed)
        self.initial: dict[str, Tensor] | None = None
        if init is not None:
            started = load(resumed or init)  # a run that goes on has the same configuration in its checkpoint
            if resumed is None:
                _refuse_other_options(config, started.config, init)
                self.initial = started.state_dict()
            self.tokenizer = started.tokenizer
            config = replace(config, model=replace(started.config, gradient_checkpointing=config.model.gradient_checkpointing))
        config = replace(config, model=replace(config.model, vocab_size=self.tokenizer.vocab_size))
        self.config, self.command, self.skipped, self.init = config, command, skipped, init
        self.examples, self.held_out = open_examples(data, val, config.run.seed, config.model)

    def __str__(self) -> str:
        lines = [f"{len(self.examples)} examples ({self.examples.name}), {len(self.held_out)} held out ({self.held_out.name})"]
        if self.init is not None:
            model = self.config.model
            lines.append(f"the model is that of --init {self.init}: {model.num_layers} layers of {model.hidden_dim}")
        for steps, counts in self.plan.counted(self.config.run.batch_size):
            pairs = ", ".join(f"{pair} {count:,}" for pair, count in counts.most_common())
            lines.append(f"pairs drawn in the steps {steps.start + 1:,} to {steps.stop:,}: {pairs}")
        return "\n".join(lines)

    @property
    def plan(self) -> Plan:
        """Which pairs are learned from, among the modalities that the examples have."""
        known = [name for name in self.config.model.modalities if name in self.examples.sample(0)]
        return Plan(self.config.pairs, tuple(known), self.config.run.seed, self.config.run.steps)

    # -- building ----------------------------------------------------------------------------------------------

    def setup(self, fabric: Fabric) -> None:
        self.fabric, config = fabric, self.config
        if config.run.batch_size % fabric.world_size:
            raise UserError(f"--batch-size {config.run.batch_size} does not split evenly over {fabric.world_size} processes: take a "
                            f"multiple of {fabric.world_size}.")
        model = self.build()
        self.bare = OmniLearning(model, config.pairs).to(fabric.device)
        self.ema = EMA(self.bare, config.optimizer.ema_decay)
        if config.run.compile and fabric.device.type == "cuda":
            self.bare.use_compiled()
        self.model, self.optimizer = fabric.setup(self.bare, self._optimizer())
        self.generator = torch.Generator(fabric.device)
        # neither gradients that processes exchange, nor a scale that changes (of fp16), nor a codec can be recorded
        scaler = getattr(fabric._precision, "scaler", None)
        recorded = fabric.world_size == 1 and scaler is None and not model.config.codecs
        self.replayed = Replayed(self._learn, self.bare.parameters(), eager=2 if recorded else sys.maxsize)

    def build(self) -> OmniLatentModel:
        """The model to train."""
        model = OmniLatentModel(self.config.model)
        self._check_budget(model)
        if self.initial is not None:
            model.load_state_dict(self.initial)
        return model

    def _check_budget(self, model: OmniLatentModel) -> None:
        """Refuse a budget in which some job's sources and target do not fit."""
        sample, counts = self.examples.sample(0), dict[str, int]()
        for name in self.plan.modalities:
            part = model.part(name)
            if isinstance(part, PatchModality):
                counts[name] = part.count(part.size_of(torch.as_tensor(sample[name])[None]))
            else:
                longest = max(model.config.text_tokens, len(self.tokenizer.encode(str(sample[name]))))
                counts[name] = in_steps(torch.zeros(1, longest)).shape[1]
        fused = sum(counts.values()) + len(counts)  # each source begins with a token that says which it is
        source = fused if self.config.pairs.fused_share else max(counts.values()) + 1
        most = source + max(count + (name == "text") for name, count in counts.items())
        if most > model.config.max_tokens:
            raise UserError(f"--max-tokens {model.config.max_tokens}: the sources and the target of a step take up to {most} tokens: give "
                            f"at least {most}, larger patches or fewer --modalities.")

    def _optimizer(self) -> torch.optim.Optimizer:
        o, model = self.config.optimizer, self.bare.model
        if o.optimizer == "muon":
            tables = [part.embedding.weight for part in model.modalities.values() if not isinstance(part, PatchModality)]
            return Muon(self.bare.parameters(), o.lr, o.betas, weight_decay=o.weight_decay, tables=tables)
        return torch.optim.AdamW(self.bare.parameters(), o.lr, o.betas, weight_decay=o.weight_decay,
                                 fused=self.fabric.device.type == "cuda")

    # -- one step ----------------------------------------------------------------------------------------------

    def batches(self, start: int, stop: int) -> Iterator[OmniBatch]:
        run, world = self.config.run, self.fabric.world_size
        cores = own_cores()  # an eighth of them for what launches the GPU's work
        workers = min(MOST_WORKERS, cores - cores // 8) if run.workers < 0 else run.workers
        return omni_batches(self.examples, self.tokenizer, self.plan, run.batch_size // world, start, stop, self.fabric.global_rank, world,
                            workers, pin=self.fabric.device.type == "cuda")

    def halve(self, batch: OmniBatch) -> OmniBatch | None:
        return batch.halved()

    def remedy(self, fits: int) -> str:
        """What helps when memory ran out and a batch of `fits` examples did not need too much (0: unknown)."""
        return f"begin anew with {f'--batch-size {fits}, which fits' if fits else 'a smaller --batch-size'}, or --gradient-checkpointing"

    def step(self, batch: OmniBatch, position: int) -> Logged:
        for file, reason in batch.skipped:
            self.skipped(file, reason)
        config, o, fabric = self.config, self.config.optimizer, self.fabric
        warmup = min(o.warmup, max(1, config.run.steps // WARMUP))
        share = warmup_cosine(position, config.run.steps, warmup, o.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * share
        batch = batch.map(lambda t: t.to(fabric.device, non_blocking=True))
        seed = (config.run.seed * 0x9E3779B97F4A7C15 + position * fabric.world_size + fabric.global_rank) % 2**63
        self.generator.manual_seed(seed)
        self.replayed.clear()
        total, logged = torch.zeros((), device=fabric.device), dict[str, Tensor | float]()
        for number, (job, data) in enumerate(batch.parts, 1):
            exchanged = fabric.world_size == 1 or number == len(batch.parts)
            found = self.replayed((job, exchanged, len(batch.parts)), self.bare.needs(job, data, self.generator))
            total = total + found.pop("loss") / len(batch.parts)
            logged |= found
        self.replayed.drop_untouched()
        norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=o.clip, error_if_nonfinite=False) if o.clip else 0.0
        self.optimizer.step()
        self.ema.update(position)
        return {"loss": total, "gradient_norm": norm, **logged}

    def close(self) -> None:
        """Let go of the model: what was recorded and compiled, and gradients."""
        self.replayed.close()
        self.bare.use_compiled(False)

    def _learn(self, key: tuple[Job, bool, int], data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward of one job of a step."""
        job, exchanged, count = key
        with self.fabric.no_backward_sync(self.model, enabled=not exchanged):
            found = self.model(job, data)
            loss = found["loss"]
            if exchanged and self.fabric.world_size > 1:  # parts of the model that no job of this step used take part with nothing
                loss = loss + 0.0 * torch.stack([p.sum() for p in self.bare.parameters()]).sum()
            self.fabric.backward(loss / count)
        return {name: value.detach() for name, value in found.items()}

    # -- measuring and saving ----------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR of each target, regressed unless only the flow is learned, and the share of texts written exactly, from each source that the examples have; `fit` is
        their mean, a PSNR counted as a share of 40 dB."""
        model = self.ema.average.model
        count = min(self.config.validation_examples, len(self.held_out))
        data = collate([self.held_out.sample(i) for i in range(count)], self.tokenizer)
        data = {name: t.to(self.fabric.device) for name, t in data.items()}
        figures: dict[str, float] = {}
        steps = 0 if self.config.pairs.flow_share < 1 else None
        made: dict[tuple[str, str], Tensor] = {}
        names = present(model, data)
        for source in names:
            read = model.read({source: data[source]})
            for target in names:
                part = model.part(target)
                if isinstance(part, PatchModality):
                    size = part.size_of(data[target])
                    out = model.answer(read, target, size, steps=steps).float().clamp(0, 1)
                    figures[f"{source}→{target} psnr"] = float(psnr(out, data[target]).mean())
                    made[source, target] = out
                else:
                    wrote = model.generate(source, data[source], max_len=data[target].shape[1] + 1)
                    figures[f"{source}→{target}"] = float(written_exactly(wrote, data[target]).float().mean())
        shares = [value / 40 if name.endswith("psnr") else value for name, value in figures.items()]
        self._picture = _sheet(data, made)
        return {"fit": sum(shares) / len(shares), **figures}

    def samples(self) -> Tensor | None:
        """Held-out pictures, and below them what each source was turned into."""
        return self._picture

    def state(self) -> dict[str, Any]:
        return {"model": self.bare.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        config = self.config
        training = {"recipe": config.recipe, **dataclasses.asdict(config.pairs), "optimizer": dataclasses.asdict(config.optimizer),
                    "run": dataclasses.asdict(config.run), "task": config.task, "step": step}
        save(folder, self.ema.average.model, self.tokenizer, self.examples.mel,
             card(config, self.examples.name, self.held_out.name, figures, step, self.command), training=training)


def _refuse_other_options(config: OmniTraining, started: OmniModelConfig, init: str) -> None:
    """Raise a UserError where an option of the model was given that the model to start from does not have."""
    module, function = RECIPES[config.recipe].split(":")
    usual = getattr(import_module(module), function)().model
    for name in OmniModelConfig.__dataclass_fields__:
        given, its = getattr(config.model, name), getattr(started, name)
        if given not in (getattr(usual, name), its) and name not in ("gradient_checkpointing", "vocab_size"):
            raise UserError(f"--init {init} keeps its own model, of {name} {its}: leave --{name.replace('_', '-')} out.")


def _tokenizer(config: OmniTraining, resumed: Path | None) -> Tokenizer:
    """The recipe's; of a run that goes on, what was saved with it."""
    if resumed is not None:
        return open_tokenizer(resumed)
    return LibraryTokenizer(config.tokenizer) if config.tokenizer else ByteTokenizer()


def _sheet(data: dict[str, Tensor], made: dict[tuple[str, str], Tensor], columns: int = 8) -> Tensor | None:
    """A row of true pictures, then one for each source."""
    if "image" not in data:
        return None
    rows = [data["image"], *(out for (_, target), out in made.items() if target == "image")]
    return torch.cat([torch.cat(list(row[:columns].float().cpu()), 2) for row in rows], 1)
