"""Plots as inline SVG that follow the page's colours, light or dark.

- `rate_distortion`: PSNR over bits per pixel. `speed`: PSNR over decoded images a second, log axis.
- `psnr_strip`: every image's PSNR, one strip a codec.
- `Plot`: the SVG, its alternative text, and what had to be left out or numbered.

Matplotlib draws with placeholder colours; `_themed` turns them into CSS variables, text into real text, and
makes identifiers unique in the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import library
from ..metrics.results import Evaluation
from .labels import place_labels, shorten

INK, MUTED, GRID, CARD = "#010101", "#010102", "#010103", "#010104"
SERIES = 8  # colours of codecs in report.css, then they repeat
LOSSLESS = 99.0  # dB; the protocol caps the PSNR of identical images at 100
DOTS = 150  # images a strip that are drawn one by one; beyond, a histogram
_RC = {"svg.fonttype": "none", "svg.hashsalt": "omnilatent", "font.family": "DejaVu Sans", "font.size": 11,
       "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
       "axes.edgecolor": GRID, "axes.linewidth": 1.0, "figure.dpi": 72, "savefig.dpi": 72,
       "path.simplify": True, "text.parse_math": False}


@dataclass(frozen=True)
class Plot:
    """`svg` is markup to inline; `alt` says in words what it shows; `remarks` belong under it."""

    svg: str
    alt: str
    remarks: list[str] = field(default_factory=list)


def rate_distortion(evaluations: Sequence[Evaluation]) -> Plot | None:
    """PSNR (dB, mean over images) over bits of latent for each pixel; None where fewer than two codecs have both."""
    return _scatter(evaluations, "bits_per_pixel", "bits per pixel", "rate", always_log=False)


def speed(evaluations: Sequence[Evaluation]) -> Plot | None:
    """PSNR (dB) over decoded images a second on a logarithmic axis; None where fewer than two have a speed."""
    return _scatter(evaluations, "decode_ips", "decoded images per second", "speed", always_log=True)


def psnr_strip(evaluations: Sequence[Evaluation]) -> Plot | None:
    """The PSNR of every image, one strip a codec with its median; None where no per-image PSNR is known."""
    remarks, rows = [], []
    for position, evaluation in enumerate(evaluations):
        values = np.asarray(evaluation.per_image.get("psnr", []), dtype=float)
        values = values[np.isfinite(values)]
        if values.size and values.min() >= LOSSLESS:
            remarks.append(f"{evaluation.label} returns every image unchanged and is left out.")
        elif values.size:
            rows.append((position, evaluation.label, values))
    if not rows:
        return None
    with library("matplotlib").rc_context(_RC):
        figure, axes = _axes(360, 52 + 54 * len(rows), left=12, right=12, top=4)
        for line, (position, label, values) in enumerate(rows):
            _strip(axes, -line, position, values)
            axes.annotate(shorten(label, 44), (0, -line), xycoords=("axes fraction", "data"), xytext=(0, 13),
                          textcoords="offset points", color=INK, va="bottom", ha="left")
        axes.set_ylim(-len(rows) + 0.65, 0.65)
        axes.set_yticks([])
        axes.grid(axis="x", color=GRID, linewidth=1)
        axes.set_xlabel("PSNR in dB, one dot an image" if max(r[2].size for r in rows) <= DOTS else "PSNR in dB")
        svg = _themed(figure, "strip")
    middles = "; ".join(f"{label} {np.median(v):.2f} dB ({v.min():.1f} to {v.max():.1f})" for _, label, v in rows)
    return Plot(svg, f"PSNR of every image, median and range by codec: {middles}.", remarks)


def _strip(axes: Any, y: float, position: int, values: np.ndarray) -> None:
    colour = _series(position)
    if values.size <= DOTS:
        # A fixed pattern of heights instead of random jitter: the page is a function of its figures.
        heights = y + 0.11 * (np.argsort(np.argsort(values)) * 2 % 3 - 1)
        axes.scatter(values, heights, s=26, color=colour, alpha=0.6, linewidths=0)
    else:
        counts, edges = np.histogram(values, bins=min(60, int(math.sqrt(values.size)) + 5))
        middle, half = (edges[1:] + edges[:-1]) / 2, 0.2 * counts / counts.max()
        axes.fill_between(middle, y - half, y + half, color=colour, alpha=0.45, linewidth=0)
    median = float(np.median(values))
    axes.plot([median, median], [y - 0.22, y + 0.22], color=colour, linewidth=3, solid_capstyle="round")


def _scatter(evaluations: Sequence[Evaluation], key: str, xlabel: str, prefix: str, always_log: bool) -> Plot | None:
    remarks, points = [], []
    for position, evaluation in enumerate(evaluations):
        x, y = _value(evaluation, key), _value(evaluation, "psnr")
        if x is None or y is None or x <= 0:
            continue
        if y >= LOSSLESS:
            remarks.append(f"{evaluation.label} returns every image unchanged and is left out ({x:,.4g} {xlabel}).")
        else:
            points.append((x, y, position, evaluation.label))
    if len(points) < 2:  # one dot shows nothing that the table does not
        return None
    xs, ys = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    log = always_log or xs.max() / xs.min() > 4
    with library("matplotlib").rc_context(_RC):
        figure, axes = _axes(360, 310, left=42, right=10, top=10)
        if log:
            span = max(xs.max() / xs.min(), 4.0) ** 0.28
            low, high = xs.min() / span, xs.max() * span
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            ticks = _log_ticks(low, high)
            axes.set_xticks(ticks, [f"{t:,.4g}" for t in ticks])
            axes.set_xticks([], minor=True)
        else:
            margin = max(0.28 * (xs.max() - xs.min()), 0.1 * xs.max())
            axes.set_xlim(xs.min() - margin, xs.max() + margin)
        margin = max(0.2 * (ys.max() - ys.min()), 0.6)
        axes.set_ylim(ys.min() - margin, ys.max() + margin)
        axes.set_xlabel(xlabel + (" (log scale)" if log else ""))
        axes.set_ylabel("PSNR in dB")
        axes.grid(color=GRID, linewidth=1)
        axes.set_axisbelow(True)
        for x, y, position, _ in points:
            axes.scatter([x], [y], s=80, color=_series(position), linewidths=1.5, edgecolors=CARD, zorder=3)
        remarks += _label(figure, axes, points)
        svg = _themed(figure, prefix)
    listed = "; ".join(f"{label}: {y:.2f} dB at {x:,.4g}" for x, y, _, label in points)
    return Plot(svg, f"PSNR over {xlabel}. {listed}.", remarks)


def _label(figure: Any, axes: Any, points: list[tuple[float, float, int, str]]) -> list[str]:
    """Write each point's label where it overlaps nothing; where there is no room, numbers and a key instead."""
    anchors = [tuple(axes.transData.transform((x, y))) for x, y, _, _ in points]
    frame = axes.get_window_extent()
    for texts in ([shorten(p[3], 24) for p in points], [str(n + 1) for n in range(len(points))]):
        sizes = [_text_size(figure, text) for text in texts]
        places = place_labels(anchors, sizes, (frame.x0, frame.y0, frame.x1, frame.y1))
        if places is not None:
            break
    else:
        return ["The points lie too close together to be labelled; the table has their values."]
    for text, anchor, place in zip(texts, anchors, places, strict=True):
        far = math.dist(anchor, place.nearest(anchor)) > 14
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 6}
        axes.annotate(text, anchor, xycoords="figure pixels", xytext=place.centre, textcoords="figure pixels",
                      ha="center", va="center", color=INK, arrowprops=line if far else None, zorder=4)
    if texts[0] == "1" and len(points) > 1:
        return ["; ".join(f"{n + 1}: {p[3]}" for n, p in enumerate(points)) + "."]
    return []


def _text_size(figure: Any, text: str) -> tuple[float, float]:
    probe = figure.text(0, 0, text)
    box = probe.get_window_extent(figure.canvas.get_renderer())
    probe.remove()
    return box.width, box.height


def _axes(width: int, height: int, left: int, right: int, top: int) -> tuple[Any, Any]:
    """A figure of `width` × `height` CSS pixels (72 dpi makes points of them) with one frameless axes."""
    figure = library("matplotlib.figure").Figure(figsize=(width / 72, height / 72), dpi=72)
    library("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    bottom = 42
    axes = figure.add_axes((left / width, bottom / height, (width - left - right) / width,
                            (height - bottom - top) / height))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=6)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _log_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers inside a logarithmic axis that spans at least a factor of 2.2."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]


def _value(evaluation: Evaluation, key: str) -> float | None:
    figure = evaluation.figures.get(key)
    value = figure.value if figure else None
    return value if value is not None and math.isfinite(value) else None


def _series(position: int) -> str:
    return f"#0202{position % SERIES:02x}"


def _themed(figure: Any, prefix: str) -> str:
    """Draw to SVG markup for inlining: placeholder colours → CSS variables, no identifiers of other plots."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*</defs>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=0).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for colour, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--line"), (CARD, "--card")):
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"#0202(\w\w)", lambda match: f"var(--s{int(match[1], 16)})", svg)
    return svg.replace("'DejaVu Sans'", "inherit-font").replace("inherit-font", "var(--sans)")
