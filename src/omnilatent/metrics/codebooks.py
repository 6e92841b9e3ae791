"""How a tokenizer uses its codebook, from hard assignments over a whole data set.

- `CodebookUsage`: counts indices; codes in use, entropy in bits, perplexity.

Soft assignments overstate usage (a code may hold a little of every vector and never be chosen), so there is no way
to give any here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class CodebookUsage:
    """Counts of the codes of one codebook.

    Args:
        codebook_size: the number of codes K; indices are 0 … K − 1.
    """

    def __init__(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise ValueError(f"a codebook has at least 1 code; got {codebook_size}")
        self.codebook_size = codebook_size
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Count integer `indices` of any shape.

        Raises:
            ValueError: they are not integers, or one is outside the codebook.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"codes are integers (hard assignments); got {indices.dtype}")
        flat = indices.detach().flatten().to("cpu", torch.int64)
        if len(flat) == 0:
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(f"codes run from 0 to {self.codebook_size - 1}; got {low if low < 0 else high}")
        self.counts += torch.bincount(flat, minlength=self.codebook_size)

    @property
    def total(self) -> int:
        """The number of codes counted."""
        return int(self.counts.sum())

    @property
    def used(self) -> int:
        """The number of different codes that occurred."""
        return int((self.counts > 0).sum())

    @property
    def entropy_bits(self) -> float:
        """−Σ p log2 p of the counted distribution: at most log2 K, 0 when one code does everything."""
        if self.total == 0:
            raise ValueError("no codes were counted yet")
        share = self.counts[self.counts > 0].double() / self.total
        return abs(float(-(share * share.log2()).sum()))  # abs: −0.0 for a single code

    @property
    def perplexity(self) -> float:
        """2^entropy: the number of equally used codes that would carry as much."""
        return math.pow(2, self.entropy_bits)
