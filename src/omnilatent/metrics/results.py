"""What a measurement is stored as: every figure with the conditions that it rests on.

- `Figure`: one number, or the reason why there is none.
- `Evaluation`: all figures of one codec on one set of images, per image and in the mean.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One cell of a table. `value` is None when it could not be had; `note` then says why and what to do."""

    value: float | None
    n: int = 0
    note: str = ""


@dataclass
class Evaluation:
    """One codec measured on one data set under the protocol.

    Attributes:
        label: the name in the report.
        codec: provenance and size: name, kind, licence, weights_hash, parameters, latent channels, downsampling.
        figures: metric name → `Figure`, in the order of the table.
        per_image: metric name → one value an image, in the order of `keys`; NaN where it has none.
        keys: the images' names, relative to the data.
        conditions: what the figures rest on: data, n, size, seed, dtype, device, versions, skipped, protocol.
        health: latent health figures, by name; nested dictionaries of numbers and lists.
    """

    label: str
    codec: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    per_image: dict[str, list[float]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: a value that is not finite, such as an image too small for a metric, becomes null."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
