"""What a source of images is to those who use it.

- `ImageSource`: what every source offers.
- `StoredImages`: what a source of files offers besides.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


class ImageSource(Protocol):
    """A sequence of images. It holds no open file, so it can be pickled and shared with forked workers."""

    name: str  # what a report calls it

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Unique: the path relative to the folder, or "shard.tar/member.jpg"."""

    def read(self, i: int) -> np.ndarray:
        """uint8 `(h, w, 3)` RGB; raises `UnreadableImage`."""


@runtime_checkable
class StoredImages(Protocol):
    """What a source of files offers besides `ImageSource`, so that copies and changes are found without decoding."""

    def stored_root(self) -> str:
        """The folder that keys are relative to, links resolved; of several sources all of theirs. Files of equal keys
        are the same file only if this is equal too."""

    def stored_size(self, i: int) -> int:
        """Bytes of the file."""

    def stored_digest(self, i: int, tail: int | None = None) -> bytes:
        """SHA-256 of its last `tail` bytes, or of all of it."""

    def stored_stamp(self, i: int) -> tuple[int, int]:
        """(bytes of the file, nanoseconds of its last change, those of its tar in one); a change of the file changes
        it. Raises OSError."""

    def stored_bytes(self, i: int) -> bytes:
        """The file's contents; raises `UnreadableImage`."""

    def decode(self, i: int, contents: bytes) -> np.ndarray:
        """What `read` gives, of contents that `stored_bytes` has read."""
