"""Idx files, in which MNIST and its relatives come: a header, then bytes.

- `read_idx`: one file, plain, .gz or .xz, as an array.
- `find_idx`: a file of a folder by its name without the suffix, whichever it has.

Header, big-endian (http://yann.lecun.com/exdb/mnist): two zero bytes, a type (8 is uint8), the number of dimensions,
then each as a 32-bit number.
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import UserError

SUFFIXES = ("", ".gz", ".xz")
IMAGES = "idx3-ubyte"  # what the name of a file of images ends with, before the suffix
LABELS = "idx1-ubyte"
_UINT8 = 8


def is_idx(path: Path) -> bool:
    """Whether a file's name says that it holds images in idx."""
    return path.name.lower().removesuffix(".gz").removesuffix(".xz").endswith(IMAGES)


def find_idx(folder: Path, name: str) -> Path | None:
    """The file `name`, `name`.gz or `name`.xz, or None."""
    return next((file for file in (folder / f"{name}{suffix}" for suffix in SUFFIXES) if file.is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of bytes with so many dimensions, 3 for images and 1 for labels.

    How it is compressed is told by its first bytes, not by its name.

    Returns:
        uint8, in the shape that the header states.

    Raises:
        UserError: the file is missing, cut short, too long, no idx, or of another type or number of dimensions.
    """
    try:
        raw = path.read_bytes()
    except OSError as failure:
        raise UserError(f"{path} cannot be read ({failure.strerror}): check the path and your rights.") from failure
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        elif raw[:6] == b"\xfd7zXZ\0":
            raw = lzma.decompress(raw)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as failure:
        raise UserError(f"{path} is damaged or cut short ({failure}): copy or download it again.") from failure
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:3] != bytes([0, 0, _UINT8]):
        raise UserError(f"{path} is no idx file of bytes (it begins with {raw[:4].hex(' ') or 'nothing'}, expected "
                        f"00 00 08 {dimensions:02}): copy or download it again.")
    if raw[3] != dimensions:
        what = {1: "labels", 3: "images"}
        raise UserError(f"{path} has {raw[3]} dimensions, and {what.get(dimensions, 'these')} have {dimensions}: give "
                        "the file that its name promises.")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) - start != math.prod(shape) or 0 in shape:
        raise UserError(f"{path} states {' × '.join(map(str, shape))} values and holds {len(raw) - start}: it is "
                        "damaged or cut short; copy or download it again.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
