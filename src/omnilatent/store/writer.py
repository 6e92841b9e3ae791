"""Rows into a store.

- `StoreWriter`: gathers rows and commits them shard by shard.
- `Place`: where a row's tensors lie, or will.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import UserError, is_disk_full
from .description import Description, create_or_check
from .index import Index, read_index
from .moments import ChannelMoments
from .shards import WriterLock, shard_numbers, write_shard

ROWS, BYTES, SECONDS = 32_768, 1 << 28, 120.0  # a shard is committed at the first of these


@dataclass(eq=False, slots=True)
class Place:
    """Shard, group of equal shapes in it, row in the group's tensors; -1 until it is known. Rows of equal content
    share one."""

    shard: int = -1
    group: int = -1
    row: int = -1

    def to_json(self) -> list[int]:
        return [self.shard, self.group, self.row]


@dataclass
class _Open:
    """The shard that is being gathered."""

    rows: list[tuple[Mapping[str, Any], Place | None]] = field(default_factory=list)
    groups: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    pieces: list[dict[str, list[np.ndarray]]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    moments: dict[str, ChannelMoments] = field(default_factory=dict)
    bytes: int = 0
    since: float = 0.0  # when its first row came


class StoreWriter:
    """One of any number of writers of a store. Not for several threads at once.

        with StoreWriter(folder, description) as writer:
            writer.add([{"key": "a.jpg"}, {"key": "b.jpg"}], {"mean": means})   # float16 (2, 4, 32, 32)

    Leaving the block commits what was gathered, unless memory or the disk failed while writing.

    Attributes:
        folder: the store's.
        description: its `store.json`.
        new, referred, skipped, bytes: rows and bytes that this writer has committed.
    """

    def __init__(
        self, folder: Path, description: Description, data: str = "", moments: Sequence[str] = ("mean",),
        rows_per_shard: int = ROWS, seconds_per_shard: float = SECONDS, root: str = "", moved: bool = False,
    ) -> None:
        """
        Args:
            description: what all rows have in common; the store must be new, or of the same kind and `about`.
            data: what the rows are made of, for the index.
            root: the folder that their keys are relative to; "" where keys name no files.
            moved: all rows that are there came from this root too, when it lay elsewhere.
            moments: the tensors `(channels, …)` whose moments are kept.
            rows_per_shard: rows of tensors after which a shard is committed; so is one of 256 MiB, and one whose first
                row has waited for `seconds_per_shard`, since a kill loses what is gathered.

        Raises:
            UserError: the folder holds something else, or rows that would not go together with these.
        """
        if rows_per_shard < 1:
            raise UserError(f"--rows-per-shard {rows_per_shard} is too small: give at least 1.")
        self.folder, self.data, self._root, self._moved = folder, data, root, moved
        self._moments, self._rows_per_shard, self._seconds = tuple(moments), rows_per_shard, seconds_per_shard
        self.description = create_or_check(folder, description)
        self._open = _Open()
        self._waiting: list[tuple[Mapping[str, Any], Place]] = []  # copies of what has not been added yet
        self.new = self.referred = self.skipped = self.bytes = 0
        self._broken = False
        self._lock = WriterLock(folder).__enter__()

    def read_index(self) -> Index:
        """What is committed, by whomever."""
        return read_index(self.folder, self.description)

    def add(
        self, rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, np.ndarray], places: Sequence[Place] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Sequence[Place]:
        """Add rows with tensors of their own.

        Args:
            rows: of each row "key", and whatever else the index shall say of it, in JSON's types.
            tensors: name → `(n, …)`. They are kept until the shard is committed: do not change them.
            places: objects to fill in; by default new ones.
            shapes: shapes that a reader needs besides those of the tensors, such as that of packed codes.

        Returns:
            The rows' places.

        Raises:
            UserError: a number is not finite, or the disk is full.
        """
        if any(len(values) != len(rows) for values in tensors.values()):
            raise ValueError(f"{len(rows)} rows; the tensors have {[len(values) for values in tensors.values()]}")
        for name, values in tensors.items():
            _refuse_infinite(name, values, rows)
        self._begin()
        places = places or [Place() for _ in rows]
        own = {name: values.shape[1:] for name, values in tensors.items()}
        group, now = self._group({**own, **(shapes or {})}), self._open
        for name, values in tensors.items():
            now.pieces[group].setdefault(name, []).append(values)
            now.bytes += values.nbytes
            if name in self._moments:
                now.moments.setdefault(name, ChannelMoments()).update(values)
        for number, (row, place) in enumerate(zip(rows, places, strict=True), start=now.counts[group]):
            place.group, place.row = group, number
            now.rows.append((row, place))
        now.counts[group] += len(rows)
        if sum(now.counts) >= self._rows_per_shard or now.bytes >= BYTES or self._is_due():
            self.commit()
        return places

    def refer(self, row: Mapping[str, Any], place: Place) -> None:
        """Add a row whose tensors are those at `place`: in this store already, or added or to be added here."""
        self._begin()
        self._waiting.append((row, place))
        self._commit_if_long()

    def skip(self, row: Mapping[str, Any]) -> None:
        """Note a file that has no tensors: "key", "size", "mtime_ns", "skipped" (the reason), and "reader" if it should
        be left alone until it, or what reads it, changes."""
        self._begin()
        self._open.rows.append((row, None))
        self._commit_if_long()

    def commit(self) -> None:
        """Commit what was gathered as a shard.

        Raises:
            UserError: the disk is full; the committed shards are untouched.
        """
        now = self._open
        ready = [(row, place) for row, place in self._waiting if place.row >= 0]
        if not now.rows and not ready:
            return
        self._open = _Open()
        self._waiting = [(row, place) for row, place in self._waiting if place.row < 0]
        entries = [*now.rows, *ready]
        tensors = {f"{name}.{g}": parts for g, group in enumerate(now.pieces) for name, parts in group.items()}
        head = {
            "store": self.description.fingerprint(), "data": self.data, "root": self._root, "moved": self._moved,
            "contents": sum(now.counts), "bytes": now.bytes, "groups": now.groups,
            "moments": {name: moments.to_json() for name, moments in now.moments.items()},
        }

        def lines(number: int) -> list[Mapping[str, Any]]:
            for _, place in now.rows:
                if place is not None:
                    place.shard = number
            return [row if place is None else {**row, "place": place.to_json()} for row, place in entries]

        try:
            written = write_shard(self.folder, head, tensors, lines)
        except BaseException as failure:
            self._broken = True
            if is_disk_full(failure):
                raise UserError(
                    f"The disk is full or a quota is reached while writing {self.folder}: free space and repeat the "
                    f"command, which goes on after the {len(shard_numbers(self.folder))} shards that are there."
                ) from failure
            raise
        self.bytes += written.bytes
        self.new += sum(now.counts)
        self.referred += len(ready)
        self.skipped += sum(place is None for _, place in now.rows)

    def close(self, failed: bool = False) -> None:
        """Commit and let go.

        Args:
            failed: commit nothing.
        """
        try:
            if not failed and not self._broken:
                self.commit()
        finally:
            self._lock.__exit__(None, None, None)

    def _group(self, shapes: dict[str, tuple[int, ...]]) -> int:
        now = self._open
        if shapes not in now.groups:
            now.groups.append(shapes)
            now.pieces.append({})
            now.counts.append(0)
        return now.groups.index(shapes)

    def _begin(self) -> None:
        if not self._open.since:
            self._open.since = time.monotonic()

    def _commit_if_long(self) -> None:
        if len(self._open.rows) + len(self._waiting) >= 8 * self._rows_per_shard or self._is_due():
            self.commit()

    def _is_due(self) -> bool:
        return time.monotonic() - self._open.since > self._seconds

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a second Ctrl-C the thread that writes may be inside `add`: what is not committed is encoded again.
        self.close(failed=isinstance(failure, (MemoryError, KeyboardInterrupt)))


def _refuse_infinite(name: str, values: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> None:
    if values.dtype.kind != "f" or not values.size:
        return
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        key = rows[int(np.argmin(finite))]["key"]
        raise UserError(f"The {name} of {key} is not finite in {values.dtype}: store it as float32 (--store-dtype "
                        "float32), and if it is not finite there either look at the weights.")
