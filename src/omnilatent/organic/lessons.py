"""What a teacher says about pictures, on the disk: pictures and its latents for them, from forward evaluations alone.

- `Lessons`: some of them in memory. `LessonStore`: all of them, read as they are needed.
- `write_lessons`: photos, or a video's frames, and a teacher → a store of lessons; goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..codec import Codec
from ..data import ImageSource, TrainingImages, resize_and_crop
from ..data.images import UnreadableImage
from ..data.protocols import StoredImages
from ..errors import UserError
from ..store import Description, Store, StoreWriter

Told = Callable[[int, int], None]
"""Called with how many views are done and how many there are."""
_ENCODED = 8  # pictures that the teacher sees at a time
_MIN_SCALE = 0.8


@dataclass(frozen=True)
class Lessons:
    """`pictures` `(N, 3, s, s)` uint8 and the teacher's normalised `latents` `(N, c, g, g)` float16; None without a
    teacher."""

    pictures: Tensor
    latents: Tensor | None

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def images(self) -> Tensor:
        """The pictures as floats in [0, 1]."""
        return self.pictures.float() / 255

    @property
    def taught(self) -> Tensor:
        """The latents as floats."""
        assert self.latents is not None, "these lessons have a teacher"
        return self.latents.float()

    def pooled(self, channels: int, windows: int = 1) -> Tensor:
        """Means of the first `channels` over `windows`² equal parts of the grid: `(N, channels, windows, windows)`."""
        grid = self.taught.shape[-1]
        if grid % windows or channels > self.taught.shape[1]:
            raise ValueError(f"{channels} channels in {windows}×{windows} windows of latents of shape "
                             f"{tuple(self.taught.shape)}")
        return torch.nn.functional.avg_pool2d(self.taught[:, :channels], grid // windows)


class LessonStore:
    """A store of lessons, in the order in which they lie on the disk.

    Args:
        photos, views: whose lessons, where other clones' may lie beside them; None: all that are there.
    """

    def __init__(self, folder: Path, photos: ImageSource | None = None, views: int = 1) -> None:
        self._store = Store(folder)
        self._order = self._store.in_place_order()
        if photos is not None:
            keys, own = self._store.keys, {_key(photos, position) for position in range(views * len(photos))}
            self._order = np.asarray([row for row in self._order.tolist() if keys[row] in own], np.int64)
        self._taught = len(self._order) > 0 and "latent" in self._store.shapes(int(self._order[0]))

    def __len__(self) -> int:
        return len(self._order)

    def read(self, which: slice | Sequence[int], device: torch.device | str = "cpu") -> Lessons:
        """Some of them, by their places in this order."""
        rows = self._order[which] if isinstance(which, slice) else self._order[np.asarray(which)]
        pictures = torch.from_numpy(self._store.arrays(rows, "picture")).to(device)
        latents = torch.from_numpy(self._store.arrays(rows, "latent")).to(device) if self._taught else None
        return Lessons(pictures, latents)


@torch.no_grad()
def write_lessons(
    folder: Path, teacher: Codec | None, photos: ImageSource, size: int, views: int, seed: int = 0,
    told: Told = lambda done, total: None, stop: Sequence[int] = (), part: int = 0, parts: int = 1,
) -> list[UnreadableImage]:
    """Fill a store with `views` views of every photo and the teacher's latents of them.

    The first view is the protocol's (short side to `size`, centre square); further ones are random squares of 80 % to
    all of the short side, half of them mirrored, a function of (seed, view, photo). The teacher encodes each as it is.
    What the folder holds already is not made again, and memory holds one shard, however long a video is.

    Args:
        teacher: None: pictures alone.
        stop: non-empty as soon as no further view should be begun.
        part, parts: this process's share of the views.

    Returns:
        The photos that cannot be read, which were left out.

    Raises:
        UserError: the folder holds other lessons.
    """
    further = TrainingImages(photos, size, seed=seed, min_scale=_MIN_SCALE)
    about = {"size": size, "seed": seed, "further": f"random squares, at least {_MIN_SCALE} of the short side, mirrored",
             "weights": None if teacher is None else teacher.provenance.weights_hash,
             "channels": None if teacher is None else teacher.spec.channels}
    notes = {} if teacher is None else {"name": teacher.provenance.name, "licence": teacher.provenance.licence}
    unreadable: list[UnreadableImage] = []
    mine = range(part, views * len(photos), parts)
    with StoreWriter(folder, Description("lessons", about, notes), photos.name, moments=()) as writer:
        known = set(writer.read_index().keys)
        pending: list[tuple[str, Tensor]] = []

        def flush() -> None:
            if not pending:
                return
            pictures = torch.stack([picture for _, picture in pending])
            tensors = {"picture": pictures.numpy()}
            if teacher is not None:
                tensors["latent"] = teacher.encode(pictures.to(teacher.device)).mode().half().cpu().numpy()
            writer.add([{"key": key} for key, _ in pending], tensors)
            pending.clear()

        for done, position in enumerate(mine, start=1):
            if stop:
                break
            key = _key(photos, position)
            if key not in known:
                try:
                    pixels = photos.read(position % len(photos))
                    pending.append((key, _centre(pixels, size) if position < len(photos) else
                                    further.crop(pixels, position)))
                except UnreadableImage as failure:
                    unreadable.append(failure)
            if len(pending) == _ENCODED:
                flush()
            told(done, len(mine))
        flush()
    return unreadable


def _key(photos: ImageSource, position: int) -> str:
    """Of a view of a photo. Lessons may be shared by clones from several folders, so a file's size counts, too."""
    view, photo = divmod(position, len(photos))
    size = ""
    if isinstance(photos, StoredImages):
        with suppress(OSError):  # it is gone, which reading it will tell
            size = f":{photos.stored_size(photo)}"
    return f"{photos.key(photo)}{size}#{view}"


def _centre(pixels: np.ndarray, size: int) -> Tensor:
    square = resize_and_crop(pixels, size)
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))
