"""What every search for one layer shares: its weights, its trust, what it has spent, and its state as plain tensors.

- `Search`: the base of `probes.Sweeps`, `directions.Directions`, `classic.Classic` and those of `streaming`.
- `vertex`: the lowest point of the parabola through three losses.
- `Batches`: minibatches as a pure function of the position; `minibatches` makes one of tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.keyed import draws
from .neurons import Activation, Neurons, TargetScale, check_pairs, chunks

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
        chosen = torch.randint(len(inputs), (size,), generator=generator("minibatch", seed, position))
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
    STATE: tuple[str, ...] = ("weight", "bias", "trust")
    """Names of the tensors that going on needs beside the data."""

    def __init__(self, inputs: int, scale: TargetScale, activation: Activation, centre: Tensor, trust: float) -> None:
        k = len(scale.scale)
        self.activation, self.scale, self.centre = activation, scale, centre
        self.weight, self.bias = torch.zeros(k, inputs), torch.zeros(k)
        self.trust = torch.full((k,), trust, dtype=torch.float64)
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

    def state(self) -> dict[str, Tensor]:
        """Everything that going on needs beside the data and the settings, as tensors."""
        return {name: getattr(self, name).clone() for name in self.STATE} | {
            "evaluations": torch.tensor(self.evaluations), "train_loss": torch.tensor(self.train_loss).double()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, on the same data and settings."""
        for name in self.STATE:
            setattr(self, name, state[name].clone())
        self.evaluations, self.train_loss = int(state["evaluations"]), float(state["train_loss"])

    def goals_of(self, targets: Tensor) -> Tensor:
        """Targets `(n, k)` → what φ must give, fp32."""
        return torch.cat([(targets[rows].float() - self.scale.shift) / self.scale.scale for rows in chunks(targets)])

    def errors(self, sums: Tensor, goals: Tensor) -> Tensor:
        """Squared error of each row and neuron, of φ's range, from the affine part; `(n, k)` each."""
        return ((torch.tanh(sums) if self.activation == "tanh" else sums) - goals).square()

    def losses(self, sums: Tensor, goals: Tensor) -> Tensor:
        """The loss of each neuron in φ's range, `(k,)` fp64."""
        total = torch.zeros(sums.shape[1], dtype=torch.float64)
        for rows in chunks(sums):
            total += self.errors(sums[rows], goals[rows]).sum(0).double()
        return total / len(sums)

    def sums_of(self, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The affine part over all rows, `(n, k)`, read in chunks."""
        out = torch.empty(len(inputs), len(weight))
        for rows in chunks(inputs, out):
            torch.addmm(bias, inputs[rows].float() - self.centre, weight.mT, out=out[rows])
        return out

    def losses_along(self, sums: Tensor, moves: Tensor, step: Tensor, goals: Tensor) -> Tensor:
        """The loss of each neuron, `(k,)` fp64, `step` `(k,)` times `moves` from `sums`, both `(n, k)`."""
        total, t = torch.zeros(len(step), dtype=torch.float64), step.float()
        for rows in chunks(sums):
            total += self.errors(torch.addcmul(sums[rows], moves[rows], t), goals[rows]).sum(0).double()
        return total / len(sums)

    def responses(self, inputs: Tensor, sums: Tensor, goals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How fast each neuron's loss falls along every weight `(k, d)` and its bias `(k,)`, and its curvature `(k,)`.

        From the squared errors of every row with the neurons' sums nudged by ±δ (see `probes`). Halved, so that the
        curvature of a linear neuron on whitened inputs is 1.
        """
        k, d = self.weight.shape
        fall, fall_bias = torch.zeros(k, d), torch.zeros(k, dtype=torch.float64)
        bend = torch.zeros(k, dtype=torch.float64)
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
        count = len(sums)
        return fall / count, (fall_bias / count).float(), bend / count

    def in_units(self, losses: Tensor) -> float:
        """Losses in φ's range, `(k,)` → their mean in the targets' units."""
        return float((losses * self.scale.scale.double().square()).mean())
