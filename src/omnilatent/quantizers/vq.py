"""Vector quantization with codes that are moving averages (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import stacked
from .codebook import CodebookQuantizer, assign, sums_of_codes
from .config import VQConfig
from .ranks import sum_over_ranks
from .search import fused, nearest_codes

_SMOOTHING = 1e-5  # Laplace, added to each count


class VQ(CodebookQuantizer):
    """The nearest code; a training step then moves each code to the moving average of the vectors that chose it.

        counts ← γ counts + (1 − γ) batch counts,  sums ← γ sums + (1 − γ) batch sums,  code = sums / counts

    `quantized` holds the codes as they were before that step. There is no parameter, so an optimiser has nothing to
    do here; counts and sums are of all ranks. Codes that die move to vectors of the batch; the gradient to the
    encoder is the rotation trick's (arXiv 2410.06424) or straight through.
    """

    def __init__(self, dim: int, codebook_size: int = 1024, num_codebooks: int = 1, config: VQConfig = VQConfig()) -> None:
        super().__init__(dim, codebook_size, num_codebooks, config)
        self.config = config
        self.register_buffer("codebook", torch.randn(num_codebooks, codebook_size, self.width) * self.width**-0.5)
        self.register_buffer("sums", self.codebook.clone())

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        parts = self.split(rows)
        if self.training:
            self.start(parts.detach())
        books = zip(parts, self.codebook, strict=True)
        indices = stacked([nearest_codes(part, codes.to(part.dtype)) for part, codes in books], 1)
        codes = self.chosen(indices).to(parts.dtype)
        values, distance, _ = assign(parts, codes, self.config.rotation)
        losses = {"commitment": self.config.commitment_weight * distance} if self.learning else {}
        if self.training:
            self.move(parts.detach(), indices)
            self.renew(parts.detach())
        return self.join(values), indices, losses

    def parameter_count(self) -> int:
        return self.codebook.numel()

    def start(self, parts: Tensor) -> None:
        super().start(parts)
        if self.steps == 0 and self.renewal.data_init:
            self.sums.copy_(self.codebook * self.counts[..., None])

    @torch.no_grad()
    def move(self, parts: Tensor, indices: Tensor) -> None:
        """The moving averages of this step."""
        batch = sum_over_ranks(sums_of_codes(parts.to(self.sums.dtype), indices, self.codebook_size))
        self.counts.lerp_(batch[..., -1], 1 - self.config.usage_decay)
        _average(self.codebook, self.sums, self.counts, batch, self.config.usage_decay)

    def renew(self, parts: Tensor) -> None:
        super().renew(parts)
        if self.steps % self.config.renew_every == 0 and self.config.dead_codes == "revive":
            self.sums.copy_(self.codebook * self.counts[..., None])


@torch.no_grad()
def _average(codebook: Tensor, sums: Tensor, counts: Tensor, batch: Tensor, decay: float) -> None:
    if fused(codebook):
        from .triton_assign import average

        average(codebook, sums, counts, batch, decay, _SMOOTHING)
        return
    sums.lerp_(batch[..., :-1], 1 - decay)
    total = counts.sum(1, keepdim=True)
    smooth = (counts + _SMOOTHING) / (total + counts.shape[1] * _SMOOTHING) * total
    codebook.copy_(sums / smooth[..., None])
