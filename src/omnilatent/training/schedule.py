"""Learning rates as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """The share of the peak learning rate at `step`.

    Linear from 0 to 1 over `warmup` steps, then half a cosine down to `final` at `steps`
    (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
