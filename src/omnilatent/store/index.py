"""What lies in a store: every shard's index, merged.

- `Index`: one row a key, sorted by key: where its tensors lie, what its file was.
- `read_index`: of all committed shards.
- `summarise`, `is_summarised`: what people see without opening shards: the summary in `store.json`, `skipped.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.names import Names
from ..errors import UserError
from .description import Description, read_description, write_summary
from .files import replace_text
from .moments import ChannelMoments
from .shards import index_file, shard_numbers

Shape = tuple[int, ...]
_KNOWN = {"key", "size", "mtime_ns", "sha256", "image", "place", "skipped", "reader"}
_COLUMNS: dict[str, tuple[int, type]] = {"place": (3, np.int64), "image": (2, np.int32), "stamp": (2, np.int64),
                                         "digest": (32, np.uint8), "root": (1, np.int32)}
_NO_HASH = "00" * 32


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read: why, what it was then, and what it was read with (None: not even opened)."""

    reason: str
    size: int
    mtime_ns: int
    reader: str | None


@dataclass(frozen=True)
class Index:
    """The rows of a store; of a key with several rows the latest.

    Attributes:
        keys: sorted.
        place: int64 `(n, 3)`: shard, group in it, row in the group's tensors.
        image: int32 `(n, 2)`: height and width after preprocessing; 0 where there is none.
        stamp: int64 `(n, 2)`: bytes and nanoseconds of the last change of the file.
        digest: uint8 `(n, 32)`: SHA-256 of the file.
        root: int32 `(n, 1)`: which of `roots` the row's file lay under.
        fields: row → whatever else a writer gave it.
        groups: shard → for each group of rows with equal shapes, tensor name → a row's shape.
        moments: tensor name → its channels' moments, each content counted once.
        skipped: key → why it has no row.
        contents: rows of tensors; less than rows of keys where files are copies, more where files have changed.
        bytes: of all shards.
        data: names of the data that went in.
        roots: folders that keys were relative to; "" where none was noted.
    """

    keys: Names
    place: np.ndarray
    image: np.ndarray
    stamp: np.ndarray
    digest: np.ndarray
    root: np.ndarray
    fields: dict[int, dict[str, Any]]
    groups: dict[int, list[dict[str, Shape]]]
    moments: dict[str, ChannelMoments]
    skipped: dict[str, Skipped]
    contents: int = 0
    bytes: int = 0
    data: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


def read_index(folder: Path, description: Description) -> Index:
    """Merge the indexes of all committed shards of the store in `folder`.

    Raises:
        UserError: an index is damaged, or belongs to another store.
    """
    merging = _Merging()
    fingerprint = description.fingerprint()
    for number in shard_numbers(folder):
        file = index_file(folder, number)
        try:
            head, *rows = json.loads("[" + ",".join(file.read_text(encoding="ascii").splitlines()) + "]")
            if head["store"] != fingerprint:
                raise UserError(f"{file} belongs to another store than {folder}: move it back where it came from.")
            merging.add(number, head, rows)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            reason = " ".join(str(failure).split())
            raise UserError(f"{file} is not a whole index ({reason}): restore it, or remove it and its .safetensors "
                            "and encode again.") from failure
        merging.bytes += file.stat().st_size
    return merging.done()


class _Merging:
    """Columns of the rows so far, shard by shard; the rows of a key that count are chosen at the end."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        self.count = 0
        self.latest: dict[str, int] = {}
        self.fields: dict[int, dict[str, Any]] = {}
        self.groups: dict[int, list[dict[str, Shape]]] = {}
        self.moments: dict[str, ChannelMoments] = {}
        self.skipped: dict[str, Skipped] = {}
        self.contents = self.bytes = 0
        self.data: dict[str, None] = {}
        self.roots: dict[str, int] = {}

    def add(self, number: int, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.groups[number] = [{name: tuple(shape) for name, shape in group.items()} for group in head["groups"]]
        for name, moments in head["moments"].items():
            self.moments.setdefault(name, ChannelMoments()).merge(ChannelMoments.from_json(moments))
        self.contents += head["contents"]
        self.bytes += head["bytes"]
        self.data[head["data"]] = None
        root = self.roots.setdefault(head.get("root", ""), len(self.roots))
        if head.get("moved"):  # what was written before came from here too, when it lay elsewhere
            for earlier in self.columns["root"]:
                earlier[:] = root
        kept = []
        for row in rows:  # a shard holds a key once, so its skipped files may go first
            if "skipped" not in row:
                kept.append(row)
                continue
            self.latest.pop(row["key"], None)
            self.skipped[row["key"]] = Skipped(row["skipped"], row["size"], row["mtime_ns"], row.get("reader"))
        if self.skipped:
            for row in kept:
                self.skipped.pop(row["key"], None)
        for at, row in enumerate(kept, start=self.count):
            if not _KNOWN.issuperset(row):
                self.fields[at] = {name: value for name, value in row.items() if name not in _KNOWN}
        self.latest.update(zip((row["key"] for row in kept), range(self.count, self.count + len(kept)), strict=True))
        self.count += len(kept)
        for name, values in _columns(kept, root).items():
            self.columns[name].append(values)

    def done(self) -> Index:
        keys = sorted(self.latest)
        order = np.fromiter((self.latest[key] for key in keys), np.int64, len(keys))
        columns = {name: np.concatenate([*parts, np.zeros((0, width), dtype)])[order]
                   for (name, (width, dtype)), parts in zip(_COLUMNS.items(), self.columns.values(), strict=True)}
        at_rows = enumerate(order.tolist()) if self.fields else ()
        fields = {row: self.fields[at] for row, at in at_rows if at in self.fields}
        return Index(Names(keys), columns["place"], columns["image"], columns["stamp"], columns["digest"],
                     columns["root"], fields, self.groups, self.moments, self.skipped, self.contents, self.bytes,
                     list(self.data), list(self.roots))


def _columns(rows: list[dict[str, Any]], root: int) -> dict[str, np.ndarray]:
    hashes = "".join([row.get("sha256", _NO_HASH) for row in rows])
    values = {
        "place": [row["place"] for row in rows],
        "image": [row.get("image", (0, 0)) for row in rows],
        "stamp": [(row.get("size", -1), row.get("mtime_ns", -1)) for row in rows],
        "digest": np.frombuffer(bytes.fromhex(hashes), np.uint8),
        "root": [root] * len(rows),
    }
    return {name: np.array(values[name], dtype).reshape(len(rows), width)
            for name, (width, dtype) in _COLUMNS.items()}


def summarise(folder: Path) -> Index:
    """Bring `store.json` and `skipped.jsonl` up to date. Any number of writers may do so; the last one is right.

    Returns:
        The index of what is committed.
    """
    while True:
        state = _state(folder)
        index = read_index(folder, read_description(folder))
        moments = {name: {"mean": m.mean.tolist(), "std": m.std.tolist()} for name, m in index.moments.items()}
        _list_skipped(folder, index)  # first: the summary says that all is done
        write_summary(folder, {"rows": len(index), "contents": index.contents, "skipped": len(index.skipped),
                               "shards": len(index.groups), "bytes": index.bytes, "moments": moments,
                               "data": index.data, "state": state})
        if _state(folder) == state:  # or another writer has come to its end meanwhile
            return index


def is_summarised(folder: Path) -> bool:
    """Whether the summary is of all shards that are there."""
    return read_description(folder).summary.get("state") == _state(folder)


def _state(folder: Path) -> str:
    """16 hex digits that differ for any other set of committed shards: over number, size and time of every index. A
    count would not tell that a shard was removed and another written since."""
    stamps = [(number, *_stamp(index_file(folder, number))) for number in shard_numbers(folder)]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _list_skipped(folder: Path, index: Index) -> None:
    """`skipped.jsonl` as every command writes it; the index is what counts."""
    rows = [json.dumps({"file": key, "reason": index.skipped[key].reason}) for key in sorted(index.skipped)]
    if rows:
        replace_text(folder / "skipped.jsonl", "\n".join(rows) + "\n")
    else:
        (folder / "skipped.jsonl").unlink(missing_ok=True)
