"""Latents on disk: a folder of immutable shards that any number of processes fill and a memory map reads.

    store = LatentStore("latents/")          # made by 'omnilatent encode NAME DATA --out latents/'
    store.batch([3, 1, 4])                   # (3, c, h, w), at training speed
    codec.decode(store.latent(3))            # back to the picture

`StoreWriter` and `Store` are the same for any named tensors: every cache of the project is a store.
The names load on first use: help and argument errors need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .description import Description, is_store, read_description
    from .config import EncodeConfig
    from .encoding import Encoding
    from .reader import LatentStore, Store
    from .stages import EncodeReport
    from .writer import Place, StoreWriter

_PUBLIC = {
    "Description": "description",
    "is_store": "description",
    "read_description": "description",
    "EncodeConfig": "config",
    "EncodeReport": "stages",
    "Encoding": "encoding",
    "LatentStore": "reader",
    "Store": "reader",
    "Place": "writer",
    "StoreWriter": "writer",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omnilatent.store' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
