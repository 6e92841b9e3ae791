"""The seed's own rule, kept to be shown for what it does: it does not learn.

- `Classic`: a population of genomes, each a whole layer with one number of trust.

A genome's trust rises by `trust_up` when its loss on a minibatch is below its own loss on the one before by more than
`epsilon`, and falls by `trust_down` when it is above by more. Genomes of little trust mutate. Nothing is ever compared
with anything on the same data, and a mutation that hurts is not taken back, so the search is a random walk. On changing
minibatches a loss falls as often as it rises, so +0.01/−0.005 drifts upwards, mutation stops, and what is left is the
best of the genomes as they were drawn; so does +0.1/−0.05, ten times sooner.

Of several processes each has the loss of its share of the genomes taken; the rest is the same on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LearnerConfig
from .neurons import Neurons, TargetScale
from .peers import ALONE, Peers
from .search import Batches, Minibatched, generator


class Classic(Minibatched):
    """Genomes `(g, k, d)` and `(g, k)`; `trust` and `losses_before`, each `(g,)`, are of genomes here."""

    STATE = ("weights", "biases", "trust", "centre", "losses_before")

    def __init__(self, batches: Batches, scale: TargetScale, centre: Tensor, config: LearnerConfig,
                 peers: Peers = ALONE) -> None:
        super().__init__(batches, scale, centre, config, peers)
        g, k, d = config.population, *self.weight.shape
        self.weights = self._noise("genomes", g, k, d)
        self.biases = centre.new_zeros(g, k)
        self.trust = torch.full((g,), config.trust_start, dtype=torch.float64, device=centre.device)
        self.losses_before = torch.full_like(self.trust, torch.inf)

    def adapt(self, inputs: Tensor, goals: Tensor) -> None:
        """Trust of all genomes, then the mutations of those that have little."""
        config, now = self.config, torch.zeros_like(self.trust)
        own = self.peers.share(len(now))
        if own:
            now[own.start:own.stop] = self._losses(inputs, goals, slice(own.start, own.stop))
        now = self.peers.sum(now)
        rise = torch.where(self.losses_before.isfinite(), now - self.losses_before, 0.0)
        up, down = (rise < -config.epsilon), (rise > config.epsilon)
        self.trust = (self.trust + config.trust_up * up - config.trust_down * down).clamp(0, 1)
        mutating = (self.trust < config.mutate_below).float()
        g, k, d = self.weights.shape
        noise = self._noise("mutations", g, k, d + 1) * mutating[:, None, None]
        self.weights += noise[..., :d]
        self.biases += noise[..., d]
        self.losses_before = now
        self.evaluations += len(now)
        self.train_loss = float(now.min())

    def _losses(self, inputs: Tensor, goals: Tensor, own: slice) -> Tensor:
        """The loss of some genomes, in the targets' units."""
        weights, biases = self.weights[own], self.biases[own]
        sums = self.sums_of(inputs, weights.flatten(0, 1), biases.flatten())  # (n, g k)
        losses = self.losses(sums, goals.repeat(1, len(weights))).unflatten(0, biases.shape)  # (g, k)
        return (losses * self.scale.scale.double().square()).mean(1)

    def _noise(self, purpose: str, *shape: int) -> Tensor:
        """As large as mutations are, the same on all processes."""
        draw = generator(purpose, self.config.seed, self.position)
        return torch.randn(shape, generator=draw).to(self.centre.device) * self.config.mutation

    def neurons(self) -> Neurons:
        """The genome whose loss was lowest on the latest minibatch: loss, not trust, is the metric."""
        best = int(self.losses_before.argmin())
        self.weight, self.bias = self.weights[best], self.biases[best]
        return super().neurons()
