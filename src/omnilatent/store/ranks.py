"""Several processes that fill one store: torchrun's ranks, or machines that know nothing of each other.

- `Ranks`: which of them this is.
- `joined`: they meet at the end, to wait for each other and to add up what they did.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ..errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: number `rank` of `world`, `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """By torchrun's variables; one process where there are none."""
        return cls(*(int(os.environ.get(name, default)) for name, default in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))

    def device(self, kind: str) -> str:
        """Each process of a machine has its own GPU.

        Raises:
            UserError: there are fewer GPUs than processes.
        """
        if kind != "cuda" or self.world == 1:
            return kind
        if self.local >= torch.cuda.device_count():
            raise UserError(f"This machine has {torch.cuda.device_count()} GPUs and torchrun started more processes on "
                            f"it: give --nproc-per-node {torch.cuda.device_count()}.")
        return f"cuda:{self.local}"

    def part(self, part: int, parts: int) -> tuple[int, int]:
        """The share of this process in share `part` of `parts`."""
        return part * self.world + self.rank, parts * self.world

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the ranks, once all have come here."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined(ranks: Ranks, device: str) -> Iterator[None]:
    """Join the processes: NCCL between GPUs, else gloo. They say nothing to each other until the end, which one may
    reach hours before another."""
    if ranks.world == 1:
        yield
        return
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(days=30))
    torch.distributed.barrier()  # the processes connect now, while all of them are there
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
