"""What a run tells.

- `RunLog`: `log.jsonl` with every logged number, TensorBoard, sample pictures.
- `progress_bar`: with `headline`, the numbers that stand in it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import library

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor


class RunLog:
    """Appends to a run's log, from step `start` on: what a killed run logged beyond it is dropped first."""

    def __init__(self, run: Path, start: int) -> None:
        library("tensorboard")  # or the next line blames torch for its absence
        self.run = run
        self.file = run / "log.jsonl"
        if self.file.exists():
            self._drop_beyond(start)
        self.board = library("torch.utils.tensorboard").SummaryWriter(str(run), purge_step=start + 1)

    def _drop_beyond(self, start: int) -> None:
        """Rewrite the log without the rows after step `start`, whole or not at all."""
        rows = self.file.read_bytes().splitlines(keepends=True)
        kept = [row for row in rows if _step_of(row) <= start]
        if len(kept) == len(rows):
            return
        temporary = self.file.with_name(f".writing-{self.file.name}")
        try:
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, self.file)
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, step: int, numbers: dict[str, float], part: str) -> None:
        """Log the numbers of `part` ("train" or "validation") after `step` optimiser steps.

        One that is not finite becomes null in the log, since JSON has no word for it.
        """
        row = {"step": step, "part": part, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}}
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, allow_nan=False) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(f"{part}/{name}", value, step)

    def picture(self, step: int, picture: Tensor) -> None:
        """Save a picture `(3, h, w)` in [0, 1] under samples/."""
        pixels = (picture.clamp(0, 1) * 255).round().byte().cpu()
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(folder / f"step-{step}.png")
        self.board.add_image("samples", pixels, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.board.close()
        except OSError:  # a full disk, for example; what has already gone wrong is told instead
            if failure is None:
                raise


def _step_of(row: bytes) -> float:
    """A row's step; a row cut off by a kill counts as beyond every step."""
    try:
        return json.loads(row)["step"] if row.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def progress_bar(visible: bool) -> Progress:
    """A bar with steps, the time left or in the end taken, and the latest numbers; on a narrow terminal the bar itself gives way."""
    from rich import progress as rich
    from rich.table import Column

    def whole() -> Column:
        return Column(no_wrap=True)

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), rich.MofNCompleteColumn(table_column=whole()),
        rich.TimeRemainingColumn(elapsed_when_finished=True, table_column=whole()),
        rich.TextColumn("{task.fields[numbers]}", markup=False), disable=not visible,
    )


def headline(numbers: dict[str, float], width: int = 48) -> str:
    """The loss and as many of the numbers after it as fit into `width` letters, which 80 columns leave beside the rest of the bar;
    not the gradients' norm, which log.jsonl has."""
    line = ""
    for name, value in numbers.items():
        longer = f"{line} {name} {value:.3g}".strip()
        if name != "gradient_norm" and len(longer) <= width:
            line = longer
    return line
