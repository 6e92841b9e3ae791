"""Shards: how rows come to be in a store, whoever else writes, and whenever somebody pulls the plug.

- `write_shard`: tensors and index rows → shard NNNNN, all or nothing.
- `shard_numbers`, `shard_file`, `index_file`: what is there.
- `WriterLock`: says that a writer is alive; the only one alive sweeps up what killed ones have left.

The number is claimed by creating `NNNNN.safetensors`, which only one writer can, and the tensors are renamed onto it.
Then `NNNNN.jsonl` is renamed into place: that is the commit. Numbers may have gaps. A later row of a key counts,
"later" by number and then by line; a new number is above all that are there.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from .files import replace_text, sync_folder, temporaries, temporary_name, write_tensors

try:
    import fcntl
except ImportError:  # Windows: nothing is swept up, nothing else changes
    fcntl = None  # type: ignore[assignment]

FOLDER = "shards"
_SETTLED = 600.0  # seconds: what was begun so long ago, and not touched since, is never finished


class Written(NamedTuple):
    """A committed shard."""

    number: int
    bytes: int


def shard_file(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:05d}.safetensors"


def index_file(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:05d}.jsonl"


def shard_numbers(folder: Path) -> list[int]:
    """The committed shards, in order."""
    return _numbers(folder, ".jsonl")


def _numbers(folder: Path, suffix: str) -> list[int]:
    try:
        names = os.listdir(folder / FOLDER)
    except FileNotFoundError:
        return []
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def write_shard(
    folder: Path, head: Mapping[str, Any], tensors: Mapping[str, Sequence[np.ndarray]],
    rows: Callable[[int], Sequence[Mapping[str, Any]]],
) -> Written:
    """Write and commit one shard.

    Args:
        head: the index's first line.
        tensors: name → pieces along the first axis (see `write_tensors`); may be empty.
        rows: the index's other lines, given the number, which the rows' places name.

    Raises:
        OSError: the disk is full, for example; nothing of the shard stays.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / FOLDER / "shard")
    claimed = None
    try:
        size = write_tensors(temporary, tensors)
        number = _claim(folder)
        claimed = shard_file(folder, number)
        os.replace(temporary, claimed)
        sync_folder(claimed.parent)
        lines = [head, *rows(number)]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)  # ASCII: stray bytes escaped
        replace_text(index_file(folder, number), text)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if claimed is not None and not index_file(folder, number).exists():
            claimed.unlink(missing_ok=True)
        raise
    return Written(number, size + len(text))


def _claim(folder: Path) -> int:
    """Create the file of the lowest number above all others."""
    number = max([0, *(n + 1 for suffix in (".safetensors", ".jsonl") for n in _numbers(folder, suffix))])
    while True:
        try:
            os.close(os.open(shard_file(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return number
        except FileExistsError:  # another writer was faster
            number += 1


class WriterLock:
    """Held, shared, by every writer of a store while it lives; the system lets go of it when the process ends.

    Entering it sweeps up when no other writer holds it. Where the file system knows no such locks nothing is swept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._handle = folder, -1

    def __enter__(self) -> WriterLock:
        if fcntl is None:
            return self
        self._handle = os.open(self._folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep()
        except BlockingIOError:
            pass
        except OSError as failure:
            if failure.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            return self
        fcntl.flock(self._handle, fcntl.LOCK_SH)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _sweep(self) -> None:
        """Remove what killed writers left, unfinished files and numbers claimed without an index, but only after a
        while: not every file system shows the locks of other machines."""
        numbers = set(_numbers(self._folder, ".safetensors")) - set(shard_numbers(self._folder))
        left = [shard_file(self._folder, number) for number in numbers]
        for path in (*temporaries(self._folder), *temporaries(self._folder / FOLDER), *left):
            try:
                if time.time() - path.stat().st_mtime > _SETTLED:
                    path.unlink()
            except FileNotFoundError:
                pass
