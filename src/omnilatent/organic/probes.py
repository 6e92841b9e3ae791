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
least-squares optimum, as any method of conjugate directions does. The response times the whitening and its transpose
then is the solution of the normal equations in the principal axes: what is spared is a solver and any gradient through
the neuron, not the arithmetic. `directions` takes nothing but losses of the whole layer, at more evaluations.

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
from .neurons import ACTIVATIONS, Activation, Neurons, TargetScale, check_pairs, scale_targets, squared_errors
from .report import FitReport
from .retina import Axes, principal_axes
from .search import Search, vertex


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
        search.step()
        history.append((search.evaluations, search.train_loss, None))
    neurons = search.neurons()
    losses = squared_errors(neurons, inputs, targets)
    return neurons, FitReport(
        train_loss=float(losses.mean()), held_out_loss=None, neuron_losses=tuple(losses.tolist()),
        evaluations=search.evaluations, seconds=time.perf_counter() - begin, trust=tuple(search.trust.tolist()),
        clipped_share=search.scale.clipped_share, history=tuple(history),
    )


class Sweeps(Search):
    """The search for one layer on fixed data, a sweep at a time.

    Per neuron, `(k,)`: `length`, where its next line search begins (0: not known yet), and `trust` in [0, 1], which
    rises by `trust_up` with every step taken and falls by `trust_down` with every step that did not lower the loss.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, activation: Activation = "linear", *, ridge: float = 0.0,
        headroom: float = 3.0, axes: Axes | None = None, scale: TargetScale | None = None, trust: float = 0.5,
        trust_up: float = 0.01, trust_down: float = 0.005,
    ) -> None:
        check_pairs(inputs, targets)
        if activation not in ACTIVATIONS:
            raise UserError(f"The activation is {activation!r}; possible are {' and '.join(ACTIVATIONS)}.")
        if not (ridge >= 0 and math.isfinite(ridge)):
            raise UserError(f"ridge is {ridge}; it must be 0 or a positive number.")
        self.axes = axes or principal_axes(inputs)
        scale = scale or scale_targets(targets, activation, headroom)
        super().__init__(inputs.shape[1], scale, activation, self.axes.mean.float(), trust)
        self.inputs, self.goals, self.ridge = inputs, self.goals_of(targets), ridge
        self.trust_up, self.trust_down = trust_up, trust_down
        if not bool(self.goals.isfinite().all() and self.axes.mean.isfinite().all()):
            raise UserError("The inputs or targets hold values that are not finite: mend or leave out those rows.")
        white = self.axes.whitening(ridge)
        self._metric = (white @ white.mT).float()  # (d, d): takes the fall of the loss to whitened axes and back
        self._forget()
        if activation == "tanh":
            self.start_from_inverse()
            self._forget()

    def step(self) -> None:
        """Every neuron probes all its directions, and takes the step along the combined one if its loss falls."""
        sums = self.sums_of(self.inputs, self.weight, self.bias)  # (N, k)
        fall, fall_bias, curvature = self.responses(self.inputs, sums, self.goals)
        if self.ridge:
            fall -= self.ridge * self.weight * self.axes.spread.float().square()
        direction, direction_bias = self._conjugate(fall, fall_bias)
        moves = self.sums_of(self.inputs, direction, direction_bias)  # (N, k): what a unit step adds to the sums
        h = torch.where(self.length > 0, self.length, 1 / curvature.clamp(min=0.05))
        here, ahead, behind = (self._losses_at(t, sums, moves, direction) for t in (0 * h, h, -h))
        best = h * vertex(here, ahead, behind)
        losses = torch.stack([here, ahead, behind, self._losses_at(best, sums, moves, direction)])
        lowest, which = losses.min(0)
        taken = torch.stack([0 * h, h, -h, best]).gather(0, which[None])[0]
        self._take(taken, direction, direction_bias, h)
        self.evaluations += 4 if self.activation == "linear" else 6  # tanh: and two with the bias nudged
        self.train_loss = self.in_units(lowest - self._penalty(self.weight))

    def _take(self, taken: Tensor, direction: Tensor, direction_bias: Tensor, tried: Tensor) -> None:
        """Move each neuron by `taken` `(k,)`; one that does not move loses trust and begins anew with shorter steps."""
        moved = taken != 0
        self.weight += taken[:, None].float() * direction
        self.bias += taken.float() * direction_bias
        self.length = torch.where(moved, taken.abs(), tried / 4)
        self.last_direction, self.last_bias = direction * moved[:, None], direction_bias * moved
        self.trust = (self.trust + torch.where(moved, self.trust_up, -self.trust_down)).clamp(0, 1)

    def _forget(self) -> None:
        """Begin without a last direction and a known length of step."""
        self.length = torch.zeros_like(self.bias, dtype=torch.float64)
        self.last_direction, self.last_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.last_fall, self.last_fall_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def _losses_at(self, step: Tensor, sums: Tensor, moves: Tensor, direction: Tensor) -> Tensor:
        """The loss of each neuron, `(k,)` fp64, at `step` `(k,)` along its direction: a forward evaluation."""
        there = self.losses_along(sums, moves, step, self.goals)
        return there + self._penalty(self.weight + step[:, None].float() * direction)

    def _penalty(self, weight: Tensor) -> Tensor | float:
        return self.ridge * (weight * self.axes.spread.float()).square().sum(1).double() if self.ridge else 0.0

    def _conjugate(self, fall: Tensor, fall_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Directions conjugate to the last ones (Polak & Ribière 1969, never negative), per neuron."""
        ahead = fall @ self._metric
        last = ((self.last_fall @ self._metric) * self.last_fall).sum(1) + self.last_fall_bias.square()
        share = (ahead * (fall - self.last_fall)).sum(1) + fall_bias * (fall_bias - self.last_fall_bias)
        share = torch.where(last > 0, share / last.clamp(min=1e-30), 0.0).clamp(0, 1e3)
        direction, direction_bias = ahead + share[:, None] * self.last_direction, fall_bias + share * self.last_bias
        falls = (direction * fall).sum(1) + direction_bias * fall_bias > 0
        self.last_fall, self.last_fall_bias = fall, fall_bias
        return torch.where(falls[:, None], direction, ahead), torch.where(falls, direction_bias, fall_bias)
