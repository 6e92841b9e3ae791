"""The task protocol, the one loop, and what it needs; it knows no model.

`Trainer` (omni/trainer.py) and `collate_multimodal` (omni/examples.py), the any-to-any model's way in from Python, are found
here by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_FAMILIES = {"Trainer": "omnilatent.omni.trainer", "collate_multimodal": "omnilatent.omni.examples"}


def __getattr__(name: str) -> Any:
    if name not in _FAMILIES:
        raise AttributeError(f"module 'omnilatent.training' has no attribute {name!r}")
    return getattr(import_module(_FAMILIES[name]), name)
