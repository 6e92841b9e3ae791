"""Saving a run so that a kill at any instant loses nothing but the steps since the last checkpoint.

- `save_checkpoint`, `prune`, `checkpoints`: write one, keep the newest, list them.
- `resume_point`, `furthest`, `load_state`: find the one to go on from, and read it.
- `remove_beyond`: what a run that goes on from an earlier checkpoint leaves behind.
- `forget_start`: what a run that failed before its first save leaves behind.

A run's folder holds `run.json` (the resolved configuration), `step-N/` (newest `keep`), `best/`, `final/`,
`log.jsonl`, `skipped.jsonl`, `samples/` and TensorBoard's events. A `step-N/` and `final/` hold the exported
model and `state.pt`, what resuming needs.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..hub import new_folder, restore_interrupted
from .task import Task


def save_checkpoint(
    folder: Path, task: Task, state: dict[str, Any] | None, figures: dict[str, float], step: int
) -> None:
    """Write the exported model and, where given, the training state as `folder`, whole or not at all.

    Args:
        figures: measured on the very weights that are exported; empty where these were not measured.
    """
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

    It tidies the run up after a kill, so of several processes only one may call it.

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


def remove_beyond(run: Path, start: int) -> list[str]:
    """Remove the checkpoints of a run that lie beyond step `start`: they belong to a branch that is given up.

    best/ and final/ state their step in config.json, as `training.step`; one that states none is left alone.

    Returns:
        The names of what was removed.
    """
    beyond = [folder for folder in checkpoints(run) if step_of(folder) > start]
    beyond += [folder for name in ("best", "final") if stated_step(folder := run / name) > start]
    for folder in beyond:
        doomed = run / f".writing-{folder.name}-removed"  # a name that `restore_interrupted` clears after a kill
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return [folder.name for folder in beyond]


def forget_start(run: Path, is_new: bool) -> None:
    """Let a new run that failed be begun once more by the mended command: where nothing was saved, remove its run.json.

    Args:
        is_new: whether the folder was made for it. Then it goes as well if nothing else is in it, and TensorBoard's files where
            nothing was logged.
    """
    if any(run.glob("*/config.json")):
        return
    (run / "run.json").unlink(missing_ok=True)
    if is_new:
        if not (run / "log.jsonl").exists():
            for events in run.glob("events.out.tfevents.*"):
                events.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or not empty
            run.rmdir()


def stated_step(folder: Path) -> int:
    """The step that a checkpoint's config.json states, -1 where it states none."""
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def load_state(folder: Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint's `state.pt` without running any code in it; `mapped` leaves its tensors on the disk.

    The tensors are on the CPU: a model or an optimiser that loads them copies them to its device, except the step
    counters of AdamW, which must stay on the CPU, or every step would wait for the GPU.
    """
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as failure:
        raise UserError(f"{folder / 'state.pt'} cannot be read ({type(failure).__name__}): resume from an earlier "
                        "step-N/ of the run.") from failure
