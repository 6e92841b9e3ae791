"""Saving a run so that a kill at any instant loses nothing but the steps since the last checkpoint.

A run's folder holds `run.json` (the resolved configuration), `step-N/` (newest `keep`), `best/`, `final/`,
`log.jsonl`, `skipped.jsonl`, `samples/` and TensorBoard's events. A `step-N/` and `final/` hold the exported
model and `state.pt`, what resuming needs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..hub import new_folder, restore_interrupted
from .task import Task


def save_checkpoint(
    folder: Path, task: Task, state: dict[str, Any] | None, figures: dict[str, float], step: int
) -> None:
    """Write the exported model and, where given, the training state as `folder`, whole or not at all."""
    with new_folder(folder) as temporary:
        task.export(temporary, figures, step)
        if state is not None:
            torch.save(state, temporary / "state.pt")


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` folders step-N/."""
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The folders step-N/ that hold training state, oldest first."""
    found = [p for p in run.glob("step-*") if p.name.removeprefix("step-").isdigit() and (p / "state.pt").exists()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def resume_point(path: Path) -> Path | None:
    """The checkpoint folder to go on from: the one named, else the furthest of the run; None before the first save.

    Raises:
        UserError: the folder named holds no training state.
    """
    run = path if (path / "run.json").exists() else path.parent
    restore_interrupted(run)
    if path != run:
        if not (path / "state.pt").exists():
            raise UserError(f"{path} holds a model but no training state: resume from the run {run} instead.")
        return path
    return furthest(run)


def furthest(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None. That is final/, unless a run was resumed with more --steps."""
    newest, final = checkpoints(run)[-1:], run / "final"
    if not (final / "state.pt").exists():
        return newest[0] if newest else None
    return newest[0] if newest and step_of(newest[0]) > load_state(final, mapped=True)["step"] else final


def load_state(folder: Path, device: torch.device | str = "cpu", mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint's `state.pt` without running any code in it; `mapped` leaves its tensors on the disk."""
    try:
        return torch.load(folder / "state.pt", map_location=device, weights_only=True, mmap=mapped)
    except Exception as failure:
        raise UserError(f"{folder / 'state.pt'} cannot be read ({type(failure).__name__}): resume from an earlier "
                        "step-N/ of the run.") from failure
