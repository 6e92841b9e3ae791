"""The processes that learn together: what they add up and what they show each other.

- `Peers`: those of a Fabric; `ALONE`: one process without any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Peers:
    """`count` processes, this one the `rank`-th of them, from 0. All of them call the same methods in the same order.

    Args:
        fabric: launched; its processes are the peers (gloo on CPUs, NCCL on GPUs). None: one process alone.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self.rank, self.count = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
        self._fabric = fabric if self.count > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, of one shape and type: a new tensor, bit-equal on all of them."""
        if self._fabric is None:
            return tensor.clone()
        return self._fabric.all_reduce(tensor.clone(), reduce_op="sum").to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All processes' tensors, of one shape and type, by rank."""
        if self._fabric is None:
            return [tensor]
        mine = tensor.to(self._fabric.device).contiguous()
        made = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(made, mine)  # Fabric's own warns that it calls what is deprecated
        return [part.to(tensor.device) for part in made]

    def rows(self, tensor: Tensor) -> Tensor:
        """All processes' rows `(n, …)`, as many of each, one process's below the other's: `(count · n, …)`."""
        return tensor if self._fabric is None else torch.cat(self.gather(tensor))

    def share(self, number: int) -> range:
        """This process's part of `number` things, as even as can be."""
        return range(number * self.rank // self.count, number * (self.rank + 1) // self.count)


ALONE = Peers()
