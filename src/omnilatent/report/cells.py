"""Figures → the cells of a table, whatever the table is drawn with.

- `Column`, `Cell`, `Row`, `Grid`: a results table as data, with its footnotes.
- `results_grid`: evaluations → `Grid`; the best value of a column is marked, a missing one has a footnote.
- `format_value`: one number as the protocol prints it.
- `null_rows`: which evaluated codecs are nulls (controls), and what each one shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ..metrics.catalogue import METRICS
from ..metrics.results import Evaluation, Figure

MISSING = "—"
_AE = re.compile(r"ae-f\d+")


@dataclass(frozen=True)
class Column:
    """One metric. `better` is "higher", "lower", or "" where neither is."""

    key: str
    name: str
    unit: str = ""
    better: str = ""

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓"}.get(self.better, "")


@dataclass(frozen=True)
class Cell:
    """One figure as text. `note` is the number (from 1) of its footnote, 0 for none."""

    text: str
    best: bool = False
    note: int = 0


@dataclass(frozen=True)
class Row:
    """One codec. `null` says what it is the null of, "" for a codec that competes."""

    label: str
    cells: list[Cell]
    null: str = ""


@dataclass(frozen=True)
class Grid:
    """A results table: rows of cells in the order of `columns`, and the footnotes that cells point to."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str]

    def measured(self) -> list[int]:
        """The positions of the columns in which at least one codec has a value."""
        return [i for i in range(len(self.columns)) if any(row.cells[i].text != MISSING for row in self.rows)]


def results_grid(evaluations: Sequence[Evaluation], nulls: Mapping[str, str] | None = None) -> Grid:
    """All figures of all codecs.

    Args:
        evaluations: one a row, in this order.
        nulls: label → what it is the null of; such rows are never marked best. None: see `null_rows`.
    """
    nulls = null_rows(evaluations) if nulls is None else nulls
    columns = [_column(key) for key in _keys(evaluations)]
    best = {column.key: _best(column, evaluations, nulls) for column in columns}
    notes: list[str] = []

    def cell(column: Column, evaluation: Evaluation) -> Cell:
        figure = evaluation.figures.get(column.key) or Figure(None, note=_absence(column.key))
        note = figure.note or ("" if _has(figure) else "Not measured.")
        if note and note not in notes:
            notes.append(note)
        number = notes.index(note) + 1 if note else 0
        if not _has(figure):
            return Cell(MISSING, note=number)
        text = format_value(column.key, figure.value)
        return Cell(text, best=evaluation.label not in nulls and text == best[column.key], note=number)

    rows = [Row(e.label, [cell(c, e) for c in columns], nulls.get(e.label, "")) for e in evaluations]
    return Grid(columns, rows, notes)


def format_value(key: str, value: float) -> str:
    """A number with the digits that its metric is printed with; parameter counts in thousands or millions."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not finite"
    if key == "parameters" and value >= 1e6:
        return f"{value / 1e6:.2f} M"
    if key == "parameters" and value >= 1e3:
        return f"{value / 1e3:.1f} k"
    info = METRICS.get(key)
    digits = info.digits if info else 3
    if digits and abs(value) >= 10 ** (digits + 2):  # 12345.6 images a second has digits to spare
        digits = 0
    return f"{value:,.{digits}f}"


def null_rows(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Label → what the codec is the null of: the identity, and autoencoders named `ae-fN` (KL weight 0)."""
    found = {}
    for evaluation in evaluations:
        name = str(evaluation.codec.get("name", ""))
        if evaluation.codec.get("kind") == "pixels":
            found[evaluation.label] = "null: the pixels themselves"
        elif any(_AE.match(part) for part in PurePath(name).parts):
            found[evaluation.label] = "null: no KL term"
    return found


def _keys(evaluations: Sequence[Evaluation]) -> list[str]:
    seen = dict.fromkeys(key for evaluation in evaluations for key in evaluation.figures)
    return [key for key in METRICS if key in seen] + [key for key in seen if key not in METRICS]


def _column(key: str) -> Column:
    info = METRICS.get(key)
    return Column(key, info.name, info.unit, info.better) if info else Column(key, key)


def _has(figure: Figure | None) -> bool:
    return figure is not None and figure.value is not None and not math.isnan(figure.value)


def _best(column: Column, evaluations: Sequence[Evaluation], nulls: Mapping[str, str]) -> str | None:
    """The printed best value among the codecs that compete; None where there is none, or all tie."""
    values = [e.figures[column.key].value for e in evaluations
              if e.label not in nulls and _has(e.figures.get(column.key))]
    if column.better not in {"higher", "lower"} or len({format_value(column.key, v) for v in values}) < 2:
        return None
    return format_value(column.key, max(values) if column.better == "higher" else min(values))


def _absence(key: str) -> str:
    needs = METRICS[key].needs if key in METRICS else ""
    return "Only tokenizers have a codebook." if needs == "a codebook" else "Not measured for this codec."
