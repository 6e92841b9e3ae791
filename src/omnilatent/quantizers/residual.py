"""Residual quantization: each stage quantizes what the stages before it left over (Zeghidour et al. 2021, SoundStream)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Quantizer
from .product import check_stages, mean_losses


class ResidualQuantizer(Quantizer):
    """`num_codebooks` stages of one width and size; `quantized` is the sum of theirs, the losses their means.

    The residuals are not detached, so the gradient is the chain rule's: with straight-through stages exactly the
    identity (detached residuals would count it once a stage), with LGQ that of the nested soft averages.
    """

    def __init__(self, stages: Sequence[Quantizer]) -> None:
        check_stages(stages)
        for stage in stages:
            if stage.dim != stages[0].dim:
                raise ValueError(f"all stages have one dim: {stages[0].dim} and {stage.dim} differ")
        super().__init__(stages[0].dim, stages[0].codebook_size, len(stages))
        self.stages = nn.ModuleList(stages)

    def parameter_count(self) -> int:
        return sum(stage.parameter_count() for stage in self.stages)

    def schedule(self, progress: float) -> dict[str, float]:
        return {name: value for stage in self.stages for name, value in stage.schedule(progress).items()}

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        left, total, columns, losses = rows, torch.zeros_like(rows), [], []
        for stage in self.stages:
            quantized, indices, named = stage.quantize(left)
            left, total = left - quantized, total + quantized
            columns.append(indices)
            losses.append(named)
        return total, torch.cat(columns, 1), mean_losses(losses)

    def look_up(self, indices: Tensor) -> Tensor:
        return sum(stage.look_up(column) for stage, column in zip(self.stages, indices.split(1, 1), strict=True))
