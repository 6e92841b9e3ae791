"""The photos that are already on the machine: scikit-image's and scikit-learn's own.

- `demo_photos`: an image source of up to 16 photos, read from the installed packages without importing them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from ..errors import UserError
from .folders import ImageFiles
from .images import MAX_PIXELS

# Photographs only: the drawings, masks and text pages beside them are no test for an autoencoder.
# Of the stereo pair one half: both show the same scene, and a split could put one on each side.
_PHOTOS = {
    ("skimage", "data"): (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
        "rocket.jpg",
    ),
    ("sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
}


def demo_photos(max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """The embedded photos, sorted by package and name. Its length says how many this installation has.

    Raises:
        UserError: neither package is installed with its photos.
    """
    found = [
        folder / name
        for (package, data), names in _PHOTOS.items()
        for folder in _package_folders(package, data)
        for name in names
        if (folder / name).is_file()
    ]
    if not found:
        raise UserError("The embedded photos come with scikit-image and scikit-learn: pip install scikit-image "
                        "scikit-learn, or give a folder of your own photos.")
    root = Path(os.path.commonpath([path.parent for path in found]))
    files = [path.relative_to(root).as_posix() for path in found]
    return _DemoPhotos(root, files, "photos", max_pixels)


class _DemoPhotos(ImageFiles):
    """Keys are the bare names, the same on every machine, or a split would depend on where packages lie."""

    def key(self, i: int) -> str:
        return super().key(i).rsplit("/", 1)[-1]


def _package_folders(package: str, data: str) -> list[Path]:
    """The data folder inside an installed package; finding a top-level package does not import it."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place, data) for place in places or []]
