"""One way in for data at hand: fit one layer of neurons by the rule that the configuration names.

- `fit`: tensors, which may be memory-mapped. For data that come in minibatches there is `layer_task`.
- `fit_headrooms`: the same for several ranges of tanh, of which each output neuron takes its own.
- `open_search`, `open_stream`: the search that a configuration stands for, on tensors and on minibatches.
- `Chosen`: which weights to hand out and when to freeze.

    neurons, report = fit(inputs, targets, LearnerConfig(activation="tanh"), held_out=(more_inputs, more_targets))

Held-out loss decides: the weights with the lowest one are handed out, and after `patience` looks without a lower one
the search is frozen. Trust decides nothing of that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from .classic import Classic
from .config import LearnerConfig
from .directions import Directions
from .neurons import Neurons, TargetScale, check_pairs, chunks, scale_targets, squared_errors
from .peers import ALONE, Peers
from .probes import Sweeps
from .report import FitReport
from .search import Batches, Minibatched, Search, minibatches
from .streaming import Mutation, Stream


def fit(
    inputs: Tensor, targets: Tensor, config: LearnerConfig | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Neurons, FitReport]:
    """Fit one layer of neurons.

    Args:
        inputs: `(N, d)` in any units.
        targets: `(N, k)` in any units.
        held_out: inputs and targets that are not fitted. Without them all steps are taken and the last weights count.

    Returns:
        Neurons in the targets' units, and the report.

    Raises:
        UserError: the shapes do not fit each other.
    """
    config = config or LearnerConfig()
    begin = time.perf_counter()
    check_pairs(inputs, targets)
    if held_out is not None:
        check_held_out(held_out, inputs.shape[1], targets.shape[1])
    search = open_search(inputs, targets, config)
    chosen, history = Chosen(search.neurons(), config.patience), []
    for step in range(1, config.steps + 1):
        search.step()
        if step % config.validate_every == 0 or step == config.steps:
            neurons = search.neurons()
            held = None if held_out is None else float(squared_errors(neurons, *held_out).mean())
            history.append((search.evaluations, search.train_loss, held))
            chosen.look(neurons, None if held is None else -held)
            if chosen.frozen:
                break
    losses = squared_errors(chosen.best, inputs, targets)
    return chosen.best, FitReport(
        train_loss=float(losses.mean()), held_out_loss=None if held_out is None else -chosen.highest,
        neuron_losses=tuple(losses.tolist()), evaluations=search.evaluations, seconds=time.perf_counter() - begin,
        trust=tuple(search.trust.tolist()), clipped_share=search.scale.clipped_share, history=tuple(history))


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


class Chosen:
    """The neurons to hand out: the best so far by a figure of held-out rows, or the latest where there is none.

    Args:
        best: what to hand out before the first look.
        patience: looks without a higher figure after which they are `frozen`; 0: never.
    """

    def __init__(self, best: Neurons, patience: int) -> None:
        self.best, self.patience = best, patience
        self.highest, self.stale = -math.inf, 0

    @property
    def frozen(self) -> bool:
        return 0 < self.patience <= self.stale

    def look(self, neurons: Neurons, figure: float | None) -> None:
        """Take them if the figure is the highest so far (higher is better), or None."""
        if figure is None:
            self.best = neurons
        elif figure > self.highest:
            self.best, self.highest, self.stale = neurons, figure, 0
        else:
            self.stale += 1


def open_search(inputs: Tensor, targets: Tensor, config: LearnerConfig) -> Search:
    """The search for the configuration's rule on tensors, before its first step."""
    check_pairs(inputs, targets)
    trust = {"trust": config.trust_start, "trust_up": config.trust_up, "trust_down": config.trust_down}
    if not config.minibatched and config.search == "sweeps":
        return Sweeps(inputs, targets, config.activation, ridge=config.ridge, headroom=config.headroom, **trust)
    if not config.minibatched:
        return Directions(inputs, targets, config.activation, whiten=config.whiten, headroom=config.headroom,
                          seed=config.seed, **trust)
    batches = minibatches(inputs, targets, config.batch_size, config.seed)
    scale = scale_targets(targets, config.activation, config.headroom)
    return _kind(config)(batches, scale, inputs.mean(0, dtype=torch.float32), config)


def open_stream(batches: Batches, config: LearnerConfig, peers: Peers = ALONE) -> Minibatched:
    """The search for the configuration's rule on minibatches, before its first step.

    The centre of the inputs and the scale of the targets are those of the first step's rows, of all processes.

    Raises:
        UserError: the search reads its data again and again, the shapes do not fit each other, or the processes'
            minibatches differ in size.
    """
    if not config.minibatched:
        raise UserError(f"--search {config.search} reads its data again and again: give it tensors (learner.fit), or "
                        "take --search stream for minibatches.")
    inputs, targets = batches(peers.rank)
    check_pairs(inputs, targets, names=f"the inputs and targets of minibatch {peers.rank}")
    sizes = [int(size) for size in peers.gather(torch.tensor(len(inputs), device=inputs.device))]
    if len(set(sizes)) > 1:
        raise UserError(f"The processes' first minibatches have {sizes} rows: all minibatches must be of one size.")
    scale = scale_targets(peers.rows(targets).cpu(), config.activation, config.headroom)
    scale = TargetScale(scale.scale.to(inputs.device), scale.shift.to(inputs.device), scale.clipped_share)
    centre = peers.sum(inputs.sum(0, dtype=torch.float64)) / sum(sizes)
    return _kind(config)(batches, scale, centre.float(), config, peers)


def check_held_out(held_out: tuple[Tensor, Tensor], inputs: int, targets: int) -> None:
    """Raise a sentence with both widths where held-out rows are not pairs, or not as wide as those that are fitted."""
    check_pairs(*held_out, names="held-out inputs and targets")
    for name, width, held in (("inputs", inputs, held_out[0]), ("targets", targets, held_out[1])):
        if held.shape[1] != width:
            raise UserError(f"Dimension mismatch: the held-out {name} have shape {tuple(held.shape)}; those that are "
                            f"fitted are (N, {width}).")


def _kind(config: LearnerConfig) -> type[Minibatched]:
    return Classic if config.rule == "classic" else Stream if config.search == "stream" else Mutation
