"""Layers of tanh neurons on a grid, each of which sees the guesses of the one before it in its neighbourhood.

- `GridLayer`: hidden neurons and a linear readout. `GridStack`: some of them, one after the other.
- `GridDecoder`: a stack that says every cell's pixels.
- `neighbourhood`: a map with its neighbours as channels. `frequencies`: a cell's pixels as cosines.

Depth and context are what a drop-in needs: one wide layer does not get there. So every layer sees the same code, and
beside it the 3×3 guesses of the last layer around its site; what it reads out of both and of its neurons is the next
guess, or what is added to the last one. A stack of n layers sees n − 1 sites beyond the code's own reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .neurons import Neurons
from .pairs import Affine


def neighbourhood(grid: Tensor, reach: int) -> Tensor:
    """`(b, c, h, w)` → `(b, c·reach², h·w)`, borders repeated; `reach` is odd."""
    if reach == 1:
        return grid.flatten(2)
    rim, (height, width) = reach // 2, grid.shape[-2:]
    padded = F.pad(grid, (rim, rim, rim, rim), mode="replicate")
    shifted = [padded[..., i : i + height, j : j + width] for i in range(reach) for j in range(reach)]
    return torch.stack(shifted, 2).flatten(3).flatten(1, 2)  # what F.unfold gives, several times as fast on a CPU


def frequencies(cell: int) -> Tensor:
    """Orthonormal rows `(3·cell², 3·cell²)`: cosines (DCT-II) of a cell's brightness and of two opponent colours, the
    low ones and brightness first. Times a cell's pixels `(3·cell²,)` as `pixel_unshuffle` gives them: coefficients."""
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colour /= colour.norm(dim=1, keepdim=True)
    places = torch.arange(cell, dtype=torch.float64)
    wave = torch.cos(math.pi / cell * (places + 0.5) * places[:, None]) * math.sqrt(2 / cell)  # a row a frequency
    wave[0] /= math.sqrt(2)
    height = (places[:, None].square() + places.square()).sqrt()
    order = (height + torch.tensor([0.0, 2.0, 2.0])[:, None, None]).flatten().argsort(stable=True)
    return torch.kron(colour, torch.kron(wave, wave))[order].float()


class GridLayer(nn.Module):
    """x → readout([x, tanh(W x + b)]) at every site: `inputs` numbers to `outputs`, by `neurons` neurons."""

    def __init__(self, inputs: int, neurons: int, outputs: int) -> None:
        super().__init__()
        shapes = {"weight": (neurons, inputs), "bias": (neurons,), "skip": (outputs, inputs), "out": (outputs, neurons),
                  "out_bias": (outputs,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @classmethod
    def of(cls, hidden: Affine, readout: Neurons) -> GridLayer:
        """From `(n, d)` neurons and a linear readout of d + n numbers."""
        n, d = hidden.weight.shape
        layer = cls(d, n, readout.outputs).to(hidden.weight.device)
        parts = (hidden.weight, hidden.bias, readout.weight[:, :d], readout.weight[:, d:], readout.bias)
        for parameter, value in zip(layer.parameters(), parts, strict=True):
            parameter.copy_(value)
        return layer

    @property
    def sizes(self) -> tuple[int, int]:
        """Neurons and outputs."""
        return len(self.weight), len(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, d, sites)` → `(b, k, sites)`."""
        hidden = _affine(self.bias, self.weight, x).tanh_()  # in place: a new map costs as much as a pass over it
        return _affine(self.out_bias, self.skip, x).baddbmm_(self.out.expand(len(x), -1, -1), hidden)


def _affine(bias: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`(b, d, sites)` → `(b, n, sites)`, in one pass."""
    return torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x)


class GridStack(nn.Module):
    """A code on a grid `(b, channels, h, w)` → `(b, k, h, w)`.

    Args:
        channels: of the code.
        sizes: neurons and outputs of each layer.
        reach: side of the code's neighbourhood that every layer sees.
        context: the first channels of a guess that the next layer sees.
        adds: what a layer says is added to the guess before it, of which a later layer sees only the first channels.
    """

    def __init__(self, channels: int, sizes: Sequence[tuple[int, int]], reach: int, context: int, adds: bool = False
                 ) -> None:
        super().__init__()
        self.channels, self.reach, self.context, self.adds = channels, reach, context, adds
        self.layers = nn.ModuleList()
        for neurons, outputs in sizes:
            self.layers.append(GridLayer(self.seen, neurons, outputs))

    @property
    def seen(self) -> int:
        """Numbers a site that the next layer would see."""
        last = min(self.context, self.layers[-1].sizes[1]) if len(self.layers) else 0
        return self.channels * self.reach**2 + 9 * last

    def config(self) -> dict[str, Any]:
        """What it is rebuilt from."""
        return {"channels": self.channels, "sizes": [layer.sizes for layer in self.layers], "reach": self.reach,
                "context": self.context, "adds": self.adds}

    def inputs(self, code: Tensor, guess: Tensor | None) -> Tensor:
        """What a layer sees: `(b, d, h·w)`. `guess` `(b, ≥ context, h, w)` is the last layer's."""
        return self._beside(neighbourhood(code, self.reach), guess)

    def _beside(self, seen: Tensor, guess: Tensor | None) -> Tensor:
        return seen if guess is None else torch.cat([seen, neighbourhood(guess[:, : self.context], 3)], 1)

    def guess(self, code: Tensor) -> Tensor | None:
        """What the last layer says; None where there is no layer."""
        guess, seen = None, neighbourhood(code, self.reach)
        for layer in self.layers:
            said = layer(self._beside(seen, guess)).unflatten(2, code.shape[-2:])
            guess = said if guess is None or not self.adds else said.add_(guess)
        return guess

    def forward(self, code: Tensor) -> Tensor:
        guess = self.guess(code)
        assert guess is not None, "a stack for use has at least one layer"
        return guess


class GridDecoder(nn.Module):
    """Latents `(b, c, h, w)` → pictures `(b, 3, cell·h, cell·w)`, about [0, 1]: a stack that says the cosines of every
    cell's pixels, the low ones first, so that a later layer sees those of its neighbours."""

    def __init__(self, stack: GridStack, cell: int) -> None:
        super().__init__()
        self.stack, self.cell = stack, cell
        self.register_buffer("waves", frequencies(cell), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != self.stack.channels:
            raise ValueError(f"latents have shape (b, {self.stack.channels}, h, w); got {tuple(latents.shape)}")
        cosines = self.stack(latents)
        pixels = (self.waves.mT @ cosines.flatten(2)).unflatten(2, cosines.shape[-2:])
        return F.pixel_shuffle(pixels.add_(0.5), self.cell)
