"""Parts of an image source.

- `subset`: chosen images of a source.
- `split`: a training part and a held-out part that share no picture and stay put when files are added. Of a video the
  end is held out, never frames among others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from ..errors import UserError
from .keyed import draws, unit
from .protocols import ImageSource, StoredImages
from .sources import JoinedImages, has_video
from .video import VideoFrames

_TAIL = 4096  # bytes: the end of a compressed picture differs where its header and size do not


class _Subset:
    def __init__(self, source: ImageSource, indices: Sequence[int], name: str) -> None:
        self.name, self._source = name, source
        self._indices = np.array(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, i: int) -> str:
        return self._source.key(int(self._indices[i]))

    def read(self, i: int) -> np.ndarray:
        return self._source.read(int(self._indices[i]))


class _StoredSubset(_Subset):
    """A subset of files: what is known of files stays known, so that it can be split again."""

    def stored_root(self) -> str:
        return self._source.stored_root()  # type: ignore[attr-defined]

    def stored_size(self, i: int) -> int:
        return self._source.stored_size(int(self._indices[i]))  # type: ignore[attr-defined]

    def stored_digest(self, i: int, tail: int | None = None) -> bytes:
        return self._source.stored_digest(int(self._indices[i]), tail)  # type: ignore[attr-defined]

    def stored_stamp(self, i: int) -> tuple[int, int]:
        return self._source.stored_stamp(int(self._indices[i]))  # type: ignore[attr-defined]

    def stored_bytes(self, i: int) -> bytes:
        return self._source.stored_bytes(int(self._indices[i]))  # type: ignore[attr-defined]

    def decode(self, i: int, contents: bytes) -> np.ndarray:
        return self._source.decode(int(self._indices[i]), contents)  # type: ignore[attr-defined]


def subset(source: ImageSource, indices: Iterable[int], name: str | None = None) -> ImageSource:
    """The images at `indices`, in that order.

    Raises:
        IndexError: an index outside the source.
    """
    chosen = [int(i) for i in indices]
    outside = [i for i in chosen if not 0 <= i < len(source)]
    if outside:
        raise IndexError(f"image {outside[0]} of {len(source)} in {source.name}")
    kind = _StoredSubset if isinstance(source, StoredImages) else _Subset
    return kind(source, chosen, source.name if name is None else name)


def split(
    source: ImageSource, held_out: float = 0.1, seed: int = 0, minimum: int = 1
) -> tuple[ImageSource, ImageSource]:
    """Divide a source in two by a hash of (seed, key).

    An image's side depends on its own key alone, so adding or removing files moves no other image, with two
    exceptions. Files of equal content go together, to the side of the one whose hash is smallest: only files of
    equal size are compared, first by their last 4 KiB, then whole. (Re-encoded or resized copies are not found.)
    And in a small source, images with the smallest hashes are moved until both sides hold enough.

    Neighbouring frames of a video are nearly copies of each other. So the last stretch of each video is held out, and a
    second before it is on neither side.

    Args:
        held_out: the expected fraction of held-out images, in (0, 1).
        minimum: the fewest images that are held out; the training part keeps at least one.

    Returns:
        (training, held out), each in the source's order.

    Raises:
        UserError: there are too few different images.
    """
    if not 0 < held_out < 1:
        raise UserError(f"The held-out fraction is {held_out}: give a number between 0 and 1.")
    if len(source) < 2:
        raise UserError(f"{source.name} holds {_count(len(source))}, which cannot be split into training and held-out "
                        "images: give at least two.")
    in_time = _in_time(source, held_out)
    if in_time is not None:
        train, held = in_time
        if len(held) < max(1, minimum):
            raise UserError(f"{source.name} holds {len(source)} frames, of which the end, {len(held)} frames, is held out "
                            f"where {max(1, minimum)} are needed: give longer videos, or --val.")
        return (subset(source, train, f"{source.name} (training)"), subset(source, held, f"{source.name} (held out)"))
    hashes = [unit(draws("split", seed, source.key(i), count=1)[0]) for i in range(len(source))]
    groups = sorted(_copies(source), key=lambda group: min(hashes[i] for i in group))
    held: list[int] = []
    for group in groups[:-1]:  # the last group is the training part's at least
        if min(hashes[i] for i in group) >= held_out and len(held) >= max(1, minimum):
            break
        held += group
    if len(groups) < 2 or len(held) < minimum:
        raise UserError(
            f"{source.name} holds {_count(len(source))}, {len(groups)} of them different, too few to hold out "
            f"{max(1, minimum)} and train on the others: give more images."
        )
    aside = set(held)
    train = [i for i in range(len(source)) if i not in aside]
    return subset(source, train, f"{source.name} (training)"), subset(source, sorted(held), f"{source.name} (held out)")


def _in_time(source: ImageSource, held_out: float) -> tuple[list[int], list[int]] | None:
    """The frames of a video, or of several: (training, held out); None of other sources."""
    if not has_video(source):
        return None
    parts = source.parts if isinstance(source, JoinedImages) else [(0, source)]
    train: list[int] = []
    held: list[int] = []
    for first, part in parts:
        if not isinstance(part, VideoFrames):
            raise UserError(f"{source.name} mixes videos and pictures, of which different parts would be held out: give "
                            "one kind, or say with --val what is held out.")
        for side, stretch in zip((train, held), part.stretches(held_out), strict=True):
            side += [first + i for i in stretch]
    return train, held


def _count(n: int) -> str:
    return "1 image" if n == 1 else f"{n} images"


def _copies(source: ImageSource) -> list[list[int]]:
    """Indices grouped by content; of a source that stores no files each image is a group of its own."""
    groups = [list(range(len(source)))]
    if not isinstance(source, StoredImages):
        return [[i] for i in groups[0]]
    for trait in (source.stored_size, lambda i: source.stored_digest(i, _TAIL), source.stored_digest):
        groups = [part for group in groups for part in _parted(group, trait)]
    return groups


def _parted(group: list[int], trait: Callable[[int], Hashable]) -> list[list[int]]:
    """A group divided by a trait that all copies share. A file that cannot be read stands alone."""
    if len(group) < 2:
        return [group]
    parts: dict[Hashable, list[int]] = defaultdict(list)
    for i in group:
        try:
            parts[trait(i)].append(i)
        except OSError:
            parts["unreadable", i].append(i)
    return list(parts.values())
