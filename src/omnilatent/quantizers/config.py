"""The settings of the quantizers. Nothing here imports torch.

- `LGQConfig`, `VQConfig`, `SimVQConfig`, `FSQConfig`, `BinaryConfig` (of LFQ and BSQ): the options of each kind.
- `levels_for`: FSQ's levels for a wished number of codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Literal, get_args, get_origin, get_type_hints

import tyro

Kind = Literal["lgq", "simvq", "vq", "fsq", "lfq", "bsq"]


def _check(**limits: tuple[float, float, float]) -> None:
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"{name} lies between {low:g} and {high:g}; got {value:g}")


def _check_words(config: object) -> None:
    """Refuse a word that a field does not have: Python itself does not look."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name} is one of {', '.join(get_args(hint))}; got {getattr(config, name)!r}")


@dataclass(frozen=True)
class LGQConfig:
    """Learnable geometric quantization."""

    tau_start: float = 1.0
    """Temperature τ of the soft assignment softmax(−‖z − c‖² / τ) at the start, in the unit that tau_unit names."""
    tau_end: float = 0.1
    """Temperature at the end."""
    tau_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How τ goes from start to end; constant stays at the start."""
    tau_unit: Literal["codes", "absolute"] = "codes"
    """codes: τ counts in the codes' own mean variance a coordinate, so that assignments do not depend on the scale that
    the encoder happens to have; absolute: as it stands, where a small-scaled latent is averaged to nothing."""
    energy_weight: float = 1.0
    """Of the free energy per coordinate; as τ → 0 it is the mean squared distance to the nearest code."""
    peak_weight: float = 0.005
    """Of the peakedness 1 − Σp² of each vector's assignment."""
    usage_weight: float = 0.1
    """Of KL(mean assignment ‖ uniform) / log K, between 0 and 1 before weighting."""
    data_init: bool = True
    """Start the codes at vectors drawn from the first training batch."""
    dead_codes: Literal["revive", "prune", "keep"] = "revive"
    """revive: codes that are hardly chosen move to vectors of the batch; prune: they are taken out for good."""
    dead_below: float = 0.03
    """A code is dead when its average count falls below this share of the mean count."""
    usage_decay: float = 0.99
    """Of the moving average of counts: a code that is never chosen is dead after log(dead_below) / log(decay) steps."""
    renew_every: int = 10
    """Training steps between looks for dead codes."""
    seed: tyro.conf.Suppress[int] = 0
    """Of draws from the batch."""

    def __post_init__(self) -> None:
        _check_words(self)
        _check(tau_start=(self.tau_start, 1e-6, 1e6), tau_end=(self.tau_end, 1e-6, 1e6), dead_below=(self.dead_below, 0, 1),
               usage_decay=(self.usage_decay, 0, 1), renew_every=(self.renew_every, 1, 1e9))


@dataclass(frozen=True)
class VQConfig:
    """Vector quantization whose codes are moving averages of their vectors."""

    usage_decay: float = 0.99
    """Of the moving averages of counts and sums."""
    commitment_weight: float = 0.25
    """Of the mean squared distance that draws vectors to their codes."""
    rotation: bool = True
    """The rotation trick: the gradient is turned and scaled as the vector was; otherwise passed straight through."""
    data_init: bool = True
    """Start the codes at vectors drawn from the first training batch."""
    dead_codes: Literal["revive", "keep"] = "revive"
    """revive: codes that are hardly chosen move to vectors of the batch."""
    dead_below: float = 0.03
    """A code is dead when its average count falls below this share of the mean count."""
    renew_every: int = 10
    """Training steps between looks for dead codes."""
    seed: tyro.conf.Suppress[int] = 0
    """Of draws from the batch."""

    def __post_init__(self) -> None:
        _check_words(self)
        _check(usage_decay=(self.usage_decay, 0, 1), dead_below=(self.dead_below, 0, 1), renew_every=(self.renew_every, 1, 1e9))


@dataclass(frozen=True)
class SimVQConfig:
    """A frozen random codebook under one learned linear map."""

    codebook_weight: float = 1.0
    """Of the mean squared distance that draws the map's codes to their vectors."""
    commitment_weight: float = 0.25
    """Of the same distance, drawing vectors to their codes."""
    rotation: bool = True
    """The rotation trick, else straight through."""
    seed: tyro.conf.Suppress[int] = 0
    """Of the frozen codebook."""


@dataclass(frozen=True)
class FSQConfig:
    """Finite scalar quantization."""

    levels: tuple[int, ...] | None = None
    """Levels of each scalar, as 8 5 5 5; without them the largest product that does not exceed the wished size."""


@dataclass(frozen=True)
class BinaryConfig:
    """Lookup-free and binary spherical quantization: one bit a coordinate."""

    entropy_weight: float = 0.1
    """Of the entropy of each vector's bits, less that of the mean bits."""
    diversity: float = 1.0
    """Weight of the mean bits' entropy within the former."""
    commitment_weight: float = 0.25
    """Of the mean squared distance that draws vectors to their codes."""
    inverse_temperature: float = 100.0
    """Of the soft bits in the entropies."""


@cache
def levels_for(size: int) -> tuple[int, ...]:
    """The levels whose product is nearest to `size` from below, so that a code still fits in ceil(log2 size) bits.

    Levels lie between 5 and 8 (the paper advises at least 5), between 2 and 8 for fewer than 256 codes; the fewest
    scalars that reach the product are taken, and the most even. 16,384 gives 8 · 8 · 7 · 6 · 6 = 16,128.

    Raises:
        ValueError: fewer than 2 codes.
    """
    if size < 2:
        raise ValueError(f"a codebook has at least 2 codes; got {size}")
    choices = range(5 if size >= 256 else 2, 9)
    counts = range(1, math.ceil(math.log(size, choices[0])) + 1)
    every = (levels[::-1] for count in counts for levels in combinations_with_replacement(choices, count))
    return max((levels for levels in every if math.prod(levels) <= size),
               key=lambda levels: (math.prod(levels), -len(levels), levels[-1]))
