"""`report.json`: everything a report rests on, for programs; and writing into a report's folder.

- `write_record`, `read_report`: evaluations, command, time and skipped files, to JSON and back.
- `write_skipped`: `skipped.jsonl`, one row an unreadable file.
- `replace_file`: a file written under a temporary name and renamed, so that a kill leaves no half of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError, is_disk_full
from ..hub import read_json
from ..metrics.results import Evaluation, Figure

FORMAT = 1  # of report.json; raise it when an older reader would misread what is written


def write_record(path: Path, evaluations: Sequence[Evaluation], **facts: Any) -> Path:
    """Write `path` (JSON): the evaluations with every condition, and `facts` such as title, command and time.

    JSON knows no NaN and no infinity: a figure that is one of them is stored as null, and its note says which.
    """
    record = {"format": FORMAT, "omnilatent": __version__, **facts,
              "evaluations": [_noted(evaluation) for evaluation in evaluations]}
    text = json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    return replace_file(path, text + "\n")


def read_report(path: Path) -> list[Evaluation]:
    """The evaluations of a `report.json`; an image without a value of a metric has NaN there again.

    Raises:
        UserError: the file is not one, or a newer version wrote it.
    """
    record = read_json(path)
    if "evaluations" not in record:
        raise UserError(f"{path} is not a report: give the report.json that 'omnilatent compare' wrote.")
    if record.get("format", 0) > FORMAT:
        raise UserError(f"{path} was written by omnilatent {record.get('omnilatent')}, which is newer than this one: "
                        "upgrade with 'pip install --upgrade omnilatent'.")
    return [_evaluation(fields) for fields in record["evaluations"]]


def write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> Path | None:
    """Write `skipped.jsonl`, or remove an earlier report's where nothing was skipped. Returns its path if written."""
    path = folder / "skipped.jsonl"
    if not skipped:
        path.unlink(missing_ok=True)
        return None
    rows = (json.dumps({"file": file, "reason": reason}, ensure_ascii=False) for file, reason in skipped)
    return replace_file(path, "".join(f"{row}\n" for row in rows))


def replace_file(path: Path, text: str) -> Path:
    """Write UTF-8 `text` to `path` as a whole or not at all; stray bytes of file names become `\\udcff`, as in JSON.

    Raises:
        UserError: the disk is full, or the folder cannot be written to; an existing file stays as it was.
    """
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as failure:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # the parent is a file, or the folder is gone: nothing of ours is left there
            pass
        if is_disk_full(failure):
            raise UserError(f"The disk is full or a quota is reached while writing {path}: free space and repeat the "
                            "command; what was saved before is untouched.") from failure
        reason = failure.strerror or type(failure).__name__
        raise UserError(f"{path} cannot be written ({reason}): choose another folder with --out.") from failure
    return path


def _noted(evaluation: Evaluation) -> dict[str, Any]:
    fields = evaluation.to_json()
    for key, figure in evaluation.figures.items():
        if figure.value is not None and not math.isfinite(figure.value):
            fields["figures"][key]["note"] = " ".join(filter(None, (figure.note, f"The value is {figure.value}.")))
    return fields


def _evaluation(fields: dict[str, Any]) -> Evaluation:
    figures = {key: Figure(**figure) for key, figure in fields["figures"].items()}
    per_image = {key: [math.nan if value is None else value for value in values]
                 for key, values in fields["per_image"].items()}
    return Evaluation(**{**fields, "figures": figures, "per_image": per_image})


def _finite(value: Any) -> Any:
    """The same nested value with JSON's types only: numpy's scalars as numbers, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
