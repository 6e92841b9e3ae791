"""Lookup-free and binary spherical quantization, over vector-quantize-pytorch's `LFQ` (extra `quantizers`).

- `LFQ`: the signs of log2 K numbers (Yu et al. 2023, arXiv 2310.05737).
- `BSQ`: the same on the unit sphere (Zhao et al. 2024, arXiv 2406.07548).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import library
from .base import Quantizer, project, straight_through
from .config import BinaryConfig
from .ranks import mean_over_ranks


class LFQ(Quantizer):
    """One bit a coordinate; projections, codes and their order are the library's, the entropies ours.

    The library's loss holds a softmax over all K codes for each vector, 16 GiB at 2^18. Every code's distance is a sum
    over bits, so the softmax is a product of sigmoids: a vector's entropy is exactly the sum of its bits' entropies.
    The entropy of the mean over vectors is not; as in BSQ (equation 10 and what follows there) the sum of the mean
    bits' entropies stands for it, an upper bound.

    Args:
        codebook_size: a power of two.
    """

    spherical: ClassVar[bool] = False

    def __init__(
        self, dim: int, codebook_size: int = 1024, num_codebooks: int = 1, config: BinaryConfig = BinaryConfig()
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks)
        self.bits = codebook_size.bit_length() - 1
        if codebook_size != 2**self.bits:
            raise ValueError(f"{type(self).__name__} has a power of two of codes, as {2**self.bits}; got {codebook_size}")
        self.config = config
        build = library("vector_quantize_pytorch", extra="quantizers").LFQ
        self.inner = build(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, spherical=self.spherical)
        del self.inner.codebook  # all K codes, only for the loss

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        numbers = project(self.inner.project_in, rows).view(len(rows), self.num_codebooks, self.bits)
        numbers = self.inner.maybe_l2norm(numbers)
        bits = numbers > 0
        codes = self._codes(bits)
        indices = (bits * self.inner.mask).sum(-1)
        quantized = project(self.inner.project_out, straight_through(codes, numbers).flatten(1))
        return quantized, indices, self._losses(numbers, codes) if self.learning else {}

    def _losses(self, numbers: Tensor, codes: Tensor) -> dict[str, Tensor]:
        size = codes.detach().abs().mean()  # 1, or 1 / √bits on the sphere
        logits = 4 * self.config.inverse_temperature * size * numbers  # of the bit: two codes ± size, logits ∓ 2 z c / T
        each = _bit_entropy(torch.sigmoid(logits)).sum(-1).mean()
        mean = _bit_entropy(mean_over_ranks(torch.sigmoid(logits).mean(0))).sum(-1).mean()
        return {
            "entropy": self.config.entropy_weight * (each - self.config.diversity * mean),
            "commitment": self.config.commitment_weight * (numbers - codes.detach()).square().mean(),
        }

    def look_up(self, indices: Tensor) -> Tensor:
        return project(self.inner.project_out, self._codes((indices[..., None] & self.inner.mask) != 0).flatten(1))

    def _codes(self, bits: Tensor) -> Tensor:
        """bool `(n, books, bits)` → float32 codes."""
        return self.inner.maybe_l2norm(self.inner.bits_to_codes(bits.float()))


class BSQ(LFQ):
    """`LFQ` of vectors brought to length 1: the codes are the corners of a cube within the unit sphere."""

    spherical = True


def _bit_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of bits that are 1 with probability `p`."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
