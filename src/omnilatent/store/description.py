"""`store.json`: what all rows of a store have in common, so that nothing else is ever mixed in.

- `Description`: its contents.
- `create_or_check`: the first writer creates it, every later one must agree with it.
- `read_description`, `write_summary`.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..hub import read_json
from .files import replace_text

FILE = "store.json"
FORMAT = 1  # raise it when older readers would misread what is written


@dataclass(frozen=True)
class Description:
    """What a store holds.

    Attributes:
        kind: "latents", or what else is cached.
        about: what decides the numbers: weights, preprocessing, precision, which tensors a row has. Rows of another
            `about` are refused.
        notes: what is good to know and decides nothing: a codec's name, path and licence; and "id", which tells this
            store from others of the same `about`, wherever it is copied or moved to.
        summary: rows and moments when a writer last finished. Readers count anew; it is for people.
    """

    kind: str
    about: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """16 hex digits of `kind` and `about`; the index of every shard repeats them."""
        text = json.dumps([self.kind, self.about], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": __version__}
        fields = {"omnilatent": head, "kind": self.kind, "about": self.about, "notes": self.notes,
                  "summary": self.summary}
        return json.dumps(fields, indent=2) + "\n"


def is_store(folder: Path) -> bool:
    """Whether a store was begun in `folder`."""
    return (folder / FILE).is_file()


def read_description(folder: Path) -> Description:
    """The description of the store in `folder`.

    Raises:
        UserError: there is none, it is damaged, or a newer omnilatent wrote it.
    """
    file = folder / FILE
    if not file.is_file():
        what = "does not exist" if not folder.exists() else f"is no store: it has no {FILE}"
        raise UserError(f"{folder} {what}; make one with 'omnilatent encode NAME DATA --out {folder}'.")
    fields = read_json(file)
    head = fields.get("omnilatent")
    form = head.get("format") if isinstance(head, dict) else None
    if not isinstance(form, int) or not all(isinstance(fields.get(part), dict) for part in ("about", "notes")):
        raise UserError(f"{file} does not describe a store: restore it, or encode into another folder.")
    if form > FORMAT:
        raise UserError(
            f"{folder} was written by omnilatent {head.get('version')} (format {form}; this version reads up to "
            f"{FORMAT}): upgrade with 'pip install --upgrade omnilatent'."
        )
    return Description(str(fields.get("kind")), fields["about"], fields["notes"], fields.get("summary") or {})


def create_or_check(folder: Path, wanted: Description) -> Description:
    """Create `store.json`, or check that the one there is of the same kind and `about`.

    Any number of writers may do so at once: a hard link to a finished file is made, which only one of them can.

    Returns:
        What is there now; its notes and summary may be another writer's.

    Raises:
        UserError: the folder holds rows of another kind, or something that is no store.
    """
    file = folder / FILE
    if not file.exists():
        refuse_strange_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = replace(wanted, notes={**wanted.notes, "id": uuid.uuid4().hex})
        replace_text(file, named.to_json(), only_new=True)
    there = read_description(folder)
    refuse_other(folder, there, wanted)
    return there


def refuse_strange_folder(folder: Path) -> None:
    """Raise a `UserError` where `folder` holds something and is no store."""
    if folder.is_dir() and not is_store(folder):
        names = [entry.name for entry in folder.iterdir()]
        strange = [name for name in names if not name.startswith(".") and name != "shards"]
        if strange and not is_store(folder):  # another writer may have begun it since
            raise UserError(f"{folder} holds other things than a store ({strange[0]}): give a new folder.")


def refuse_other(folder: Path, there: Description, wanted: Description) -> None:
    """Raise a `UserError` that names the first thing in which rows of `wanted` differ from those that are there."""
    found = _leaves({"kind": there.kind, **there.about})
    asked = json.loads(json.dumps({"kind": wanted.kind, **wanted.about}))  # tuples become lists, as in the file
    for name, value in _leaves(asked).items():
        if found.get(name) != value:
            raise UserError(
                f"{folder} holds rows with {name} {_shown(found.get(name))}, and this run would add rows with {name} "
                f"{_shown(value)}, which are not mixed: give the same as before, or another folder."
            )
    extra = next((name for name in found if name not in _leaves(asked)), None)
    if extra is not None:
        raise UserError(
            f"{folder} holds rows with {extra} {_shown(found[extra])}, and this run would add rows without: give the "
            "same as before, or another folder."
        )


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replace the summary in `store.json`, as a whole or not at all."""
    there = read_description(folder)
    text = Description(there.kind, there.about, there.notes, summary).to_json()
    replace_text(folder / FILE, text)


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """A nested dictionary flattened: {"a": {"b": 1}} → {"a b": 1}, underscores as spaces."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _leaves(part, f"{name} {key}".strip().replace("_", " "))
    return flat


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
