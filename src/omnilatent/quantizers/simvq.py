"""SimVQ: a frozen random codebook under one learned linear map (Zhu et al. 2024, arXiv 2411.02038)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.keyed import draws
from .base import Quantizer, check_divides, stacked
from .codebook import assign
from .config import SimVQConfig
from .search import nearest_codes


class SimVQ(Quantizer):
    """The nearest of the codes `frozen[k] @ Wᵀ`. Every vector's gradient moves W and with it all codes, so that none
    is left behind and nothing needs to be revived.

    `frozen` `(books, K, width)` ~ N(0, 1 / width) is drawn from the seed and saved as a buffer; W, one for each book,
    is all that learns here. Losses: `codebook`, ‖sg z − q‖² for W, and `commitment`, ‖z − sg q‖² for the encoder
    (means over coordinates, as in vector-quantize-pytorch).
    """

    frozen: Tensor

    def __init__(
        self, dim: int, codebook_size: int = 1024, num_codebooks: int = 1, config: SimVQConfig = SimVQConfig()
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks)
        self.config, self.width = config, check_divides(dim, num_codebooks)
        generator = torch.Generator().manual_seed(draws("simvq", config.seed, count=1)[0] >> 1)
        frozen = torch.randn(num_codebooks, codebook_size, self.width, generator=generator) * self.width**-0.5
        self.register_buffer("frozen", frozen)
        self.maps = nn.ModuleList(nn.Linear(self.width, self.width, bias=False) for _ in range(num_codebooks))

    def parameter_count(self) -> int:
        return self.frozen.numel() + super().parameter_count()

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        parts, codes, indices = self.split(rows), [], []
        for part, frozen, linear in zip(parts, self.frozen.to(rows.dtype), self.maps, strict=True):
            weight = linear.weight.to(rows.dtype)
            with torch.no_grad():
                indices.append(nearest_codes(part, frozen @ weight.T))
            codes.append(frozen[indices[-1]] @ weight.T)  # of the chosen ones alone: the gradient never sees all K
        values, pulled, pulling = assign(parts, stacked(codes, 0), self.config.rotation)
        losses = {}
        if self.learning:
            losses["codebook"] = self.config.codebook_weight * pulling
            losses["commitment"] = self.config.commitment_weight * pulled
        return self.join(values), stacked(indices, 1), losses

    def look_up(self, indices: Tensor) -> Tensor:
        books = zip(indices.T, self.frozen, self.maps, strict=True)
        return torch.cat([frozen[index].float() @ linear.weight.float().T for index, frozen, linear in books], 1)
