"""Latent health as markup: one line a figure, one column a codec, and a folded table a channel.

- `health_section`: everything in `Evaluation.health`. Names that are known here get a heading and a sentence
  that says what to read off them; any other number is shown under its own name, so nothing gets lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from numbers import Number
from typing import Any

from ..metrics.results import Evaluation
from .cells import MISSING

Path = tuple[str, ...]

# dotted name → heading, what to read off it. Extended where metrics/health.py gains a figure.
EXPLAINED: dict[str, tuple[str, str]] = {}


def health_section(evaluations: Sequence[Evaluation]) -> str:
    """The section's markup, "" where no codec has health figures."""
    measured = [e for e in evaluations if e.health]
    if not measured:
        return ""
    flat = {e.label: dict(_leaves(e.health)) for e in measured}
    single = dict.fromkeys(path for leaves in flat.values() for path, value in leaves.items() if _is_single(value))
    heads = "".join(f'<th scope="col"><span class="name">{escape(e.label)}</span></th>' for e in measured)
    lines = "".join(_line(path, [flat[e.label].get(path) for e in measured]) for path in single)
    table = (f'<div class="scroll" tabindex="0" role="region" aria-label="Latent health, a table that scrolls">'
             f'<table><thead><tr><th scope="col" class="left">figure</th>{heads}</tr></thead><tbody>{lines}</tbody>'
             "</table></div>")
    channels = "".join(_channels(e.label, flat[e.label]) for e in measured)
    folded = f"<details><summary>Every channel of every codec</summary>{channels}</details>" if channels else ""
    return table + folded


def _line(path: Path, values: Sequence[Any]) -> str:
    heading, says = EXPLAINED.get(".".join(path), (_words(path), ""))
    hint = f"<small>{escape(says)}</small>" if says else ""
    cells = "".join(f"<td>{escape(number(value))}</td>" for value in values)
    return f'<tr><th scope="row"><span class="name">{escape(heading)}{hint}</span></th>{cells}</tr>'


def _channels(label: str, leaves: Mapping[Path, Any]) -> str:
    """One table for each length of list: a line an entry, a column a figure."""
    lists = {path: value for path, value in leaves.items() if isinstance(value, (list, tuple)) and value}
    tables = ""
    for length in dict.fromkeys(len(value) for value in lists.values()):
        columns = {path: value for path, value in lists.items() if len(value) == length}
        heads = "".join(f'<th scope="col">{escape(_words(path))}</th>' for path in columns)
        lines = "".join(
            f'<tr><th scope="row">{n}</th>' + "".join(f"<td>{escape(number(v[n]))}</td>" for v in columns.values())
            + "</tr>" for n in range(length))
        tables += (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)} by channel">'
                   f'<table><thead><tr><th scope="col">no.</th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>')
    return f"<h3>{escape(label)}</h3>{tables}" if tables else ""


def number(value: Any) -> str:
    """A health figure with about four significant digits; "—" where this codec has none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Number):
        size = abs(float(value))
        if isinstance(value, int) or size >= 1e4 or size == 0:
            return f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
        return f"{value:.2e}" if size < 1e-3 else f"{value:.4g}"
    return str(value)


def _leaves(health: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in health.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _is_single(value: Any) -> bool:
    return not isinstance(value, (list, tuple))


def _words(path: Path) -> str:
    return ", ".join(part.replace("_", " ") for part in path)
