"""A prefix: what any number of targets attend to.

- `Prefix`: its tokens, before the backbone. `Source`: what the backbone read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Hooks, LayerMemory, Read
from .tokens import Tokens


@dataclass(frozen=True)
class Prefix:
    """Tokens of all sources, the hooks with the states that they begin with, and which modalities the sources are."""

    embedded: Tokens
    hooks: Hooks
    names: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        return len(self.embedded.x)

    @property
    def tokens(self) -> int:
        return self.embedded.x.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedded.x.dtype

    @property
    def device(self) -> torch.device:
        return self.embedded.x.device


@dataclass(frozen=True)
class Source:
    """What the backbone read of a prefix, and the mean of its last states `(b, dim)`, which is the latent."""

    prefix: Prefix
    read: Read
    latent: Tensor

    @property
    def batch(self) -> int:
        return self.prefix.batch

    @property
    def tokens(self) -> int:
        return self.prefix.tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.latent.dtype

    @property
    def device(self) -> torch.device:
        return self.latent.device

    @property
    def memory(self) -> list[LayerMemory]:
        return self.read.memory
