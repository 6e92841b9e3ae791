"""What a run tells: `log.jsonl` with every logged number, TensorBoard, sample pictures and a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor


class RunLog:
    """Appends to a run's log, from step `start` on: what a killed run logged beyond it is dropped first."""

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.file = run / "log.jsonl"
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= start]
            self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.board = SummaryWriter(str(run), purge_step=start + 1)

    def write(self, step: int, numbers: dict[str, float], part: str) -> None:
        """Log the numbers of `part` ("train" or "validation") after `step` optimiser steps."""
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "part": part, **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(f"{part}/{name}", value, step)

    def picture(self, step: int, picture: Tensor) -> None:
        """Save a picture `(3, h, w)` in [0, 1] under samples/."""
        pixels = (picture.clamp(0, 1) * 255).round().byte().cpu()
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"step-{step}.png")
        self.board.add_image("samples", pixels, step)

    def close(self) -> None:
        self.board.close()


def _step_of(line: str) -> float:
    """A row's step; a row cut off by a kill counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def progress_bar(visible: bool) -> Progress:
    """A bar with steps, time left and the latest numbers."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), disable=not visible,
    )
