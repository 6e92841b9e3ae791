"""Worker processes that make batches, and what ends them.

- `made_in_workers`: the items of a data set in a given order, each made by a worker process, or here.
- `own_cores`: the share of the cores that this process may use.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .signals import CAN_WAIT, signals_held

Item = TypeVar("Item")


def own_cores() -> int:
    """Cores that this process may use, shared with the other processes that torchrun started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def made_in_workers(items: Dataset[Item], order: Sequence[int], workers: int, pin: bool = False) -> Iterator[Item]:
    """Yield `items[i]` for each i of `order`, in that order.

    Args:
        items: makes an item of an index; what the user must mend it returns as a value, since PyTorch would wrap an
            exception that leaves a worker into the text of its traceback.
        workers: processes; each makes a whole item at a time, and a few ahead. 0 makes them here.
        pin: into page-locked memory, by the items' `pin_memory`, in a thread of its own; only where there is CUDA.

    Raises:
        UserError: a worker was ended from outside.
    """
    if workers == 0:
        yield from (_pinned(items[i]) if pin else items[i] for i in order)
        return
    loader = DataLoader(
        items,
        batch_size=None,  # an item is a batch already
        sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        # Without a generator of its own the loader draws from the global one, and workers would change the run.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    with signals_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        iterator = iter(loader)
    try:
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError) as failure:
        if isinstance(failure, RuntimeError) and "DataLoader worker" not in str(failure):
            raise
        raise UserError(
            "A data worker was ended from outside, most often for want of memory or of shared memory (/dev/shm): "
            "use fewer --workers, or give the container more (docker run --shm-size 8g)."
        ) from failure


def _as_it_is(item: Any) -> Any:
    return item


def _pinned(item: Any) -> Any:
    """As PyTorch's loader does it."""
    return item.pin_memory() if hasattr(item, "pin_memory") else item


def _begin_worker(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach every process of the group: only the main one answers, finishes what
    it must and ends the workers. A worker ends with its parent, and when its parent says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for `_watch` to receive
    sys.excepthook = _report_unless_cut_off
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None  # this is a worker
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True).start()


def _watch(parent: int) -> None:
    """End this worker within a second of its parent's end, at once on its parent's SIGTERM, on no other's.

    PyTorch's own watch takes whoever is the parent when it begins for the process to outlive, so a worker whose run
    was killed while it started would wait for ever.
    """
    while os.getppid() == parent:
        if not CAN_WAIT:
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
