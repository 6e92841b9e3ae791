"""Photos of low contrast and uniform textures, made of other photos: what kl-f8-small's second training adds.

    python benchmarks/textures.py --data ../shared/data/imagenet-1k-sample/train.tar --out textures/

One picture of 288 pixels a photo: two in five grey; one in two a piece of the photo mirrored over the whole picture;
its contrast between a tenth and all of what it was, its mean colour moved by up to 40.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from omnilatent.data import open_images, resize_and_crop

SIDE = 288
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Textures:
    """Make a folder of low contrasts and textures."""

    data: str
    """The photos: a folder, a .tar or several."""
    out: Path
    """Folder for the pictures, new."""
    seed: int = 0
    """Of what happens to each."""


def texture(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 `(h, w, 3)` → uint8 `(288, 288, 3)`."""
    pixels = resize_and_crop(photo, SIDE).astype(np.float32)
    if rng.random() < 0.4:
        pixels = (pixels @ LUMA)[..., None].repeat(3, 2)
    if rng.random() < 0.5:
        side = int(rng.choice([48, 64, 96, 128]))
        top, left = rng.integers(0, SIDE - side, 2)
        piece = pixels[top : top + side, left : left + side]
        piece = np.concatenate([piece, piece[::-1]], 0)
        piece = np.concatenate([piece, piece[:, ::-1]], 1)
        times = -(-SIDE // len(piece))
        pixels = np.tile(piece, (times, times, 1))[:SIDE, :SIDE]
    mean = pixels.mean((0, 1))
    changed = (pixels - mean) * rng.uniform(0.1, 1) + mean + rng.uniform(-40, 40)
    return changed.clip(0, 255).round().astype(np.uint8)


def main(options: Textures) -> None:
    source, rng = open_images(options.data), np.random.default_rng(options.seed)
    options.out.mkdir(parents=True)
    for i in range(len(source)):
        Image.fromarray(texture(source.read(i), rng)).save(options.out / f"{i:06}.png")
    print(f"{options.out}: {len(source):,} pictures")


if __name__ == "__main__":
    main(tyro.cli(Textures))
