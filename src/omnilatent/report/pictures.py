"""The kept pictures: encoded without loss into the page, within a budget of bytes, and laid out side by side.

- `Shown`: the pictures as data URIs, their PSNR, the scale of the error maps, and what was cut to fit.
- `embed`: pictures of all codecs → `Shown`, whole if they fit, else centre crops, else fewer of them.
- `pictures_section`: the markup that report.js makes zoomable; without scripts it is a plain list of pictures.

Error maps cost no bytes: the browser computes |x − x̂| from the two lossless pictures.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from .markup import dot

if TYPE_CHECKING:
    from ..metrics.protocol import Picture

CROPS = (None, 768, 512, 384, 256, 128)  # longest side kept, from the middle
SCALES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 255)  # 8-bit levels at the bright end of the error map
MAX_WEBP = 16383  # pixels a side that the WebP format can hold


@dataclass(frozen=True)
class Tile:
    """One picture of a row. `uri` is None where the codec has no picture of this image."""

    label: str
    uri: str | None
    psnr: float | None


@dataclass(frozen=True)
class PictureRow:
    """One image: the original first, then each codec. `size` is (height, width) as shown, `full` as measured."""

    key: str
    size: tuple[int, int]
    full: tuple[int, int]
    tiles: list[Tile]


@dataclass(frozen=True)
class Shown:
    """What the page shows. `scale`: 8-bit levels at the bright end; `remark`: what was cut, "" for nothing."""

    rows: list[PictureRow]
    scale: int
    remark: str = ""


def embed(pictures: Mapping[str, Sequence[Picture]], budget: int) -> Shown:
    """Encode the pictures as lossless WebP data URIs of at most `budget` bytes in all.

    Args:
        pictures: label → its kept pictures; the same keys under every label, in the same order.
    """
    keys = list(dict.fromkeys(picture.key for kept in pictures.values() for picture in kept))
    by_label = {label: {p.key: p for p in kept} for label, kept in pictures.items()}
    scale = _error_scale(pictures)
    longest = max((max(p.original.shape[:2]) for kept in pictures.values() for p in kept), default=0)
    crops = [c for c in CROPS if c is None and longest <= MAX_WEBP or c is not None and c < longest]
    for crop in crops or [None]:
        rows, spent = [], 0
        for key in keys:
            row = _row(key, by_label, crop)
            spent += sum(len(tile.uri) for tile in row.tiles if tile.uri)
            if spent > budget:
                break
            rows.append(row)
        # The smallest crop is the last resort: then as many pictures as fit are shown.
        if len(rows) == len(keys) or crop == crops[-1]:
            return Shown(rows, scale, _remark(len(rows), len(keys), crop, rows, budget))
    return Shown([], scale)


def psnr(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures of equal shape; infinite for equal ones."""
    error = np.mean((original.astype(np.float64) - reconstruction.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _row(key: str, by_label: Mapping[str, Mapping[str, Picture]], crop: int | None) -> PictureRow:
    first = next(kept[key] for kept in by_label.values() if key in kept)
    full = first.original.shape[0], first.original.shape[1]
    window = _window(full, crop)
    tiles = [Tile("original", _data_uri(first.original[window]), None)]
    for label, kept in by_label.items():
        picture = kept.get(key)
        tiles.append(Tile(label, None, None) if picture is None else Tile(
            label, _data_uri(picture.reconstruction[window]), psnr(picture.original, picture.reconstruction)))
    shown = first.original[window].shape
    return PictureRow(key, (shown[0], shown[1]), full, tiles)


def _window(size: tuple[int, int], crop: int | None) -> tuple[slice, slice]:
    kept = [side if crop is None else min(side, crop) for side in size]
    starts = [(side - keep) // 2 for side, keep in zip(size, kept, strict=True)]
    return slice(starts[0], starts[0] + kept[0]), slice(starts[1], starts[1] + kept[1])


def _data_uri(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "WEBP", lossless=True, method=1, quality=30)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _error_scale(pictures: Mapping[str, Sequence[Picture]]) -> int:
    """One scale for all error maps: the 99th percentile over every picture of every codec that errs, rounded up."""
    counts = np.zeros(256, dtype=np.int64)
    for picture in (picture for kept in pictures.values() for picture in kept):
        error = np.abs(picture.original.astype(np.int16) - picture.reconstruction.astype(np.int16)).mean(-1)
        if error.any():
            counts += np.bincount(np.ceil(error).astype(np.int64).ravel(), minlength=256)
    level = int(np.searchsorted(np.cumsum(counts), 0.99 * counts.sum()))
    return next(scale for scale in SCALES if scale >= level)


def _remark(shown: int, all_: int, crop: int | None, rows: Sequence[PictureRow], budget: int) -> str:
    parts = []
    if crop is not None and any(row.size != row.full for row in rows):
        parts.append(f"pictures are cut to the middle {crop} pixels of their sides (captions and figures rest on the "
                     "whole pictures)")
    if shown < all_:
        parts.append(f"{shown} of {all_} kept pictures are shown")
    return f"To keep this page within {budget / 1e6:.1f} MB of pictures, {'; '.join(parts)}." if parts else ""


def pictures_section(shown: Shown, series: Mapping[str, int], heat: Sequence[str]) -> str:
    """The section's markup.

    Args:
        series: label → colour number.
        heat: colours of the error map from 0 to the scale's end, as `rrggbb`.
    """
    rows = "".join(_row_markup(n, row, series) for n, row in enumerate(shown.rows, 1))
    stops = ", ".join(f"#{heat[i]}" for i in range(0, len(heat), 15))
    remark = f'<p class="muted">{escape(shown.remark)}</p>' if shown.remark else ""
    return f"""<p class="hint">Click or tap a picture to magnify that spot in all of them, drag to move,
pinch or Ctrl + wheel to zoom.</p>{remark}
<div id="viewer" data-scale="{shown.scale}" data-heat="{''.join(heat)}">
<div class="strip" role="group" aria-label="Choose a picture"></div>
<div class="bar" role="toolbar" aria-label="How the pictures are shown">
<div class="segments" role="group" aria-label="Show">
<button type="button" data-view="picture" aria-pressed="true">Pictures</button>
<button type="button" data-view="error" aria-pressed="false">Error maps</button>
<button type="button" data-view="original" aria-pressed="false" title="Hold O to blink">Original</button></div>
<div class="segments" role="group" aria-label="Zoom">
<button type="button" data-zoom="1" aria-pressed="true">1×</button>
<button type="button" data-zoom="2" aria-pressed="false">2×</button>
<button type="button" data-zoom="4" aria-pressed="false">4×</button>
<button type="button" data-zoom="8" aria-pressed="false">8×</button></div>
<button type="button" class="all" aria-pressed="false">Show all</button>
<output aria-live="polite"></output></div>
<div class="legend" hidden><span>0</span><i style="background:linear-gradient(90deg, {stops})"></i>
<span>≥ {shown.scale}</span><span class="says">|x − x̂|, mean of the three channels, in 8-bit levels of 0–255;
the same scale for every codec and picture</span></div>
{rows}
<p class="hint keys">With the pictures in focus: arrows move, <kbd>+</kbd> <kbd>-</kbd> zoom, <kbd>0</kbd> resets,
<kbd>E</kbd> error maps, hold <kbd>O</kbd> for the original, <kbd>N</kbd> <kbd>P</kbd> next and previous
picture.</p></div>"""


def _row_markup(number: int, row: PictureRow, series: Mapping[str, int]) -> str:
    height, width = row.size
    size = f"{row.full[1]}×{row.full[0]}" + ("" if row.size == row.full else f", middle {width}×{height} shown")
    columns = len(row.tiles) if len(row.tiles) <= 4 else 3 if len(row.tiles) in (5, 6, 9) else 4
    tiles = "".join(_tile_markup(row, tile, series) for tile in row.tiles)
    return f"""<article class="row" aria-labelledby="picture-{number}"><h3 id="picture-{number}">{escape(row.key)}
<small>{size}</small></h3><div class="tiles" style="--columns:{columns}" tabindex="0" role="group"
aria-label="{escape(row.key)}: original and reconstructions, zoomed together">{tiles}</div></article>"""


def _tile_markup(row: PictureRow, tile: Tile, series: Mapping[str, int]) -> str:
    height, width = row.size
    label = escape(tile.label)
    is_original = tile is row.tiles[0]
    mark = "" if is_original else dot(series[tile.label])
    shape = f'style="aspect-ratio:{width}/{height}"'
    if tile.uri is None:
        return (f'<figure><div class="stage empty" {shape}>no picture</div>'
                f"<figcaption>{mark}<b>{label}</b></figcaption></figure>")
    alt = f"{escape(row.key)}, original" if is_original else f"{escape(row.key)} reconstructed by {label}"
    value = "" if tile.psnr is None else "identical" if math.isinf(tile.psnr) else f"{tile.psnr:.2f} dB"
    locator = '<i class="locator" aria-hidden="true"><b></b></i>' if is_original else ""
    return (f'<figure{" data-original" if is_original else ""}><div class="stage" {shape}><div class="layer">'
            f'<img src="{tile.uri}" alt="{alt}" width="{width}" height="{height}"></div>{locator}</div>'
            f"<figcaption>{mark}<b>{label}</b><span>{value}</span></figcaption></figure>")
