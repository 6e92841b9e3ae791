"""Pictures that the bundled models have never seen, from what is installed: scikit-image's data, our README in print.

- `build`: microscopy, text and everyday photos, each with a part to learn from and a part held out.

Microscopy is scikit-image's stained tissue, the right part held out in three tiles, and its lone cell on grey, cut
through the cell: half of it and a tile of the grey are held out. Text is its photographed page and
handwriting, the right halves held out, with rendered pages beside them because two halves are too little to learn from:
the held-out pages have other words and another typeface. The photos are its everyday ones, five of them held out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from variants import fonts

from omnilatent.data.photos import demo_photos
from omnilatent.errors import UserError

README = Path(__file__).parents[1] / "README.md"
SETS = ("microscopy", "text", "photos")
HELD_OUT_PHOTOS = ("astronaut.png", "chelsea.png", "china.jpg", "coffee.png", "rocket.jpg")
TYPEFACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmr10", "DejaVuSans-Bold")  # to learn from
UNSEEN_TYPEFACE = "STIXGeneral"


def build(folder: Path) -> None:
    """Write SET/train and SET/val below `folder`, the same bytes each time."""
    for name in SETS:
        for part in ("train", "val"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
    for name, edge, tops in (("ihc", 352, (0, 176, 344)), ("cell", 428, (60, 314))):
        image = _skimage(f"{name}.png")
        side = image.width - edge
        image.crop((0, 0, edge, image.height)).save(folder / "microscopy" / "train" / f"{name}.png")
        for number, top in enumerate(tops):
            tile = image.crop((edge, top, image.width, top + side))
            tile.save(folder / "microscopy" / "val" / f"{name}-{number}.png")
    for name in ("page", "text"):
        image = _skimage(f"{name}.png")
        middle = image.width // 2
        image.crop((0, 0, middle, image.height)).save(folder / "text" / "train" / f"{name}.png")
        image.crop((middle, 0, image.width, image.height)).save(folder / "text" / "val" / f"{name}.png")
    words = README.read_text(encoding="utf-8").split()
    learned, unseen = words[: len(words) * 3 // 4], words[len(words) * 3 // 4 :]
    rng = np.random.default_rng(0)
    for number in range(10):
        typeface = TYPEFACES[number % len(TYPEFACES)]
        _page(learned, typeface, 512, rng).save(folder / "text" / "train" / f"rendered-{number:02}.png")
    for number in range(4):
        _page(unseen, UNSEEN_TYPEFACE, 256, rng).save(folder / "text" / "val" / f"rendered-{number:02}.png")
    photos = demo_photos()
    for i in range(len(photos)):
        if photos.key(i) != "ihc.png":  # microscopy
            part = "val" if photos.key(i) in HELD_OUT_PHOTOS else "train"
            Image.fromarray(photos.read(i)).save(folder / "photos" / part / f"{Path(photos.key(i)).stem}.png")


def _skimage(name: str) -> Image.Image:
    """A picture that ships inside scikit-image, as RGB."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError("The pictures come with scikit-image: pip install scikit-image.")
    with Image.open(Path(package.origin).parent / "data" / name) as image:
        return image.convert("RGB")


def _page(words: list[str], typeface: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A page of `side`² with a random passage in a random size, ink and paper."""
    size = int(rng.integers(16, 36))  # in pixels; smaller letters are lost in a latent at an eighth, tuned or not
    font = ImageFont.truetype(fonts() / f"{typeface}.ttf", size)
    paper, ink = int(rng.integers(190, 256)), int(rng.integers(0, 90))
    page = Image.new("RGB", (side, side), (paper,) * 3)
    draw = ImageDraw.Draw(page)
    at, line, y = int(rng.integers(0, len(words))), "", 6
    while y < side:
        word = words[at % len(words)]
        if line and font.getlength(f"{line} {word}") > side - 12:
            draw.text((6, y), line, (ink,) * 3, font)
            line, y = word, y + round(1.3 * size)
        else:
            line = f"{line} {word}".strip()
        at += 1
    return page
