"""What a teacher says about photos: pictures and its latents for them, from forward evaluations alone.

- `Lessons`: pictures and latents in memory, 8 and 16 bits.
- `teach`: photos, crops of them and a teacher → lessons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..codec import Codec
from ..data import ImageSource, TrainingImages, resize_and_crop
from ..data.images import UnreadableImage
from ..errors import UserError

Progress = Callable[[str], None]


def quiet(line: str) -> None:
    """The progress that says nothing."""


@dataclass(frozen=True)
class Lessons:
    """`pictures` `(N, 3, s, s)` uint8 and the teacher's normalised `latents` `(N, c, g, g)` float16."""

    pictures: Tensor
    latents: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, which: slice | Tensor) -> Lessons:
        return Lessons(self.pictures[which], self.latents[which])

    def pooled(self, channels: int, windows: int = 1) -> Tensor:
        """Means of the first `channels` over `windows`² equal parts of the grid: `(N, channels, windows, windows)`."""
        grid = self.latents.shape[-1]
        if grid % windows or channels > self.latents.shape[1]:
            raise ValueError(f"{channels} channels in {windows}×{windows} windows of latents of shape "
                             f"{tuple(self.latents.shape)}")
        return torch.nn.functional.avg_pool2d(self.latents[:, :channels].float(), grid // windows)


@torch.no_grad()
def teach(
    teacher: Codec, photos: ImageSource, size: int = 256, crops: int = 1, progress: Progress = quiet, seed: int = 0,
) -> Lessons:
    """Let the teacher encode `crops` views of every photo.

    The first view is the protocol's (short side to `size`, centre square); further ones are random squares of 80 % to
    all of the short side, half of them mirrored, a function of (seed, photo) alone. The teacher encodes each as it is.

    Raises:
        UserError: no photo can be read.
    """
    further = TrainingImages(photos, size, seed=seed, min_scale=0.8)
    pictures: list[Tensor] = []
    latents: list[Tensor] = []
    unreadable: list[UnreadableImage] = []
    total = crops * len(photos)
    for position in range(total):
        try:
            picture = _centre(photos, position, size) if position < len(photos) else further.sample(position).image
        except UnreadableImage as failure:
            unreadable.append(failure)
            continue
        pictures.append(picture)
        latents.append(teacher.encode(picture[None]).mode()[0].half().cpu())
        if (position + 1) % 100 == 0 or position + 1 == total:
            progress(f"{teacher.label} encoded {position + 1:,} of {total:,} pictures")
    if not pictures:
        raise UserError(f"None of the {len(photos)} images of {photos.name} can be read; the first: {unreadable[0]}")
    if unreadable:
        progress(f"{len(unreadable)} unreadable images left out; the first: {unreadable[0]}")
    return Lessons(torch.stack(pictures), torch.stack(latents))


def _centre(photos: ImageSource, index: int, size: int) -> Tensor:
    square = resize_and_crop(photos.read(index), size)
    return torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))
