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
from .markup import scrolling_table

Path = tuple[str, ...]

# dotted name → heading, what to read off it. metrics/health.py and probes.py define the figures.
EXPLAINED: dict[str, tuple[str, str]] = {
    "kl": ("KL", "nats an image, posterior against N(0, I)"),
    "active_units": ("active channels", "those whose mean varies over pictures by more than 0.01"),
    "spectrum.latent_slope": ("spectrum slope of the latent", "much flatter than the images': high frequencies that "
                              "diffusion finds hard"),
    "spectrum.image_slope": ("spectrum slope of the images", "about −2 for photographs"),
    "cycle.real": ("cycle error, real latents", "‖E(D(z)) − z‖² / var z: 0 is a perfect inverse, 1 a constant answer"),
    "cycle.interpolated": ("cycle error, between pictures", "close to the line above where there are no holes between"),
    "cycle.prior": ("cycle error, drawn from N(0, I)", "close to it where any draw is a valid latent"),
    **{f"noise_psnr.{strength}": (f"PSNR under noise of {strength} σ", "dB of D(z + noise) against D(z): more is "
                                  "smoother") for strength in ("0.1", "0.5", "1.0")},
    "equivariance.scale": ("PSNR of the halved latent", "dB of the decoded half-size latent against the "
                           "half-size picture"),
    "equivariance.scale_reference": ("the same, halved picture encoded", "the mark for the line above"),
    "equivariance.rotation": ("PSNR of the turned latent", "dB of the decoded latent turned by 90° against the turned "
                              "picture"),
    "equivariance.rotation_reference": ("the same, turned picture encoded", "the mark for the line above"),
    "n": ("pictures", "that these figures rest on"),
    "size": ("their side", "in pixels"),
    "seed": ("seed", "of noise and draws"),
}


def health_section(evaluations: Sequence[Evaluation]) -> str:
    """The section's markup, "" where no codec has health figures."""
    measured = [e for e in evaluations if e.health]
    if not measured:
        return ""
    flat = {e.label: dict(_leaves(e.health)) for e in measured}
    single = dict.fromkeys(path for leaves in flat.values() for path, value in leaves.items() if _is_single(value))
    single = sorted(single, key=_place)
    heads = '<th scope="col" class="left">figure</th>' + "".join(
        f'<th scope="col"><span class="name">{escape(e.label)}</span></th>' for e in measured)
    lines = "".join(_line(path, [flat[e.label].get(path) for e in measured]) for path in single)
    table = scrolling_table("Latent health", heads, lines)
    channels = "".join(_channels(e.label, flat[e.label]) for e in measured)
    folded = f"<details><summary>Every channel of every codec</summary>{channels}</details>" if channels else ""
    notes = "".join(f"<li>{escape(e.label)}: {escape(str(note))}</li>" for e in measured
                    for note in e.health.get("notes", ()))
    return table + (f'<ul class="footnotes">{notes}</ul>' if notes else "") + folded


def _line(path: Path, values: Sequence[Any]) -> str:
    heading, says = EXPLAINED.get(".".join(path), (_words(path), ""))
    hint = f"<small>{escape(says)}</small>" if says else ""
    cells = "".join(f"<td>{escape(number(value))}</td>" for value in values)
    return f'<tr><th scope="row"><span class="name far">{escape(heading)}{hint}</span></th>{cells}</tr>'


def _channels(label: str, leaves: Mapping[Path, Any]) -> str:
    """One table for each length of list: a line an entry, a column a figure."""
    lists = {path: value for path, value in leaves.items() if isinstance(value, (list, tuple)) and value}
    tables = ""
    for length in dict.fromkeys(len(value) for value in lists.values()):
        columns = {path: value for path, value in lists.items() if len(value) == length}
        heads = '<th scope="col">no.</th>' + "".join(
            f'<th scope="col">{escape(_words(path))}</th>' for path in columns)
        lines = "".join(
            f'<tr><th scope="row">{n}</th>' + "".join(f"<td>{escape(number(v[n]))}</td>" for v in columns.values())
            + "</tr>" for n in range(length))
        tables += scrolling_table(f"{label} by channel", heads, lines)
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
            text = f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
        else:
            text = f"{value:.2e}" if size < 1e-3 else f"{value:.4g}"
        return text.replace("-", "−")
    return str(value)


def _leaves(health: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in health.items():
        if key == "notes" and not path:
            continue  # sentences, shown under the table
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _place(path: Path) -> int:
    """Known figures in the order of `EXPLAINED`, its conditions last of all; unknown ones just above those."""
    order = list(EXPLAINED)
    name = ".".join(path)
    return order.index(name) if name in EXPLAINED else order.index("n") - 1


def _is_single(value: Any) -> bool:
    return not isinstance(value, (list, tuple))


def _words(path: Path) -> str:
    return ", ".join(part.replace("_", " ") for part in path)
