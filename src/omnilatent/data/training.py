"""Batches for training, decoded in worker processes.

- `Batch`: what one process gets for one step.
- `batches`: the steps from `start` to `stop`; the same batches for any number of workers, and the ranks together
  see what one process with the whole batch would see.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .samples import TrainingImages


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
    pin = pin and torch.cuda.is_available()
    made = (steps[step] for step in range(start, stop)) if workers == 0 else _in_workers(steps, start, stop, workers)
    for batch in made:
        if isinstance(batch, UserError):
            raise batch
        yield batch.pin_memory() if pin else batch


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


def _in_workers(steps: _Steps, start: int, stop: int, workers: int) -> Iterator[Batch | UserError]:
    loader = DataLoader(
        steps,
        batch_size=None,  # an item is a batch already
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        # Without a generator of its own the loader draws from the global one, and workers would change the run.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    with _signals_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as failure:
        if "DataLoader worker" not in str(failure):
            raise
        raise UserError(
            "A data worker was ended from outside, most often for want of memory or of shared memory (/dev/shm): "
            "use fewer --workers, or give the container more (docker run --shm-size 8g)."
        ) from failure


def _as_it_is(item: Batch | UserError) -> Batch | UserError:
    return item


def _begin_worker(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach every process of the group: only the main one answers, finishes what
    it must and ends the workers. A worker ends with its parent, and when its parent says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for `_watch` to receive
    sys.excepthook = _report_unless_cut_off
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None  # this is a worker
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True).start()


_CAN_WAIT = hasattr(signal, "sigtimedwait")  # not on macOS and Windows, where PyTorch's own handling stays


def _watch(parent: int) -> None:
    """End this worker within a second of its parent's end, at once on its parent's SIGTERM, on no other's.

    PyTorch's own watch takes whoever is the parent when it begins for the process to outlive, so a worker whose run
    was killed while it started would wait for ever.
    """
    while os.getppid() == parent:
        if not _CAN_WAIT:
            time.sleep(1)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def _report_unless_cut_off(kind: type[BaseException], failure: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a worker. The main process may end while a batch is handed over to it; the thread that
    hands over would print that. Failures of the decoding itself do not come this way."""
    if not issubclass(kind, (EOFError, OSError)):
        sys.__excepthook__(kind, failure, trace)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while workers start, or they reach one that has not come to `_begin_worker`.
    Workers keep them blocked from birth; here they arrive afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM} if _CAN_WAIT else {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
