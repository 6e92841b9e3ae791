"""Tables of the HTML report.

- `results_section`: the results grid with marked best cells and visible footnotes.
- `benchmark_section`: the KL-against-VQ table, our rows above, quoted rows set apart below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..metrics.results import Evaluation
from .cells import MISSING, Cell, Grid, Row
from .markup import dot, scrolling_table
from .published import PUBLISHED, PUBLISHED_NOTE, PUBLISHED_SET, Benchmark, benchmark_rows


def results_section(grid: Grid, series: Mapping[str, int]) -> str:
    """One row a codec. `series`: label → colour number."""
    heads = '<th scope="col" class="left">codec</th>' + "".join(
        f'<th scope="col" class="metric">{escape(column.name)} {_arrow(column.better)}'
        f'<small>{escape(column.unit) or "&nbsp;"}</small></th>' for column in grid.columns)
    rows = "".join(_row(row, series) for row in grid.rows)
    notes = "".join(f'<li id="note-{n}">{escape(note)}</li>' for n, note in enumerate(grid.notes, 1))
    marks = any(cell.best for row in grid.rows for cell in row.cells)
    legend = ('<p class="hint">Green marks the best of a column'
              + (" among the codecs that are no nulls" if any(row.null for row in grid.rows) else "")
              + "; ↑ more is better, ↓ less is better.</p>") if marks else ""
    footnotes = f'<ol class="footnotes">{notes}</ol>' if notes else ""
    return legend + scrolling_table("Figures", heads, rows, "results") + footnotes


def benchmark_section(evaluations: Sequence[Evaluation], series: Mapping[str, int]) -> str:
    """Type, downsampling, latent, rFID, PSNR, SSIM and LPIPS of our codecs, then of published ones."""
    names = (*(("codec", "left"), ("type", "left"), ("f", ""), ("latent", "left")),
             *((name, "") for name in ("rFID ↓", "PSNR ↑", "SSIM ↑", "LPIPS ↓")), ("source", "left"))
    heads = "".join(f'<th scope="col" class="{side}">{name}</th>' for name, side in names)
    ours = "".join(_benchmark(row, dot(series.get(row.label))) for row in benchmark_rows(evaluations))
    quoted = "".join(_benchmark(row, "") for row in PUBLISHED)
    divider = (f'<tr class="divide"><th colspan="{len(names)}" scope="rowgroup">Published for another set: '
               f"{escape(PUBLISHED_SET)}</th></tr>")
    table = scrolling_table("Published figures", heads, ours + divider + quoted)
    return f'<p class="muted">{escape(PUBLISHED_NOTE)}</p>{table}'


def _row(row: Row, series: Mapping[str, int]) -> str:
    null = f"<small>{escape(row.null)}</small>" if row.null else ""
    head = f'<th scope="row"><span class="name">{dot(series.get(row.label))}{escape(row.label)}{null}</span></th>'
    cells = "".join(_cell(cell) for cell in row.cells)
    return f'<tr{" class=null" if row.null else ""}>{head}{cells}</tr>'


def _cell(cell: Cell) -> str:
    link = f'<a href="#note-{cell.note}" aria-label="footnote {cell.note}">{cell.note}</a>'
    note = f"<sup>{link}</sup>" if cell.note else ""
    if cell.best:
        return f'<td class="best">{escape(cell.text)}<span class="visually-hidden"> (best)</span>{note}</td>'
    return f"<td>{escape(cell.text)}{note}</td>"


def _benchmark(row: Benchmark, mark: str) -> str:
    values = "".join(
        f"<td>{MISSING if value is None else f'{value:.{digits}f}'}</td>"
        for value, digits in ((row.rfid, 2), (row.psnr, 2), (row.ssim, 2), (row.lpips, 3)))
    factor = MISSING if row.downsampling is None else row.downsampling
    return (f'<tr{" class=quoted" if row.source else ""}><th scope="row">'
            f'<span class="name">{mark}{escape(row.label)}</span></th><td class="left">{escape(row.type)}</td>'
            f'<td>{factor}</td><td class="left">{escape(row.shape)}</td>{values}'
            f'<td class="left wrap">{escape(row.source) or "this report"}</td></tr>')


def _arrow(better: str) -> str:
    arrow, says = {"higher": ("↑", "more"), "lower": ("↓", "less")}.get(better, ("", ""))
    return f'<span title="{says} is better">{arrow}</span>' if arrow else ""
