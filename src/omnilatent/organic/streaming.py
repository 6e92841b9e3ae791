"""Data larger than memory, or that never repeat: parents and children on the same minibatch, a search per neuron.

- `Stream`: a sweep over all directions on every minibatch, half of the step taken.
- `Mutation`: (1+1) evolution with the 1/5 rule.

Both compare only losses on the same minibatch (common random numbers): what a neuron takes must be better there than
what it has. Inputs are whitened by the principal axes of those seen so far, renewed whenever the number of minibatches
has doubled, until 40 d rows were seen. What is handed out is a mean of all weights so far, in which the noise of single
minibatches cancels (Polyak & Juditsky 1992), so that on a stream of n rows the excess over least squares falls as d/n.
The weights after the t-th minibatch count about as t², so that the first ones are soon forgotten (polynomial-decay
averaging, Shamir & Zhang 2013, with η = 2).

`Stream` takes half of the step to the vertex of the parabola, since the whole step fits the minibatch's noise. It needs
minibatches of a few d rows. Processes spread the rows: what they find is, but for rounding, what one finds on all rows.

`Mutation` tries `population` mutations on each minibatch one after the other. One direction is drawn for all neurons,
since its activations are then made once; each neuron's child goes along it by its own step, which grows by e^(1/3) with
a success and shrinks by e^(−1/12) with a failure and so holds where one mutation in five succeeds (Rechenberg 1973;
rates: arXiv 2209.12467). It needs some 10 d to 20 d evaluations, and minibatches of at least 20 d rows: every mutation
kept fits their noise a little, too. Processes spread the population: each is an island for one minibatch, with its
share of the children and all rows; then each neuron takes the weights of the island where its loss is lowest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .config import LearnerConfig
from .neurons import Neurons, TargetScale
from .peers import ALONE, Peers
from .retina import Moments
from .search import Batches, Minibatched, generator, vertex

_ENOUGH = 40  # rows a dimension after which the axes are known well enough; looking costs more than a sweep
_FORGETTING = 2  # η
_GROW, _SHRINK = 1 / 3, -1 / 12  # of a step's logarithm


class Streaming(Minibatched):
    """What both share. `moments`: of the inputs seen; `white` `(d, r)`: their whitening, of unit variance."""

    STATE = (*Minibatched.STATE, "white", "mean_weight", "mean_bias")

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig,
                 peers: Peers = ALONE) -> None:
        super().__init__(batches, scale, centre, config, peers)
        self.moments, self.white = Moments(len(centre), centre.device), centre.new_zeros(len(centre), 0)
        self.mean_weight, self.mean_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def adapt(self, inputs: Tensor, goals: Tensor) -> None:
        if self.moments.count < _ENOUGH * inputs.shape[1]:
            self._whiten(self.row_peers.rows(inputs))
        sums = self.sums_of(inputs, self.weight, self.bias)
        loss, moved = self.search(inputs, sums, goals)
        self.trust = (self.trust + self.config.trust_up * moved - self.config.trust_down * (1 - moved)).clamp(0, 1)
        self.train_loss = self.in_units(loss)
        share = (_FORGETTING + 1) / (self.position + 1 + _FORGETTING)
        self.mean_weight.lerp_(self.weight, share)
        self.mean_bias.lerp_(self.bias, share)

    @abstractmethod
    def search(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        """Change weight and bias by one minibatch; the loss of each neuron there, and its share of successes."""

    def neurons(self) -> Neurons:
        """The mean of the weights so far."""
        now = self.weight, self.bias
        self.weight, self.bias = self.mean_weight, self.mean_bias
        made = super().neurons()
        self.weight, self.bias = now
        return made

    def state(self) -> dict[str, Any]:
        return super().state() | {"moments": self.moments.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.moments.load_state({name: value.to(self.centre.device) for name, value in state["moments"].items()})

    def _whiten(self, inputs: Tensor) -> None:
        """Look at more inputs; take new axes where the minibatches have doubled, or these inputs were the last."""
        self.moments.add(inputs)
        count, d = float(self.moments.count), inputs.shape[1]
        if _is_power_of_two(self.position + 1) or count >= _ENOUGH * d:
            self.white = self.moments.axes().whitening(ridge=0.1 * d / count).float()


class Stream(Streaming):
    """A sweep on every minibatch."""

    SPREAD_ROWS = True

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
    """(1+1) evolution; `length` `(k,)`: logarithm of each neuron's next step, in standard deviations of its sum."""

    STATE = (*Streaming.STATE, "length")

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig,
                 peers: Peers = ALONE) -> None:
        super().__init__(batches, scale, centre, config, peers)
        self.length = torch.full_like(self.bias, math.log(config.mutation))

    def search(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        p, r = self.config.population, self.white.shape[1]
        noise = torch.randn(r + 1, p, generator=generator("mutations", self.config.seed, self.position)).to(sums.device)
        noise /= math.sqrt(r + 1)
        directions, biases = self.white @ noise[:r], noise[r]  # (d, p), (p,)
        loss, length, taken = self._evolve(inputs, sums, goals, directions, biases)
        losses = torch.stack(self.peers.gather(loss))  # (processes, k)
        successes = self.peers.sum((taken != 0).double().sum(0))
        taken = self.peers.sum(taken * (losses.argmin(0) == self.peers.rank))
        self.weight += taken.mT @ directions.mT
        self.bias += taken.mT @ biases
        self.length = self.peers.sum(length) / self.peers.count  # every process's children count for the 1/5 rule
        self.evaluations += self.peers.count + p
        return losses.amin(0), successes / p

    def _evolve(
        self, inputs: Tensor, sums: Tensor, goals: Tensor, directions: Tensor, biases: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This process's children: the losses that they end at and the logarithms of the next steps, `(k,)` each, and
        the steps taken, `(p, k)`, 0 where a child was no better or is another process's."""
        own = self.peers.share(len(biases))
        loss, length, taken = self.losses(sums, goals), self.length, sums.new_zeros(len(biases), sums.shape[1])
        activations = (inputs - self.centre) @ directions[:, own.start:own.stop] + biases[own.start:own.stop]
        for j, activation in zip(own, activations.mT, strict=True):
            step = length.exp()
            child = torch.addcmul(sums, activation[:, None], step)
            there = self.losses(child, goals)
            better = there < loss
            sums, loss = torch.where(better, child, sums), torch.where(better, there, loss)
            taken[j] = step * better
            length = length + torch.where(better, _GROW, _SHRINK)
        return loss, length, taken


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
