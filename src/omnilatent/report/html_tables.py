"""Tables of the HTML report.

- `results_section`: the results grid with marked best cells and visible footnotes.
- `benchmark_section`: the KL-against-VQ table, our rows above, quoted rows set apart below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..metrics.results import Evaluation
from .cells import MISSING, Cell, Grid, Row
from .published import PUBLISHED, PUBLISHED_NOTE, PUBLISHED_SET, Benchmark, benchmark_rows


def results_section(grid: Grid, series: Mapping[str, int]) -> str:
    """One row a codec. `series`: label → colour number."""
    heads = "".join(
        f'<th scope="col">{escape(c.name)} {_arrow(c.better)}<small>{escape(c.unit) or "&nbsp;"}</small></th>'
        for c in grid.columns)
    rows = "".join(_row(row, series) for row in grid.rows)
    notes = "".join(f'<li id="note-{n}">{escape(note)}</li>' for n, note in enumerate(grid.notes, 1))
    marks = any(cell.best for row in grid.rows for cell in row.cells)
    legend = ('<p class="hint">Green marks the best of a column'
              + (" among the codecs that are no nulls" if any(row.null for row in grid.rows) else "")
              + "; ↑ more is better, ↓ less is better.</p>") if marks else ""
    return (f'{legend}<div class="scroll" tabindex="0" role="region" aria-label="Figures, a table that scrolls"><table>'
            f'<thead><tr><th scope="col" class="left">codec</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
            + (f'<ol class="footnotes">{notes}</ol>' if notes else ""))


def benchmark_section(evaluations: Sequence[Evaluation], series: Mapping[str, int]) -> str:
    """Type, downsampling, latent, rFID, PSNR, SSIM and LPIPS of our codecs, then of published ones."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("rFID ↓", "PSNR ↑", "SSIM ↑", "LPIPS ↓"))
    ours = "".join(_benchmark(row, _dot(series, row.label)) for row in benchmark_rows(evaluations))
    quoted = "".join(_benchmark(row, "") for row in PUBLISHED)
    return f"""<p class="muted">{escape(PUBLISHED_NOTE)}</p>
<div class="scroll" tabindex="0" role="region" aria-label="Published figures, a table that scrolls"><table><thead><tr>
<th scope="col" class="left">codec</th><th scope="col" class="left">type</th><th scope="col">f</th>
<th scope="col" class="left">latent</th>{heads}<th scope="col" class="left">source</th></tr></thead>
<tbody>{ours}<tr class="divide"><th colspan="9" scope="rowgroup">Published for another set: {PUBLISHED_SET}</th></tr>{quoted}
</tbody></table></div>"""


def _row(row: Row, series: Mapping[str, int]) -> str:
    null = f"<small>{escape(row.null)}</small>" if row.null else ""
    head = f'<th scope="row"><span class="name">{_dot(series, row.label)}{escape(row.label)}{null}</span></th>'
    cells = "".join(_cell(cell) for cell in row.cells)
    return f'<tr{" class=null" if row.null else ""}>{head}{cells}</tr>'


def _cell(cell: Cell) -> str:
    note = f'<sup><a href="#note-{cell.note}" aria-label="footnote {cell.note}">{cell.note}</a></sup>' if cell.note else ""
    if cell.best:
        return f'<td class="best">{escape(cell.text)}<span class="visually-hidden"> (best)</span>{note}</td>'
    return f"<td>{escape(cell.text)}{note}</td>"


def _benchmark(row: Benchmark, dot: str) -> str:
    values = "".join(
        f"<td>{MISSING if value is None else f'{value:.{digits}f}'}</td>"
        for value, digits in ((row.rfid, 2), (row.psnr, 2), (row.ssim, 2), (row.lpips, 3)))
    factor = MISSING if row.downsampling is None else row.downsampling
    return (f'<tr{" class=quoted" if row.source else ""}><th scope="row"><span class="name">{dot}{escape(row.label)}</span>'
            f'</th><td class="left">{escape(row.type)}</td><td>{factor}</td><td class="left">{escape(row.shape)}</td>{values}'
            f'<td class="left wrap">{escape(row.source) or "this report"}</td></tr>')


def _dot(series: Mapping[str, int], label: str) -> str:
    return f'<i class="dot" style="--c:var(--s{series[label]})"></i>' if label in series else ""


def _arrow(better: str) -> str:
    return {"higher": '<span title="more is better">↑</span>', "lower": '<span title="less is better">↓</span>'}.get(better, "")
