"""What the loop asks of a family: a `Task` builds models, does one step, validates, and saves itself.

The loop never calls backward: the task does (a GAN has two, a gradient-free learner none).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

Logged = dict[str, "Tensor | float"]


class Task(Protocol):
    """One training job. `monitor` names the validated number that decides what is best (higher is better)."""

    monitor: str

    def setup(self, fabric: Fabric) -> None:
        """Build models and optimisers on the fabric's device, wrapped by it."""

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """This process's batches for the steps [start, stop): a pure function of (seed, step)."""

    def step(self, batch: Any, position: int) -> Logged:
        """One optimiser step, the `position`-th counted from 0; returns numbers to log, `loss` among them."""

    def halve(self, batch: Any) -> Any | None:
        """The first half of a batch, to find what fits after running out of memory; None when it cannot shrink."""

    def validate(self) -> dict[str, float]:
        """Numbers measured on held-out data, `monitor` among them."""

    def samples(self) -> Tensor | None:
        """A picture for a person, `(3, h, w)` in [0, 1], from the latest validation."""

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs, as tensors and plain values (it is loaded with weights_only=True)."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after `setup`."""

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        """Write the model for use (`hub.write_model`) into an existing folder; config.json states `training.step`."""
