"""Hidden tanh neurons from pairs of data. No gradients, no solver.

- `Affine`: weights and biases of candidate neurons, tanh(W x + b).
- `draw_pairs`: candidates as in SWIM (Bolager et al. 2023, arXiv 2306.16830): a neuron's weight is the difference of
  two inputs whose targets differ much, its bias puts the midpoint of the two at 0.

Beyond SWIM: a pair is also taken in partly or fully whitened coordinates, where its difference is the direction that
tells the two apart against the spread of all inputs (Fisher's), and not the brightest one; and slopes are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .retina import Axes, principal_axes

_SLOPE = 1.0986  # ln 3: tanh is ∓½ at the two inputs of a pair (SWIM, section 2)
_APART = 1e-3  # inputs that are closer count as equal
_DRAWS = 8  # pairs looked at for each pair taken


@dataclass(frozen=True)
class Affine:
    """`weight` `(n, d)` and `bias` `(n,)` of neurons before their tanh."""

    weight: Tensor
    bias: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, which: Tensor) -> Affine:
        return Affine(self.weight[which], self.bias[which])

    def __call__(self, inputs: Tensor) -> Tensor:
        """`(…, d)` → `(…, n)` in (-1, 1)."""
        return torch.tanh(inputs @ self.weight.mT + self.bias)


def draw_pairs(
    inputs: Tensor, targets: Tensor, count: int, generator: torch.Generator, *, steepest: float = 4.0,
    whitening: Sequence[float] = (0.0, 0.5, 1.0), axes: Axes | None = None,
) -> Affine:
    """`count` candidate neurons.

    A pair is taken with a probability proportional to the distance of its targets over that of its inputs; two equal
    inputs make no neuron.

    Args:
        inputs: `(N, d)`.
        targets: `(N, k)`, in units in which a distance means something; residuals of earlier layers, when boosting.
        generator: of the CPU, so that every device draws the same.
        steepest: slopes are drawn from 1 to this, in units of SWIM's.
        whitening: powers of the whitening, an equal share of the candidates each; 0 is SWIM as published.
        axes: the inputs' principal axes where they are known already.
    """
    if axes is None and any(whitening):
        axes = principal_axes(inputs)
    mean = inputs.mean(0) if axes is None else axes.mean.float()
    centred = inputs - mean
    shares = [count // len(whitening) + (i < count % len(whitening)) for i in range(len(whitening))]
    weights = []
    for power, share in zip(whitening, shares, strict=True):
        if axes is None or power == 0:
            to_white, seen = None, centred
        else:
            stretch = (axes.variances + 1e-3 * axes.variances.mean()).pow(-power / 2)
            to_white = (axes.axes * stretch / axes.spread[:, None]).float()
            seen = centred @ to_white
        weight, bias = _pairs(seen, targets, share, generator, steepest)
        weights.append((weight if to_white is None else weight @ to_white.mT, bias))
    weight = torch.cat([w for w, _ in weights])
    return Affine(weight, torch.cat([b for _, b in weights]) - weight @ mean)


def _pairs(seen: Tensor, targets: Tensor, count: int, generator: torch.Generator, steepest: float
           ) -> tuple[Tensor, Tensor]:
    where = seen.device
    first, second = torch.randint(len(seen), (2, _DRAWS * count), generator=generator).to(where)
    distance = (seen[first] - seen[second]).norm(dim=1)
    apart, differ = distance.clamp(min=_APART), (targets[first] - targets[second]).norm(dim=1)
    wanted = torch.where(distance > _APART, differ / apart, 0.0) + 1e-12
    taken = torch.multinomial(wanted.cpu(), count, generator=generator).to(where)
    first, second, apart = first[taken], second[taken], apart[taken, None]
    slope = _SLOPE * (1 + (steepest - 1) * torch.rand(count, 1, generator=generator).to(where))
    weight = slope * (seen[first] - seen[second]) / apart.square()
    return weight, -(weight * (seen[first] + seen[second]) / 2).sum(1)
