"""A million file names that forked workers share.

- `Names`: an immutable sequence of strings in two arrays. A list of strings would be copied into every worker page
  by page, because reading an object writes its reference count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


class Names:
    """A sequence of strings; bytes that are not UTF-8 in file names survive (surrogateescape)."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        return self._text[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
