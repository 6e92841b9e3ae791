"""Ctrl-C and SIGTERM, when they may come at any instant.

- `signals_held`: hold them back while worker processes start.
- `stop_on_signal`: turn the first into a wish that is granted between two batches.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CAN_WAIT = hasattr(signal, "sigtimedwait")  # not on macOS and Windows, where PyTorch's own handling stays


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while workers start, or they reach one that has not come to `workers._begin_worker`.
    Workers keep them blocked from birth; here they arrive afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM} if CAN_WAIT else {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yield a list that becomes non-empty with the first Ctrl-C or SIGTERM; only a second Ctrl-C stops at once.

    Schedulers and torchrun may send SIGTERM more than once, or after the terminal's Ctrl-C: that is still one wish.
    """
    stop: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in stop:
            raise KeyboardInterrupt
        stop.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: leave the signals alone
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
