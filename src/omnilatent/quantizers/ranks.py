"""One quantizer over several processes: what they must agree on.

- `sum_over_ranks`, `mean_over_ranks`: counts and sums; a mean with a gradient.
- `draw_rows`: vectors of the batch, the same on every rank, a pure function of (seed, step) and the vectors.

With one process, or before torch.distributed is initialised, they only compute.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.keyed import draws


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, without gradient; one process gets its own back."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # noqa: ANN001
        return sum_over_ranks(tensor) / world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        return sum_over_ranks(grad) / world_size()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of all ranks' tensors. With the averaging of parameters' gradients over ranks that DDP does, a loss of
    this mean has the gradient that one process would get from the whole batch."""
    return tensor if world_size() == 1 else _MeanOverRanks.apply(tensor)


@torch.no_grad()
def draw_rows(rows: Tensor, count: int, seed: int, step: int) -> Tensor:
    """`count` vectors `(books, count, d)` of a batch `(books, n, d)`, an equal share from each rank's.

    Vectors repeat only where there are fewer than wanted; then noise of 1 % of each coordinate's standard deviation
    tells the copies apart.
    """
    share = math.ceil(count / world_size())
    generator = torch.Generator(rows.device).manual_seed(draws("quantizer", seed, step, count=1)[0] >> 1)
    n = rows.shape[1]
    if n >= share:
        drawn = rows[:, torch.randperm(n, generator=generator, device=rows.device)[:share]]
    else:
        drawn = rows[:, torch.randint(n, (share,), generator=generator, device=rows.device)]
        noise = torch.randn(drawn.shape, generator=generator, device=rows.device).to(drawn.dtype)
        drawn = drawn + 0.01 * rows.std(1, keepdim=True, unbiased=False) * noise
    if world_size() > 1:
        parts = [torch.empty_like(drawn) for _ in range(world_size())]
        dist.all_gather(parts, drawn.contiguous())
        drawn = torch.stack(parts, 2).flatten(1, 2)  # in turn, so that every rank has its share of the first `count`
    return drawn[:, :count]
