"""Vectors → codes. The classes load on first use; `build_quantizer` makes one by its kind.

- codebooks: `LGQ`, `SimVQ`, `VQ`; grids: `FSQ`, `LFQ`, `BSQ`
- `ProductQuantizer`, `ResidualQuantizer`: several quantizers side by side, or one after the other
- the contract: `Quantizer`, `Quantized` (base.py); the options of each kind: config.py
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from .config import BinaryConfig, FSQConfig, Kind, LGQConfig, SimVQConfig, VQConfig

if TYPE_CHECKING:
    from .base import Quantizer

_PUBLIC = {
    "Quantized": "base",
    "Quantizer": "base",
    "LGQ": "lgq",
    "VQ": "vq",
    "SimVQ": "simvq",
    "FSQ": "fsq",
    "LFQ": "adapters",
    "BSQ": "adapters",
    "ProductQuantizer": "product",
    "ResidualQuantizer": "residual",
}
_KINDS = {"lgq": ("LGQ", LGQConfig), "vq": ("VQ", VQConfig), "simvq": ("SimVQ", SimVQConfig),
          "fsq": ("FSQ", FSQConfig), "lfq": ("LFQ", BinaryConfig), "bsq": ("BSQ", BinaryConfig)}

__all__ = [*_PUBLIC, "build_quantizer"]


def build_quantizer(
    kind: Kind, dim: int, codebook_size: int | None = None, num_codebooks: int = 1, depth: int = 1, **options: Any
) -> Quantizer:
    """A quantizer by its kind.

    Args:
        kind: lgq, simvq, vq, fsq, lfq or bsq.
        dim: the width of the vectors.
        codebook_size: the codes K of each book; by default 1024, or what FSQ's levels make.
        num_codebooks: the books.
        depth: residual stages, each a quantizer of one book (lgq, simvq, vq).
        options: fields of the kind's config.

    Raises:
        ValueError: an unknown kind or option, or numbers that do not fit together; both are named.
    """
    if kind not in _KINDS:
        raise ValueError(f"quantizers are {', '.join(get_args(Kind))}; got {kind!r}")
    name, config = _KINDS[kind]
    known = {f.name for f in fields(config)}
    for option in options:
        if option not in known:
            raise ValueError(f"{kind} has the options {', '.join(sorted(known))}; got {option!r}")
    if kind != "fsq" and codebook_size is None:
        codebook_size = 1024
    build = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if depth == 1:
        return build(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, config=config(**options))
    if depth < 1:
        raise ValueError(f"depth is at least 1; got {depth}")
    if num_codebooks > 1:
        raise ValueError(f"residual stages have one codebook each; got depth {depth} and num_codebooks {num_codebooks}")
    if kind not in ("lgq", "simvq", "vq"):
        raise ValueError(f"{kind} has a fixed grid, which cannot follow shrinking residuals; depth must be 1, got {depth}")
    seed = options.pop("seed", 0)
    stages = [build(dim=dim, codebook_size=codebook_size, num_codebooks=1, config=config(seed=seed + stage, **options))
              for stage in range(depth)]
    return import_module(".residual", __name__).ResidualQuantizer(stages)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omnilatent.quantizers' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
