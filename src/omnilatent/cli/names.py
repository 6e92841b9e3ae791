"""The NAMEs of a command line: refused early where they are no codecs, opened, and shortened for a report.

- `check_names`: before anything heavy is imported.
- `is_any_to_any`: what `evaluate` has other options for.
- `load_codecs`: every name as a `Codec` that decodes, with a label of its own.
- `short_label`, `distinct`: what a report calls them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..hub import WEIGHTLESS, bundled_names, locate, read_json, recognise, refuse_others, split_label

if TYPE_CHECKING:
    from ..codec import Codec


def check_names(names: Sequence[str], any_kind: bool = False) -> None:
    """Refuse a name that is no codec, before anything heavy is imported; with `any_kind` only one that is no model at all. Hub
    ids are left to the loading."""
    for name in names:
        _, target = split_label(name)
        is_local = Path(target).expanduser().exists()
        if target not in WEIGHTLESS and (is_local or "/" not in target):
            kind = recognise(locate(target))
            if not any_kind:
                refuse_others(kind, target)


def is_any_to_any(name: str) -> bool:
    """Whether a name is an any-to-any model that is on this machine: a path, or a bundled model."""
    target = split_label(name)[1]
    place = Path(target).expanduser()
    if name.startswith("-") or not (place.is_dir() or not place.exists() and target in bundled_names()):
        return False
    return any(read_json(file).get("kind") == "omni" for file in (locate(target) / "config.json",) if file.exists())


def load_codecs(names: Sequence[str], dtype: str) -> list[Codec]:
    """Open every codec on the CPU, so that a bad one fails before the first is measured; make labels distinct."""
    import torch

    from ..hub import load

    codecs = [load(name, "cpu", getattr(torch, dtype)) for name in names]
    for codec, label in zip(codecs, distinct([short_label(name) for name in names]), strict=True):
        codec.label = label
        if not codec.spec.decodes:
            raise UserError(f"{label} only encodes: there is no reconstruction to compare; leave it out.")
    return codecs


def short_label(name: str) -> str:
    """What a report calls a codec: the label given, else the name, of a path its last part that tells it apart."""
    label, target = split_label(name)
    path = Path(target).expanduser()
    if label or not path.exists():
        return label or target
    parts = [part for part in path.resolve().parts if not re.fullmatch(r"final|best|step-\d+", part)]
    return parts[-1].removesuffix(".safetensors")


def distinct(labels: Sequence[str]) -> list[str]:
    """The labels, a later equal one with a number: a, b, a → a, b, a (2)."""
    taken = set(labels)
    seen: set[str] = set()
    made = []
    for label in labels:
        number, name = 2, label
        while name in seen or (number > 2 and name in taken):
            name, number = f"{label} ({number})", number + 1
        seen.add(name)
        made.append(name)
    return made
