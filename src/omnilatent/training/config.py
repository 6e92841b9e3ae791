"""The settings of a run that every recipe shares. Nothing here imports torch.

- `RunConfig`, `OptimizerConfig`: fields of every recipe's configuration.
- `check_least`, `check_whole`, `is_whole`: what values may be.
- `from_json`: a saved configuration back into its frozen dataclasses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

Config = TypeVar("Config")


def check_least(config: object, least: float, *names: str) -> None:
    """Raise a `ValueError` that names the option for a field of `config` that is below `least` or not finite."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; the least is {least}")


def check_whole(config: object, least: int, *names: str) -> None:
    """Raise a `ValueError` that names the field of `config` that is no whole number from `least` on."""
    for name in names:
        value = getattr(config, name)
        if not is_whole(value) or value < least:
            raise ValueError(f"{name} is {'' if is_whole(value) else 'a whole number, '}at least {least}; got {value!r}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class RunConfig:
    """How long, in what precision and how safely a run trains."""

    steps: int = 100_000
    """Optimiser steps."""
    batch_size: int = 16
    """Images an optimiser step, over all processes and accumulated parts together."""
    accumulate: int = 1
    """Parts that a process splits its share of the batch into, to fit memory; the gradients stay the same."""
    seed: int = 0
    """Of weights, crops and posterior noise."""
    amp: bool = True
    """Mixed precision: bf16 where the GPU has it, else fp16 with a loss scaler; on a CPU always fp32."""
    compile: bool = True
    """Compile the model on a CUDA GPU."""
    deterministic: bool = False
    """Bit-equal repetition on a GPU, slower."""
    workers: int = -1
    """Processes that decode images; -1: this process's share of the cores, at most 16; 0: none."""
    save_every: int = 1_000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept, beside best/ and final/."""
    validate_every: int = 1_000
    """Steps between validations on held-out images, each with sample pictures."""
    log_every: int = 50
    """Steps between logged numbers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a GPU if there is one, and says so."""

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "batch_size", "accumulate", "save_every", "keep", "validate_every", "log_every")
        check_least(self, -1, "workers")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; possible are 0 to {2**32 - 1}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser with linear warm-up and cosine decay, gradient clipping, and an average of the weights."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonal momentum for the matrices, AdamW for the rest (training/muon.py); takes larger rates."""
    lr: float = 1e-4
    """Peak learning rate."""
    disc_lr: float = 0.0
    """Peak learning rate of a discriminator, which always has AdamW; 0: the same as --lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momenta."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: int = 500
    """Steps of linear warm-up."""
    final_lr: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm; larger gradients are scaled down. 0: no clipping."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is saved and measured."""

    def __post_init__(self) -> None:
        check_least(self, 0, "lr", "disc_lr", "weight_decay", "warmup", "final_lr", "clip")
        for name, values in {"betas": self.betas, "ema_decay": (self.ema_decay,)}.items():
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; possible are 0 up to, not "
                                 "including, 1")


def from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """Rebuild a frozen dataclass from what `dataclasses.asdict` and JSON made of it.

    Fields that an older version did not write take their defaults; those it no longer has are left out.
    """
    hints = get_type_hints(kind)
    rebuilt = {}
    for entry in fields(kind):
        if entry.name not in values:
            continue
        value, hint = values[entry.name], hints[entry.name]
        if is_dataclass(hint) and isinstance(value, dict):
            value = from_json(hint, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif hint == Path | None and value is not None:
            value = Path(value)
        rebuilt[entry.name] = value
    return kind(**rebuilt)
