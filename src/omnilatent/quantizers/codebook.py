"""Quantizers that own a codebook: its start at the data, the count of what is chosen, codes that die.

- `CodebookQuantizer`: the base of LGQ and VQ.
- `assign`: the chosen codes, their distance, and the gradients of both. `sums_of_codes`: what a batch adds to each code.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import Quantizer, check_divides, stacked
from .ranks import draw_rows, sum_over_ranks
from .search import fused


class Renewal(Protocol):
    """The settings that LGQ and VQ share; see config.py."""

    usage_decay: float
    data_init: bool
    dead_codes: Literal["revive", "prune", "keep"]
    dead_below: float
    renew_every: int
    seed: int


class CodebookQuantizer(Quantizer):
    """`codebook` `(books, K, dim / books)`, a parameter or buffer, is the subclass's.

    Buffers: `counts` `(books, K)`, the moving average of how many vectors of a batch (of all ranks) choose each code;
    `clock`, seed and number of training steps so far (each forward while training is one). With them every draw from
    the batch is a function of the state and the batch, so that a resumed run makes the same ones, and all ranks do.
    """

    codebook: Tensor
    counts: Tensor
    clock: Tensor

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int, renewal: Renewal) -> None:
        super().__init__(dim, codebook_size, num_codebooks)
        self.width = check_divides(dim, num_codebooks)
        self.renewal = renewal
        self.register_buffer("counts", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("clock", torch.tensor([renewal.seed, 0]))
        self._read_clock(self, None)
        self.register_load_state_dict_post_hook(self._read_clock)

    @staticmethod
    def _read_clock(module: CodebookQuantizer, _: object) -> None:
        """Keep the clock as numbers too: to read the buffer would make a GPU wait at every step."""
        module.seed, module.steps = (int(v) for v in module.clock.tolist())

    def chosen(self, indices: Tensor) -> Tensor:
        """Codes `(n, books)` → their vectors `(books, n, width)`."""
        return stacked([codes[column] for codes, column in zip(self.codebook, indices.T, strict=True)], 0)

    def look_up(self, indices: Tensor) -> Tensor:
        return self.join(self.chosen(indices).float())

    @torch.no_grad()
    def start(self, parts: Tensor) -> None:
        """Before the first training step: put the codes where the data is."""
        if self.steps == 0 and self.renewal.data_init:
            self.codebook.copy_(draw_rows(parts, self.codebook_size, self.seed, 0))
            share = sum_over_ranks(self.counts.new_tensor(float(parts.shape[1]))) / self.codebook_size
            self.counts.copy_(share.expand_as(self.counts))

    @torch.no_grad()
    def count(self, indices: Tensor) -> None:
        """Count a batch's codes `(n, books)` into the moving average."""
        ones = self.counts.new_ones(indices.T.shape)
        batch = sum_over_ranks(torch.zeros_like(self.counts).scatter_add_(1, indices.T, ones))
        self.counts.lerp_(batch, 1 - self.renewal.usage_decay)

    def dead(self) -> Tensor:
        """bool `(books, K)`: codes chosen less than `dead_below` of the mean."""
        return self.counts < self.renewal.dead_below * self.counts.mean(1, keepdim=True)

    @torch.no_grad()
    def renew(self, parts: Tensor) -> None:
        """At the end of a training step: move the clock on, and, when it is time, dead codes to vectors of the batch."""
        self.steps += 1
        self.clock[1].add_(1)
        if self.steps % self.renewal.renew_every or self.renewal.dead_codes == "keep":
            return
        if self.renewal.dead_codes == "prune":
            self.prune()
            return
        dead = self.dead()
        fresh = draw_rows(parts, self.codebook_size, self.seed, self.steps).to(self.codebook)
        self.codebook.copy_(torch.where(dead[..., None], fresh, self.codebook))
        self.counts.copy_(torch.where(dead, self.counts.mean(1, keepdim=True), self.counts))

    def prune(self) -> None:
        raise ValueError(f"{type(self).__name__} does not prune dead codes; dead_codes is revive or keep")


class _Assign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, codes: Tensor, rotation: bool) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        ctx.save_for_backward(vectors, codes)
        ctx.rotation = rotation
        distance = torch.nn.functional.mse_loss(vectors, codes)
        return codes.detach(), distance, distance.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, pulled: Tensor, pulling: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN001
        vectors, codes = ctx.saved_tensors
        if fused(vectors):
            from .triton_assign import turn

            return *turn(vectors, codes, grad, pulled, pulling, ctx.rotation, ctx.needs_input_grad[1]), None
        return *_gradients(vectors, codes, grad, pulled, pulling, ctx.rotation), None


def _gradients(
    vectors: Tensor, codes: Tensor, grad: Tensor, pulled: Tensor, pulling: Tensor, rotation: bool
) -> tuple[Tensor, Tensor]:
    apart = 2 / vectors.numel() * (vectors - codes)
    if rotation:
        length, code_length = (t.norm(dim=-1, keepdim=True).clamp_min(1e-6) for t in (vectors, codes))
        start, end = vectors / length, codes / code_length
        middle = torch.nn.functional.normalize(start + end, dim=-1, eps=1e-6)
        turned = grad - 2 * middle * (middle * grad).sum(-1, keepdim=True) + 2 * start * (end * grad).sum(-1, keepdim=True)
        grad = turned * (code_length / length)
    return grad + pulled * apart, -pulling * apart


def assign(vectors: Tensor, codes: Tensor, rotation: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`codes` `(…, d)`, and twice their mean squared distance to `vectors`.

    The first sends its gradient to `vectors` alone: through the rotation and scaling that takes each vector to its code,
    both held constant (Fifty et al. 2024, arXiv 2410.06424: R = I − 2 m mᵀ + 2 ĉ ẑᵀ with m the unit vector along ẑ + ĉ),
    or straight. The first distance sends its gradient to `vectors`, the second to `codes`. The first result must not be
    written into: the gradient is computed from it.
    """
    return _Assign.apply(vectors, codes, rotation)


@torch.no_grad()
def sums_of_codes(parts: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """Of each code, the vectors of `parts` `(books, n, d)` that chose it, by `indices` `(n, books)`: `(books, K, d + 1)`,
    their sum and last their number."""
    if fused(parts):
        from .triton_assign import add

        return add(parts, indices, codebook_size)
    rows = torch.nn.functional.pad(parts, (0, 1), value=1.0)
    sums = rows.new_zeros(len(rows), codebook_size, rows.shape[2])
    return sums.scatter_add_(1, indices.T[..., None].expand_as(rows), rows)
