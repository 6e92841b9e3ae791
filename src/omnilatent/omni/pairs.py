"""Which modalities are turned into which, at each step of a run: a pure function of (seed, step).

- `Job`: sources and target of one part of a batch, and whether the target is learned by flow matching.
- `jobs_at`, `Plan`: those of a step, and how many of a run. `pair_weights`: how likely each pair is at a part of the run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..data.keyed import draws, unit
from .config import PairConfig


class Job(NamedTuple):
    """`sources` → `target`; without sources the target is learned as it is by itself."""

    sources: tuple[str, ...]
    target: str
    flowing: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Its modalities, each once."""
        return tuple(dict.fromkeys((*self.sources, self.target)))

    @property
    def pair(self) -> str:
        """source→target, for a person."""
        source = self.sources[0] if len(self.sources) == 1 else "several" if self.sources else "nothing"
        return f"{source}→{self.target}"


def pair_weights(config: PairConfig, modalities: tuple[str, ...], progress: float) -> dict[tuple[str, str], float]:
    """(source, target) → its probability at a share of the run that is done."""
    same = [(name, name) for name in modalities]
    cross = [(a, b) for a in modalities for b in modalities if a != b]
    if progress < config.warmup_share or not cross:
        return dict.fromkeys(same, 1 / len(same))
    share = len(same) / (len(same) + len(cross)) if config.reconstruction_share < 0 else config.reconstruction_share
    return dict.fromkeys(same, share / len(same)) | dict.fromkeys(cross, (1 - share) / len(cross))


def jobs_at(config: PairConfig, modalities: tuple[str, ...], seed: int, step: int, steps: int) -> list[Job]:
    """The jobs of a step, the same on all ranks."""
    weights = pair_weights(config, modalities, step / steps)
    jobs = []
    for number in range(config.jobs):
        which, fused, flowing, more, alone = draws("pairs", seed, step, number, count=5)
        source, target = _pick(weights, unit(which))
        sources = [source]
        if unit(fused) < config.fused_share and step / steps >= config.warmup_share:
            others = [name for name in modalities if name != source]
            taken = [name for bit, name in enumerate(others) if more >> bit & 1]
            sources = [name for name in modalities if name == source or name in taken]
        flows = unit(flowing) < config.flow_share and target != "text"
        if flows and unit(alone) < config.unconditional_share and step / steps >= config.warmup_share:
            sources = []
        jobs.append(Job(tuple(sources), target, flows))
    return jobs


@dataclass(frozen=True)
class Plan:
    """The jobs of a run's every step, among the modalities that its examples have."""

    config: PairConfig
    modalities: tuple[str, ...]
    seed: int
    steps: int

    def jobs(self, step: int, batch_size: int) -> list[Job]:
        """As many as share a batch evenly."""
        config = replace(self.config, jobs=math.gcd(self.config.jobs, batch_size))
        return jobs_at(config, self.modalities, self.seed, step, self.steps)

    def counted(self, batch_size: int) -> list[tuple[range, Counter[str]]]:
        """The steps of each phase, before and after the warm-up, and how often each pair is learned from in them."""
        after = min(self.steps, math.ceil(self.config.warmup_share * self.steps))
        phases = [phase for phase in (range(after), range(after, self.steps)) if phase]
        return [(phase, Counter(job.pair for step in phase for job in self.jobs(step, batch_size))) for phase in phases]


def _pick(weights: dict[tuple[str, str], float], u: float) -> tuple[str, str]:
    below = 0.0
    for pair, weight in weights.items():
        below += weight
        if u < below:
            return pair
    return next(reversed(weights))
