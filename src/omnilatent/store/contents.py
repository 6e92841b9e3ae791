"""Which contents a store holds, so that equal files are encoded once.

- `Digests`: a sorted table of SHA-256 digests, which forked workers share.
- `Contents`: a digest → where its tensors lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .index import Index
from .writer import Place


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
