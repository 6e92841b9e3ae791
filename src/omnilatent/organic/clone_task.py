"""A clone as a run of the one loop.

- `OrganicTask`: learns in rounds, without gradients. `GradientTask`: the same student by backpropagation.
- `run_config`: steps, validations and checkpoints of either.

A round of the first is a step for every batch of lessons and one for every sweep, each of them resumable; the logged
loss is the share of the held-out variance that is not explained yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError, is_out_of_memory
from ..training.config import RunConfig
from ..training.task import Logged
from .clone_config import CloneConfig
from .cloning import Way
from .learning import Learning, Pace
from .lessons import Lessons, LessonStore
from .peers import ALONE, Peers
from .search import generator

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BATCH = 16  # lessons that are read at a time
_CLIP = 0.05  # norm of the gradients, with --gradients
Card = Callable[[dict[str, float]], str]


class _Turn(NamedTuple):
    """What one step does: `lessons` to see, or none, and then work."""

    lessons: Lessons | None
    held: bool
    position: int
    reads: bool


class OrganicTask:
    """Learns what `way` names from the lessons `train`, by what `held` holds out.

    Args:
        card: the README.md of a checkpoint from its figures.
    """

    monitor = "explained"

    def __init__(self, way: Way, train: LessonStore, held: LessonStore, config: CloneConfig, peers: Peers, card: Card
                 ) -> None:
        self.way, self.train, self.held, self.config, self.card = way, train, held, config, card
        self.peers, self.device = peers, way.device
        pace = Pace(len(train), len(held), config.sites, config.seed)
        self.parts: dict[str, Learning] = way.parts(pace, peers)
        self.rounds = max(part.rounds for part in self.parts.values())
        held_batch = max(1, min(BATCH, len(held) // peers.count))  # so that every process has some
        self._reads = [(store, held, slice(i, i + size)) for store, held, size in
                       ((train, False, BATCH), (self.held, True, held_batch)) for i in range(0, len(store), size)]
        self._each = -(-len(self._reads) // peers.count)

    @property
    def per_round(self) -> int:
        """Steps of a round."""
        return self._each + self.config.sweeps + 1

    def setup(self, fabric: Fabric) -> None:
        if fabric.device.type == "mps":
            raise UserError("Neurons are learned in float64 partly, which MPS does not have: take --device cpu.")
        torch.set_float32_matmul_precision("highest")  # TF32 would spoil the inputs' small axes

    def batches(self, start: int, stop: int) -> Iterator[_Turn]:
        for step in range(start, stop):
            place = step % self.per_round
            number = place * self.peers.count + self.peers.rank
            if place >= self._each or number >= len(self._reads) or self._done():
                yield _Turn(None, False, place, place < self._each)
            else:
                store, held, which = self._reads[number]
                yield _Turn(store.read(which, self.device), held, number, True)

    def _done(self) -> bool:
        return all(part.over or part.round >= part.rounds for part in self.parts.values())

    @torch.no_grad()
    def step(self, batch: _Turn, position: int) -> Logged:
        try:
            for part in self.parts.values():
                if part.round >= part.rounds:
                    continue
                if batch.lessons is not None:
                    part.see(batch.lessons, batch.held, batch.position)
                elif not batch.reads:
                    part.work((position + 1) % self.per_round == 0)
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            raise UserError(f"Out of memory at step {position}: fewer --sites (now {self.config.sites:,}) or --candidates "
                            f"(now {self.config.candidates:,}) need less; what was saved before is untouched."
                            ) from failure
        left = [part.left for part in self.parts.values()]
        return {"loss": sum(left) / len(left), "round": min(1 + position // self.per_round, self.rounds)}

    def halve(self, batch: _Turn) -> None:
        """A batch is small already; what fills memory is `sites`."""

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        model = self._model()
        if model is None:
            return {"explained": 0.0}
        size = min(BATCH, len(self.held))
        held = (self.held.read(slice(i, i + size), self.device) for i in range(0, len(self.held), size))
        return self.way.figures(model, held)

    def samples(self) -> Tensor | None:
        """None: the report shows pictures at the end."""
        return None

    def state(self) -> dict[str, Any]:
        return {"layout": _layout(self), **{name: part.state() for name, part in self.parts.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        _check_layout(self, state["layout"])
        for name, part in self.parts.items():
            part.load_state(state[name])

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        """The model so far; before there is one, a card that says so."""
        model = self._model()
        if model is None:
            (folder / "README.md").write_text("Nothing that could be used has been learned yet.\n", encoding="utf-8")
        else:
            self.way.write(folder, model, self.card(figures), {"step": step, **figures})

    def _model(self) -> nn.Module | None:
        parts = {name: part.model() for name, part in self.parts.items()}
        missing = [name for name, part in parts.items() if part is None and name not in self.way.spared]
        return None if missing else _as_stored(self.way.assembled(parts))


def _as_stored(model: nn.Module) -> nn.Module:
    """A copy whose weights are what fp16 leaves of them, so that figures are those of the file."""
    model = deepcopy(model)
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    return model


class GradientTask:
    """Trains the same student by backpropagation with Adam, from random weights, on the same lessons."""

    monitor = "explained"

    def __init__(self, way: Way, train: LessonStore, held: LessonStore, config: CloneConfig, peers: Peers, card: Card
                 ) -> None:
        self.way, self.train, self.held, self.config, self.card = way, train, held, config, card
        self.peers, self.device = peers, way.device

    def setup(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.student = self.way.student().to(self.device)
        for parameter in self.student.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(self.student.parameters(), lr=self.config.lr)
        self.loss, self.optimizer = fabric.setup(_Loss(self.student, self.way), optimizer)

    def batches(self, start: int, stop: int) -> Iterator[Lessons]:
        each = max(1, BATCH // self.peers.count)
        for step in range(start, stop):
            draw = generator("lessons", self.config.seed, step, self.peers.rank)
            yield self.train.read(torch.randint(len(self.train), (each,), generator=draw).tolist(), self.device)

    def step(self, batch: Lessons, position: int) -> Logged:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, (position + 1) / 50) * 0.5 * (
                1 + math.cos(math.pi * position / self.config.steps))
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.loss, self.optimizer, max_norm=_CLIP)
        self.optimizer.step()
        return {"loss": loss.detach()}

    def halve(self, batch: Lessons) -> None:
        """A batch is small already."""

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        size = min(BATCH, len(self.held))
        held = (self.held.read(slice(i, i + size), self.device) for i in range(0, len(self.held), size))
        return self.way.figures(_as_stored(self.student), held)

    def samples(self) -> Tensor | None:
        """None: the report shows pictures at the end."""
        return None

    def state(self) -> dict[str, Any]:
        return {"layout": _layout(self), "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        _check_layout(self, state["layout"])
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        self.way.write(folder, self.student, self.card(figures), {"step": step, **figures})


def _layout(task: OrganicTask | GradientTask) -> list[int]:
    """What decides which step does what."""
    return [len(task.train), len(task.held), task.peers.count]


def _check_layout(task: OrganicTask | GradientTask, begun: list[int]) -> None:
    """Refuse to go on with other lessons, or another number of processes, than the run was begun with."""
    for before, now, what in zip(begun, _layout(task), ("lessons", "held-out lessons", "processes"), strict=True):
        if before != now:
            raise UserError(f"This clone was begun with {before:,} {what}, and now there are {now:,}: put back what it was "
                            "begun with, or begin anew in another --out.")


class _Loss(nn.Module):
    """The student behind its loss, since processes meet in a module's `forward`."""

    def __init__(self, student: nn.Module, way: Way) -> None:
        super().__init__()
        self.student, self._of = student, way.loss

    def forward(self, lessons: Lessons) -> Tensor:
        return self._of(self.student, lessons)


def task_of(way: Way, train: LessonStore, held: LessonStore, config: CloneConfig, peers: Peers = ALONE,
            card: Card = lambda figures: "") -> OrganicTask | GradientTask:
    """The task that the configuration names.

    Raises:
        UserError: there are no lessons to learn from, or none held out that could tell better from worse.
    """
    for store, what in ((train, "photos to learn from"), (held, "held-out photos")):
        if not len(store):
            raise UserError(f"None of the {what} can be read: give others.")
    if config.latent == "pooled" and len(held) < 2:
        raise UserError("One held-out photo says nothing about how numbers vary from photo to photo: hold out more (--val), "
                        "or give more photos.")
    shown = held.read(range(0, len(held), max(1, len(held) // 32))).pictures
    if int(shown.max()) == int(shown.min()):
        raise UserError("The held-out photos are all of one colour: hold out others (--val).")
    return (GradientTask if config.gradients else OrganicTask)(way, train, held, config, peers, card)


def run_config(task: OrganicTask | GradientTask, run: RunConfig) -> RunConfig:
    """The run's settings with the steps, validations and checkpoints that the task needs. The models after each round
    of `OrganicTask` are kept: they are the trade of size against likeness."""
    if isinstance(task, OrganicTask):
        each = task.per_round
        # Several processes stop where they log, and what a round has gathered is each process's own: so at its end.
        logged = each if task.peers.count > 1 else max(1, each // 100)
        return replace(run, steps=task.rounds * each, validate_every=each, save_every=each, log_every=logged,
                       keep=task.rounds)
    steps = task.config.steps
    every = max(1, steps // 10)
    return replace(run, steps=steps, validate_every=every, save_every=every, log_every=max(1, min(20, every)), keep=1)
