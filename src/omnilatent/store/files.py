"""Files that are whole or not there, and one shard's tensors as such a file.

- `replace_text`: a small text file.
- `write_tensors`: arrays in pieces → a .safetensors file, without joining the pieces in memory.
- `temporary_name`, `temporaries`: names of unfinished files.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8, "I8": np.int8, "U16": np.uint16,
          "I16": np.int16, "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "BOOL": np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_ALIGNED = 64  # bytes: where the data begin, so that mapped arrays are aligned
_UNFINISHED = ".writing-"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else takes and that readers pass over."""
    return path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")


def temporaries(folder: Path) -> Iterator[Path]:
    """The unfinished files in `folder`, whoever writes or wrote them."""
    return folder.glob(f"{_UNFINISHED}*")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system offers that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse; their rename is their promise
        pass
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, only_new: bool = False) -> bool:
    """Write `text` to `path`, as a whole or not at all.

    Args:
        only_new: leave a file that is there, also one that comes to be in this instant, as it is.

    Returns:
        Whether it was written.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if not only_new:
            os.replace(temporary, path)
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links: two writers in this very instant are not told apart
                if path.exists():
                    return False
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def write_tensors(path: Path, tensors: Mapping[str, Sequence[np.ndarray]]) -> int:
    """Write a .safetensors file and flush it to the disk.

    The layout is safetensors' own: the length of the head as a 64-bit integer, the head in JSON (filled up with
    spaces), then the data (https://github.com/huggingface/safetensors#format).

    Args:
        tensors: name → pieces `(n_i, …)` of one type and shape, which follow one another along the first axis.

    Returns:
        Bytes written.

    Raises:
        ValueError: pieces do not fit together, or their type has no name in the format.
    """
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, pieces in tensors.items():
        first = pieces[0]
        if any(piece.dtype != first.dtype or piece.shape[1:] != first.shape[1:] for piece in pieces):
            raise ValueError(f"the pieces of {name} differ in type or shape: {[(p.dtype, p.shape) for p in pieces]}")
        if first.dtype not in _NAMES:
            raise ValueError(f"{name} is {first.dtype}; a store takes {', '.join(map(str, _NAMES))}")
        size = sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *first.shape[1:]]
        head[name] = {"dtype": _NAMES[first.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(head).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for pieces in tensors.values():
            for piece in pieces:
                file.write(memoryview(np.ascontiguousarray(piece)).cast("B") if piece.size else b"")
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset
