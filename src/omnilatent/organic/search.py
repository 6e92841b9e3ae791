"""What every search for one layer shares: its weights, its trust, and what it has spent.

- `Search`: the base of all; `probes.Sweeps` and `directions.Directions` read data at hand again and again.
- `Minibatched`: the base of `classic.Classic` and those of `streaming`, with their state, over any number of processes.
- `vertex`: the lowest point of the parabola through three losses.
- `Batches`: minibatches as a pure function of the position; `minibatches` makes one of tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.keyed import draws
from .config import LearnerConfig
from .neurons import Activation, Neurons, TargetScale, check_pairs, chunks
from .peers import ALONE, Peers

_NUDGE = 0.03  # δ: of a neuron's sum, which is about 1 in size; balances δ² against fp32 rounding
_INSIDE = 0.97  # of tanh's range, where the start from the inverse of tanh cuts targets off
Batches = Callable[[int], tuple[Tensor, Tensor]]


def generator(purpose: str, *key: int) -> torch.Generator:
    """Random numbers that are a pure function of (purpose, key), so that resuming needs no state."""
    return torch.Generator().manual_seed(draws(purpose, *key, count=1)[0] >> 1)


def minibatches(inputs: Tensor, targets: Tensor, size: int, seed: int) -> Batches:
    """Rows drawn with replacement, the same for the same position."""
    check_pairs(inputs, targets)

    def batch(position: int) -> tuple[Tensor, Tensor]:
        draw = generator("minibatch", seed, position)
        chosen = torch.randint(len(inputs), (size,), generator=draw).to(inputs.device)
        return inputs[chosen], targets[chosen]

    return batch


def vertex(here: Tensor, ahead: Tensor, behind: Tensor) -> Tensor:
    """Where the parabola through the losses at 0, +1 and −1 is lowest, within ±4; 2 downhill where it bends down."""
    bend = (ahead + behind - 2 * here) / 2
    lowest = torch.where(bend > 0, (behind - ahead) / (4 * bend.clamp(min=1e-30)), torch.sign(behind - ahead) * 2)
    return lowest.clamp(-4, 4)


class Search(ABC):
    """A search for one layer of `k` neurons on `d` inputs, a step at a time.

    `weight` `(k, d)` and `bias` `(k,)` act on inputs minus `centre` `(d,)`; `trust` `(k,)` fp64 lies in [0, 1].
    `train_loss` is that of the latest step, in the targets' units; `evaluations` counts forward passes.
    """

    goals: Tensor
    """`(N, k)` fp32, what φ must give on the rows, for searches on fixed data."""
    row_peers: Peers = ALONE
    """The processes over which the rows are spread, as many on each: sums over rows are taken over all of them."""

    def __init__(self, inputs: int, scale: TargetScale, activation: Activation, centre: Tensor, trust: float) -> None:
        k = len(scale.scale)
        self.activation, self.scale, self.centre = activation, scale, centre
        self.weight, self.bias = centre.new_zeros(k, inputs), centre.new_zeros(k)
        self.trust = torch.full((k,), trust, dtype=torch.float64, device=centre.device)
        self.evaluations, self.train_loss = 0, math.inf

    @abstractmethod
    def step(self) -> None:
        """Go on by a sweep or a minibatch."""

    def start_from_inverse(self) -> None:
        """One step of linear neurons towards the inverse of tanh of `goals`, where tanh neurons begin."""
        goals, trust = self.goals, self.trust
        self.goals, self.activation = torch.atanh(goals.clamp(-_INSIDE, _INSIDE)), "linear"
        self.step()
        self.goals, self.activation, self.trust = goals, "tanh", trust

    def neurons(self) -> Neurons:
        """The neurons as they are now, on plain inputs and in the targets' units."""
        bias = self.bias.double() - self.weight.double() @ self.centre.double()
        return Neurons(self.weight, bias.float(), self.activation, self.scale.scale, self.scale.shift)

    def goals_of(self, targets: Tensor) -> Tensor:
        """Targets `(n, k)` → what φ must give, fp32."""
        return torch.cat([(targets[rows].float() - self.scale.shift) / self.scale.scale for rows in chunks(targets)])

    def errors(self, sums: Tensor, goals: Tensor) -> Tensor:
        """Squared error of each row and neuron, of φ's range, from the affine part; `(n, k)` each."""
        return ((torch.tanh(sums) if self.activation == "tanh" else sums) - goals).square()

    def losses(self, sums: Tensor, goals: Tensor) -> Tensor:
        """The loss of each neuron in φ's range, `(k,)` fp64."""
        total = torch.zeros(sums.shape[1], dtype=torch.float64, device=sums.device)
        for rows in chunks(sums):
            total += self.errors(sums[rows], goals[rows]).sum(0).double()
        return self._mean(total, len(sums))

    def sums_of(self, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The affine part over all rows, `(n, k)`, read in chunks."""
        out = weight.new_empty(len(inputs), len(weight))
        for rows in chunks(inputs, out):
            torch.addmm(bias, inputs[rows].float() - self.centre, weight.mT, out=out[rows])
        return out

    def losses_along(self, sums: Tensor, moves: Tensor, step: Tensor, goals: Tensor) -> Tensor:
        """The loss of each neuron, `(k,)` fp64, `step` `(k,)` times `moves` from `sums`, both `(n, k)`."""
        total, t = torch.zeros(len(step), dtype=torch.float64, device=sums.device), step.float()
        for rows in chunks(sums):
            total += self.errors(torch.addcmul(sums[rows], moves[rows], t), goals[rows]).sum(0).double()
        return self._mean(total, len(sums))

    def responses(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How fast each neuron's loss falls along every weight `(k, d)` and its bias `(k,)`, and its curvature `(k,)`.

        From the squared errors of every row with the neurons' sums nudged by ±δ (see `probes`). Halved, so that the
        curvature of a linear neuron on whitened inputs is 1.
        """
        fall, count = torch.zeros_like(self.weight), len(sums)
        fall_bias, bend = torch.zeros(2, len(fall), dtype=torch.float64, device=fall.device)
        for rows in chunks(inputs, goals):
            here, goal = sums[rows], goals[rows]
            if self.activation == "linear":
                response = goal - here  # what the nudged errors give, for every δ
                bend += len(here)
            else:
                plus, minus = self.errors(here + _NUDGE, goal), self.errors(here - _NUDGE, goal)
                response = (minus - plus) / (4 * _NUDGE)
                bend += (plus + minus - 2 * self.errors(here, goal)).sum(0) / (2 * _NUDGE**2)
            fall.addmm_(response.mT, inputs[rows].float() - self.centre)
            fall_bias += response.sum(0)
        return self._mean(fall, count), self._mean(fall_bias, count).float(), self._mean(bend, count)

    def in_units(self, losses: Tensor) -> float:
        """Losses in φ's range, `(k,)` → their mean in the targets' units."""
        return float((losses * self.scale.scale.double().square()).mean())

    def _mean(self, total: Tensor, rows: int) -> Tensor:
        """The sum over this process's rows → the mean over all rows."""
        return self.row_peers.sum(total) / (rows * self.row_peers.count)


class Minibatched(Search):
    """A search that reads one minibatch after the other, each once, and can go on from its state.

    Of several processes the `rank`-th takes the minibatch `rank` of each `count` in turn, and all of them together
    are what one process alone would take for one, so `batches` knows nothing of processes. What is learned is bit-equal
    on all of them.
    """

    SPREAD_ROWS = False
    """Whether each process keeps to its own rows. Otherwise each of them gets all rows, and tries other weights."""
    STATE: tuple[str, ...] = ("weight", "bias", "trust", "centre")
    """Names of the tensors that going on needs beside the data."""

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig,
                 peers: Peers = ALONE) -> None:
        super().__init__(len(centre), scale, config.activation, centre, config.trust_start)
        self.batches, self.config, self.peers, self.position = batches, config, peers, 0
        if self.SPREAD_ROWS:
            self.row_peers = peers

    def step(self) -> None:
        self.learn(*self.minibatch(self.position))

    def minibatch(self, position: int) -> tuple[Tensor, Tensor]:
        """This process's share of the `position`-th step's rows."""
        return self.batches(position * self.peers.count + self.peers.rank)

    def learn(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on a minibatch, of which every process gives as many rows."""
        if not self.SPREAD_ROWS:
            inputs, targets = self.peers.rows(inputs), self.peers.rows(targets)
        self.adapt(inputs.float(), self.goals_of(targets))
        self.position += 1

    @abstractmethod
    def adapt(self, inputs: Tensor, goals: Tensor) -> None:
        """Change the weights by one minibatch, and set `trust`, `evaluations` and `train_loss`."""

    def state(self) -> dict[str, Any]:
        """Everything that going on needs beside the data and the settings."""
        tensors = {name: getattr(self, name).clone() for name in self.STATE}
        plain = {"position": self.position, "evaluations": self.evaluations, "train_loss": self.train_loss}
        return {**tensors, **plain, "scale": vars(self.scale)}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, on the same data and settings."""
        device = self.centre.device
        for name in self.STATE:
            setattr(self, name, state[name].to(device, copy=True))
        self.position, self.evaluations = state["position"], state["evaluations"]
        self.train_loss = state["train_loss"]
        scale, shift, clipped_share = (state["scale"][name] for name in ("scale", "shift", "clipped_share"))
        self.scale = TargetScale(scale.to(device), shift.to(device), clipped_share)
