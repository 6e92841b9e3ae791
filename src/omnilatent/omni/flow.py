"""Flow matching with the clean data as what is predicted: few steps from noise to a picture, a sound, a video.

x_t = (1 − t) noise + t x (Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003). The model takes x_t for x̂,
and the velocity is (x̂ − x_t) / (1 − t): clean patches lie on a manifold, noise does not (Li & He 2025, arXiv 2511.13720).

The more values an example has, the more of the steps are taken near pure noise (after Esser et al. 2024, arXiv 2403.03206, section
5.3.2; how many is fitted to one model of the digits world: docs/experiments.md).

- `flow`: Euler's steps. `shifted`: where they lie. `draw`, `on_the_way`: noise, t and x_t for training. `TimeFeatures`: t as a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


PER_SHIFT, MOST = 384, 8.0  # the shift is the root of the values over the first, from 1 to the second


class TimeFeatures(nn.Module):
    """t in 0 … 1 as sines and cosines, then a small perceptron."""

    frequencies: Tensor

    def __init__(self, dim: int, waves: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1000.0 ** (torch.arange(waves) / waves), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        """`(b,)` → `(b, dim)`."""
        angles = time.float()[:, None] * self.frequencies
        return self.layers(torch.cat((angles.sin(), angles.cos()), 1).to(self.layers[0].weight.dtype))


def flow(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Euler from t = 0 to 1; `predict(x_t, t)` gives x̂ for noise `(b, n, p)` that is on its way, and the last step ends at it."""
    x = noise
    times = [shifted(step / steps, noise[0].numel()) for step in range(steps + 1)]
    for now, then in zip(times, times[1:], strict=False):
        clean = predict(x, x.new_full((len(x),), now, dtype=torch.float32)).to(x)
        x = clean if then == 1 else x + (clean - x) * ((then - now) / (1 - now))
    return x


def shifted(time: float, values: int) -> float:
    """A share of the steps → t of an example with so many values."""
    towards = min(MOST, max(1.0, math.sqrt(values / PER_SHIFT)))
    return time / (time + towards * (1 - time))


def draw(shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of a shape `(b, n, p)`, and t `(b,)`, which is logit-normal (Esser et al. 2024) around 0.31: what is drawn is decided
    early."""
    time = torch.randn(shape[0], generator=generator, device=generator.device).sub(0.8).sigmoid()
    return torch.randn(shape, generator=generator, device=generator.device), time


def on_the_way(patches: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Clean patches `(b, n, p)` and noise → x_t at each one's t `(b,)`."""
    return noise.to(patches).lerp(patches, time[:, None, None].to(patches))
