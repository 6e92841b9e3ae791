"""What there is to encode: the files of a source that the store does not hold yet, and this process's share of them.

- `plan`: the images to read.
- `shares`: which of several processes takes which file.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.protocols import ImageSource, StoredImages
from ..errors import UserError
from .index import Index

@dataclass(frozen=True)
class Plan:
    """The work of one process.

    Attributes:
        indices: int64 `(n,)`, images of the source to read, in its order.
        unchanged: images that the store holds, of files that have not changed since.
        given_up: images that could not be read before, of files that have not changed since.
    """

    indices: np.ndarray
    unchanged: int
    given_up: int


def plan(source: ImageSource, index: Index, reader: str, part: int = 0, parts: int = 1) -> Plan:
    """Compare the source with what is committed. Files are looked at (size, last change), not opened.

    Args:
        reader: what images are read with; files that another reader could not read are tried again.
        part, parts: this process is number `part` of `parts`, which all see the same source.

    Raises:
        UserError: the store's rows come from other data with files of the same names.
    """
    stamps = stamps_of(source)
    mine = np.ones(len(source), bool)
    if parts > 1:
        mine = shares(stamps[:, 0], [source.key(i) for i in range(len(source))], parts) == part
    rows = {key: row for row, key in enumerate(index.keys)}
    _refuse_other_data(source, stamps, index, rows)
    todo, unchanged, given_up = [], 0, 0
    for i in np.flatnonzero(mine).tolist():
        key, stamp = source.key(i), (int(stamps[i, 0]), int(stamps[i, 1]))
        row, skipped = rows.get(key), index.skipped.get(key)
        if row is not None and (int(index.stamp[row, 0]), int(index.stamp[row, 1])) == stamp:
            unchanged += 1
        elif skipped is not None and (skipped.size, skipped.mtime_ns, skipped.reader) == (*stamp, reader):
            given_up += 1
        else:
            todo.append(i)
    return Plan(np.array(todo, np.int64), unchanged, given_up)


def stamps_of(source: ImageSource) -> np.ndarray:
    """int64 `(n, 2)`: bytes and nanoseconds of the last change of every file; -1 where it cannot be looked at. Images
    that are no files never change: 0."""
    stamps = np.zeros((len(source), 2), np.int64)
    if isinstance(source, StoredImages):
        for i in range(len(source)):
            try:
                stamps[i] = source.stored_stamp(i)
            except OSError:
                stamps[i] = -1
    return stamps


def shares(sizes: np.ndarray, keys: Sequence[str], parts: int) -> np.ndarray:
    """int64 `(n,)`: which of `parts` processes takes each file.

    A file's share follows from its size alone, so that copies meet in one process, and processes that look at a growing
    folder at different times agree. Shares differ as chance has it, by about √n. Only where one size is that of more
    than an eighth of a share (bitmaps, say) the file's key decides; a copy that lands in another share is encoded
    there too.
    """
    share = _mixed(sizes) % parts
    _, place, count = np.unique(sizes, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(count[place] > max(2, len(sizes) / (8 * parts))).tolist():
        share[i] = zlib.crc32(keys[i].encode("utf-8", "surrogateescape")) % parts
    return share


def _mixed(sizes: np.ndarray) -> np.ndarray:
    """int64 sizes → numbers as good as random (the finaliser of MurmurHash3), as int64 ≥ 0."""
    x = sizes.astype(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return (x >> np.uint64(33)).astype(np.int64)


def _refuse_other_data(source: ImageSource, stamps: np.ndarray, index: Index, rows: dict[str, int]) -> None:
    """A row's key is its path within the data, so two folders with a 1.jpg each must not share a store. Where the
    data's name has changed, a key whose file now has another size gives that away."""
    if not index.data or _stem(source.name) in {_stem(name) for name in index.data}:
        return
    for i in range(len(source)):
        row = rows.get(source.key(i))
        if row is not None and stamps[i, 0] not in (-1, index.stamp[row, 0]):
            raise UserError(
                f"The store was made of {', '.join(index.data)} and {source.name} has another file under the same name "
                f"({source.key(i)}): encode the folder that holds both, or give another --out."
            )


def _stem(name: str) -> str:
    """`000.tar + 12` has grown to `000.tar + 13`: that is no other data."""
    return name.rsplit(" + ", 1)[0]
