"""The learner of `rule="neuron"` on data at hand: conjugate probes of whole blocks of directions.

- `fit_linear`: neurons from inputs and targets.
- `Sweeps`: the search behind it, one sweep at a time, with its state as plain tensors.

What it is, said plainly. It is a derivative-free method of conjugate directions (Powell 1964) over whitened inputs, and
no new kind of evolution. Its response is that of Madaline's Rule III (Widrow & Lehr 1990): nudge the sum of a neuron by
±δ, here by its bias, and note what that does to the squared error of every row. Since a neuron is affine, a step along
any direction of its weights moves the sum of row n by a known a_n, so these row-wise responses, summed with a_n, are
the difference of the losses along that direction. For a linear neuron this is algebra: along a direction with
activations a the losses at ±h are mean((e ± h a)²), whose difference is 4 h mean(e a), and 2 d probes of the kind are
one matrix product. For tanh it is a difference quotient of step δ, the derivative up to δ². So a sweep costs what a
forward and a backward pass cost, and on linear neurons with exactly whitened inputs the first sweep ends at the
least-squares optimum, as any method of conjugate directions does.

Each output neuron is its own search: its loss, direction, step length, acceptance and trust are its own. The step along
its direction is found by forward evaluations at −h, +h and the vertex of their parabola, and taken only if the loss of
that neuron is really lower.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..errors import UserError
from .neurons import ACTIVATIONS, Activation, Neurons, TargetScale, check_pairs, chunks, scale_targets, squared_errors
from .report import FitReport
from .retina import Axes, principal_axes

_NUDGE = 0.03  # δ: of a neuron's sum, which is about 1 in size; balances δ² against fp32 rounding
_INSIDE = 0.97  # of tanh's range, where the start from the inverse of tanh cuts targets off


def fit_linear(
    inputs: Tensor, targets: Tensor, *, activation: Activation = "linear", sweeps: int = 1, ridge: float = 0.0,
    seed: int = 0, headroom: float = 3.0, axes: Axes | None = None,
) -> tuple[Neurons, FitReport]:
    """Fit affine neurons, linear or tanh, to pairs of rows, without gradients and without solving linear equations.

    One sweep of linear neurons reaches the least-squares optimum but for fp32 rounding, a second one removes that.
    tanh neurons start from linear ones fitted to the inverse of tanh; they gain from 5 to 20 sweeps.

    Args:
        inputs: `(N, d)` in any units, N ≥ 20 d advised; they may be memory-mapped, they are read in chunks.
        targets: `(N, k)` in any units.
        sweeps: each reads the inputs three times: 3 N d k multiplications, beside N d² once.
        ridge: weight of Σ w² in each neuron's loss, w its weights on standardised inputs and the loss in its range
            (targets' units for linear neurons, divided by the scale for tanh).
        seed: not used, since nothing is drawn; other rules draw.
        headroom: half of tanh's range in standard deviations of the targets.
        axes: the principal axes of these inputs where they are known already.

    Returns:
        Neurons in the targets' units, and the report.

    Raises:
        UserError: the shapes do not fit each other, or values are not finite.
    """
    begin = time.perf_counter()
    search = Sweeps(inputs, targets, activation, ridge=ridge, headroom=headroom, axes=axes)
    history = []
    for _ in range(sweeps):
        search.sweep()
        history.append((search.evaluations, search.train_loss, None))
    neurons = search.neurons()
    losses = squared_errors(neurons, inputs, targets)
    return neurons, FitReport(
        train_loss=float(losses.mean()), held_out_loss=None, neuron_losses=tuple(losses.tolist()),
        evaluations=search.evaluations, seconds=time.perf_counter() - begin, trust=tuple(search.trust.tolist()),
        clipped_share=search.scale.clipped_share, history=tuple(history),
    )


class Sweeps:
    """The search for one layer, a sweep at a time.

    `weight` `(k, d)` and `bias` `(k,)` act on centred inputs. Per neuron, `(k,)`: `step`, where its next line search
    begins, and `trust` in [0, 1], which rises by `trust_up` with every step taken and falls by `trust_down` with every
    step that did not lower the loss.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, activation: Activation = "linear", *, ridge: float = 0.0,
        headroom: float = 3.0, axes: Axes | None = None, scale: TargetScale | None = None, trust_up: float = 0.01,
        trust_down: float = 0.005,
    ) -> None:
        check_pairs(inputs, targets)
        if activation not in ACTIVATIONS:
            raise UserError(f"The activation is {activation!r}; possible are {' and '.join(ACTIVATIONS)}.")
        if not (ridge >= 0 and math.isfinite(ridge)):
            raise UserError(f"ridge is {ridge}; it must be 0 or a positive number.")
        self.inputs, self.activation, self.ridge = inputs, activation, ridge
        self.trust_up, self.trust_down = trust_up, trust_down
        self.scale = scale or scale_targets(targets, activation, headroom)
        self.axes = axes or principal_axes(inputs)
        self._goals = torch.cat([(targets[rows].float() - self.scale.shift) / self.scale.scale
                                 for rows in chunks(targets)])  # (N, k)
        if not bool(self._goals.isfinite().all() and self.axes.mean.isfinite().all()):
            raise UserError("The inputs or targets hold values that are not finite: mend or leave out those rows.")
        self._centre = self.axes.mean.float()
        white = self.axes.whitening(ridge)
        self._metric = (white @ white.mT).float()  # (d, d): in it, directions of equal length are conjugate
        k, d = targets.shape[1], inputs.shape[1]
        self.weight, self.bias = torch.zeros(k, d), torch.zeros(k)
        self.trust = torch.full((k,), 0.5, dtype=torch.float64)
        self.evaluations, self.train_loss = 0, math.inf
        self._restart()
        if activation == "tanh":
            self._start_from_inverse()

    def sweep(self) -> None:
        """Every neuron probes all its directions, and takes the step along the combined one if its loss falls."""
        sums = self._sums(self.weight, self.bias)  # (N, k)
        fall, fall_bias, curvature = self._responses(sums)
        direction, direction_bias = self._conjugate(fall, fall_bias)
        moves = self._sums(direction, direction_bias)  # (N, k): what a unit step adds to the sums
        h = torch.where(self.step > 0, self.step, 1 / curvature.clamp(min=0.05))
        here, ahead, behind = (self._losses(sums, moves, t, direction) for t in (0 * h, h, -h))
        bend = (ahead + behind - 2 * here) / 2
        vertex = torch.where(bend > 0, (behind - ahead) / (4 * bend.clamp(min=1e-30)), torch.sign(behind - ahead) * 2)
        best = h * vertex.clamp(-4, 4)
        there = self._losses(sums, moves, best, direction)
        table = torch.stack([here, ahead, behind, there])
        lowest, which = table.min(0)
        taken = torch.stack([0 * h, h, -h, best]).gather(0, which[None])[0]
        self.weight += taken[:, None].float() * direction
        self.bias += taken.float() * direction_bias
        moved = taken != 0
        self.step = torch.where(moved, taken.abs(), h / 4)
        self._previous_direction *= moved[:, None]  # a neuron that did not move begins anew
        self._previous_bias *= moved
        self.trust = (self.trust + torch.where(moved, self.trust_up, -self.trust_down)).clamp(0, 1)
        self.evaluations += 4 if self.activation == "linear" else 6
        penalty = self.ridge * (self.weight * self.axes.spread.float()).square().sum(1)
        self.train_loss = float(((lowest - penalty) * self.scale.scale.square()).mean())

    def neurons(self) -> Neurons:
        """The neurons as they are now, on plain inputs and in the targets' units."""
        bias = self.bias.double() - self.weight.double() @ self.axes.mean
        return Neurons(self.weight, bias.float(), self.activation, self.scale.scale, self.scale.shift)

    def state(self) -> dict[str, Tensor]:
        """Everything that going on needs beside the data, as tensors."""
        return {name: getattr(self, name).clone() for name in _STATE} | {
            "evaluations": torch.tensor(self.evaluations), "train_loss": torch.tensor(self.train_loss).double()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, on the same data and settings."""
        for name in _STATE:
            setattr(self, name, state[name].clone())
        self.evaluations, self.train_loss = int(state["evaluations"]), float(state["train_loss"])

    def _restart(self) -> None:
        k, d = self.weight.shape
        self.step = torch.zeros(k, dtype=torch.float64)  # 0: not known yet
        self._previous_direction, self._previous_bias = torch.zeros(k, d), torch.zeros(k)
        self._previous_fall, self._previous_fall_bias = torch.zeros(k, d), torch.zeros(k)

    def _start_from_inverse(self) -> None:
        """One sweep of linear neurons towards the inverse of tanh of the targets."""
        goals, self.activation = self._goals, "linear"
        self._goals = torch.atanh(goals.clamp(-_INSIDE, _INSIDE))
        trust = self.trust
        self.sweep()
        self._goals, self.activation, self.trust = goals, "tanh", trust
        self._restart()

    def _sums(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Affine part over all rows: `(N, k)`."""
        out = torch.empty(len(self.inputs), len(weight))
        for rows in chunks(self.inputs, self._goals):
            torch.addmm(bias, self.inputs[rows].float() - self._centre, weight.mT, out=out[rows])
        return out

    def _errors(self, sums: Tensor, goals: Tensor) -> Tensor:
        """Squared error of each row and neuron."""
        return ((torch.tanh(sums) if self.activation == "tanh" else sums) - goals).square()

    def _losses(self, sums: Tensor, moves: Tensor, step: Tensor, direction: Tensor) -> Tensor:
        """The loss of each neuron, `(k,)` fp64, at `step` along its direction: a forward evaluation."""
        total, t = torch.zeros(len(step), dtype=torch.float64), step.float()
        for rows in chunks(sums):
            total += self._errors(torch.addcmul(sums[rows], moves[rows], t), self._goals[rows]).sum(0).double()
        total /= len(sums)
        if self.ridge:
            there = (self.weight + t[:, None] * direction) * self.axes.spread.float()
            total += self.ridge * there.square().sum(1)
        return total

    def _responses(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How fast each neuron's loss falls along every weight `(k, d)` and its bias `(k,)`, and its curvature `(k,)`.

        Halved, so that the curvature of a linear neuron on whitened inputs is 1.
        """
        k, d = self.weight.shape
        fall, fall_bias, bend = torch.zeros(k, d), torch.zeros(k, dtype=torch.float64), torch.zeros(k)
        for rows in chunks(self.inputs, self._goals):
            here, goals = sums[rows], self._goals[rows]
            if self.activation == "linear":
                response = goals - here  # what ±δ gives, for every δ
                bend += len(here)
            else:
                plus, minus = self._errors(here + _NUDGE, goals), self._errors(here - _NUDGE, goals)
                response = (minus - plus) / (4 * _NUDGE)
                bend += (plus + minus - 2 * self._errors(here, goals)).sum(0) / (2 * _NUDGE**2)
            fall.addmm_(response.mT, self.inputs[rows].float() - self._centre)
            fall_bias += response.sum(0)
        count = len(sums)
        fall = fall / count - self.ridge * self.weight * self.axes.spread.float().square()
        return fall, (fall_bias / count).float(), (bend / count).double()

    def _conjugate(self, fall: Tensor, fall_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Directions conjugate to the last ones (Polak & Ribière 1969, never negative), per neuron."""
        ahead = fall @ self._metric
        change, change_bias = fall - self._previous_fall, fall_bias - self._previous_fall_bias
        last = ((self._previous_fall @ self._metric) * self._previous_fall).sum(1) + self._previous_fall_bias.square()
        share = (ahead * change).sum(1) + fall_bias * change_bias
        share = torch.where(last > 0, share / last.clamp(min=1e-30), 0.0).clamp(0, 1e3)
        direction = ahead + share[:, None] * self._previous_direction
        direction_bias = fall_bias + share * self._previous_bias
        falls = (direction * fall).sum(1) + direction_bias * fall_bias > 0
        direction = torch.where(falls[:, None], direction, ahead)
        direction_bias = torch.where(falls, direction_bias, fall_bias)
        self._previous_direction, self._previous_bias = direction.clone(), direction_bias.clone()
        self._previous_fall, self._previous_fall_bias = fall, fall_bias
        return direction, direction_bias


_STATE = ("weight", "bias", "trust", "step", "_previous_direction", "_previous_bias", "_previous_fall",
          "_previous_fall_bias")
