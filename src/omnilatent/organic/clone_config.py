"""What `omnilatent clone` learns, and how much of it. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..training.config import check_least


@dataclass(frozen=True)
class CloneConfig:
    """A clone, gradient-free unless it is asked to be none."""

    latent: Literal["pooled", "grid", "native"] = "grid"
    """pooled: four numbers a picture, the means of the teacher's first channels. grid: the teacher's own latent, so that
    a clone's half takes the place of the teacher's. native: a latent of its own, encoder and decoder learned together,
    the teacher beside it for comparison."""
    part: Literal["encoder", "decoder", "both"] = "both"
    """What is cloned. Of grid the other half stays the teacher's; pooled needs its encoder, native both."""
    gradients: bool = False
    """Train the same student by backpropagation instead, from random weights: the null, and what some will prefer."""
    layers: int = 3
    """Of grid and of native's decoder: layers at most; learning ends where the held-out loss stops falling."""
    neurons: int = 256
    """Tanh neurons of each layer; of pooled twice as many in all."""
    candidates: int = 1024
    """Neurons drawn from pairs of inputs, of which the best are kept: a layer, of pooled for each of its scales."""
    sweeps: int = 80
    """Times that a layer's neurons are tuned together; a thousand where there is a GPU."""
    channels: int = 16
    """Of native's latent."""
    reach: int = 3
    """Of native: blocks of 8 pixels that filters and layers span, an odd number."""
    turns: int = 5
    """Of native: times that the filters and the linear decoder learn from each other; thirty where there is a GPU."""
    context: int = 32
    """Of grid and native: numbers of each neighbour's guess that the next layer sees."""
    sites: int = 60_000
    """Positions that each layer learns from; a million where there is a GPU."""
    views: int = 2
    """Of each photo: the centre square, then random squares."""
    size: int = 256
    """Side of the views in pixels; of pooled always 256."""
    steps: int = 2_000
    """Of --gradients: optimiser steps."""
    lr: float = 1e-3
    """Of --gradients: Adam's peak learning rate, cosine decay."""
    seed: int = 0
    """Of everything that is drawn."""

    @property
    def side(self) -> int:
        """Of the views that this clone learns from."""
        return 256 if self.latent == "pooled" else self.size

    def __post_init__(self) -> None:
        check_least(self, 1, "layers", "neurons", "candidates", "sweeps", "channels", "reach", "views", "size", "steps",
                    "context", "turns")
        check_least(self, 100, "sites")
        check_least(self, 0, "seed", "lr")
        if self.seed >= 2**32:
            raise ValueError(f"--seed is {self.seed}; it must be below {2**32}")
        if self.size % 8:
            raise ValueError(f"--size is {self.size}; it must be a multiple of 8")
        if self.latent == "pooled" and self.part == "decoder":
            raise ValueError("--part decoder: four numbers mean something only to the encoder that gives them; take both")
        if self.latent == "native":
            if self.part != "both":
                raise ValueError(f"--part {self.part}: a native clone's halves are learned together; leave --part out")
            if self.channels > 192 or self.reach % 2 == 0:
                raise ValueError(f"--channels is {self.channels} and --reach {self.reach}; a native latent has 1 to 192 "
                                 "channels, and its reach is odd")
