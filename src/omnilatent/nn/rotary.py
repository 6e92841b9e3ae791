"""Rotary positions in three coordinates (Su et al. 2021, arXiv 2104.09864; by axis as in Qwen2-VL, arXiv 2409.12191).

- `Rotary`: coordinates `(t, y, x)` → angles; sequences use one coordinate three times, pictures two, videos three.
- `rotate`: queries or keys by these angles. `rotate_back`: by their opposites.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """The pairs of a head's channels, dealt to the three axes in turn; nothing here is learned or saved."""

    frequencies: Tensor
    axes: Tensor

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels; a head has {head_dim}")
        pairs = head_dim // 2
        self.register_buffer("frequencies", torch.pi * base ** (-torch.arange(pairs) / pairs), persistent=False)
        self.register_buffer("axes", torch.arange(pairs) % 3, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Positions `(n, 3)` → cosines and sines for `rotate`, each `(n, 1, 1, head_dim)`."""
        angles = positions.float()[:, self.axes] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        turn = torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)
        return turn[0][:, None, None].to(dtype), turn[1][:, None, None].to(dtype)


def rotate(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries and keys `(b, n, 2, h, d)` with each pair of channels (i, i + d/2) turned by its angle, in the heads' dtype."""
    cos, sin = turn
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos.to(heads.dtype), swapped, sin.to(heads.dtype))


def rotate_back(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of `rotate`, which is its transpose."""
    return rotate(heads, (turn[0], -turn[1]))
