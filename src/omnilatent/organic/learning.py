"""Learning in rounds: each reads the lessons once, and then works on what it has gathered.

- `Learning`: what every organic family is learned by; it knows no files, no loop and no number of processes.
- `Pace`: how many pictures there are, and how many rows of them a round gathers.
- `Gathered`: rows of a round, a random share of every picture's.

A round is `see` for every batch of lessons, fitted and held out, then `work` for `LearningConfig.sweeps` times, of which
the last ends it. Every process sees its own batches; sums over all of them decide, so all decide alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .lessons import Lessons
from .peers import Peers
from .search import generator
from .tuning import Rows


@dataclass(frozen=True)
class Pace:
    """Of all processes together.

    Attributes:
        photos, held: pictures that are fitted and held out.
        sites: rows that a round gathers at most; an eighth of it of held-out pictures.
        seed: of everything that is drawn.
    """

    photos: int
    held: int
    sites: int
    seed: int

    def share(self, held: bool) -> float:
        """Rows a picture."""
        return max(64, self.sites // 8) / self.held if held else self.sites / self.photos


class Learning(ABC):
    """A model that is learned in `rounds`.

    Attributes:
        round: how many have ended.
        over: nothing more is to be gained; further rounds change nothing.
        left: share of the targets' variance that is not explained on held-out lessons, the best so far; 1 before any.
    """

    rounds: int

    def __init__(self, pace: Pace, peers: Peers, device: torch.device) -> None:
        self.pace, self.peers, self.device = pace, peers, device
        self.round, self.over, self.left, self.done = 0, False, 1.0, 0

    @abstractmethod
    def see(self, lessons: Lessons, held: bool, position: int) -> None:
        """One batch, the `position`-th of this round over all processes."""

    @abstractmethod
    def work(self, last: bool) -> None:
        """One step of work; the `last` one ends the round. `done` counts those of this round before it."""

    @abstractmethod
    def model(self) -> nn.Module | None:
        """What is learned so far; None where that is nothing that could be used."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What going on needs beside the lessons and the settings, as tensors and plain values."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


class Gathered:
    """Rows of this process that a round has gathered, of fitted and of held-out pictures."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}

    def take(self, x: Tensor, y: Tensor, held: bool, *key: int) -> None:
        """A random share of the sites of maps `(b, d, sites)` and `(b, k, sites)`; which, is a function of the key."""
        b, _, sites = x.shape
        count = min(b * sites, max(1, round(b * self.pace.share(held))))
        chosen = torch.randperm(b * sites, generator=generator("sites", self.pace.seed, held, *key))[:count].to(x.device)
        self.parts[held].append(tuple(maps.mT.flatten(0, 1)[chosen].float() for maps in (x, y)))

    def rows(self) -> Rows:
        """All of them, in random order.

        Raises:
            UserError: there are none to fit or to choose by.
        """
        found = []
        for held, parts in self.parts.items():
            if not parts:
                raise UserError(f"There are no {'held-out ' if held else ''}pictures for one of the processes: give more "
                                "pictures, or start fewer processes.")
            x, y = (torch.cat(columns) for columns in zip(*parts, strict=True))
            order = torch.randperm(len(x), generator=generator("order", self.pace.seed, held)).to(x.device)
            found += [x[order], y[order]]
        return Rows(*found)

    def state(self) -> list[tuple[bool, Tensor, Tensor]]:
        return [(held, x, y) for held, parts in self.parts.items() for x, y in parts]

    def load_state(self, state: list[tuple[bool, Tensor, Tensor]], device: torch.device) -> None:
        for held, x, y in state:
            self.parts[held].append((x.to(device), y.to(device)))
