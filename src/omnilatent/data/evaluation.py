"""Images for measuring, in order, prepared by the protocol.

- `EvaluationImages`: resized and centre-cropped, or in their own sizes; one at a time or in batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .images import UnreadableImage, resize_and_crop
from .protocols import ImageSource


class EvaluationImages:
    """The images of a source for evaluation.

    Attributes:
        source, size, limit: as given.
        skipped: (key, reason) of each unreadable file that the newest iteration met.
    """

    def __init__(self, source: ImageSource, size: int | None = 256, limit: int | None = None) -> None:
        """
        Args:
            size: side of the centre square in pixels; None keeps each image as it is.
            limit: at most this many images, evenly spread over the source, since folders are often sorted by class.
        """
        if size is not None and size < 1:
            raise UserError(f"The evaluation size is {size}: give at least 1 pixel.")
        if limit is not None and limit < 1:
            raise UserError(f"The limit is {limit} images: give at least 1.")
        self.source, self.size, self.limit = source, size, limit
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        """Candidates: readable or not."""
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, float32 `(3, h, w)` in [0, 1]).

        Raises:
            UserError: at the end, when no image could be read.
        """
        self.skipped = []
        count = len(self)
        for place in range(count):
            index = place * len(self.source) // count
            key = self.source.key(index)
            try:
                pixels = self.source.read(index)
            except UnreadableImage as unreadable:
                self.skipped.append((key, unreadable.reason))
                continue
            if self.size is not None:
                pixels = resize_and_crop(pixels, self.size)
            yield key, torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
        if len(self.skipped) == count:
            first = f"; the first: {self.skipped[0][0]} {self.skipped[0][1]}" if self.skipped else ""
            raise UserError(f"None of the {count} images of {self.source.name} can be read{first}.")

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Yield (keys, `(b, 3, h, w)`): up to `batch_size` consecutive images of equal size."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        keys: list[str] = []
        images: list[Tensor] = []
        for key, image in self:
            if images and (len(images) == batch_size or image.shape != images[0].shape):
                yield keys, torch.stack(images)
                keys, images = [], []
            keys.append(key)
            images.append(image)
        if images:
            yield keys, torch.stack(images)
