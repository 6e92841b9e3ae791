"""Images in tar files, WebDataset layout: any number of uncompressed shards, images beside other members.

- `index_tar`: where each image of a tar lies; only headers are read, once a file.
- `TarImages`: an image source over one tar or many; an image is one seek and one read.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import UserError
from .images import IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, read_image
from .names import Names

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")
_SIGNATURES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


def refuse_compressed(path: Path) -> None:
    """Raise for an archive that would have to be unpacked from its beginning for each image."""
    with path.open("rb") as file:
        compressed = file.read(8).startswith(_SIGNATURES)
    if compressed or path.name.lower().endswith(COMPRESSED):
        raise UserError(f"{path} is a compressed archive, whose images cannot be read one by one: unpack it first.")


def index_tar(path: Path) -> tuple[Names, np.ndarray]:
    """The images of a tar in its order.

    Returns:
        their member names, and int64 `(n, 2)`: offset of the contents and size in bytes. Of a member that is there
        twice the later one counts, as when unpacking. Links, sparse files and hidden names are left out.

    Raises:
        UserError: the file is no tar, is compressed, or ends or breaks before its last member.
    """
    try:
        status = path.stat()
        return _index(path.absolute(), status.st_mtime_ns, status.st_size)
    except OSError as failure:
        raise UserError(f"{path} cannot be read ({failure.strerror}): check the path and your rights.") from failure


@lru_cache(maxsize=4096)
def _index(path: Path, modified: int, length: int) -> tuple[Names, np.ndarray]:
    """`modified` and `length` are there for the cache: a tar that changed is read anew."""
    refuse_compressed(path)
    places: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # or the library keeps every header it has read
                name = str(PurePosixPath(member.name))  # "./a.jpg" is "a.jpg"
                if member.isreg() and not member.issparse() and _is_image(name):
                    places.pop(name, None)
                    places[name] = (member.offset_data, member.size)
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"{member.name} goes on beyond the end of the file")
            file.seek(tar.offset)  # the library takes a damaged header for the end, which is a block of zeros
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no member starts at byte {tar.offset}")
    except (tarfile.TarError, EOFError, ValueError) as failure:
        raise UserError(f"{path} is not a whole tar file ({failure}): copy it again or make it anew.") from failure
    return Names(places), np.array(list(places.values()), np.int64).reshape(-1, 2)


def _is_image(member: str) -> bool:
    parts = PurePosixPath(member)
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts.parts)
    return parts.suffix.lower() in IMAGE_SUFFIXES and not hidden


class TarImages:
    """The images of `tars` in order. The key of one is "shard.tar/member.jpg".

    Args:
        tars: paths.
        labels: what keys call each tar: its path relative to `root`.
        root: the folder that all lie in.
        name: what a report calls the whole.
    """

    def __init__(
        self, tars: Sequence[Path], labels: Sequence[str], root: Path, name: str, max_pixels: int = MAX_PIXELS
    ) -> None:
        assert len(set(labels)) == len(tars)
        self.name, self._root, self._max_pixels = name, str(root), max_pixels
        self._tars, self._labels = [str(tar) for tar in tars], list(labels)
        indexes = [index_tar(tar) for tar in tars]
        self._members = [members for members, _ in indexes]
        self._places = [places for _, places in indexes]
        self._ends = np.cumsum([len(places) for places in self._places])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, i: int) -> str:
        tar, member = self._locate(i)
        return f"{self._labels[tar]}/{self._members[tar][member]}"

    def read(self, i: int) -> np.ndarray:
        return self.decode(i, self.stored_bytes(i))

    def stored_root(self) -> str:
        return os.path.realpath(self._root)

    def stored_size(self, i: int) -> int:
        tar, member = self._locate(i)
        return int(self._places[tar][member, 1])

    def stored_digest(self, i: int, tail: int | None = None) -> bytes:
        """SHA-256 of the member's last `tail` bytes, or of all of it."""
        return hashlib.sha256(self._contents(i, tail)).digest()

    def stored_stamp(self, i: int) -> tuple[int, int]:
        tar, member = self._locate(i)
        return int(self._places[tar][member, 1]), os.stat(self._tars[tar]).st_mtime_ns

    def stored_bytes(self, i: int) -> bytes:
        try:
            return self._contents(i)
        except OSError as failure:
            raise UnreadableImage(self._full_name(i), f"cannot be read from its tar ({failure.strerror}): check that "
                                  "the tar is still there") from failure

    def decode(self, i: int, contents: bytes) -> np.ndarray:
        return read_image(io.BytesIO(contents), self._full_name(i), self._max_pixels)

    def _full_name(self, i: int) -> str:
        tar, member = self._locate(i)
        return f"{self._tars[tar]}/{self._members[tar][member]}"

    def _contents(self, i: int, tail: int | None = None) -> bytes:
        tar, member = self._locate(i)
        offset, size = map(int, self._places[tar][member])
        skip = 0 if tail is None else max(0, size - tail)
        with open(self._tars[tar], "rb") as file:  # opened for each image: forked workers may not share a position
            file.seek(offset + skip, os.SEEK_SET)
            return file.read(size - skip)

    def _locate(self, i: int) -> tuple[int, int]:
        """Index of the image → (index of its tar, index in it)."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        tar = int(np.searchsorted(self._ends, i, side="right"))
        return tar, i - (int(self._ends[tar - 1]) if tar else 0)
