"""The published weight files of the networks that judge images: where they are looked for, and what is said when
one is missing.

- `MissingNetwork`: one sentence: which file, where to fetch it, where to put it.
- `NetworkFile`: a published file by its name, which ends in the first 8 hex digits of its SHA-256, and its address.
- `folders`: the search path, `$OMNILATENT_WEIGHTS`, then torch.hub's checkpoints.

Nothing is downloaded here: these files are large, and a measurement should not fetch half a gigabyte unasked.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

VARIABLE = "OMNILATENT_WEIGHTS"


class MissingNetwork(UserError):
    """A network's weights are not on this machine. There is no stand-in: fetch the file, or do without the metric."""


@dataclass(frozen=True)
class NetworkFile:
    """A published weight file, `stem-<8 hex digits>.pth`, and the address it is fetched from."""

    name: str
    url: str
    purpose: str  # what needs it, as the sentence begins: "LPIPS (vgg)"

    @property
    def digest(self) -> str:
        """The hex digits that the file's SHA-256 begins with, by its name."""
        return self.name.rsplit("-", 1)[1].removesuffix(".pth")

    def missing(self) -> str | None:
        """None where the file lies in the search path, else the sentence that says what to fetch."""
        if any((folder / self.name).is_file() for folder in folders()):
            return None
        return (f"{self.purpose} needs {self.name}, which is not in {' or '.join(map(str, folders()))}: "
                f"fetch {self.url} into that folder, or into one that {VARIABLE} names.")

    def path(self) -> Path:
        """The file in the search path, its SHA-256 checked against its name.

        Raises:
            MissingNetwork: it is nowhere.
            UserError: it is there and its bytes are others.
        """
        sentence = self.missing()
        if sentence is not None:
            raise MissingNetwork(sentence)
        found = next(folder / self.name for folder in folders() if (folder / self.name).is_file())
        digest = _sha256(found, found.stat().st_size, found.stat().st_mtime_ns)
        if not digest.startswith(self.digest):
            raise UserError(f"{found} is not the published file (its SHA-256 begins with {digest[:8]}, expected "
                            f"{self.digest}): fetch {self.url} again.")
        return found


def folders() -> list[Path]:
    """Where weight files are looked for, first to last."""
    named = os.environ.get(VARIABLE)
    return [*([Path(named).expanduser()] if named else []), Path(torch.hub.get_dir()) / "checkpoints"]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A third-party .pth as tensors alone: `weights_only=True`, so that it cannot run code.

    Raises:
        UserError: the file is damaged, or holds something other than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a weight file.") from None
    except Exception as failure:  # whatever the unpickler makes of foreign bytes
        sentence = f"{path} cannot be read as weights ({type(failure).__name__}): fetch the file again."
        raise UserError(sentence) from failure
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a state dictionary of tensors: give the published file.")
    return state


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Keyed by size and time of change, so that half a gigabyte is read once a process."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
