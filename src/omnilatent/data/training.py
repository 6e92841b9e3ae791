"""Batches for training, decoded in worker processes.

- `Batch`: what one process gets for one step.
- `batches`: the steps from `start` to `stop`; the same batches for any number of workers, and the ranks together
  see what one process with the whole batch would see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .samples import TrainingImages
from .workers import made_in_workers


@dataclass(frozen=True)
class Batch:
    """One step's images on one rank.

    Attributes:
        images: uint8 `(b, 3, size, size)`.
        positions: int64 `(b,)`, each sample's number in the whole run, over all ranks.
        skipped: (key, reason) of the unreadable files that were passed over.
    """

    images: Tensor
    positions: Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a GPU run beside the computation."""
        return replace(self, images=self.images.pin_memory(), positions=self.positions.pin_memory())

    def halved(self, least: int) -> Batch | None:
        """The first half, of at least so many images; None where that is no less than all."""
        half = max(len(self.images) // 2, least)
        return None if half >= len(self.images) else replace(
            self, images=self.images[:half], positions=self.positions[:half])


def batches(
    images: TrainingImages, batch_size: int, start: int, stop: int, rank: int = 0, world: int = 1, workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield the batch of each step in [start, stop), in order.

    Step s covers the positions s·G … s·G + G − 1 with G = batch_size · world; rank r gets its r-th `batch_size` of
    them.

    Args:
        workers: processes that decode, each a whole batch at a time; 0 decodes here.
        pin: page-locked memory, where there is a GPU.

    Raises:
        UserError: no image can be read, or a worker was ended from outside.
    """
    if batch_size < 1 or workers < 0 or not 0 <= rank < world:
        raise ValueError(f"batch_size {batch_size}, workers {workers}, rank {rank} of {world}: "
                         "expected batch_size >= 1, workers >= 0 and 0 <= rank < world")
    steps = _Steps(images, batch_size, rank, world)
    for batch in made_in_workers(steps, range(start, stop), workers, pin and torch.cuda.is_available()):
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Steps(Dataset[Batch | UserError]):
    """Step → this rank's batch. What the user must mend comes back as a value: PyTorch would wrap an exception
    that leaves a worker into the text of its traceback."""

    def __init__(self, images: TrainingImages, batch_size: int, rank: int, world: int) -> None:
        self.images, self.batch_size, self.rank, self.world = images, batch_size, rank, world

    def __getitem__(self, step: int) -> Batch | UserError:
        first = (step * self.world + self.rank) * self.batch_size
        positions = range(first, first + self.batch_size)
        try:
            samples = [self.images.sample(position) for position in positions]
        except UserError as mistake:
            return mistake
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            positions=torch.tensor(positions, dtype=torch.int64),
            skipped=[row for sample in samples for row in sample.skipped],
        )
