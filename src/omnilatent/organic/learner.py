"""One way in: fit one layer of neurons by the rule that the configuration names.

- `fit`: tensors, which may be memory-mapped, or minibatches by their position.
- `fit_headrooms`: the same for several ranges of tanh, of which each output neuron takes its own.
- `open_search`: the search that a configuration stands for.

    neurons, report = fit(inputs, targets, LearnerConfig(activation="tanh"), held_out=(more_inputs, more_targets))

Held-out loss decides: the weights with the lowest one are handed out, and after `patience` looks without a lower one
the search is frozen. Trust decides nothing of that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from .classic import Classic
from .config import LearnerConfig
from .directions import Directions
from .neurons import Neurons, TargetScale, check_pairs, chunks, scale_targets, squared_errors
from .probes import Sweeps
from .report import FitReport
from .search import Batches, Search, minibatches
from .streaming import Mutation, Stream

State = dict[str, Tensor]


def fit(
    inputs: Tensor | Batches, targets: Tensor | None = None, config: LearnerConfig | None = None,
    held_out: tuple[Tensor, Tensor] | None = None, *, state: State | None = None,
    checkpoint: Callable[[State], None] | None = None,
) -> tuple[Neurons, FitReport]:
    """Fit one layer of neurons.

    Args:
        inputs: `(N, d)`; or a function of the position, from 0, that returns a minibatch `(n, d)` and `(n, k)`, with
            `targets` None. Such a function works with `search="stream"` or `"mutation"` and the rule classic; the
            targets' scale is then taken from its minibatch 0.
        targets: `(N, k)` in any units.
        held_out: inputs and targets that are not fitted. Without them all steps are taken and the last weights count.
        state: what `checkpoint` was given, to go on from, with the same data and settings. Going on and going through
            are bit-equal.
        checkpoint: called with the state after every look at the held-out data, as tensors that may be saved.

    Returns:
        Neurons in the targets' units, and the report.

    Raises:
        UserError: the shapes do not fit each other, or the search needs data that it can read again.
    """
    config = config or LearnerConfig()
    begin = time.perf_counter()
    if held_out is not None:
        check_pairs(*held_out, names="held-out inputs and targets")
        if isinstance(inputs, Tensor) and targets is not None:
            _check_widths(inputs, targets, held_out)
    search = open_search(inputs, targets, config)
    course = _Course(search)
    if state is not None:
        course.load_state(state)
    while int(course.steps) < config.steps and not course.frozen(config):
        search.step()
        course.steps += 1
        if int(course.steps) % config.validate_every == 0 or int(course.steps) == config.steps:
            course.look(held_out)
            if checkpoint is not None:
                checkpoint(course.state())
    return course.finish(inputs, targets, held_out, time.perf_counter() - begin)


def fit_headrooms(
    inputs: Tensor, targets: Tensor, config: LearnerConfig, held_out: tuple[Tensor, Tensor],
    headrooms: Sequence[float] = (1.2, 1.6, 2.2, 3.0, 5.0),
) -> tuple[Neurons, FitReport]:
    """Fit a tanh layer once for each range, and take each output neuron from the fit with its lowest held-out loss.

    Whether a target saturates or is nearly linear differs between output neurons, and their losses add up, so the
    choice is each one's own. Costs one `fit` a range.
    """
    begin = time.perf_counter()
    fits = [fit(inputs, targets, replace(config, headroom=headroom), held_out) for headroom in headrooms]
    losses = torch.stack([squared_errors(neurons, *held_out) for neurons, _ in fits])  # (h, k)
    best = losses.argmin(0)  # (k,)
    each = torch.arange(len(best))
    parts = {name: torch.stack([neurons.get_buffer(name) for neurons, _ in fits])[best, each]
             for name in ("weight", "bias", "scale", "shift")}
    chosen = Neurons(activation=config.activation, **parts)
    train = squared_errors(chosen, inputs, targets)
    beyond = sum(int(((targets[rows].float() - chosen.shift).abs() > chosen.scale).sum()) for rows in chunks(targets))
    reports = [report for _, report in fits]
    return chosen, FitReport(
        train_loss=float(train.mean()), held_out_loss=float(losses.amin(0).mean()), neuron_losses=tuple(train.tolist()),
        evaluations=sum(report.evaluations for report in reports), seconds=time.perf_counter() - begin,
        trust=tuple(reports[which].trust[i] for i, which in enumerate(best.tolist())),
        clipped_share=beyond / targets.numel() if config.activation == "tanh" else 0.0)


def open_search(inputs: Tensor | Batches, targets: Tensor | None, config: LearnerConfig) -> Search:
    """The search for the configuration's rule, before its first step."""
    trust = {"trust": config.trust_start, "trust_up": config.trust_up, "trust_down": config.trust_down}
    batched = config.rule == "classic" or config.search in ("stream", "mutation")
    if isinstance(inputs, Tensor):
        if targets is None:
            raise UserError("The inputs are a tensor, so targets (N, k) must be given as well.")
        check_pairs(inputs, targets)
        if not batched:
            if config.search == "sweeps":
                return Sweeps(inputs, targets, config.activation, ridge=config.ridge, headroom=config.headroom, **trust)
            return Directions(inputs, targets, config.activation, whiten=config.whiten, headroom=config.headroom,
                              seed=config.seed, **trust)
        batches, first = minibatches(inputs, targets, config.batch_size, config.seed), (inputs, targets)
    elif not batched:
        raise UserError(f"--search {config.search} reads its data again and again: give it tensors, or take "
                        "--search stream for minibatches.")
    else:
        batches, first = inputs, inputs(0)
        check_pairs(*first, names="the inputs and targets of minibatch 0")
    scale: TargetScale = scale_targets(first[1], config.activation, config.headroom)
    kind = Classic if config.rule == "classic" else Stream if config.search == "stream" else Mutation
    return kind(batches, scale, first[0].mean(0, dtype=torch.float32), config)


class _Course:
    """How far a fit has come, and the best neurons so far by the held-out loss (without one: the latest)."""

    def __init__(self, search: Search) -> None:
        self.search, self.best = search, search.neurons()
        self.steps, self.stale = torch.tensor(0), torch.tensor(0)
        self.lowest = torch.tensor(math.inf, dtype=torch.float64)
        self.history = torch.zeros(0, 3, dtype=torch.float64)  # evaluations, training loss, held-out loss or nan

    def frozen(self, config: LearnerConfig) -> bool:
        return 0 < config.patience <= int(self.stale)

    def look(self, held_out: tuple[Tensor, Tensor] | None) -> None:
        neurons, loss = self.search.neurons(), math.nan
        if held_out is None:
            self.best = neurons
        else:
            loss = float(squared_errors(neurons, *held_out).mean())
            if loss < float(self.lowest):
                self.best, self.lowest, self.stale = neurons, torch.tensor(loss).double(), torch.tensor(0)
            else:
                self.stale += 1
        row = torch.tensor([[self.search.evaluations, self.search.train_loss, loss]], dtype=torch.float64)
        self.history = torch.cat([self.history, row])

    def state(self) -> State:
        own = {name: getattr(self, name).clone() for name in ("steps", "stale", "lowest", "history")}
        return own | {f"search.{name}": value for name, value in self.search.state().items()} | {
            f"best.{name}": value.clone() for name, value in self.best.state_dict().items()}

    def load_state(self, state: State) -> None:
        for name in ("steps", "stale", "lowest", "history"):
            setattr(self, name, state[name].clone())
        parts: dict[str, State] = {"search": {}, "best": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value
        self.search.load_state(parts["search"])
        self.best.load_state_dict(parts["best"])

    def finish(self, inputs: Tensor | Batches, targets: Tensor | None, held_out: tuple[Tensor, Tensor] | None,
               seconds: float) -> tuple[Neurons, FitReport]:
        """The neurons to hand out, and the report. On a stream the training loss is that of the latest minibatch."""
        if isinstance(inputs, Tensor):
            losses = squared_errors(self.best, inputs, targets)
        else:
            losses = squared_errors(self.best, *inputs(int(self.steps) - 1))
        held = None if held_out is None else float(squared_errors(self.best, *held_out).mean())
        report = FitReport(
            train_loss=float(losses.mean()), held_out_loss=held, neuron_losses=tuple(losses.tolist()),
            evaluations=self.search.evaluations, seconds=seconds, trust=tuple(self.search.trust.tolist()),
            clipped_share=self.search.scale.clipped_share)
        history = tuple((int(done), loss, None if math.isnan(held) else held)
                        for done, loss, held in self.history.tolist())
        return self.best, replace(report, history=history)


def _check_widths(inputs: Tensor, targets: Tensor, held_out: tuple[Tensor, Tensor]) -> None:
    for name, given, held in (("inputs", inputs, held_out[0]), ("targets", targets, held_out[1])):
        if given.dim() == 2 and given.shape[1] != held.shape[1]:
            raise UserError(f"Dimension mismatch: the held-out {name} have shape {tuple(held.shape)}, the fitted ones "
                            f"{tuple(given.shape)}.")
