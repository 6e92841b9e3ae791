"""From files to samples. A sample is a pure function of (seed, position), so data needs no state to resume.

    source = open_images("photos/")                      # a folder, tars, one image, 'synthetic', 'photos'
    train, held_out = split(source)                      # by a hash of the key; copies stay together
    images = TrainingImages(train, size=256)
    for batch in batches(images, batch_size=8, start=0, stop=1000, workers=4):
        batch.images                                     # (8, 3, 256, 256) uint8

The names load on first use: reading images needs Pillow and NumPy, only training and evaluation need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import EvaluationImages
    from .images import IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, read_image, resize_and_crop
    from .photos import demo_photos
    from .protocols import ImageSource
    from .samples import Sample, TrainingImages
    from .skipped import SkippedLog
    from .sources import open_images
    from .splits import split, subset
    from .structured import structured_image
    from .training import Batch, batches

_PUBLIC = {
    "IMAGE_SUFFIXES": "images",
    "MAX_PIXELS": "images",
    "UnreadableImage": "images",
    "read_image": "images",
    "resize_and_crop": "images",
    "ImageSource": "protocols",
    "open_images": "sources",
    "demo_photos": "photos",
    "split": "splits",
    "subset": "splits",
    "structured_image": "structured",
    "Sample": "samples",
    "TrainingImages": "samples",
    "Batch": "training",
    "batches": "training",
    "EvaluationImages": "evaluation",
    "SkippedLog": "skipped",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omnilatent.data' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
