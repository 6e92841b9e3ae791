"""Rows' keys as names of files.

- `picture_names`: keys → paths that stay inside a folder.
- `sample_names`: keys → WebDataset's sample names, in which a dot ends the name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath


def picture_names(keys: Iterable[str], suffix: str) -> list[str]:
    """Relative paths, different for different keys: the key with `suffix` (".png") in place of its own.

    Two keys that differ in their suffix only keep it: a.jpg and a.tif become a.jpg.png and a.tif.png. What would lead
    out of the folder is taken out.
    """
    paths = [_inside(key) for key in keys]
    return _distinct([str(path.with_suffix(suffix)) for path in paths], [f"{path}{suffix}" for path in paths], suffix)


def sample_names(keys: Iterable[str]) -> list[str]:
    """Sample names for tar files, different for different keys: the key without its suffix; further dots of the last
    part become underscores, since WebDataset takes what follows the first for the name of a field."""
    paths = [_inside(key) for key in keys]
    short = [str(path.with_name(_undotted(path.stem))) for path in paths]
    return _distinct(short, [str(path.with_name(_undotted(path.name))) for path in paths], "")


def _inside(key: str) -> PurePosixPath:
    """The key as a relative path without any step upwards."""
    parts = key.replace("\\", "/").replace("\0", "_").split("/")
    kept = ["_" if part == ".." else part.replace(":", "_") for part in parts if part not in ("", ".")]
    return PurePosixPath(*kept) if kept else PurePosixPath("_")


def _undotted(name: str) -> str:
    return name.replace(".", "_")


def _distinct(short: list[str], long: list[str], suffix: str) -> list[str]:
    """The short name where only one has it, else the long one, with a number where even that is taken."""
    counts = Counter(short)
    taken: set[str] = set()
    names = []
    for brief, full in zip(short, long, strict=True):
        wanted = brief if counts[brief] == 1 else full
        name, number = wanted, 2
        while name in taken:
            name, number = f"{wanted.removesuffix(suffix)}-{number}{suffix}", number + 1
        taken.add(name)
        names.append(name)
    return names
