"""Linear neurons from the second moments of their data, which may be of any length and lie in any number of processes.

- `Regression`: moments of inputs and targets, and the loss that any linear neurons have on their rows.
- `fit_moments`: the neurons with the lowest loss. `fit_readout`: the same, with the ridge that held-out rows like best.
- `forward_selection`: the inputs that explain most of what those before them left over.

The squared error of a linear neuron on N rows is a function of second moments alone, so the probes of `probes` need not
read the rows again: along a whitened axis of the inputs the losses at ±h differ by 4 h times the covariance of axis and
target, the vertex of their parabola lies at that covariance, and no step undoes another. All probes are one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .neurons import Neurons, chunks
from .peers import Peers
from .retina import Axes, Moments

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Regression:
    """Second moments of inputs `(n, d)` and targets `(n, k)` that come in parts.

    Attributes:
        inputs: those of the inputs. cross: `(d, k)`, sum of products. sum, squares: `(k,)`, of the targets.
    """

    def __init__(self, d: int, k: int, device: torch.device | str = "cpu") -> None:
        self.inputs = Moments(d, device)
        self.cross = torch.zeros(d, k, dtype=torch.float64, device=device)
        self.sum, self.squares = torch.zeros(2, k, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs.add(inputs)
        for rows in chunks(inputs, targets):
            x, y = inputs[rows].float(), targets[rows].float()
            mean, goal = x.mean(0), y.mean(0)
            self.cross += (x - mean).mT @ (y - goal)
            self.cross += len(x) * torch.outer(mean.double(), goal.double())
            self.sum += y.sum(0, dtype=torch.float64)
            self.squares += y.double().square().sum(0)

    @property
    def count(self) -> float:
        return float(self.inputs.count)

    @property
    def mean(self) -> Tensor:
        """Of the targets, `(k,)`."""
        return self.sum / self.inputs.count

    def covariance(self) -> Tensor:
        """Of inputs and targets, `(d, k)`."""
        return self.cross / self.inputs.count - torch.outer(self.inputs.sum / self.inputs.count, self.mean)

    def part(self, inputs: Tensor) -> Regression:
        """The same rows with some of the inputs, by their indices."""
        found = Regression(0, 0)
        found.inputs, found.cross, found.sum, found.squares = (
            self.inputs.part(inputs), self.cross[inputs], self.sum, self.squares)
        return found

    def losses(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error of each of the neurons `weight` `(k, d)`, `bias` `(k,)` on these rows; `(k,)` fp64."""
        weight, bias, n = weight.double(), bias.double(), self.inputs.count
        explained = (weight * (2 * self.cross.mT - weight @ self.inputs.second)).sum(1)
        shifted = bias * (2 * self.sum - 2 * weight @ self.inputs.sum - n * bias)
        return (self.squares - explained - shifted) / n

    def over(self, peers: Peers) -> Regression:
        """Those of the rows of all processes."""
        found = Regression(0, 0)
        found.cross, found.sum, found.squares = map(peers.sum, (self.cross, self.sum, self.squares))
        found.inputs = self.inputs.over(peers)
        return found

    def state(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name).clone() for name in ("cross", "sum", "squares")}
        return own | {f"inputs.{name}": value for name, value in self.inputs.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in ("cross", "sum", "squares"):
            setattr(self, name, state[name].clone())
        self.inputs.load_state({name: state[f"inputs.{name}"] for name in Moments.NAMES})


def fit_moments(seen: Regression, ridge: float = 0.0, axes: Axes | None = None) -> Neurons:
    """Linear neurons with the lowest squared error on the rows seen.

    Args:
        ridge: weight of Σ w² in each neuron's loss, w its weights on standardised inputs.
        axes: the principal axes of the inputs where they are known already.
    """
    white = (axes or seen.inputs.axes()).whitening(ridge)
    weight = (white @ (white.mT @ seen.covariance())).mT  # (k, d)
    bias = seen.mean - weight @ (seen.inputs.sum / seen.inputs.count)
    return Neurons(weight.float(), bias.float())


def fit_readout(seen: Regression, held_out: Regression, ridges: Sequence[float] = RIDGES) -> tuple[Neurons, float]:
    """The linear neurons whose ridge gives the lowest loss on held-out rows, and that loss, the mean over them.

    Raises:
        UserError: no loss is finite.
    """
    axes, best, lowest = seen.inputs.axes(), None, float("inf")
    for ridge in ridges:
        neurons = fit_moments(seen, ridge, axes)
        loss = float(held_out.losses(neurons.weight, neurons.bias).mean())
        if loss < lowest:
            best, lowest = neurons, loss
    if best is None:
        raise UserError("No ridge gives a finite held-out loss: the pictures hold values that are not finite, or none "
                        "is held out.")
    return best, lowest


def forward_selection(
    seen: Regression, count: int, forced: int = 0, ridge: float = 1e-2, weighing: Tensor | None = None,
) -> Tensor:
    """Indices `(count,)` of the inputs that lower the squared error most, one after the other.

    Orthogonal forward selection (Chen, Cowan & Grant 1991): after each choice the other inputs and the targets are
    made orthogonal to it, so the next one is judged by what it adds. All of that happens to their inner products.

    Args:
        count: at most d − `forced`.
        forced: the first inputs are taken as given, and not returned.
        ridge: share of an input's variance that is added when it is judged, so that what is nearly a combination of
            those chosen is not taken for its noise.
        weighing: `(k, q)`; errors are judged as error @ weighing; None: as they are.
    """
    n, mean = seen.inputs.count, seen.inputs.sum / seen.inputs.count
    products = seen.inputs.second / n - torch.outer(mean, mean)
    spread = products.diagonal().clamp(min=1e-12).sqrt()
    products = (products / spread / spread[:, None]).float()
    shared = seen.covariance() / spread[:, None]
    shared = (shared if weighing is None else shared @ weighing.double()).float()
    products.diagonal().add_(ridge)
    free = torch.ones(len(shared), dtype=torch.bool, device=shared.device)
    chosen = torch.arange(forced + count, device=shared.device)
    for step in range(forced + count):
        if step >= forced:
            gain = shared.square().sum(1) / products.diagonal().clamp(min=1e-3 * ridge)
            chosen[step] = gain.masked_fill(~free, -1).argmax()
        best = chosen[step]
        free[best] = False
        column = products[best] / products[best, best].clamp(min=1e-3 * ridge)
        shared.addr_(column, shared[best].clone(), alpha=-1)
        products.addr_(column, products[best].clone(), alpha=-1)
    return chosen[forced:]
