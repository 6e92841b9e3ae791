"""What every search for one layer shares: its weights, its trust, what it has spent, and its state as plain tensors.

- `Search`: the base of `probes.Sweeps`, `directions.Directions`, `streaming.Mutation` and `classic.Classic`.
- `Batches`: minibatches as a pure function of the position; `minibatches` makes one of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.keyed import draws
from .neurons import Activation, Neurons, TargetScale, check_pairs, chunks

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


class Search:
    """A search for one layer of `k` neurons on `d` inputs, a step at a time.

    `weight` `(k, d)` and `bias` `(k,)` act on inputs minus `centre` `(d,)`; `trust` `(k,)` fp64 lies in [0, 1].
    `train_loss` is that of the latest step, in the targets' units; `evaluations` counts forward passes.
    """

    STATE: tuple[str, ...] = ("weight", "bias", "trust")
    """Names of the tensors that going on needs beside the data."""

    def __init__(self, inputs: int, scale: TargetScale, activation: Activation, centre: Tensor, trust: float) -> None:
        k = len(scale.scale)
        self.activation, self.scale, self.centre = activation, scale, centre
        self.weight, self.bias = torch.zeros(k, inputs), torch.zeros(k)
        self.trust = torch.full((k,), trust, dtype=torch.float64)
        self.evaluations, self.train_loss = 0, math.inf

    def step(self) -> None:
        """Go on by a sweep or a minibatch."""
        raise NotImplementedError

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

    def in_units(self, losses: Tensor) -> float:
        """Losses in φ's range, `(k,)` → their mean in the targets' units."""
        return float((losses * self.scale.scale.double().square()).mean())
