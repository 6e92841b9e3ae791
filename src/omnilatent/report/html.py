"""The report: one self-contained page, and the same figures as JSON beside it.

- `write_report`: evaluations and kept pictures → `report.html`, `report.json` (and `skipped.jsonl`).
- `MAX_BYTES`: the page is never larger; pictures are cut or left out instead, and the page says so.

The page makes no network request: pictures, style and script are inside it, and its content policy forbids others.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, library
from ..metrics.results import Evaluation
from . import plots
from .cells import format_value, null_rows, results_grid
from .conditions import conditions_section, summary
from .health import health_section
from .html_tables import benchmark_section, results_section
from .pictures import embed, pictures_section
from .record import replace_file, write_record, write_skipped

if TYPE_CHECKING:
    from ..metrics.protocol import Picture

MAX_BYTES = 20_000_000
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(
    folder: Path, evaluations: Sequence[Evaluation], pictures: Mapping[str, Sequence[Picture]], title: str,
    command: str | Sequence[str], notes: Sequence[str] = (), *, nulls: Mapping[str, str] | None = None,
    skipped: Sequence[tuple[str, str]] = (), max_bytes: int = MAX_BYTES,
) -> Path:
    """Write a report into `folder`, which is made where it is missing; a report there is replaced, other files stay.

    Args:
        evaluations: one a codec, with distinct labels, in the order of tables and pictures.
        pictures: label → its kept pictures, the same keys for every label.
        title: the heading.
        command: the command line that made it, as text or as a list of arguments.
        notes: sentences that belong at the top, such as how many photos the figures rest on.
        nulls: label → what the row is the null of; None finds them by `cells.null_rows`.
        skipped: (file, reason) of unreadable files; written to `skipped.jsonl` and counted on the page.
        max_bytes: the page's limit; pictures are cut to fit.

    Returns:
        The path of `report.html`; `report.json` lies beside it.

    Raises:
        ValueError: there is no evaluation, two have one label, or pictures bear a label without evaluation.
        UserError: the folder cannot be written to, or the disk is full.
    """
    _check(folder, evaluations, pictures)
    nulls = null_rows(evaluations) if nulls is None else nulls
    command = command if isinstance(command, str) else shlex.join(command)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    sentences = [*notes, *_skipped_note(skipped)]
    page = _page(evaluations, pictures, nulls, title, command, time, sentences, max_bytes)
    write_record(folder / "report.json", evaluations, title=title, command=command, time=time, notes=list(notes),
                 nulls=dict(nulls), skipped=[{"file": file, "reason": reason} for file, reason in skipped])
    write_skipped(folder, skipped)
    return replace_file(folder / "report.html", page)


def _page(
    evaluations: Sequence[Evaluation], pictures: Mapping[str, Sequence[Picture]], nulls: Mapping[str, str], title: str,
    command: str, time: str, notes: Sequence[str], max_bytes: int,
) -> str:
    """The whole page. Pictures come last into it: they get the bytes that the rest leaves."""
    series = {evaluation.label: position % plots.SERIES for position, evaluation in enumerate(evaluations)}
    sections = {
        "Figures": ("figures", results_section(results_grid(evaluations, nulls), series)),
        "Quality against cost": ("cost", _plots(evaluations)),
        "Side by side": ("pictures", "\0" if any(pictures.values()) else ""),
        "Latent health": ("health", _health(evaluations)),
        "Beside published figures": ("published", benchmark_section(evaluations, series)),
        "Conditions": ("conditions", conditions_section(evaluations, command, _clock(time))),
    }
    shown = {name: part for name, part in sections.items() if part[1]}
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, (anchor, _) in shown.items())
    body = "".join(f'<section id="{anchor}" aria-labelledby="{anchor}-head"><h2 id="{anchor}-head">{name}</h2>{content}'
                   "</section>" for name, (anchor, content) in shown.items())
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">
<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_asset("report.css")}</style></head><body>
<header><p class="kicker">OmniLatent report</p><h1>{escape(title)}</h1>
<p class="lead">{escape(summary(evaluations))}</p>
{f'<ul class="notes">{listed}</ul>' if listed else ""}{_facts(evaluations, nulls)}
<nav aria-label="Sections">{links}</nav></header><main>{body}</main>
<footer>Written {escape(_clock(time))} by OmniLatent. This page is complete in itself: it loads nothing.</footer>
<script>{_asset("report.js")}</script></body></html>
"""
    if "\0" not in page:
        return page
    room = max_bytes - len(page.encode(errors="backslashreplace")) - 60_000  # markup of the viewer, captions, long keys
    heat = _heat()
    return page.replace("\0", pictures_section(embed(pictures, max(0, room)), series, heat))


def _plots(evaluations: Sequence[Evaluation]) -> str:
    made = (
        ("Rate and distortion", "Further up is closer to the original, further left is a smaller latent.",
         plots.rate_distortion(evaluations)),
        ("Speed", "Further up is closer to the original, further right decodes faster.", plots.speed(evaluations)),
        ("Every image", "PSNR of each image; the bar is the median.", plots.psnr_strip(evaluations)),
    )
    figures = "".join(
        f'<figure class="card"><h3>{name}</h3><figcaption>{says}</figcaption><div class="plot" role="img" '
        f'aria-label="{escape(plot.alt)}">{plot.svg}</div>'
        + "".join(f'<figcaption>{escape(remark)}</figcaption>' for remark in plot.remarks) + "</figure>"
        for name, says, plot in made if plot)
    return f'<div class="plots">{figures}</div>' if figures else ""


def _health(evaluations: Sequence[Evaluation]) -> str:
    markup = health_section(evaluations)
    intro = ("<p class=\"muted\">What the latent space is like, apart from how well it reconstructs: whether channels "
             "are used, and whether a small step in it stays a small step in the image.</p>")
    return intro + markup if markup else ""


def _facts(evaluations: Sequence[Evaluation], nulls: Mapping[str, str]) -> str:
    """Up to five headline figures: the leader of each among the codecs that are no nulls."""
    rivals = [e for e in evaluations if e.label not in nulls] or list(evaluations)
    wanted = (  # key, which leads, heading with rivals, heading alone, unit
        ("psnr", max, "highest PSNR", "PSNR", "dB"), ("ssim", max, "highest SSIM", "SSIM", ""),
        ("lpips_vgg", min, "lowest LPIPS", "LPIPS", ""),
        ("bits_per_pixel", min, "smallest latent", "latent", "bits/pixel"),
        ("decode_ips", max, "fastest decoder", "decoding", "img/s"))
    items = ""
    for key, choose, rivalled, alone, unit in wanted:
        known = [e for e in rivals if key in e.figures and e.figures[key].value is not None]
        if known:
            leader = choose(known, key=lambda e: e.figures[key].value)
            text = f"{rivalled}: {leader.label}" if len(known) > 1 else alone
            items += f"<li><span>{escape(text)}</span><b>{format_value(key, leader.figures[key].value)} {unit}</b></li>"
    return f'<ul class="facts">{items}</ul>' if items else ""


def _heat() -> list[str]:
    """Matplotlib's perceptually even `inferno` in 256 steps, as `rrggbb`."""
    colours = library("matplotlib").colormaps["inferno"](range(256), bytes=True)
    return ["".join(f"{int(value):02x}" for value in colour[:3]) for colour in colours]


def _skipped_note(skipped: Sequence[tuple[str, str]]) -> list[str]:
    if not skipped:
        return []
    count = f"{len(skipped)} file" + ("s were" if len(skipped) > 1 else " was")
    return [f"{count} unreadable and skipped; skipped.jsonl beside this page says which and why."]


def _clock(time: str) -> str:
    """An ISO time in UTC as a person reads it: `2025-01-31 17:05 UTC`."""
    return f"{time[:10]} {time[11:16]} UTC"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _check(folder: Path, evaluations: Sequence[Evaluation], pictures: Mapping[str, Sequence[Picture]]) -> None:
    labels = [evaluation.label for evaluation in evaluations]
    if not labels:
        raise ValueError("a report needs at least one evaluation; got none")
    if len(set(labels)) < len(labels):
        raise ValueError(f"evaluations need distinct labels; got {labels}")
    strangers = set(pictures) - set(labels)
    if strangers:
        raise ValueError(f"pictures of {sorted(strangers)} have no evaluation; evaluated are {labels}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to write the report into.")
