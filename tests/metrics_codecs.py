"""Codecs whose figures are known beforehand, and images for them.

- `Identity`: the image is the latent.
- `Blocks`: 2×2 pixels become 12 Gaussian channels and one that is never used; exactly invertible.
- `Blur`: the mean of 2×2 pixels.
- `Levels`: a tokenizer whose 4 codes are levels of brightness.
- `FakeImages`: `EvaluationImages` from tensors in memory.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from omnilatent.codec import Codec, Provenance
from omnilatent.latent import Codes, DiagonalGaussian, Latent, LatentSpec, Point
from torch import Tensor, nn


class Identity(Codec):
    def __init__(self, channels: int = 3) -> None:
        spec = LatentSpec(channels, 1, "point", channels, shift=(0.5,), scale=(2.0,))
        super().__init__(nn.Identity(), spec, Provenance("identity", "test"))

    def _encode(self, images: Tensor) -> Latent:
        return Point(self.spec.normalise(images))

    def _decode(self, raw: Tensor) -> Tensor:
        return raw


class Blocks(Codec):
    """Posterior mean 2·(pixel − ½) with variance 0.01; the 13th channel is the prior itself, N(0, 1)."""

    def __init__(self) -> None:
        module = nn.Linear(3, 5)  # 20 parameters to count
        super().__init__(module, LatentSpec(13, 2), Provenance("blocks", "test", weights_hash="0123456789abcdef"))

    def _encode(self, images: Tensor) -> Latent:
        mean = F.pixel_unshuffle(2 * images - 1, 2)
        mean = F.pad(mean, (0, 0, 0, 0, 0, 1))
        logvar = torch.full_like(mean, 0.01).log()
        logvar[:, -1] = 0
        return DiagonalGaussian(mean, logvar, self.spec)

    def _decode(self, raw: Tensor) -> Tensor:
        return (F.pixel_shuffle(raw[:, :12], 2) + 1) / 2


class Blur(Codec):
    def __init__(self) -> None:
        super().__init__(nn.Identity(), LatentSpec(3, 2, "point"), Provenance("blur", "test"))

    def _encode(self, images: Tensor) -> Latent:
        return Point(F.avg_pool2d(images, 2))

    def _decode(self, raw: Tensor) -> Tensor:
        return F.interpolate(raw, scale_factor=2, mode="bilinear")


class Levels(Codec):
    def __init__(self) -> None:
        spec = LatentSpec(1, 4, "codes", codebook_size=4)
        super().__init__(nn.Identity(), spec, Provenance("levels", "test"))

    def _encode(self, images: Tensor) -> Latent:
        indices = (F.avg_pool2d(images.mean(1), 4) * 3).round().long()
        return Codes(indices, indices[:, None] / 3)

    def _decode(self, raw: Tensor) -> Tensor:
        return F.interpolate(raw, scale_factor=4).expand(-1, 3, -1, -1)


class FakeImages:
    """What `EvaluationImages` offers to the protocol."""

    def __init__(self, images: list[Tensor], size: int | None = None, skipped: int = 0) -> None:
        self.images, self.size = images, size
        self.source = SimpleNamespace(name="fake photos")
        self.skipped = [(f"broken-{i}.jpg", "is truncated") for i in range(skipped)]

    def __len__(self) -> int:
        return len(self.images) + len(self.skipped)

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        keys: list[str] = []
        group: list[Tensor] = []
        for number, image in enumerate(self.images):
            if group and (len(group) == batch_size or group[0].shape != image.shape):
                yield keys, torch.stack(group)
                keys, group = [], []
            keys.append(f"{number:02}.png")
            group.append(image)
        if group:
            yield keys, torch.stack(group)


def photos(count: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    """Smooth random pictures `(count, 3, h, w)` on the 8-bit grid, a little noise on top."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size[0] // 8 + 2, size[1] // 8 + 2, generator=generator)
    fine = torch.rand(count, 3, *size, generator=generator)
    smooth = F.interpolate(coarse, size, mode="bicubic")
    return ((0.9 * smooth + 0.1 * fine).clamp(0, 1) * 255).round() / 255
