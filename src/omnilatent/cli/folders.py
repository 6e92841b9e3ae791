"""Folders that a command reads and writes, looked at before it works for hours and before NumPy is imported.

- `check_data`: refuse DATA that does not exist.
- `check_writable`: refuse a place in which nothing can be made. `check_file`: the same for a file to write.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..data.patterns import WORDS, paths_of
from ..errors import UserError


def check_data(data: str) -> None:
    """Look for the paths that `data` stands for; whether they hold images is found out when they are opened.

    Raises:
        UserError: one does not exist.
    """
    if data not in WORDS:
        paths_of(data)


def check_writable(folder: Path, option: str = "--out") -> None:
    """Look at `folder`, or at its nearest parent that exists, without making anything.

    Raises:
        UserError: that is a file, nothing may be written into it, or the name is not text.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in str(folder)):
        raise UserError(f"{option} {folder} holds bytes that are not UTF-8, which TensorBoard refuses: choose another.")
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{option} {folder}: {there} is a file: give a folder.")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{option} {folder}: nothing may be written into {there}: choose another folder.")


def check_file(file: Path, option: str) -> None:
    """Look at where a file is to be written, as `check_writable` at its folder, which is made later if it is not there.

    Raises:
        UserError: as there, or it is a folder.
    """
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder: give a file, such as {file / 'results.json'}.")
    check_writable(file.parent, option)
