"""How a stack on a grid learns, a layer a round, from forward evaluations.

- `GridConfig`: how many layers and neurons, and how they are looked for.
- `StackLearning`: codes and goals of lessons → a `GridStack`.
- `LayerSearch`: one layer from rows at hand.

Each layer: a linear readout of what it sees; candidates from pairs of sites where that leaves different errors
(boosting); the neurons among them that explain most of it; sweeps that make them better together (tuning.py); a readout
of all. It is kept if the held-out loss falls.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grids import GridLayer, GridStack
from .learning import Gathered, Learning, Pace
from .lessons import Lessons
from .neurons import Neurons
from .pairs import Affine, draw_pairs
from .peers import ALONE, Peers
from .regression import Regression, forward_selection
from .search import generator
from .tuning import Rows, Tuning, read_out

Maps = Callable[[Lessons], Tensor]  # lessons → their maps (b, c, h, w)


@dataclass(frozen=True)
class GridConfig:
    """Layers and their learning.

    Attributes:
        layers: at most; learning ends where the held-out loss stops falling.
        neurons: a layer.
        candidates: drawn a layer.
        judged: rows that the candidates are drawn from and judged on.
        reach, context: as in `GridStack`.
        steepest, whitening: of the candidates, as in `draw_pairs`.
        ridges: of which held-out rows choose one.
    """

    layers: int = 3
    neurons: int = 256
    candidates: int = 1024
    judged: int = 300_000
    reach: int = 1
    context: int = 32
    steepest: float = 2.0
    whitening: tuple[float, ...] = (0.0, 0.5)
    ridges: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


class LayerSearch:
    """One layer: x `(N, d)` → y `(N, k)` by a linear readout of x and of tanh neurons on it.

    Args:
        key: of the pairs that are drawn.
        weighing: `(k, q)`; errors count as error @ weighing when neurons are chosen and tuned; None: as they are.
        peers: each draws its share of the candidates from its own rows; all of them are judged on all rows.

    Attributes:
        mean_loss: held-out loss of the fitted rows' mean.
    """

    def __init__(self, rows: Rows, config: GridConfig, *key: int, weighing: Tensor | None = None, peers: Peers = ALONE
                 ) -> None:
        self._linear, self._linear_loss, moments = read_out(rows, None, config.ridges, peers)
        axes = moments.inputs.axes()
        self.mean_loss = _held_variance(rows, moments.mean.float(), peers)
        judged, d = slice(0, max(1, config.judged // peers.count)), rows.x.shape[1]
        x, y = rows.x[judged], rows.y[judged]
        left = y - self._linear(x)
        left = left if weighing is None else left @ weighing
        drawn = draw_pairs(x, left, -(-config.candidates // peers.count), generator("pairs", *key, peers.rank),
                           steepest=config.steepest, whitening=config.whitening, axes=axes)
        drawn = Affine(peers.rows(drawn.weight), peers.rows(drawn.bias))
        seen = Regression(d + len(drawn), y.shape[1], x.device)
        for part in Rows(x, y, x, y).parts(d + len(drawn)):
            seen.add(torch.cat([x[part], drawn(x[part])], 1), y[part])
        chosen = forward_selection(seen.over(peers), min(config.neurons, len(drawn)), forced=d, weighing=weighing) - d
        self.tuning = Tuning(rows, drawn[chosen], axes, config.ridges, weighing, peers)

    @property
    def held_loss(self) -> float:
        """Mean squared error on held-out rows, the lowest so far."""
        return min(self._linear_loss, self.tuning.lowest)

    def step(self) -> None:
        """One sweep over the hidden neurons."""
        self.tuning.step()

    def layer(self) -> GridLayer:
        """The best layer so far; without neurons where these do not help held-out rows."""
        if self._linear_loss <= self.tuning.lowest:
            none = Affine(self._linear.weight.new_zeros(0, self._linear.inputs), self._linear.weight.new_zeros(0))
            return GridLayer.of(none, self._linear)
        return GridLayer.of(*self.tuning.best)


def _held_variance(rows: Rows, mean: Tensor, peers: Peers) -> float:
    total = peers.sum((rows.held_y - mean).double().square().sum())
    return float(total / peers.sum(torch.tensor(float(rows.held_y.numel()), device=total.device)))


class StackLearning(Learning):
    """Learns a stack, a layer a round.

    Args:
        stack: a stack without layers.
        code, goal: what it sees of lessons, `(b, channels, h, w)`, and what it should say, `(b, k, h, w)`.
        weighing: as for `LayerSearch`.
    """

    def __init__(self, stack: GridStack, code: Maps, goal: Maps, config: GridConfig, pace: Pace, peers: Peers,
                 device: torch.device, weighing: Tensor | None = None) -> None:
        super().__init__(pace, peers, device)
        self.rounds, self.stack, self.config = config.layers, stack.to(device), config
        self.code, self.goal, self.weighing = code, goal, weighing
        self.gathered, self.search = Gathered(pace), None
        self.rows: Rows | None = None  # of the layer that is being tuned
        self.losses: list[float] = []  # held out: of the mean, then after each layer that was kept

    @torch.no_grad()
    def see(self, lessons: Lessons, held: bool, position: int) -> None:
        if self.over:
            return
        code = self.code(lessons)
        guess, goal = self.stack.guess(code), self.goal(lessons)
        if guess is not None and self.stack.adds:
            goal = goal - guess
        self.gathered.take(self.stack.inputs(code, guess), goal.flatten(2), held, self.round, position)

    @torch.no_grad()
    def work(self, last: bool) -> None:
        if not self.over:
            if self.search is None:
                self._begin()
            else:
                self.search.step()
            self.left = min(self.left, self.search.held_loss / max(self.losses[0], 1e-12))
        self.done += 1
        if last:
            self._conclude()

    def _begin(self) -> None:
        if self.rows is None:
            self.rows, self.gathered = self.gathered.rows(), Gathered(self.pace)
        self.search = LayerSearch(self.rows, self.config, self.pace.seed, self.round, weighing=self.weighing,
                                  peers=self.peers)
        self.losses = self.losses or [self.search.mean_loss]

    def _conclude(self) -> None:
        if not self.over:
            if self.search.held_loss < self.losses[-1]:
                self.losses.append(self.search.held_loss)
                self.stack.layers.append(self.search.layer())
            else:
                self.over = True
        self.gathered, self.search, self.rows = Gathered(self.pace), None, None
        self.round, self.done = self.round + 1, 0

    def model(self) -> GridStack | None:
        """The stack so far. Where layers do not add to each other, of all but the last only what the next one sees is
        kept."""
        if not len(self.stack.layers):
            return None
        if self.stack.adds:
            return deepcopy(self.stack)
        first = self.stack.layers[:-1]
        context = self.stack.context
        sizes = [(layer.sizes[0], min(context, layer.sizes[1])) for layer in first] + [self.stack.layers[-1].sizes]
        slim = GridStack(self.stack.channels, sizes, self.stack.reach, context).to(self.device)
        for kept, layer in zip(slim.layers, self.stack.layers, strict=True):
            outputs = kept.sizes[1]
            for name, value in layer.named_parameters():
                getattr(kept, name).copy_(value[:outputs] if name in ("skip", "out", "out_bias") else value)
        return slim

    def state(self) -> dict[str, Any]:
        layers = [list(layer.parameters()) for layer in self.stack.layers]
        return {"numbers": [self.round, self.over, self.left, self.done], "losses": self.losses, "layers": layers,
                "gathered": self.gathered.state(), "rows": None if self.rows is None else list(vars(self.rows).values()),
                "tuning": None if self.search is None else self.search.tuning.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.round, self.over, self.left, self.done = state["numbers"]
        self.losses = list(state["losses"])
        for weight, bias, skip, out, out_bias in (map(self._here, layer) for layer in state["layers"]):
            self.stack.layers.append(GridLayer.of(Affine(weight, bias), Neurons(torch.cat([skip, out], 1), out_bias)))
        self.gathered.load_state(state["gathered"], self.device)
        if state["rows"] is not None:
            self.rows = Rows(*(columns.to(self.device) for columns in state["rows"]))
        if state["tuning"] is not None:
            self._begin()
            self.search.tuning.load_state(state["tuning"])

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.data.to(self.device)
