"""DATA → images: one kind of argument everywhere.

- `open_images`: a folder, an image, tars, videos, idx files, a list or pattern of these, or a word.
- `JoinedImages`, `JoinedFiles`: several sources one after the other. (Parts of one: `split` and `subset`, splits.py.)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from ..errors import UserError
from .digits import embedded_digits, holds_idx, mnist, open_idx
from .folders import ImageFiles, list_files
from .idx import is_idx
from .images import IMAGE_SUFFIXES, MAX_PIXELS
from .patterns import WORDS, paths_of
from .photos import demo_photos
from .protocols import ImageSource, StoredImages
from .structured import StructuredImages
from .tars import COMPRESSED, TarImages, refuse_compressed
from .video import VIDEO_SUFFIXES, VideoFrames


def open_images(data: str | Path, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Open DATA.

    Args:
        data: a folder (any depth; hidden files are left out), an image, a .tar, a video, a folder that holds .tar
            files or videos and no images, MNIST's idx files or a folder of them, several of these as a pattern
            ("shards/{000..012}.tar", "*.tar") or separated by commas; or a word: `synthetic`, `photos`, `digits`
            (scikit-learn's) or `mnist` (downloaded once). An existing path of that name goes before a word.
        max_pixels: larger images count as unreadable.

    Raises:
        UserError: it does not exist, holds no image, or is of another kind.
    """
    text = str(data)
    if text in WORDS and not os.path.lexists(text):
        return _open_word(text, max_pixels)
    paths = paths_of(text)
    parts: list[ImageSource] = []
    for kind, run in groupby(paths, _kind):
        group = list(run)
        if kind == "folder":
            parts += [_open_folder(path, max_pixels) for path in group]
        elif kind == "tar":
            parts.append(_open_tars(group, max_pixels))
        elif kind == "video":
            parts += [VideoFrames(path, max_pixels) for path in group]
        elif kind == "idx":
            parts += [open_idx(path) for path in group]
        else:
            root = _common_folder(group)
            parts.append(ImageFiles(root, _relative(group, root), _name_of(group), max_pixels))
    source = joined(parts, _name_of(paths))
    if not len(source):
        raise UserError(f"{text} holds no image: give tars with {_EXAMPLES} members.")
    return source


_EXAMPLES = ".jpg, .png, .webp, .tif or .bmp"


def _open_word(word: str, max_pixels: int) -> ImageSource:
    if word in ("digits", "mnist"):
        return embedded_digits() if word == "digits" else mnist()
    return StructuredImages() if word == "synthetic" else demo_photos(max_pixels)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if is_idx(path):
        return "idx"
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "tar"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if path.name.lower().endswith(COMPRESSED):
        refuse_compressed(path)
    raise UserError(f"{path} is neither a folder, an image, a video nor a .tar: give one of these, or convert it to PNG.")


def _open_folder(folder: Path, max_pixels: int) -> ImageSource:
    if holds_idx(folder):
        return open_idx(folder)
    files = list_files(folder)
    images = [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
    name = folder.resolve().name or str(folder)
    if images:
        return ImageFiles(folder, images, name, max_pixels)
    tars = [file for file in files if file.lower().endswith(".tar")]
    if tars:
        return TarImages([folder / tar for tar in tars], tars, folder, name, max_pixels)
    videos = [file for file in files if Path(file).suffix.lower() in VIDEO_SUFFIXES]
    if videos:
        return joined([VideoFrames(folder / video, max_pixels) for video in videos], name)
    if (folder / "store.json").is_file():  # store/ stands above this room
        raise UserError(f"{folder} is a store, not a folder of images: give the images it was made from, or decode it "
                        f"first with 'omnilatent decode {folder} --out PICTURES'.")
    suffixes = Counter(Path(file).suffix.lower() or "no suffix" for file in files)
    instead = ", ".join(f"{count} with {suffix}" for suffix, count in suffixes.most_common(3))
    raise UserError(
        f"{folder} holds no image ({'files: ' + instead if files else 'it is empty'}): give a folder with {_EXAMPLES} "
        "files, with .tar shards or with videos; other formats, HEIC for example, must be converted first."
    )


def _open_tars(tars: list[Path], max_pixels: int) -> ImageSource:
    root = _common_folder(tars)
    return TarImages(tars, _relative(tars, root), root, _name_of(tars), max_pixels)


def _common_folder(files: list[Path]) -> Path:
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def _relative(files: list[Path], root: Path) -> list[str]:
    """Names relative to `root`, in order. A file that was named twice is an error."""
    names = [file.absolute().relative_to(root).as_posix() for file in files]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{root / twice[0]} is given twice: name it once.")
    return names


def _name_of(paths: Sequence[Path]) -> str:
    """What a report calls several paths: the first and how many more, "000.tar + 12"."""
    first = paths[0].resolve().name or str(paths[0])
    return first if len(paths) == 1 else f"{first} + {len(paths) - 1}"


def joined(parts: Sequence[ImageSource], name: str) -> ImageSource:
    """One source of several; of one that one itself."""
    if len(parts) == 1:
        return parts[0]
    files = all(isinstance(part, StoredImages) for part in parts)
    return JoinedFiles(parts, name) if files else JoinedImages(parts, name)


def has_video(source: ImageSource) -> bool:
    """Whether any of it is frames of a video."""
    parts = [part for _, part in source.parts] if isinstance(source, JoinedImages) else [source]
    return any(isinstance(part, VideoFrames) for part in parts)


class JoinedImages:
    """Sources one after the other. Keys begin with the part's name, and a number where two share it."""

    def __init__(self, parts: Sequence[ImageSource], name: str) -> None:
        self.name, self._parts = name, list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        seen: Counter[str] = Counter()
        self._labels: list[str] = []
        for part in parts:
            seen[part.name] += 1
            self._labels.append(part.name if seen[part.name] == 1 else f"{part.name}-{seen[part.name]}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, i: int) -> str:
        part, inner = self._locate(i)
        return f"{self._labels[part]}/{self._parts[part].key(inner)}"

    def read(self, i: int) -> np.ndarray:
        part, inner = self._locate(i)
        return self._parts[part].read(inner)

    @property
    def parts(self) -> list[tuple[int, ImageSource]]:
        """(index of its first image, source) of each."""
        return [(int(end) - len(part), part) for end, part in zip(self._ends, self._parts, strict=True)]

    def _locate(self, i: int) -> tuple[int, int]:
        """Index of the image → (index of its part, index in it)."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        part = int(np.searchsorted(self._ends, i, side="right"))
        return part, i - (int(self._ends[part - 1]) if part else 0)


class JoinedFiles(JoinedImages):
    """Sources of files one after the other."""

    def stored_root(self) -> str:
        return ", ".join(part.stored_root() for part in self._parts if isinstance(part, StoredImages))

    def stored_size(self, i: int) -> int:
        part, inner = self._stored(i)
        return part.stored_size(inner)

    def stored_digest(self, i: int, tail: int | None = None) -> bytes:
        """SHA-256 of the file's last `tail` bytes, or of all of it."""
        part, inner = self._stored(i)
        return part.stored_digest(inner, tail)

    def stored_stamp(self, i: int) -> tuple[int, int]:
        part, inner = self._stored(i)
        return part.stored_stamp(inner)

    def stored_bytes(self, i: int) -> bytes:
        part, inner = self._stored(i)
        return part.stored_bytes(inner)

    def decode(self, i: int, contents: bytes) -> np.ndarray:
        part, inner = self._stored(i)
        return part.decode(inner, contents)

    def _stored(self, i: int) -> tuple[StoredImages, int]:
        part, inner = self._locate(i)
        stored = self._parts[part]
        assert isinstance(stored, StoredImages)  # `joined` has looked
        return stored, inner
