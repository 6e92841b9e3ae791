"""Tables for a terminal and for Markdown documents.

- `terminal_table`: all figures, one column a codec, with footnotes; a rich renderable.
- `benchmark_table`: the KL-against-VQ table for a terminal, quoted rows set apart.
- `markdown_table`: one row a codec, for a README; what nobody has is listed under it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..metrics.results import Evaluation
from .cells import MISSING, Cell, Column, Grid, Row, results_grid
from .published import PUBLISHED, PUBLISHED_NOTE, Benchmark, benchmark_rows

if TYPE_CHECKING:
    from rich.console import RenderableType

LABEL_WIDTH = 18  # characters a codec takes at most in a terminal
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def terminal_table(
    evaluations: Sequence[Evaluation], nulls: Mapping[str, str] | None = None, width: int | None = None
) -> RenderableType:
    """Metrics down, codecs across, the best of each line in bold; reasons for missing figures under it.

    Args:
        width: of the terminal, by default as rich finds it; codecs that do not fit beside each other go into further
            blocks below.
    """
    from rich import get_console
    from rich.console import Group
    from rich.text import Text

    grid = results_grid(evaluations, nulls)
    blocks = [_block(grid.columns, rows) for rows in _packed(grid, width or get_console().width)]
    notes = [Text(f"{_sup(n)} {note}", style="dim") for n, note in enumerate(grid.notes, 1)]
    spaced = [part for block in blocks for part in (block, Text())]
    return Group(*spaced, *notes)


def _packed(grid: Grid, width: int) -> list[list[Row]]:
    """The rows in groups that fit beside each other in `width` characters."""
    names = max(len(_heading(column)) for column in grid.columns) + 2
    groups: list[list[Row]] = []
    used = width
    for row in grid.rows:
        need = max(8, len(row.label), min(12, len(row.null) + 2), *(len(_marked(cell)) for cell in row.cells))
        need = min(LABEL_WIDTH, need) + 2
        if used + need > width:
            groups.append([])
            used = names
        groups[-1].append(row)
        used += need
    return groups


def _heading(column: Column) -> str:
    return " ".join(part for part in (column.name, column.arrow, column.unit and f"[{column.unit}]") if part)


def _block(columns: Sequence[Column], rows: Sequence[Row]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for row in rows:
        head = Text(row.label, style="bold")
        if row.null:
            head.append(f"\n({row.null})", style="dim")
        table.add_column(head, justify="right", overflow="fold", min_width=8, max_width=LABEL_WIDTH)
    for i, column in enumerate(columns):
        cells = [Text(_marked(row.cells[i]), style="bold green" if row.cells[i].best else "") for row in rows]
        table.add_row(Text(_heading(column)), *cells)
    return table


def benchmark_table(evaluations: Sequence[Evaluation]) -> RenderableType:
    """Type, downsampling, latent shape, rFID, PSNR, SSIM: our rows first, then those of papers, marked as quoted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "type", "f", "latent"):
        table.add_column(name)
    for name in ("rFID ↓", "PSNR ↑", "SSIM ↑"):
        table.add_column(name, justify="right")
    for row in benchmark_rows(evaluations):
        table.add_row(*map(Text, _benchmark_cells(row)))
    table.add_section()
    table.add_row(Text("published:", style="italic"))
    for row in PUBLISHED:
        table.add_row(*(Text(text, style="dim") for text in _benchmark_cells(row)))
    return Group(table, Text(PUBLISHED_NOTE, style="dim"))


def markdown_table(
    evaluations: Sequence[Evaluation], nulls: Mapping[str, str] | None = None, columns: Sequence[str] | None = None
) -> str:
    """A table for a document.

    Args:
        columns: metric keys to show, in the table's order; by default all that at least one codec has.
    """
    grid = results_grid(evaluations, nulls)
    shown = [i for i in grid.measured() if columns is None or grid.columns[i].key in columns]
    heads = [_heading(grid.columns[i]) for i in shown]
    lines = ["| codec | " + " | ".join(map(_md, heads)) + " |", "| --- |" + " ---: |" * len(shown)]
    used: dict[int, None] = {}
    for row in grid.rows:
        label = _md(row.label) + (f" *({_md(row.null)})*" if row.null else "")
        cells = [row.cells[i] for i in shown]
        used.update(dict.fromkeys(cell.note for cell in cells if cell.note))
        texts = [f"**{_marked(cell)}**" if cell.best else _marked(cell) for cell in cells]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    notes = [f"{_sup(n)} {_md(grid.notes[n - 1])}" for n in sorted(used)]
    absent = [i for i, column in enumerate(grid.columns)
              if i not in shown and (columns is None or column.key in columns)]
    notes += [f"{grid.columns[i].name}: {MISSING} {_md(_reason(grid.notes, [r.cells[i] for r in grid.rows]))}"
              for i in absent]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes) + "\n"


def benchmark_number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _benchmark_cells(row: Benchmark) -> list[str]:
    factor = MISSING if row.downsampling is None else str(row.downsampling)
    return [row.label, row.type, factor, row.shape, benchmark_number(row.rfid, 2), benchmark_number(row.psnr, 2),
            benchmark_number(row.ssim, 2)]


def _reason(notes: list[str], cells: Sequence[Cell]) -> str:
    return " ".join(notes[n - 1] for n in dict.fromkeys(cell.note for cell in cells) if n)


def _marked(cell: Cell) -> str:
    return cell.text + (_sup(cell.note) if cell.note else "")


def _sup(number: int) -> str:
    return str(number).translate(_SUPERSCRIPT)


def _md(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
