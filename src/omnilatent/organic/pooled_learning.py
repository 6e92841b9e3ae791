"""How the pooled clone learns: forward evaluations of a teacher, of candidate neurons, and of their linear readout.

- `PooledConfig`: retina, neurons, and how they are looked for.
- `PooledLearning`: lessons → a `PooledEncoder`. `PooledDecoderLearning`: its numbers → small pictures.
- `agreement`, `Agreement`: R², cosine and L2 between two sets of latents.

Candidates come from pairs of patches whose targets differ (pairs.py); those are kept that explain most of the pooled
targets by forward selection. A teacher's grid says more than its mean does, so the readout also learns from the means
of parts of a picture: a quarter of the picture is a smaller picture with a target of its own, at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .grid_learning import GridConfig, StackLearning
from .grids import GridLayer, GridStack
from .learning import Gathered, Learning, Pace
from .lessons import Lessons
from .pairs import Affine, draw_pairs
from .peers import Peers
from .pooled import PICTURE, PooledEncoder, Retina
from .regression import Regression, fit_readout, forward_selection
from .search import generator

_RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_SITES = 40_000  # patches of each scale that pairs are drawn from


@dataclass(frozen=True)
class PooledConfig:
    """Which clone, and how it is looked for.

    Attributes:
        outputs: the teacher's first channels that are cloned.
        neurons: chosen of all candidates.
        candidates: drawn for each scale.
        windows: the readout learns from windows² parts of every picture; a power of 2 up to 4.
    """

    outputs: int = 4
    neurons: int = 512
    candidates: int = 1536
    windows: int = 2
    retina: Retina = field(default_factory=Retina)

    def __post_init__(self) -> None:
        if self.neurons > self.candidates * len(self.retina.scales):
            raise UserError(f"{self.neurons} neurons cannot be chosen among "
                            f"{self.candidates * len(self.retina.scales)} candidates: draw more.")


@dataclass(frozen=True)
class Agreement:
    """Between latents `(N, k)`: `r2`, the share of the variance about each channel's mean that is explained, all
    channels together; `cosine` and `l2`, means over the pictures of the plain vectors'."""

    r2: float
    cosine: float
    l2: float

    def __str__(self) -> str:
        return f"R² {self.r2:.3f}, cosine {self.cosine:.3f}, L2 {self.l2:.3f}"


def agreement(found: Tensor, wanted: Tensor) -> Agreement:
    """Compare latents `(N, k)` with the teacher's."""
    if found.shape != wanted.shape:
        raise UserError(f"Dimension mismatch: latents of shape {tuple(found.shape)} against the teacher's "
                        f"{tuple(wanted.shape)}.")
    error, spread = (found - wanted).square().sum(), (wanted - wanted.mean(0)).square().sum()
    return Agreement(float(1 - error / spread), float(F.cosine_similarity(found, wanted).mean()),
                     float((found - wanted).norm(dim=1).mean()))


class PooledLearning(Learning):
    """The first round gathers patches, from which the candidates are drawn; the second one chooses among them."""

    rounds = 2

    def __init__(self, config: PooledConfig, pace: Pace, peers: Peers, device: torch.device) -> None:
        super().__init__(pace, peers, device)
        self.config = config
        sites = Pace(pace.photos, pace.held, _SITES, pace.seed)
        self.gathered = [Gathered(sites) for _ in config.retina.scales]
        self.groups: list[Affine] = []
        self.seen: dict[bool, Regression] = {}
        self.encoder: PooledEncoder | None = None

    @torch.no_grad()
    def see(self, lessons: Lessons, held: bool, position: int) -> None:
        retina, k = self.config.retina, self.config.outputs
        if self.round == 0:
            for place, patches in enumerate(retina.patches(lessons.pictures)):
                sites, grid = retina.sites(retina.scales[place]), lessons.taught.shape[-1]
                here = min(sites, grid)
                goal = F.interpolate(lessons.pooled(k, here), scale_factor=sites // here)
                self.gathered[place].take(patches.mT, goal.flatten(2), held, place, position)
        elif not self.over:
            for windows in (1,) if held else sorted({1, self.config.windows}):
                self.seen[held].add(self._features(lessons.pictures, windows), _rows(lessons.pooled(k, windows)))

    @torch.no_grad()
    def work(self, last: bool) -> None:
        if last and self.round == 0:
            self._draw()
        elif last and self.round == 1:
            self._choose()
        self.done += 1
        if last:
            self.round, self.done = self.round + 1, 0

    def _draw(self) -> None:
        each = -(-self.config.candidates // self.peers.count)
        for place, gathered in enumerate(self.gathered):
            rows = gathered.rows()
            drawn = draw_pairs(rows.x, rows.y, each, generator("patches", self.pace.seed, place, self.peers.rank))
            self.groups.append(Affine(self.peers.rows(drawn.weight), self.peers.rows(drawn.bias)))
        self._begin()

    def _begin(self) -> None:
        self.gathered = []
        self.seen = {held: Regression(sum(map(len, self.groups)), self.config.outputs, self.device) for held in (False, True)}

    def _choose(self) -> None:
        seen, held = (self.seen[part].over(self.peers) for part in (False, True))
        chosen = forward_selection(seen, self.config.neurons).sort().values
        readout, loss = fit_readout(seen.part(chosen), held.part(chosen), _RIDGES)
        variance = float((held.squares / held.inputs.count - held.mean.square()).mean())
        self.left, self.over = min(1.0, loss / max(variance, 1e-12)), True
        if loss >= variance:
            return  # no better than the mean
        groups, first = [], 0
        for group in self.groups:
            inside = chosen[(chosen >= first) & (chosen < first + len(group))]
            groups.append(group[inside - first])
            first += len(group)
        self.encoder = PooledEncoder.of(self.config.retina, groups, readout)

    def _features(self, pictures: Tensor, windows: int) -> Tensor:
        """Means of all candidates over each window: `(b·windows², n)`."""
        maps, retina = [], self.config.retina
        for patches, group, scale in zip(retina.patches(pictures), self.groups, retina.scales, strict=True):
            grid = group(patches).mT.unflatten(2, (retina.sites(scale),) * 2)
            maps.append(F.avg_pool2d(grid, retina.sites(scale) // windows))
        return _rows(torch.cat(maps, 1))

    def model(self) -> PooledEncoder | None:
        return self.encoder

    def state(self) -> dict[str, Any]:
        encoder = self.encoder
        return {"numbers": [self.round, self.over, self.left, self.done],
                "gathered": [gathered.state() for gathered in self.gathered],
                "groups": [[group.weight, group.bias] for group in self.groups],
                "seen": {} if self.over else {str(held): seen.state() for held, seen in self.seen.items() if seen.count},
                "encoder": None if encoder is None else [encoder.sizes, encoder.state_dict()]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.round, self.over, self.left, self.done = state["numbers"]
        for gathered, saved in zip(self.gathered, state["gathered"], strict=False):
            gathered.load_state(saved, self.device)
        self.groups = [Affine(*(t.to(self.device) for t in group)) for group in state["groups"]]
        if self.groups:
            self._begin()
        for held, saved in state["seen"].items():
            self.seen[held == "True"].load_state({name: value.to(self.device) for name, value in saved.items()})
        if state["encoder"] is not None:
            sizes, weights = state["encoder"]
            self.encoder = PooledEncoder(self.config.retina, sizes, self.config.outputs).to(self.device)
            self.encoder.load_state_dict(weights)


class PooledDecoderLearning(StackLearning):
    """Four numbers a picture → 64×64 pixels: one layer on a grid of one site.

    The best linear map of four numbers to a picture of 64² reaches 13 to 15 dB on photos with TAEF2's first channels,
    and four numbers cannot say much more than that, whatever decodes them.
    """

    def __init__(self, outputs: int, config: GridConfig, pace: Pace, peers: Peers, device: torch.device) -> None:
        stack = GridStack(outputs, [], 1, 0)
        super().__init__(stack, lambda lessons: lessons.pooled(outputs), small_pictures, config, pace, peers, device)

    def model(self) -> GridLayer | None:
        stack = super().model()
        return None if stack is None else stack.layers[-1]


def small_pictures(lessons: Lessons) -> Tensor:
    """The pictures at 64², a column each: `(b, 3·64², 1, 1)`."""
    return F.interpolate(lessons.images, (PICTURE, PICTURE), mode="bilinear", antialias=True).flatten(1)[..., None, None]


def _rows(maps: Tensor) -> Tensor:
    """`(N, c, h, w)` → `(N·h·w, c)`."""
    return maps.movedim(1, 3).reshape(-1, maps.shape[1])
