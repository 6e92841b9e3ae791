"""Whether held-out images are really held out.

- `repeated`: how many images of one source lie byte for byte in another.
"""

from __future__ import annotations

from collections import defaultdict

from .protocols import ImageSource


def repeated(held_out: ImageSource, training: ImageSource) -> int:
    """How many images of `held_out` are also in `training`, as files of equal bytes.

    Only files of equal size are read. Sources that store no files (`synthetic`) repeat nothing; re-encoded or resized
    copies are not found. A file that cannot be read repeats nothing.
    """
    if not all(hasattr(source, "stored_digest") for source in (held_out, training)):
        return 0
    by_size: dict[int, list[int]] = defaultdict(list)
    for i in range(len(training)):
        by_size[_size(training, i)].append(i)
    count = 0
    for i in range(len(held_out)):
        rivals = by_size.get(_size(held_out, i), [])
        count += any(_digest(held_out, i) == _digest(training, rival) != b"" for rival in rivals)
    return count


def _size(source: ImageSource, i: int) -> int:
    try:
        return source.stored_size(i)
    except OSError:
        return -1


def _digest(source: ImageSource, i: int) -> bytes:
    try:
        return source.stored_digest(i)
    except OSError:
        return b""
