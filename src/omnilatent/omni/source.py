"""A prefix that was read: what any number of targets attend to.

- `Source`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .backbone import LayerMemory, Read


@dataclass(frozen=True)
class Source:
    """What the backbone read, the mean of its last states `(b, dim)`, which is the latent, and how many examples and tokens."""

    read: Read
    latent: Tensor
    batch: int
    tokens: int

    @property
    def memory(self) -> list[LayerMemory]:
        return self.read.memory
