"""Hidden neurons made better together, by nudging the sum of each and noting what that does to every row's error.

- `Rows`: rows that are fitted and rows that are held out. `Tuning`: the search, a sweep at a time.

Neurons from data pairs are good first guesses, and one layer of them is left far behind by one that was trained. What
closes the gap is Madaline's Rule III (Widrow & Lehr 1990) for a layer below a linear readout: the sum of one neuron is
nudged by ±δ, its tanh and the row's squared error are evaluated anew, and how the two errors differ is the row's
response. The readout being linear, the errors after all nudges of all neurons come out of one product with the residual.
Summed with the inputs over the rows, the responses say how the loss falls along every weight; with the inputs' whitening
and each neuron's own curvature that gives a direction, made conjugate to the last one (Polak & Ribière 1969). The step
along it is the vertex of the parabola through three losses, and it is taken only if the loss on the same rows really
falls. Where there are rows enough, the steps take shares of them in turn, which goes four times as far in the same time.
Now and then the readout is found anew from the moments of all rows. What held-out rows like best is handed out.

Said plainly: the response is a difference quotient of the derivative, so this is a derivative-free method of conjugate
directions, and a sweep costs what a forward and two backward passes cost. No derivative is asked for anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .neurons import Neurons
from .pairs import Affine
from .peers import ALONE, Peers
from .regression import Regression, fit_readout
from .retina import Axes

_NUDGE = 0.03  # δ of a neuron's sum
_SHARE, _SHARES = 20_000, 8  # rows that a step needs at least; shares at most
_CHUNK = 1 << 24  # numbers


@dataclass(frozen=True)
class Rows:
    """`x` `(N, d)` and `y` `(N, k)` to fit, `held_x` and `held_y` to choose by; this process's share of them."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    def parts(self, width: int) -> Iterator[slice]:
        """Slices of the fitted rows, for work that makes `width` numbers a row."""
        rows = max(256, _CHUNK // width)
        return (slice(start, start + rows) for start in range(0, len(self.x), rows))


def read_out(rows: Rows, hidden: Affine | None, ridges: Sequence[float], peers: Peers = ALONE
             ) -> tuple[Neurons, float, Regression]:
    """The linear readout of the inputs and the hidden neurons, its held-out loss, and the fitted rows' moments."""
    found = []
    for x, y in ((rows.x, rows.y), (rows.held_x, rows.held_y)):
        moments = Regression(x.shape[1] + (0 if hidden is None else len(hidden)), y.shape[1], x.device)
        for part in Rows(x, y, x, y).parts(moments.inputs.sum.numel()):
            moments.add(x[part] if hidden is None else torch.cat([x[part], hidden(x[part])], 1), y[part])
        found.append(moments.over(peers))
    readout, loss = fit_readout(*found, ridges)
    return readout, loss, found[0]


class Tuning:
    """The search for a layer's hidden neurons. The rows are in random order.

    Args:
        hidden: where it begins.
        axes: the principal axes of the inputs.
        weighing: `(k, q)`; errors count as error @ weighing; None: as they are.

    Attributes:
        best: hidden neurons and readout with the lowest held-out loss, `lowest`.
        loss: of the latest step, on its share of the rows, as weighed.
    """

    def __init__(self, rows: Rows, hidden: Affine, axes: Axes, ridges: Sequence[float], weighing: Tensor | None = None,
                 peers: Peers = ALONE) -> None:
        self.rows, self.ridges, self.weighing, self.peers = rows, ridges, weighing, peers
        self.hidden = Affine(hidden.weight.clone(), hidden.bias.clone())
        white = axes.whitening(1e-3)
        self._metric, self._mean = (white @ white.mT).float(), axes.mean.float()
        count = int(peers.sum(torch.tensor(float(len(rows.x)))))
        self.shares = max(1, min(_SHARES, count // _SHARE))
        self._refit_every = 3 if self.shares == 1 else 3 * self.shares // 2
        self.loss, self.lowest, self.length, self.steps = math.nan, math.inf, 1.0, 0
        self._last: tuple[Tensor, Tensor, float] | None = None  # response, direction, their product
        self._refit()

    @torch.no_grad()
    def step(self) -> None:
        """One sweep: responses, a direction, and the step along it if the loss falls; now and then a new readout."""
        precise = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # a step need not be exact, since it is taken only if it helps
        try:
            self._step()
        finally:
            torch.set_float32_matmul_precision(precise)
        self.steps += 1
        if self.steps % self._refit_every == 0:
            self._refit()

    def _share(self) -> Rows:
        """The fitted rows of this step."""
        size = len(self.rows.x) // self.shares
        part = slice(self.steps % self.shares * size, (self.steps % self.shares + 1) * size)
        return Rows(self.rows.x[part], self.rows.y[part], self.rows.held_x, self.rows.held_y)

    def _step(self) -> None:
        rows = self._share()
        count = float(self.peers.sum(torch.tensor(float(len(rows.x)))))
        response, curvature, here = self._responses(rows, count)
        # A neuron whose error bends up hardly at all would step far beyond where its response holds.
        curvature = curvature.clamp(min=0.05 * float(curvature.clamp(min=0).mean()) + 1e-12)
        pull = torch.cat([response[:, :-1] @ self._metric, response[:, -1:]], 1) / curvature[:, None]
        direction, product = pull, float((pull * response).sum())
        if self._last is not None:
            last, course, before = self._last
            share = min(max(float((pull * (response - last)).sum()) / max(before, 1e-30), 0.0), 1.5)
            conjugate = pull + share * course
            direction = conjugate if float((conjugate * response).sum()) > 0 else pull
        self._last = response, direction, product
        weight, bias = direction[:, :-1], direction[:, -1] - direction[:, :-1] @ self._mean
        once, twice = self._losses(rows, count, weight, bias, self.length, 2 * self.length)
        bend, slope = (here - 2 * once + twice) / 2, (4 * once - 3 * here - twice) / 2
        vertex = self.length * min(max(-slope / (2 * bend) if bend > 0 else 3.0, 0.1), 4.0)
        (there,) = self._losses(rows, count, weight, bias, vertex)
        self.loss, taken = min((here, 0.0), (once, self.length), (twice, 2 * self.length), (there, vertex))
        if taken:
            self.hidden = Affine(self.hidden.weight + taken * weight, self.hidden.bias + taken * bias)
            self.length = taken
        else:
            self.length, self._last = self.length / 4, None

    def _refit(self) -> None:
        self.readout, held, _ = read_out(self.rows, self.hidden, self.ridges, self.peers)
        if held < self.lowest:
            self.best, self.lowest = (self.hidden, self.readout), held

    def _weighed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The readout's weights of inputs and of neurons and its bias, as errors count."""
        d, weight, bias = self.hidden.weight.shape[1], self.readout.weight, self.readout.bias
        if self.weighing is not None:
            weight, bias = self.weighing.mT @ weight, bias @ self.weighing
        return weight[:, :d], weight[:, d:], bias

    def _goal(self, y: Tensor) -> Tensor:
        return y if self.weighing is None else y @ self.weighing

    def _responses(self, rows: Rows, count: float) -> tuple[Tensor, Tensor, float]:
        """How the loss falls along every neuron's weights, about the inputs' mean, and its bias `(n, d + 1)`; the
        curvature of each neuron's sum `(n,)`; the loss."""
        skip, out, bias = self._weighed()
        n, d = self.hidden.weight.shape
        response, curvature = torch.zeros(n, d + 1, device=out.device), torch.zeros(n, device=out.device)
        energy, total = out.square().sum(0), torch.zeros((), dtype=torch.float64, device=out.device)
        for part in rows.parts(2 * n + d):
            x = rows.x[part]
            sums = torch.addmm(self.hidden.bias, x, self.hidden.weight.mT)
            value = torch.tanh(sums)
            error = self._goal(rows.y[part]) - x @ skip.mT - value @ out.mT - bias
            pressed = error @ out  # (rows, n): what the error says to each neuron
            up, down = torch.tanh(sums + _NUDGE) - value, torch.tanh(sums - _NUDGE) - value
            above, below = up * (up * energy - 2 * pressed), down * (down * energy - 2 * pressed)  # beyond the error
            answer = (below - above) / (4 * _NUDGE)
            response[:, :d].addmm_(answer.mT, x - self._mean)
            response[:, d] += answer.sum(0)
            curvature += (above + below).sum(0) / (2 * _NUDGE**2)
            total += error.square().sum(dtype=torch.float64)
        response, curvature, total = map(self.peers.sum, (response, curvature, total))
        return response / count, curvature / count, float(total) / count / len(bias)

    def _losses(self, rows: Rows, count: float, weight: Tensor, bias: Tensor, *steps: float) -> list[float]:
        """The loss at each of the steps along a direction of the hidden weights."""
        skip, out, shift = self._weighed()
        total = torch.zeros(len(steps), dtype=torch.float64, device=out.device)
        for part in rows.parts(2 * len(bias) + 2 * len(shift)):
            x = rows.x[part]
            sums, moves = torch.addmm(self.hidden.bias, x, self.hidden.weight.mT), torch.addmm(bias, x, weight.mT)
            left = self._goal(rows.y[part]) - x @ skip.mT - shift
            for i, step in enumerate(steps):
                error = left - torch.tanh(torch.add(sums, moves, alpha=step)) @ out.mT
                total[i] += error.square().sum(dtype=torch.float64)
        return (self.peers.sum(total) / count / len(shift)).tolist()

    def state(self) -> dict[str, object]:
        """What going on needs beside the rows."""
        return {"hidden": [self.hidden.weight, self.hidden.bias], "readout": self.readout.state_dict(),
                "best": [self.best[0].weight, self.best[0].bias], "best_readout": self.best[1].state_dict(),
                "numbers": [self.loss, self.lowest, self.length, self.steps],
                "last": None if self._last is None else [self._last[0], self._last[1], self._last[2]]}

    def load_state(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        device = self.hidden.weight.device

        def neurons(saved: dict[str, Tensor]) -> Neurons:
            return Neurons(**{name: value.to(device) for name, value in saved.items()})

        self.hidden = Affine(*(t.to(device) for t in state["hidden"]))
        self.readout = neurons(state["readout"])
        self.best = Affine(*(t.to(device) for t in state["best"])), neurons(state["best_readout"])
        self.loss, self.lowest, self.length, self.steps = state["numbers"]
        last = state["last"]
        self._last = None if last is None else (last[0].to(device), last[1].to(device), last[2])
