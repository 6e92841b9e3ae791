"""Images in folders.

- `list_files`: everything under a folder, sorted, safe against loops of links.
- `ImageFiles`: an image source over files under one root.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..errors import UserError
from .images import MAX_PIXELS, read_bytes, read_image
from .names import Names


def list_files(folder: Path) -> list[str]:
    """Paths under `folder`, relative with forward slashes, sorted. Names that start with a dot are left out.

    Links to folders are followed; a folder that is reached twice, through a loop or by two ways, counts once.

    Raises:
        UserError: a subfolder cannot be listed.
    """
    return sorted(_walk(str(folder), "", set()))


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Depth first with its own stack, so that real folders nested a thousand deep do not end it."""
    stack = [(folder, prefix)]
    while stack:
        folder, prefix = stack.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as failure:
            raise UserError(
                f"{folder} cannot be listed ({failure.strerror}): give yourself the right to read it, or move it away."
            ) from failure
        if (status.st_dev, status.st_ino) in seen and status.st_ino:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in reversed(entries):
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, which is as broken as one to nowhere
                is_folder = is_file = False
            if is_folder:
                stack.append((entry.path, f"{prefix}{entry.name}/"))
            elif is_file or entry.is_symlink():  # a broken link is an image that cannot be read; pipes are none
                yield prefix + entry.name


class ImageFiles:
    """Image files under `root`, in the order given. The key of a file is its path relative to `root`."""

    def __init__(self, root: Path, files: Iterable[str], name: str, max_pixels: int = MAX_PIXELS) -> None:
        self.name = name
        self._root, self._files, self._max_pixels = str(root), Names(files), max_pixels

    def __len__(self) -> int:
        return len(self._files)

    def key(self, i: int) -> str:
        return self._files[i]

    def read(self, i: int) -> np.ndarray:
        path = self._path(i)
        return read_image(path, str(path), self._max_pixels)

    def stored_root(self) -> str:
        return os.path.realpath(self._root)

    def stored_size(self, i: int) -> int:
        return self._path(i).stat().st_size

    def stored_digest(self, i: int, tail: int | None = None) -> bytes:
        """SHA-256 of the file's last `tail` bytes, or of all of it."""
        with self._path(i).open("rb") as file:
            if tail is None:
                return hashlib.file_digest(file, "sha256").digest()
            file.seek(-min(tail, os.fstat(file.fileno()).st_size), os.SEEK_END)
            return hashlib.sha256(file.read(tail)).digest()

    def stored_stamp(self, i: int) -> tuple[int, int]:
        status = self._path(i).stat()
        return status.st_size, status.st_mtime_ns

    def stored_bytes(self, i: int) -> bytes:
        path = self._path(i)
        return read_bytes(path, str(path))

    def decode(self, i: int, contents: bytes) -> np.ndarray:
        return read_image(io.BytesIO(contents), str(self._path(i)), self._max_pixels)

    def _path(self, i: int) -> Path:
        return Path(self._root, self._files[i])
