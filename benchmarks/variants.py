"""What each variant of a codec makes of the same photos: a labelled grid of zoomed crops.

    python benchmarks/variants.py kl-f8-small gan:runs/gan --data ../shared/data/kodak --out variants.png

Rows are photos of DATA, cut where they have most detail; columns the original and every NAME, with its mean PSNR and
high-frequency power ratio over all of DATA below. Crops are enlarged without smoothing, so a pixel is a square.

- `compare`: the figures and pictures of every codec.
- `busiest`, `grid`: where to look, and the sheet of crops; finetune.py draws with them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from omnilatent.cli.names import load_codecs
from omnilatent.data import EvaluationImages, open_images
from omnilatent.errors import UserError
from omnilatent.devices import choose_device
from omnilatent.metrics.protocol import Picture, evaluate

METRICS = ("psnr", "spectrum_high")
GAP, LINE = 6, 16  # pixels between crops, and of a line of text


@dataclass(frozen=True)
class Variants:
    """A labelled grid of zoomed crops: original and variants side by side."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Codecs to show: runs, bundled models, hub ids, each with LABEL: before it or not."""
    data: str
    """Held-out photos: a folder, a .tar or 'photos'."""
    out: Path
    """The PNG to write."""
    size: int = 256
    """Side of the centre square that is measured and cut from."""
    crop: int = 80
    """Side of a crop in pixels."""
    zoom: int = 2
    """Times that it is enlarged."""
    rows: int = 4
    """Photos to show, evenly spread over DATA."""
    limit: int | None = None
    """Most photos to measure."""
    device: str = "cpu"
    """auto, cpu or cuda."""


def main(options: Variants) -> None:
    if options.crop > options.size:
        raise UserError(f"--crop {options.crop} does not fit into --size {options.size}: take a smaller crop.")
    columns = compare(options)
    originals = [picture.original for picture in next(iter(columns.values()))[1]]
    corners = [busiest(original, options.crop) for original in originals]
    shown = {"original": originals} | {
        label: [picture.reconstruction for picture in pictures] for label, (_, pictures) in columns.items()}
    cut = {label: [crop(image, corner, options.crop) for image, corner in zip(images, corners, strict=True)]
           for label, images in shown.items()}
    below = {"original": ["PSNR", "high frequencies"]} | {label: lines for label, (lines, _) in columns.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    grid(cut, below, options.zoom).save(options.out, optimize=True)
    for label, lines in below.items():
        print(f"{label:<24} {'  '.join(lines)}")
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


def compare(options: Variants) -> dict[str, tuple[list[str], list[Picture]]]:
    """Label → lines of figures and the pictures to show, the same photos for every codec."""
    found = {}
    device = choose_device(options.device)
    for codec in load_codecs(options.names, "float32"):
        images = EvaluationImages(open_images(options.data), options.size, options.limit)
        measured, pictures = evaluate(codec.to(device), images, batch_size=4, metrics=METRICS, keep=options.rows,
                                      health=False, speed=False)
        figures = [measured.figures[name].value for name in METRICS]
        high = "not measured" if figures[1] is None else f"{figures[1]:.3f} ×"
        found[codec.label] = ([f"{figures[0]:.2f} dB, N = {len(measured.keys)}", high], pictures)
        codec.to("cpu")
    return found


def busiest(image: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the crop with the largest mean absolute difference between neighbours, of uint8 `(h, w, 3)`.

    Places a quarter of `side` apart are tried.
    """
    grey = image.astype(np.float32).mean(2)
    detail = np.zeros_like(grey)
    detail[1:] += np.abs(np.diff(grey, axis=0))
    detail[:, 1:] += np.abs(np.diff(grey, axis=1))
    total = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    step = max(1, side // 4)
    places = [(top, left) for top in range(0, grey.shape[0] - side + 1, step)
              for left in range(0, grey.shape[1] - side + 1, step)]
    return max(places, key=lambda p: total[p[0] + side, p[1] + side] - total[p[0], p[1] + side]
               - total[p[0] + side, p[1]] + total[p[0], p[1]])


def crop(image: np.ndarray, corner: tuple[int, int], side: int) -> np.ndarray:
    top, left = corner
    return image[top : top + side, left : left + side]


def grid(columns: dict[str, list[np.ndarray]], below: dict[str, Sequence[str]], zoom: int) -> Image.Image:
    """A sheet: a column a label, its crops uint8 `(s, s, 3)` under each other, its lines of text below."""
    rows = len(next(iter(columns.values())))
    side = next(iter(columns.values()))[0].shape[0] * zoom
    lines = max(map(len, below.values()), default=0)
    width = len(columns) * (side + GAP) + GAP
    height = GAP + LINE + rows * (side + GAP) + lines * LINE + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(fonts() / "DejaVuSans.ttf", 11)
    for number, (label, crops) in enumerate(columns.items()):
        left = GAP + number * (side + GAP)
        draw.text((left, GAP // 2), fitting(label, font, side), "black", font)
        for row, part in enumerate(crops):
            enlarged = Image.fromarray(part).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, GAP + LINE + row * (side + GAP)))
        for row, line in enumerate(below.get(label, ())):
            draw.text((left, height - GAP - (lines - row) * LINE), fitting(line, font, side), "black", font)
    return sheet


def fonts() -> Path:
    """matplotlib's folder of fonts: Pillow's own font lacks half of the signs."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, its end left out where it is wider than `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main(tyro.cli(Variants))
    except UserError as mistake:
        raise SystemExit(f"variants.py: {mistake}") from None
