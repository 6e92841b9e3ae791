"""Several processes that fill one store: torchrun's ranks, or machines that know nothing of each other.

- `Ranks`: which of them this is.
- `joined`: within it they are each other's `Others`: they end together when one fails, and meet at the end.

They exchange a few words through torchrun's key-value store and nothing else: no collective, which would wait for a
process that has failed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import distributed

from ..errors import UserError
from ..store import EncodeReport

_LOOK = 2.0  # seconds between two looks for a failure
_LINGER = 10 * _LOOK  # seconds that the first process, which may keep the words, waits for the others to look


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
        """Each process of a machine has its own GPU, which becomes PyTorch's current one.

        Raises:
            UserError: there are fewer GPUs than processes.
        """
        if kind != "cuda" or self.world == 1:
            return kind
        if self.local >= torch.cuda.device_count():
            raise UserError(f"This machine has {torch.cuda.device_count()} GPUs and torchrun started more processes on "
                            f"it: give --nproc-per-node {torch.cuda.device_count()}.")
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def part(self, part: int, parts: int) -> tuple[int, int]:
        """The share of this process in share `part` of `parts`."""
        return part * self.world + self.rank, parts * self.world


class Others:
    """What a process knows of the others.

    Attributes:
        failure: what the first one that failed said; None as long as none did, or none has been heard of.
    """

    def __init__(self, ranks: Ranks, words: distributed.Store | None) -> None:
        self._ranks, self._words = ranks, words
        self.failure: str | None = None

    @contextmanager
    def watched(self, stop: list[int]) -> Iterator[None]:
        """While this lasts, `stop` becomes non-empty a few seconds after another process has failed."""
        if self._words is None:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_LOOK):
                if self._look():
                    stop.append(0)
                    return

        thread = threading.Thread(target=watch, name="omnilatent-others", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def refuse_failed(self) -> None:
        """Raise a `UserError` where another process is known to have failed."""
        if self.failure is not None:
            raise UserError(f"Another process failed, so this one stopped too ({self.failure}): what is encoded is "
                            "kept; mend that and repeat the command.")

    def gather(self, report: EncodeReport) -> list[EncodeReport]:
        """On the first process the reports of all, in the order of the ranks, once all have come here; the others
        leave theirs and get none.

        Raises:
            UserError: another process failed.
        """
        if self._words is None:
            return [report]
        if self._look():
            self.refuse_failed()
        self._words.set(f"report {self._ranks.rank}", json.dumps(asdict(report)))
        if self._ranks.rank:
            return []
        names = [f"report {rank}" for rank in range(self._ranks.world)]
        while not self._words.check(names):  # hours, perhaps
            if self._look():
                self.refuse_failed()
            time.sleep(_LOOK / 10)
        return [EncodeReport(**json.loads(self._words.get(name))) for name in names]

    def tell(self, failure: BaseException) -> None:
        """Say that this process failed, unless it is because another did."""
        if self._words is None:
            return
        if not self._look():
            reason = str(failure) if isinstance(failure, UserError) else type(failure).__name__
            what = "was stopped" if isinstance(failure, (SystemExit, KeyboardInterrupt)) else f"failed: {reason}"
            self._words.set("failure", f"rank {self._ranks.rank} {what}".rstrip("."))
            self._look()
        deadline = time.monotonic() + _LINGER
        while self._ranks.rank == 0 and not self._all_know() and time.monotonic() < deadline:
            time.sleep(_LOOK / 10)

    def _all_know(self) -> bool:
        """Whether every other process has heard of a failure or is through."""
        assert self._words is not None
        try:
            return all(self._words.check([f"knows {rank}"]) or self._words.check([f"report {rank}"])
                       for rank in range(1, self._ranks.world))
        except RuntimeError:  # torchrun kept the words, and is gone
            return True

    def _look(self) -> bool:
        """Whether another process has failed."""
        assert self._words is not None  # there are others
        try:
            if self.failure is None and self._words.check(["failure"]):
                self.failure = self._words.get("failure").decode()
                self._words.set(f"knows {self._ranks.rank}", "")
        except RuntimeError:  # the process that keeps the words is gone
            self.failure = "the connection to the first machine is lost"
        return self.failure is not None


@contextmanager
def joined(ranks: Ranks) -> Iterator[Others]:
    """Find the other processes, and tell them when this one fails.

    Raises:
        UserError: the others are not there within half an hour.
    """
    if ranks.world == 1:
        yield Others(ranks, None)
        return
    try:
        words, _, _ = next(distributed.rendezvous("env://", ranks.rank, ranks.world))
    except (RuntimeError, ValueError) as failure:
        raise UserError(f"Rank {ranks.rank} of {ranks.world} does not reach the others "
                        f"({' '.join(str(failure).split())}): start all of them with torchrun.") from failure
    others = Others(ranks, distributed.PrefixStore("omnilatent", words))
    try:
        yield others
    except BaseException as failure:
        others.tell(failure)
        raise
