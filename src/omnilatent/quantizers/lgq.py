"""LGQ: learnable geometric quantization (Altun et al. 2026, arXiv 2602.16086): soft while it learns, hard in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import stacked, straight_through
from .codebook import CodebookQuantizer
from .config import LGQConfig
from .ranks import mean_over_ranks
from .search import nearest_codes
from .soft import SoftAssignment, soft_assignment


class LGQ(CodebookQuantizer):
    """Vectors are assigned to codes as to the parts of an isotropic Gaussian mixture of variance τ / 2,

        p_k = softmax_k(−‖z − c_k‖² / τ);    forward: the nearest code;    gradient: that of Σ p_k c_k.

    Losses, each a mean over vectors and books, finite for every τ > 0:
        energy   (−τ log Σ_k exp(−‖z − c_k‖²/τ) / K) / width: the mixture's free energy in units of squared distance,
                 min_q E_q ‖z − c‖² + τ KL(q ‖ uniform); it moves encoder and codes, and is VQ's commitment as τ → 0
        peak     1 − Σ p_k²: every single assignment becomes sharp
        usage    KL(p̄ ‖ uniform) / log K of the mean assignment p̄ (of all ranks): all together use every code
    Peak looks at each vector, usage only at their mean: sharp and balanced is possible, and least of both.

    What three sources say, and which is followed:
    - the paper. Of it we read the abstract of v1 (soft assignments hardened by temperature, posterior of an isotropic
      Gaussian mixture, free energy, token-level peakedness, global usage, nearest neighbour as τ → 0) and notes of
      others, not its equations; a reader's notes say that v1's equations use the norm, not its square. The square is
      followed: only it makes the mixture Gaussian.
    - its code (KurbanIntelligenceLab/LGQ, `MultiBinDiscretizer`, read for the flattened mode): −‖z − c‖²/τ, argmax
      forward with the soft average's gradient, peak 1 − Σp², τ from 1 to .1, first-batch start: followed. Its
      distance term is a plain squared error to the hard code, without free energy (ours instead), its usage term is
      K Σ p̄² (ours ≈ (that − 1) / (2 log K) near uniform; the weight is converted at K = 16,384), its optional bin
      widths and perplexity floor are left out.
    - the seed's repository (Deeplearning3): τ² in the softmax and a free energy divided by it, which grows as τ
      falls; its KL(q ‖ uniform) and its entropy cancel at equal weights. Not followed. Its product codebooks are.

    Ours alone: τ counts in the codes' own variance (`tau_unit`). In absolute units a latent of small scale is assigned
    evenly to all codes, nothing comes through, and the energy shrinks it further until it is constant: a test shows
    both (`test_a_small_encoder_learns_through_lgq_as_through_vq`).

    Codes that are hardly chosen are revived, or pruned (`alive`), by hard counts.
    """

    alive: Tensor
    temperature: Tensor

    def __init__(self, dim: int, codebook_size: int = 1024, num_codebooks: int = 1, config: LGQConfig = LGQConfig()) -> None:
        super().__init__(dim, codebook_size, num_codebooks, config)
        self.config = config
        self.codebook = nn.Parameter(torch.randn(num_codebooks, codebook_size, self.width))
        self.register_buffer("alive", torch.ones(num_codebooks, codebook_size, dtype=torch.bool))
        self.register_buffer("temperature", torch.tensor(config.tau_start, dtype=torch.float32))
        self.tau = float(self.temperature)
        self.register_load_state_dict_post_hook(self._read_temperature)

    @staticmethod
    def _read_temperature(module: LGQ, _: object) -> None:
        module.tau = float(module.temperature)

    def schedule(self, progress: float) -> dict[str, float]:
        """τ at a share of the run, which is clipped to 0 … 1."""
        start, end, done = self.config.tau_start, self.config.tau_end, min(1.0, max(0.0, progress))
        if self.config.tau_schedule == "constant":
            done = 0.0
        elif self.config.tau_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        self.tau = float(torch.tensor(start + (end - start) * done, dtype=torch.float32))  # as the buffer will hold it
        self.temperature.fill_(self.tau)
        return {"temperature": self.tau}

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        parts = self.split(rows)
        if self.training:
            self.start(parts.detach())
        alive = self.alive if self.config.dead_codes == "prune" else [None] * self.num_codebooks
        quantized, indices, losses = [], [], []
        for part, codes, mask in zip(parts, self.codebook.to(rows.dtype), alive, strict=True):
            if self.learning:
                tau = self.tau if self.config.tau_unit == "absolute" else self.tau * _variance(codes, mask)
                soft = soft_assignment(part, codes, tau, mask)
                indices.append(soft.indices)
                quantized.append(straight_through(codes[soft.indices], soft.average))
                log_k = math.log(len(codes)) if mask is None else mask.sum().clamp_min(2).to(rows.dtype).log()
                losses.append(self._losses(soft, tau, log_k))
            else:
                indices.append(nearest_codes(part, codes, mask))
                quantized.append(codes[indices[-1]])
        codes, (first, *others) = stacked(indices, 1), losses or [{}]
        named = {name: sum((each[name] for each in others), loss) for name, loss in first.items()}
        if self.training:
            self.count(codes)
            self.renew(parts.detach())
        return self.join(stacked(quantized, 0)), codes, named

    def _losses(self, soft: SoftAssignment, tau: float | Tensor, log_k: float | Tensor) -> dict[str, Tensor]:
        """One book's share of the losses; its codes alive are exp(`log_k`)."""
        config, books = self.config, self.num_codebooks
        entropy = torch.special.entr(mean_over_ranks(soft.usage).clamp_min(1e-30)).sum()
        return {"energy": config.energy_weight / (books * self.width) * (soft.energy.mean() + tau * log_k),
                "peak": config.peak_weight / books * (1 - soft.peak.mean()),
                "usage": config.usage_weight / books * (1 - entropy / log_k)}

    @torch.no_grad()
    def prune(self) -> None:
        """Take the codes that are dead out for good; the most used one of each book always stays."""
        self.alive &= ~self.dead()
        self.alive.scatter_(1, self.counts.argmax(1, keepdim=True), True)


@torch.no_grad()
def _variance(codes: Tensor, alive: Tensor | None) -> Tensor:
    """The codes' mean variance a coordinate, of those alive."""
    if alive is None:
        return codes.var(0, correction=0).mean().clamp_min(1e-12)
    share = alive.to(codes.dtype)[:, None] / alive.sum()
    return (share * (codes - (share * codes).sum(0)).square()).sum(0).mean().clamp_min(1e-12)
