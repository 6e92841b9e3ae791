"""Running out of memory becomes a sentence that names a split of the batch which fits.

- `step_within_memory`: one step of a task; where it does not fit, halves of its batch are tried until one does.
"""

from __future__ import annotations

import traceback
from typing import Any, NoReturn

import torch

from ..errors import UserError, is_out_of_memory
from .config import RunConfig
from .task import Logged, Task


def step_within_memory(task: Task, batch: Any, position: int, config: RunConfig, world: int) -> Logged:
    """`task.step(batch, position)` in one of `world` processes.

    Raises:
        UserError: memory ran out. The sentence names the --accumulate that was seen to fit; of several processes, which
            cannot try apart from each other, the next larger one. A task that cannot accumulate says by a method
            `remedy(fits)` what helps instead: `fits` is the batch size that was seen to fit, 0 where none was.
    """
    try:
        return task.step(batch, position)
    except (RuntimeError, MemoryError) as failure:
        if not is_out_of_memory(failure):
            raise
        traceback.clear_frames(failure.__traceback__)  # they hold the activations of the step that did not fit
        reason = failure
    share = config.batch_size // world  # images of this process
    if (remedy := getattr(task, "remedy", None)) is not None:
        halvings = _halvings(task, batch, position) if world == 1 else None
        fits = 0 if halvings is None else max(1, share >> halvings)
        raise UserError(f"Out of memory at step {position} with batches of {config.batch_size}: {remedy(fits)}; what was saved "
                        "before is untouched.") from reason
    if world > 1:
        parts = _divisor(share, config.accumulate + 1)
        _raise(position, config, f"--accumulate {parts} needs less and gives the same gradients", reason)
    halvings = _halvings(task, batch, position)
    if halvings is not None:
        at_once = max(1, (share >> halvings) // config.accumulate)
        parts = _divisor(share, -(-share // at_once))
        split = f"--batch-size {config.batch_size} --accumulate {parts}"
        _raise(position, config, f"{split} fits and gives the same gradients", reason)
    raise UserError(
        f"Out of memory at step {position} even with the smallest part of a batch: train smaller crops (--size) or a "
        "smaller model, or turn on --checkpointing; what was saved before is untouched."
    ) from reason


def _halvings(task: Task, batch: Any, position: int) -> int | None:
    """How often a batch that did not fit must be halved until it does; None if it cannot be. The run ends with this trial, which
    may spoil the weights."""
    halvings = 0
    while (batch := task.halve(batch)) is not None:
        halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            task.step(batch, position)
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            continue
        return halvings
    return None


def _divisor(n: int, least: int) -> int:
    """The smallest divisor of `n` that is at least `least`, at most `n` itself: parts must be of equal size."""
    return next((d for d in range(least, n) if n % d == 0), n)


def _raise(position: int, config: RunConfig, remedy: str, reason: BaseException) -> NoReturn:
    raise UserError(
        f"Out of memory at step {position} with --batch-size {config.batch_size} --accumulate {config.accumulate}: "
        f"{remedy}; what was saved before is untouched."
    ) from reason
