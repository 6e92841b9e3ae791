"""What `omnilatent clone` learns, and how much of it. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..training.config import check_least


@dataclass(frozen=True)
class CloneConfig:
    """A gradient-free clone."""

    latent: Literal["pooled", "grid", "native"] = "grid"
    """pooled: four numbers a picture, the means of the teacher's first channels; encodes only. grid: the teacher's own
    latent, so that a clone's half takes the place of the teacher's. native: a latent of its own, encoder and decoder
    learned together, the teacher beside it for comparison."""
    part: Literal["encoder", "decoder", "both"] = "both"
    """Of grid: what is cloned; the other half stays the teacher's."""
    layers: int = 3
    """Of grid: layers at most; learning ends where the held-out loss stops falling."""
    neurons: int = 448
    """Tanh neurons: of pooled, of each layer of grid, of native's decoder."""
    candidates: int = 1536
    """Of pooled and grid: neurons drawn from pairs of inputs, of which the best are kept."""
    channels: int = 16
    """Of native: 4, 16 or 32."""
    sites: int = 60_000
    """Of grid and native: positions that each fit learns from."""
    crops: int = 2
    """Views of each photo."""
    size: int = 256
    """Side of the views of grid and native, in pixels."""
    seed: int = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        check_least(self, 1, "layers", "neurons", "candidates", "crops", "size")
        check_least(self, 100, "sites")
        check_least(self, 0, "seed")
        if self.size % 8:
            raise ValueError(f"--size is {self.size}; it must be a multiple of 8")
        if self.latent == "pooled" and self.part == "decoder":
            raise ValueError("--part decoder: a pooled clone only encodes; --latent grid or native decodes too")
        if self.latent == "native" and self.part != "both":
            raise ValueError(f"--part {self.part}: a native clone's halves are learned together; leave --part out")
        if self.latent == "native" and self.channels not in (4, 16, 32):
            raise ValueError(f"--channels is {self.channels}; a native latent has 4, 16 or 32")
