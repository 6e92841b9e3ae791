"""Codecs small enough to test a store with: a Gaussian one of one convolution, and a tokenizer.

`REGISTERED` gives the first a NAME for command lines.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from omnilatent.codec import Codec, Provenance
from omnilatent.latent import Codes, DiagonalGaussian, Latent, LatentSpec


class TinyGaussian(Codec):
    """f4, 4 channels; `_decode` is a transposed convolution."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = nn.ModuleList([nn.Conv2d(3, 8, 4, stride=4), nn.ConvTranspose2d(4, 3, 4, stride=4)])
        spec = LatentSpec(channels=4, downsampling=4, shift=(0.1, 0.2, 0.3, 0.4), scale=(2.0,))
        super().__init__(module, spec, Provenance(name="tiny", kind="tiny-gaussian", weights_hash=f"{seed:016x}"))

    def _encode(self, images: Tensor) -> Latent:
        mean, logvar = self.module[0](images).chunk(2, 1)
        return DiagonalGaussian(mean, logvar - 3, self.spec)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module[1](raw) + 0.5


class TinyCodes(Codec):
    """f4, a codebook of `size` vectors; `books` indices a place, whose vectors are averaged."""

    def __init__(self, size: int = 100, books: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Embedding(size, 4)
        self.books = books
        spec = LatentSpec(channels=4, downsampling=4, kind="codes", codebook_size=size)
        super().__init__(module, spec, Provenance(name="codes", kind="codes", weights_hash="c0de"))

    def _encode(self, images: Tensor) -> Latent:
        means = nn.functional.avg_pool2d(images, 4)  # (b, 3, h, w)
        indices = (means[:, : self.books] if self.books else means.mean(1)) * (self.spec.codebook_size - 1)
        indices = indices.round().long()
        return Codes(indices, self.lookup(indices))

    def lookup(self, indices: Tensor) -> Tensor:
        vectors = self.module(indices)  # (b, [books,] h, w, c)
        return (vectors.mean(1) if self.books else vectors).permute(0, 3, 1, 2)

    def _decode(self, raw: Tensor) -> Tensor:
        return nn.functional.interpolate(raw[:, :3], scale_factor=4.0).sigmoid()


REGISTERED = {"WEIGHTLESS": {"tiny": "tiny-gaussian"}, "OPENERS": {"tiny-gaussian": "store_codecs:open_tiny"}}


def open_tiny(path: Path, name: str) -> Codec:
    """An opener as `hub.OPENERS` takes it."""
    codec = TinyGaussian()
    codec.label = name
    return codec
