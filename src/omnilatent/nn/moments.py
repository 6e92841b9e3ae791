"""`Statistics`: mean and variance of a map's groups of channels, gathered from its parts without seeing it whole."""

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """Mean and variance a group of a whole map, merged from its tiles' (Chan, Golub & LeVeque 1983, eq. 2.1)."""

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles
        self._parts: list[tuple[int, Tensor, Tensor]] = []  # pixels, mean, variance
        self._merged: tuple[Tensor, Tensor] | None = None
        self._seen = 0

    @property
    def ready(self) -> bool:
        return self._seen == self.tiles

    def add(self, core: Tensor, groups: int) -> None:
        """Add a tile's core `(1, c, h, w)`; it is the tile's own pixels, each of the map's in one core only."""
        assert not self.ready, "a tile came twice"
        self._seen += 1
        pixels = core.shape[-2] * core.shape[-1]
        if pixels == 0:
            return
        # Narrow types are widened a quarter of the groups at a time, for a wide copy of a tile would be its peak.
        parts = core.unflatten(1, (groups, -1)).split(max(1, -(-groups // 4)), dim=1)
        wide = torch.float64 if core.dtype == torch.float64 else torch.float32
        moments = [torch.var_mean(part.to(wide), dim=(0, 2, 3, 4), correction=0) for part in parts]
        self._parts.append((pixels, torch.cat([m for _, m in moments]), torch.cat([v for v, _ in moments])))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance `(groups,)` of the whole map, merged in float64."""
        assert self.ready, "a tile is missing"
        if self._merged is None:
            like = self._parts[0][1]
            share = torch.tensor([float(n) for n, _, _ in self._parts], dtype=torch.float64)[:, None]
            share /= share.sum()
            means = torch.stack([m for _, m, _ in self._parts]).cpu().double()
            variances = torch.stack([v for _, _, v in self._parts]).cpu().double()
            mean = (share * means).sum(0)
            variance = (share * (variances + (means - mean) ** 2)).sum(0)
            self._merged = mean.to(like), variance.to(like)
            self._parts.clear()
        return self._merged
