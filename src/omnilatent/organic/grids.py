"""Layers of tanh neurons on a grid, each of which sees the guesses of the one before it in its neighbourhood.

- `GridLayer`: hidden neurons and a linear readout. `GridStack`: some of them, one after the other.
- `neighbourhood`: a map with its neighbours as channels.

Depth and context are what a drop-in needs: one wide layer does not get there. So every layer sees the same code, and
beside it the 3×3 guesses of the last layer around its site; what it reads out of both and of its neurons is the next
guess. A stack of n layers sees n − 1 sites beyond the code's own reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .neurons import Neurons
from .pairs import Affine


def neighbourhood(grid: Tensor, reach: int) -> Tensor:
    """`(b, c, h, w)` → `(b, c·reach², h·w)`, borders repeated; `reach` is odd."""
    if reach == 1:
        return grid.flatten(2)
    rim = reach // 2
    return F.unfold(F.pad(grid, (rim, rim, rim, rim), mode="replicate"), reach)


class GridLayer(nn.Module):
    """x → readout([x, tanh(W x + b)]) at every site.

    Args:
        hidden: `(n, d)` neurons.
        readout: from d + n numbers to k.
    """

    def __init__(self, hidden: Affine, readout: Neurons) -> None:
        super().__init__()
        n, d = hidden.weight.shape
        if readout.inputs != d + n:
            raise UserError(f"Dimension mismatch: {n} neurons on {d} inputs give {d + n} numbers, and the readout has "
                            f"shape {tuple(readout.weight.shape)}.")
        weight = readout.weight * readout.scale[:, None]
        self.register_buffer("weight", hidden.weight.clone())
        self.register_buffer("bias", hidden.bias.clone())
        self.register_buffer("skip", weight[:, :d].clone())
        self.register_buffer("out", weight[:, d:].clone())
        self.register_buffer("out_bias", readout.bias * readout.scale + readout.shift)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, d, sites)` → `(b, k, sites)`."""
        hidden = (self.weight @ x).add_(self.bias[:, None]).tanh_()
        return (self.out @ hidden).add_(self.skip @ x).add_(self.out_bias[:, None])

    def first(self, outputs: int) -> GridLayer:
        """This layer with its first outputs only: those that a next layer sees."""
        readout = Neurons(torch.cat([self.skip, self.out], 1)[:outputs], self.out_bias[:outputs])
        return GridLayer(Affine(self.weight, self.bias), readout)


class GridStack(nn.Module):
    """A code on a grid `(b, r, h, w)` → `(b, k, h, w)`.

    Args:
        layers: the first takes r·reach² numbers a site, the others 9·context more.
        reach: side of the code's neighbourhood that every layer sees.
        context: the first channels of a guess that the next layer sees.
    """

    def __init__(self, layers: Sequence[GridLayer], reach: int, context: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reach, self.context = reach, context

    def inputs(self, code: Tensor, guess: Tensor | None) -> Tensor:
        """What a layer sees: `(b, d, h·w)`. `guess` `(b, ≥ context, h, w)` is the last layer's."""
        seen = neighbourhood(code, self.reach)
        return seen if guess is None else torch.cat([seen, neighbourhood(guess[:, : self.context], 3)], 1)

    def forward(self, code: Tensor) -> Tensor:
        guess = None
        for layer in self.layers:
            guess = layer(self.inputs(code, guess)).unflatten(2, code.shape[-2:])
        assert guess is not None, "a stack has at least one layer"
        return guess
