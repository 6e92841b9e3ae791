"""Product quantization: several quantizers side by side, each for its part of the vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Quantizer


class ProductQuantizer(Quantizer):
    """Quantizers of one codebook each, of any kind and width; `dim` is the sum of theirs, and their sizes agree.

    LGQ, VQ, SimVQ, FSQ, LFQ and BSQ take `num_codebooks` themselves; this is for parts that differ. Losses are the
    means over the parts, under their names.
    """

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        check_stages(parts)
        super().__init__(sum(part.dim for part in parts), parts[0].codebook_size, len(parts))
        self.parts = nn.ModuleList(parts)

    def parameter_count(self) -> int:
        return sum(part.parameter_count() for part in self.parts)

    def schedule(self, progress: float) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part.schedule(progress).items()}

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        pieces = rows.split([part.dim for part in self.parts], 1)
        results = [part.quantize(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return (torch.cat([r[0] for r in results], 1), torch.cat([r[1] for r in results], 1),
                mean_losses([r[2] for r in results]))

    def look_up(self, indices: Tensor) -> Tensor:
        columns = indices.split(1, 1)
        return torch.cat([part.look_up(column) for part, column in zip(self.parts, columns, strict=True)], 1)


def check_stages(parts: Sequence[Quantizer]) -> None:
    """Raises `ValueError` unless there are quantizers, of one book each and of one size."""
    if not parts:
        raise ValueError("there must be at least 1 quantizer; got 0")
    for part in parts:
        if part.num_codebooks != 1:
            raise ValueError(f"each of the quantizers has 1 codebook; one has {part.num_codebooks}")
        if part.codebook_size != parts[0].codebook_size:
            raise ValueError(f"all have as many codes: {parts[0].codebook_size} and {part.codebook_size} differ")


def mean_losses(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named loss over all quantizers; one that some do not have counts 0 there."""
    names = dict.fromkeys(name for losses in each for name in losses)
    return {name: sum(losses[name] for losses in each if name in losses) / len(each) for name in names}
