"""The seed's own rule, kept to be shown for what it does: it does not learn.

- `Classic`: a population of genomes, each a whole layer with one number of trust.

A genome's trust rises by `trust_up` when its loss on a minibatch is below its own loss on the one before by more than
`epsilon`, and falls by `trust_down` when it is above by more. Genomes of little trust mutate. Nothing is ever compared
with anything on the same data, and a mutation that hurts is not taken back, so the search is a random walk. On changing
minibatches a loss falls as often as it rises, so +0.01/−0.005 drifts upwards, mutation stops, and what is left is the
best of the genomes as they were drawn; so does +0.1/−0.05, ten times sooner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LearnerConfig
from .neurons import Neurons, TargetScale
from .search import Batches, Search, generator


class Classic(Search):
    """Genomes `(g, k, d)` and `(g, k)`; `trust` and `losses_before`, each `(g,)`, are of genomes here."""

    STATE = ("weights", "biases", "trust", "losses_before", "position")

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig) -> None:
        super().__init__(len(centre), scale, config.activation, centre, config.trust_start)
        self.batches, self.config = batches, config
        g, k, d = config.population, *self.weight.shape
        self.weights = torch.randn(g, k, d, generator=generator("genomes", config.seed)) * config.mutation
        self.biases = torch.zeros(g, k)
        self.trust = torch.full((g,), config.trust_start, dtype=torch.float64)
        self.losses_before = torch.full((g,), torch.inf, dtype=torch.float64)
        self.position = torch.tensor(0)

    def step(self) -> None:
        """One minibatch: trust of all genomes, then the mutations of those that have little."""
        inputs, targets = self.batches(int(self.position))
        goals, config = self.goals_of(targets), self.config
        sums = self.sums_of(inputs, self.weights.flatten(0, 1), self.biases.flatten())  # (n, g k)
        now = self.losses(sums, goals.repeat(1, len(self.weights))).unflatten(0, self.biases.shape)  # (g, k)
        now = (now * self.scale.scale.double().square()).mean(1)
        rise = torch.where(self.losses_before.isfinite(), now - self.losses_before, 0.0)
        up, down = (rise < -config.epsilon), (rise > config.epsilon)
        self.trust = (self.trust + config.trust_up * up - config.trust_down * down).clamp(0, 1)
        mutating = (self.trust < config.mutate_below).float()
        noise = generator("mutations", config.seed, int(self.position))
        self.weights += torch.randn(self.weights.shape, generator=noise) * config.mutation * mutating[:, None, None]
        self.biases += torch.randn(self.biases.shape, generator=noise) * config.mutation * mutating[:, None]
        self.losses_before = now
        self.evaluations += len(now)
        self.position += 1
        self.train_loss = float(now.min())

    def neurons(self) -> Neurons:
        """The genome whose loss was lowest on the latest minibatch: loss, not trust, is the metric."""
        best = int(self.losses_before.argmin())
        self.weight, self.bias = self.weights[best], self.biases[best]
        return super().neurons()
