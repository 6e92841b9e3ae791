"""What there is to encode: the files of a source that the store does not hold yet, and this process's share of them;
and, once they are read, which contents it holds already, so that equal files are encoded once.

- `plan`: the images to read.
- `shares`: which of several processes takes which file.
- `root_of`: the folder that a source's keys are relative to.
- `Digests`: a sorted table of SHA-256 digests, which forked workers share.
- `Contents`, `Content`: a digest → where its tensors lie.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..data.protocols import ImageSource, StoredImages
from ..data.workers import own_cores
from ..errors import UserError
from .index import Index
from .writer import Place


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


def plan(
    source: ImageSource, index: Index, reader: str, part: int = 0, parts: int = 1, moved: bool = False
) -> Plan:
    """Compare the source with what is committed. Files are looked at (size, last change), not opened.

    Args:
        reader: what images are read with; files that another reader could not read are tried again.
        part, parts: this process is number `part` of `parts`, which all see the same source.
        moved: the source is what the store was made of, at another place.

    Raises:
        UserError: the store holds rows of other files with the same names, and `moved` is not given.
    """
    stamps = stamps_of(source)
    mine = np.ones(len(source), bool)
    if parts > 1:
        mine = shares(stamps[:, 0], [source.key(i) for i in range(len(source))], parts) == part
    rows = {key: row for row, key in enumerate(index.keys)}
    if not moved:
        _refuse_other_data(source, stamps, mine, index, rows)
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
    folder at different times agree, but for common sizes: repeat the command when the folder is complete. Shares differ as chance has it, by about √n. Only where one size is that of more
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


def root_of(source: ImageSource) -> str:
    """The folder that the keys of a source of files are relative to, links resolved; "" of other sources."""
    return source.stored_root() if isinstance(source, StoredImages) else ""


def _refuse_other_data(
    source: ImageSource, stamps: np.ndarray, mine: np.ndarray, index: Index, rows: dict[str, int]
) -> None:
    """A row's key is its path within the data, so two folders with a 1.jpg each must not share a store. A folder that
    was moved or copied may: files of another root than their row's are the same if size and time of change are, or if
    size and SHA-256 are, for which the files of this process's share are read."""
    if not isinstance(source, StoredImages):
        return
    root = source.stored_root()
    elsewhere = np.array([place != root for place in index.roots], bool)
    if not elsewhere.any():
        return
    suspects = []
    for i in range(len(source)):
        row = rows.get(source.key(i))
        if row is None or stamps[i, 0] < 0 or not elsewhere[index.root[row, 0]]:
            continue
        if stamps[i, 0] != index.stamp[row, 0]:
            raise _other_file(source, i, index, row)
        if stamps[i, 1] != index.stamp[row, 1] and mine[i]:
            suspects.append((i, row))

    def differs(suspect: tuple[int, int]) -> bool:
        try:
            return source.stored_digest(suspect[0]) != index.digest[suspect[1]].tobytes()
        except OSError:  # read again by a worker, which says why it cannot
            return False

    with ThreadPoolExecutor(own_cores()) as pool:
        for begin in range(0, len(suspects), 256):  # the first that differs ends it
            some = suspects[begin : begin + 256]
            for (i, row), other in zip(some, pool.map(differs, some), strict=True):
                if other:
                    raise _other_file(source, i, index, row)


def _other_file(source: ImageSource, i: int, index: Index, row: int) -> UserError:
    before = index.roots[int(index.root[row, 0])] or ", ".join(index.data)
    return UserError(
        f"The store's row {source.key(i)} was made of a file in {before}, and the file of that name in "
        f"{root_of(source)} is another: encode the folder that holds both, give another --out, or, if this is the "
        "same folder at a new place, add --moved."
    )


class Digests:
    """SHA-256 digests uint8 `(n, 32)`, looked up by bisection of their first 8 bytes."""

    def __init__(self, digests: np.ndarray) -> None:
        heads = np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
        self._rows = np.argsort(heads, kind="stable")
        self._heads, self._digests = heads[self._rows], digests

    def find(self, digest: bytes) -> int | None:
        """Its row, or None."""
        head = np.uint64(int.from_bytes(digest[:8], "big"))
        at = int(np.searchsorted(self._heads, head))
        while at < len(self._heads) and self._heads[at] == head:
            row = int(self._rows[at])
            if self._digests[row].tobytes() == digest:
                return row
            at += 1
        return None


class Content(NamedTuple):
    """Where the tensors of a content lie, or will, and the size of its image."""

    place: Place
    size: tuple[int, int]


class Contents:
    """Contents that are committed, and those of this run.

    Attributes:
        known: the committed ones' digests.
    """

    def __init__(self, index: Index) -> None:
        self.known = Digests(index.digest)
        self._place, self._size = index.place, index.image
        self._new: dict[bytes, Content] = {}

    def find(self, digest: bytes) -> Content | None:
        if digest in self._new:
            return self._new[digest]
        row = self.known.find(digest)
        if row is None:
            return None
        height, width = self._size[row].tolist()
        return Content(Place(*self._place[row].tolist()), (height, width))

    def begin(self, digest: bytes, size: tuple[int, int]) -> Content:
        """Note a content that is about to be encoded."""
        self._new[digest] = content = Content(Place(), size)
        return content
