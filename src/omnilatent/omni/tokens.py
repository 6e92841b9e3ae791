"""What stands between modalities and backbone: tokens with their coordinates.

- `Tokens`: vectors, coordinates, and which of them are padding.
- `sequence`, `grid`: coordinates of a sequence, and of a picture's or video's patches.
- `PositionFeatures`: coordinates as vectors, added to tokens beside the rotation in attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """`x` `(b, n, dim)`, `positions` `(n, 3)` as (t, y, x), `valid` `(b, n)` bool or None where nothing is padding."""

    x: Tensor
    positions: Tensor
    valid: Tensor | None = None

    def then(self, other: Tokens) -> Tokens:
        """These and the others as one sequence; coordinates stay each one's own."""
        valid = None
        if self.valid is not None or other.valid is not None:
            valid = torch.cat([t.x.new_ones(t.x.shape[:2], dtype=torch.bool) if t.valid is None else t.valid
                               for t in (self, other)], 1)
        return Tokens(torch.cat((self.x, other.x), 1), torch.cat((self.positions, other.positions)), valid)


def sequence(n: int, device: torch.device) -> Tensor:
    """Places 0 … n − 1 on all three axes `(n, 3)`."""
    return torch.arange(n, device=device)[:, None].expand(n, 3)


def grid(t: int, h: int, w: int, device: torch.device) -> Tensor:
    """Coordinates of t·h·w patches in the order of `Patches.cut` `(n, 3)`."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in (t, h, w)), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], 1)


class PositionFeatures(nn.Module):
    """Sines and cosines of each coordinate, then one linear layer."""

    frequencies: Tensor

    def __init__(self, dim: int, waves: int = 16, base: float = 1_000.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * base ** (-torch.arange(waves) / waves), persistent=False)
        self.linear = nn.Linear(6 * waves, dim)

    def forward(self, positions: Tensor) -> Tensor:
        """`(n, 3)` → `(n, dim)`."""
        angles = (positions.float()[..., None] * self.frequencies).flatten(1)
        return self.linear(torch.cat((angles.sin(), angles.cos()), 1).to(self.linear.weight.dtype))
