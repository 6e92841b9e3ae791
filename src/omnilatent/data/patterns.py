"""DATA as text → paths: comma-separated lists, {braces}, wildcards.

- `paths_of`: all existing paths that a text stands for.
- `WORDS`: what DATA may be beside paths.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ..errors import UserError

WORDS = ("synthetic", "photos", "digits", "mnist")  # an existing path of such a name goes before
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def paths_of(text: str) -> list[Path]:
    """The paths that `text` names, in its order; an existing path is taken as it stands, commas and braces included.

    Raises:
        UserError: a path does not exist, or a pattern matches nothing.
    """
    whole = Path(text).expanduser()
    if text and whole.exists():
        return [whole]
    paths: list[Path] = []
    for part in _split_commas(text):
        for name in _expand_braces(part):
            paths += _existing(name)
    return paths


def _existing(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if name and path.exists():
        return [path]
    if glob.has_magic(name):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"The pattern {name} matches no file: check it, and quote it if the shell expands it.")
        return found
    raise UserError(f"{name or 'An empty path'} does not exist: give a folder, an image, a .tar or several, "
                    f"{', '.join(map(repr, WORDS[:-1]))} or {WORDS[-1]!r}.")


def _split_commas(text: str) -> list[str]:
    """Split at the commas outside braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _expand_braces(text: str) -> list[str]:
    """`{000..012}` counts with its leading zeros, `{a,b}` lists; several braces multiply."""
    braces = _BRACES.search(text)
    if braces is None:
        return [text]
    counted = _RANGE.fullmatch(braces[1])
    if counted:
        first, last = int(counted[1]), int(counted[2])
        if last < first:
            raise UserError(f"{braces[0]} in {text} counts backwards: write {{{counted[2]}..{counted[1]}}}.")
        choices = [str(number).zfill(len(counted[1])) for number in range(first, last + 1)]
    else:
        choices = braces[1].split(",")
    rests = _expand_braces(text[braces.end() :])
    return [text[: braces.start()] + choice + rest for choice in choices for rest in rests]
