"""An exponential moving average of a model's parameters; buffers, such as codebooks that are averages already, are copied."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Keeps `average`, a copy of `model` whose parameters follow it slowly.

    The decay rises as (1 + n) / (10 + n) over the first updates n up to `decay`, so that short runs do not
    average over the initial weights (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = list(zip(self.average.parameters(), model.parameters(), strict=True))
        self._buffers = list(zip(self.average.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, position: int) -> None:
        """Move towards the model after optimiser step `position` (counted from 0)."""
        decay = min(self.decay, (1 + position) / (10 + position))
        averages, current = [a for a, _ in self._pairs], [p.detach() for _, p in self._pairs]
        torch._foreach_lerp_(averages, current, 1 - decay)
        for kept, buffer in self._buffers:
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.load_state_dict(state)
