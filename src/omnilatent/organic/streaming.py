"""Data larger than memory, or that never repeat: parents and children on the same minibatch, a search per neuron.

- `Stream`: a sweep over all directions on every minibatch, half of the step taken.
- `Mutation`: (1+1) evolution with the 1/5 rule.

Both compare only losses on the same minibatch (common random numbers): what a neuron takes must be better there than
what it has. Inputs are whitened by the principal axes of those seen so far, renewed whenever the number of minibatches
has doubled, until 40 d rows were seen. What is handed out is the mean of the weights since then, in which the noise of single minibatches cancels
(Polyak & Juditsky 1992), so that on a stream of n rows the excess over least squares falls as d/n.

`Stream` takes half of the step to the vertex of the parabola, since the whole step fits the minibatch's noise. It needs
minibatches of a few d rows.

`Mutation` tries `population` mutations on each minibatch one after the other. One direction is drawn for all neurons,
since its activations are then made once; each neuron's child goes along it by its own step, which grows by e^(1/3) with
a success and shrinks by e^(−1/12) with a failure and so holds where one mutation in five succeeds (Rechenberg 1973;
rates: arXiv 2209.12467). It needs some 10 d to 20 d evaluations, and minibatches of at least 20 d rows: every mutation
kept fits their noise a little, too.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .config import LearnerConfig
from .neurons import Neurons, TargetScale
from .retina import Moments
from .search import Batches, Search, generator, vertex

_ENOUGH = 40  # rows a dimension after which the axes are known well enough; looking costs more than a sweep
_GROW, _SHRINK = math.exp(1 / 3), math.exp(-1 / 12)


class Streaming(Search):
    """What both share. `moments`: of the inputs seen; `white` `(d, r)`: their whitening, of unit variance."""

    STATE = (*Search.STATE, "position", "mean_weight", "mean_bias", "mean_count", "white")

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig) -> None:
        super().__init__(len(centre), scale, config.activation, centre, config.trust_start)
        self.batches, self.config = batches, config
        self.position = torch.tensor(0)
        self.moments, self.white = Moments(len(centre)), torch.zeros(len(centre), 0)
        self._forget_mean()

    def step(self) -> None:
        """One minibatch."""
        inputs, targets = self.batches(int(self.position))
        inputs, goals = inputs.float(), self.goals_of(targets)
        renew = _is_power_of_two(int(self.position) + 1)
        if self.moments.count < _ENOUGH * inputs.shape[1]:
            self._whiten(inputs, renew)
        sums = self.sums_of(inputs, self.weight, self.bias)
        loss, moved = self.search(inputs, sums, goals)
        self.trust = (self.trust + self.config.trust_up * moved - self.config.trust_down * (1 - moved)).clamp(0, 1)
        self.train_loss = self.in_units(loss)
        self.position += 1
        if renew:
            self._forget_mean()
        self.mean_weight += self.weight
        self.mean_bias += self.bias
        self.mean_count += 1

    @abstractmethod
    def search(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        """Change weight and bias by one minibatch; the loss of each neuron there, and its share of successes."""

    def neurons(self) -> Neurons:
        """The mean of the weights since the number of minibatches was a power of two."""
        now = self.weight, self.bias
        if int(self.mean_count):
            self.weight, self.bias = self.mean_weight / self.mean_count, self.mean_bias / self.mean_count
        made = super().neurons()
        self.weight, self.bias = now
        return made

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"moments.{name}": value for name, value in self.moments.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.moments.load_state({name: state[f"moments.{name}"] for name in self.moments.state()})

    def _whiten(self, inputs: Tensor, renew: bool) -> None:
        """Look at more inputs; take new axes now, or because they were the last."""
        self.moments.add(inputs)
        count, d = float(self.moments.count), inputs.shape[1]
        if renew or count >= _ENOUGH * d:
            self.white = self.moments.axes().whitening(ridge=0.1 * d / count).float()

    def _forget_mean(self) -> None:
        self.mean_weight, self.mean_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.mean_count = torch.tensor(0)


class Stream(Streaming):
    """A sweep on every minibatch."""

    def search(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        fall, bias, curvature = self.responses(inputs, sums, goals)
        weight = (fall @ self.white) @ self.white.mT
        moves = self.sums_of(inputs, weight, bias)
        h = 1 / curvature.clamp(min=0.05)
        here, ahead, behind = (self.losses_along(sums, moves, t, goals) for t in (0 * h, h, -h))
        step = h * vertex(here, ahead, behind) / 2
        there = self.losses_along(sums, moves, step, goals)
        moved = there < here
        step = torch.where(moved, step, 0.0).float()
        self.weight += step[:, None] * weight
        self.bias += step * bias
        self.evaluations += 4 if self.activation == "linear" else 6
        return torch.where(moved, there, here), moved.double()


class Mutation(Streaming):
    """(1+1) evolution; `length` `(k,)`: of each neuron's next mutation, in standard deviations of its sum."""

    STATE = (*Streaming.STATE, "length")

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig) -> None:
        super().__init__(batches, scale, centre, config)
        self.length = torch.full((len(self.bias),), config.mutation)

    def search(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        p, r = self.config.population, self.white.shape[1]
        noise = torch.randn(r + 1, p, generator=generator("mutations", self.config.seed, int(self.position)))
        noise /= math.sqrt(r + 1)
        directions, biases = self.white @ noise[:r], noise[r]  # (d, p), (p,)
        activations = (inputs - self.centre) @ directions + biases  # (n, p)
        loss, taken = self.losses(sums, goals), torch.zeros(p, len(self.bias))
        for j in range(p):
            child = torch.addcmul(sums, activations[:, j, None], self.length)
            there = self.losses(child, goals)
            better = there < loss
            sums, loss = torch.where(better, child, sums), torch.where(better, there, loss)
            taken[j] = self.length * better
            self.length = self.length * torch.where(better, _GROW, _SHRINK)
        self.weight += taken.mT @ directions.mT
        self.bias += taken.mT @ biases
        self.evaluations += 1 + p
        return loss, (taken != 0).double().mean(0)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
