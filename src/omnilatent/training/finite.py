"""A run stops at the first number that is not finite, before it is saved over a good one.

- `check_finite`: raises the sentence that names what was kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .checkpoint import furthest


def check_finite(healthy: Tensor, step: int, run: Path, learned: Any = None) -> None:
    """Raise unless `healthy` and every floating point tensor in `learned` are finite.

    Args:
        healthy: a sum over all losses so far, which one NaN or infinity spoils.
        learned: a task's state. An update can spoil the weights while the loss before it was still finite.

    Raises:
        UserError: naming the checkpoint to go on from.
    """
    if not bool(torch.isfinite(healthy)):
        what = "The loss is"
    elif _any_not_finite(learned, healthy.device):
        what = "The weights are"
    else:
        return
    last = furthest(run)
    raise UserError(
        f"{what} no longer finite by step {step}, and training stopped: "
        + (f"the last good checkpoint is {last}; begin a new run from it with --init {last} and a lower --lr or --clip."
           if last else "nothing was saved yet; begin again with a lower --lr or --clip.")
    )


def _any_not_finite(state: Any, device: torch.device) -> bool:
    """One answer from the device for all tensors together."""
    flags = [torch.isfinite(tensor).all().to(device) for tensor in _float_tensors(state)]
    return bool(flags) and not bool(torch.stack(flags).all())


def _float_tensors(state: Any) -> Iterator[Tensor]:
    """Every floating point tensor in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield state.detach()
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _float_tensors(part)
