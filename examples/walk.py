"""Walk in a straight line from one photo's latent to another's, and save what is decoded along the way.

    python examples/walk.py A.jpg B.jpg [--codec NAME] [--steps 7] [--out walk.png]

Both photos are cropped to a square of `--size` pixels, so that their latents have one shape.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import omnilatent
from omnilatent.data import read_image, resize_and_crop


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs=2)
    parser.add_argument("--codec", default="kl-f8-small")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", default="walk.png")
    options = parser.parse_args(argv)

    codec = omnilatent.load(options.codec)
    crops = [resize_and_crop(read_image(Path(path), path), options.size) for path in options.photos]  # uint8 (s, s, 3)
    images = torch.stack([torch.from_numpy(crop).permute(2, 0, 1) for crop in crops]) / 255
    start, end = codec.encode(images).mode()  # each (c, s/f, s/f), normalised

    way = torch.linspace(0, 1, options.steps).view(-1, 1, 1, 1)
    pictures = codec.decode(torch.lerp(start, end, way), size=(options.size, options.size))  # (steps, 3, s, s)
    strip = torch.cat(list(pictures), dim=2).permute(1, 2, 0)
    Image.fromarray(np.uint8(strip.numpy() * 255 + 0.5)).save(options.out)
    print(f"{options.out}: {options.steps} pictures decoded by {codec.label}")


if __name__ == "__main__":
    main()
