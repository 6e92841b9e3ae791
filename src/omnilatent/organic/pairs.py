"""Hidden tanh neurons from pairs of data, chosen by how much of the targets they explain. No gradients, no solver.

- `Affine`: weights and biases of candidate neurons, tanh(W x + b).
- `draw_pairs`: candidates as in SWIM (Bolager et al. 2023, arXiv 2306.16830): a neuron's weight is the difference of
  two inputs whose targets differ much, its bias puts the midpoint of the two at 0.
- `forward_selection`: the candidates that explain most of what the ones before them left over.
- `fit_readout`: the linear map on top, with the ridge that has the lowest held-out loss.

Beyond SWIM: a pair is also taken in partly or fully whitened coordinates, where its difference is the direction that
tells the two apart against the spread of all inputs (Fisher's), and not the brightest one; and slopes are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .neurons import Neurons
from .probes import fit_linear
from .retina import Axes, principal_axes

_SLOPE = 1.0986  # ln 3: tanh is ∓½ at the two inputs of a pair (SWIM, section 2)
_DRAWS = 8  # pairs looked at for each pair taken
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


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

    A pair is taken with a probability proportional to the distance of its targets over that of its inputs.

    Args:
        inputs: `(N, d)`.
        targets: `(N, k)`, in units in which a distance means something; residuals of earlier layers, when boosting.
        steepest: slopes are drawn from 1 to this, in units of SWIM's.
        whitening: powers of the whitening, an equal share of the candidates each; 0 is SWIM as published.
        axes: the inputs' principal axes where they are known already.
    """
    axes = axes or principal_axes(inputs)
    centred = inputs - axes.mean.float()
    shares = [count // len(whitening) + (i < count % len(whitening)) for i in range(len(whitening))]
    weights = []
    for power, share in zip(whitening, shares, strict=True):
        if power == 0:
            to_white, seen = None, centred
        else:
            stretch = (axes.variances + 1e-3 * axes.variances.mean()).pow(-power / 2)
            to_white = (axes.axes * stretch / axes.spread[:, None]).float()
            seen = centred @ to_white
        weight, bias = _pairs(seen, targets, share, generator, steepest)
        weights.append((weight if to_white is None else weight @ to_white.mT, bias))
    weight = torch.cat([w for w, _ in weights])
    return Affine(weight, torch.cat([b for _, b in weights]) - weight @ axes.mean.float())


def _pairs(seen: Tensor, targets: Tensor, count: int, generator: torch.Generator, steepest: float
           ) -> tuple[Tensor, Tensor]:
    first, second = torch.randint(len(seen), (2, _DRAWS * count), generator=generator).to(seen.device)
    apart = (seen[first] - seen[second]).norm(dim=1).clamp(min=1e-3)
    differ = (targets[first] - targets[second]).norm(dim=1)
    taken = torch.multinomial((differ / apart + 1e-12).cpu(), count, generator=generator).to(seen.device)
    first, second, apart = first[taken], second[taken], apart[taken, None]
    slope = _SLOPE * (1 + (steepest - 1) * torch.rand(count, 1, generator=generator).to(seen.device))
    weight = slope * (seen[first] - seen[second]) / apart.square()
    return weight, -(weight * (seen[first] + seen[second]) / 2).sum(1)


def forward_selection(
    features: Tensor, targets: Tensor, count: int, forced: int = 0, ridge: float = 1e-2,
) -> Tensor:
    """Indices `(count,)` of the features that lower the squared error most, one after the other.

    Orthogonal forward selection (Chen, Cowan & Grant 1991): after each choice the other features and the targets are
    made orthogonal to it, so the next one is judged by what it adds. All of that happens to their inner products.

    Args:
        features: `(N, P)`.
        targets: `(N, k)`.
        count: at most P − `forced`.
        forced: the first features are taken as given, and not returned.
        ridge: share of a feature's variance that is added when it is judged, so that what is nearly a combination of
            those chosen is not taken for its noise.
    """
    centre, count_rows = features.mean(0), len(features)
    spread = features.std(0).clamp(min=1e-6)
    products = torch.zeros(features.shape[1], features.shape[1])
    shared = torch.zeros(features.shape[1], targets.shape[1])
    goal = targets - targets.mean(0)
    for rows in torch.arange(count_rows).split(8192):
        part = (features[rows] - centre) / spread
        products.addmm_(part.mT, part)
        shared.addmm_(part.mT, goal[rows])
    products /= count_rows
    shared /= count_rows
    products.diagonal().add_(ridge)
    free = torch.ones(features.shape[1], dtype=torch.bool)
    chosen = []
    for step in range(forced + count):
        if step < forced:
            best = step
        else:
            gain = shared.square().sum(1) / products.diagonal().clamp(min=1e-3 * ridge)
            best = int(gain.masked_fill(~free, -1).argmax())
            chosen.append(best)
        free[best] = False
        column = products[best] / products[best, best].clamp(min=1e-3 * ridge)
        shared.addr_(column, shared[best].clone(), alpha=-1)
        products.addr_(column, products[best].clone(), alpha=-1)
    return torch.tensor(chosen)


def fit_readout(
    features: Tensor, targets: Tensor, held_features: Tensor, held_targets: Tensor,
    ridges: Sequence[float] = RIDGES, sweeps: int = 2,
) -> tuple[Neurons, float]:
    """The linear map `(N, P)` → `(N, k)` and its held-out mean squared error, lowest over the ridges.

    Args:
        ridges: as in `fit_linear`: against a loss of targets in their units, so that no unit matters.
    """
    axes = principal_axes(features)
    best, lowest = None, float("inf")
    for ridge in ridges:
        neurons, _ = fit_linear(features, targets, sweeps=sweeps, ridge=ridge, axes=axes)
        loss = float((neurons(held_features) - held_targets).square().mean())
        if loss < lowest:
            best, lowest = neurons, loss
    if best is None:
        raise UserError("No ridge gives a finite held-out loss: the pictures hold values that are not finite, or none is "
                        "held out.")
    return best, lowest
