"""Measure a model of your own beside ours: wrap it as a `Codec`, and hand it to the protocol.

    python examples/own_codec.py --data photos/ [--size 256] [--limit 16]

The model here is the plainest that has a latent: each 8×8 block of pixels is replaced by its mean.
"""

from __future__ import annotations

import argparse

import torch.nn.functional as F
from torch import Tensor, nn

import omnilatent
from omnilatent.data import EvaluationImages, open_images
from omnilatent.codec import Codec, Provenance
from omnilatent.latent import LatentSpec, Point
from omnilatent.metrics.protocol import evaluate
from omnilatent.report.tables import markdown_table


class Blocks(Codec):
    """Each block's mean colour as the latent `(b, 3, h/8, w/8)`.

    A codec implements two methods on images in [0, 1] whose sides are multiples of the downsampling. Padding and
    cropping other sizes, normalisation and clamping are the base class's.
    """

    def __init__(self, block: int = 8) -> None:
        spec = LatentSpec(channels=3, downsampling=block, kind="point", shift=(0.5,), scale=(4.0,))
        super().__init__(nn.Identity(), spec, Provenance(name="blocks", kind="example", licence="MIT"))

    def _encode(self, images: Tensor) -> Point:
        return Point(self.spec.normalise(F.avg_pool2d(images, self.spec.downsampling)))

    def _decode(self, raw: Tensor) -> Tensor:
        return F.interpolate(raw, scale_factor=self.spec.downsampling)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--limit", type=int, default=16)
    options = parser.parse_args(argv)

    images = EvaluationImages(open_images(options.data), options.size, options.limit)
    codecs = [Blocks(), omnilatent.load("kl-f8-small")]
    measured = [evaluate(codec, images, metrics=("psnr", "ssim", "bits_per_pixel"), health=False, speed=False)[0]
                for codec in codecs]
    print(markdown_table(measured))


if __name__ == "__main__":
    main()
