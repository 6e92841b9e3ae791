"""What the pages say, as data: code blocks, tables, links; and how a documented command becomes a short one.

- `PAGES`, `text_of`: the pages.
- `bash_lines`, `blocks`: a page's code.
- `Row`, `rows`: the tables of docs/commands.md.
- `shortened`: a documented command line → the arguments that a test runs.
- `seed_lines`: the command lines in a seed's code blocks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
PLACES = {"DATA": "photos/", "RUN": "runs/mine", "NAME": "runs/mine", "STORE": "latents/"}
# What makes a documented command take seconds. An option that the command has already gets this value instead.
TRAIN = ("--steps 2 --batch-size 2 --size 32 --workers 0 --validation-images 1 --widths 8 8 8 8 --layers 1 "
         "--norm-groups 4")
SHORT = {
    "train": TRAIN,
    **dict.fromkeys(("train lgq", "train fsq", "train simvq", "train vq"), f"{TRAIN} --perceptual laplacian"),
    **dict.fromkeys(("train omni", "train omni-coco", "train debug-omni"), "--steps 2 --batch-size 2 --workers 0 --validation-examples 2 "
                    "--hidden-dim 32 --num-layers 1 --num-heads 2 --image-size 32 32 --mel-frames 16"),
    **dict.fromkeys(("evaluate runs/omni", "evaluate runs/any"), "--count 4"),
    "bench omni": "--calls 1 --batch-size 2 --hidden-dim 32 --num-layers 2 --num-heads 2",
    "bench runs/omni": "--calls 1 --batch-size 2",
    "train gaussian": "--steps 2 --batch-size 2 --workers 0 --data digits",
    "resume": "--steps 3 --workers 0",
    "compare": "--size 32 --limit 2 --no-health --no-speed",
    "evaluate": "--size 32 --limit 2 --no-health --no-speed",
    "demo": "--steps 1 --data photos/",
    "encode": "--size 32 --workers 0",
    "clone": "--data synthetic --most 40 --size 64 --neurons 8 --candidates 32 --layers 1 --sites 500 --sweeps 1 --views 1 --shown 1",
}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    code: str


def blocks(text: str) -> list[Block]:
    return [Block(*match.groups()) for match in _BLOCK.finditer(text)]


def bash_lines(code: str) -> Iterator[str]:
    """The command lines of a block: continued lines joined, comments and double spaces removed."""
    for line in code.replace("\\\n", " ").splitlines():
        line = re.sub(r"(?:^|\s+)#.*$", "", line)
        if line.strip():
            yield " ".join(line.split())


class Row(NamedTuple):
    """One row of docs/commands.md: the seed's line, ours, and its state."""

    seed: str
    ours: str
    state: str


def rows(text: str) -> list[Row]:
    """The rows of all tables with the three columns."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[1].startswith("`"):
            found.append(Row(cells[0], cells[1].strip("`"), cells[2]))
    return found


def shortened(line: str) -> list[str]:
    """The arguments after `omnilatent` of a documented line, with the places of the sandbox and short options.

    A line for several processes (torchrun … -m omnilatent …) runs as one process: the command is the same.
    """
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    assert words[0] == "omnilatent", f"{line!r} is no command of ours"
    words = [re.sub(r"\b[A-Z]{3,}\b", lambda match: PLACES.get(match[0], match[0]), word) for word in words[1:]]
    kinds = ["resume"] if "--resume" in words else [" ".join(words[:2]), words[0]]
    kind = next((kind for kind in kinds if kind in SHORT), None)
    return words if "--help" in words or kind is None else _with(words, shlex.split(SHORT[kind]))


def _with(words: list[str], options: list[str]) -> list[str]:
    """`words` with `options` set: those there already are taken out with their values first."""
    for option in (word for word in options if word.startswith("--")):
        if option in words:
            at = words.index(option)
            end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
            words = words[:at] + words[end:]
    return words + options


def seed_lines(text: str) -> list[str]:
    """The command lines in a seed's bash blocks, each once."""
    lines = [line for block in blocks(text) if block.language == "bash" for line in bash_lines(block.code)]
    return list(dict.fromkeys(lines))
