"""Per-channel mean and standard deviation of what a store holds, summed up shard by shard.

- `ChannelMoments`: streaming and mergeable, in float64; it travels as JSON in the head of each shard's index.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class ChannelMoments:
    """Count, mean and sum of squared deviations of every channel, by the pairwise update of Chan, Golub and LeVeque
    (1979), which has no difference of large sums.

    Attributes:
        count: values of one channel seen so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._squares = np.zeros(0)

    def update(self, rows: np.ndarray) -> None:
        """Take in rows `(n, c, …)`."""
        by_channel = np.moveaxis(rows.astype(np.float64), 1, 0).reshape(rows.shape[1], -1)
        if by_channel.shape[1]:
            mean = by_channel.mean(1)
            self._join(by_channel.shape[1], mean, ((by_channel - mean[:, None]) ** 2).sum(1))

    def merge(self, other: ChannelMoments) -> None:
        """Take in everything that `other` has seen."""
        if other.count:
            self._join(other.count, other._mean, other._squares)

    def _join(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        if self.count == 0:
            self.count, self._mean, self._squares = count, mean, squares
            return
        if len(mean) != len(self._mean):
            raise ValueError(f"cannot merge moments of {len(mean)} channels into {len(self._mean)}")
        total = self.count + count
        step = mean - self._mean
        self._squares = self._squares + squares + step**2 * (self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """float64 `(c,)`; empty before the first value."""
        return self._mean

    @property
    def std(self) -> np.ndarray:
        """float64 `(c,)`, of the values themselves (divided by their count)."""
        return np.sqrt(self._squares / max(1, self.count))

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self._mean.tolist(), "squares": self._squares.tolist()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ChannelMoments:
        moments = cls()
        moments.count = int(fields["count"])
        moments._mean, moments._squares = np.array(fields["mean"], np.float64), np.array(fields["squares"], np.float64)
        return moments
