"""TAEF2 on the eight Kodak photographs: PSNR of each against the figures of the weights' own description.

    python benchmarks/kodak_taef2.py [--data FOLDER]

FOLDER holds `taef2/` and `kodak/` (by default ../shared/data beside the repository). Takes a minute on one core.
Ends with code 1 if a photo differs by more than 0.01 dB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import omnilatent
from omnilatent.metrics.pixel import psnr

EXPECTED = {  # dB; fp32, full size, output in 8 bits
    "kodim02": 31.43, "kodim03": 33.22, "kodim05": 28.00, "kodim08": 26.15,
    "kodim13": 23.60, "kodim15": 31.07, "kodim19": 29.98, "kodim23": 33.34,
}
MEAN = 29.60


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared" / "data")
    data = arguments.parse_args().data
    codec = omnilatent.load(data / "taef2")
    figures, latents = {}, []
    for name, expected in EXPECTED.items():
        with Image.open(data / "kodak" / f"{name}.webp") as photo:
            image = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        latent = codec.encode(image)
        latents.append(latent.mode().flatten(2))
        figures[name] = psnr(image, codec.decode(latent)).item()
        print(f"{name}  {figures[name]:6.2f} dB  (described {expected:.2f})", flush=True)
    z = torch.cat(latents, 2)
    mean = sum(figures.values()) / len(figures)
    print(f"mean     {mean:6.2f} dB  (described {MEAN:.2f})  n = {len(figures)}")
    print(f"weights: {codec.provenance.weights_hash}, {codec.dtype}, torch {torch.__version__}")
    print(f"latents: mean {z.mean():.3f}, standard deviation {z.std():.3f}")
    wrong = [name for name, value in figures.items() if abs(value - EXPECTED[name]) > 0.01]
    return int(bool(wrong) or abs(mean - MEAN) > 0.01)


if __name__ == "__main__":
    sys.exit(main())
