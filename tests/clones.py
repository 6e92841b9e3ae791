"""A toy teacher, pictures and tiny settings for the tests of clones, and the mode in which gradients and solvers raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omnilatent.codec import Codec, Provenance
from omnilatent.data.images import UnreadableImage
from omnilatent.data.structured import structured_image
from omnilatent.latent import Latent, LatentSpec, Point
from omnilatent.organic.clone_config import CloneConfig
from omnilatent.organic.clone_task import GradientTask, OrganicTask, task_of
from omnilatent.organic.cloning import way_of
from omnilatent.organic.lessons import LessonStore, write_lessons
from omnilatent.organic.peers import ALONE, Peers

LINALG = {"solve", "lstsq", "inv", "pinv", "solve_ex", "inv_ex", "solve_triangular", "cholesky", "cholesky_ex",
          "lu_solve", "tensorsolve", "tensorinv", "ldl_solve", "lu_factor"}
TORCH = {"cholesky_solve", "cholesky_inverse", "triangular_solve", "lu_solve", "inverse", "pinverse", "lstsq"}


@contextmanager
def forward_only() -> Iterator[None]:
    """Gradients and solvers raise, of torch and of numpy."""
    def refuse(name: str):
        def refused(*_: object, **__: object) -> None:
            raise AssertionError(f"{name} was called")
        return refused

    with pytest.MonkeyPatch.context() as patch:
        for place, names in ((torch.linalg, LINALG), (np.linalg, LINALG), (torch, TORCH), (Tensor, TORCH | {"backward"}),
                             (torch.autograd, {"backward", "grad"})):
            for name in names:
                if hasattr(place, name):
                    patch.setattr(place, name, refuse(name))
        yield


class Pictures:
    """Structured pictures as a source; those at `unreadable` cannot be read."""

    def __init__(self, count: int, first: int = 0, side: int = 64, unreadable: tuple[int, ...] = ()) -> None:
        self.name, self.count, self.first, self.side, self.unreadable = "pictures", count, first, side, unreadable

    def __len__(self) -> int:
        return self.count

    def key(self, i: int) -> str:
        return f"{self.first + i:04}"

    def read(self, i: int) -> np.ndarray:
        if i in self.unreadable:
            raise UnreadableImage(self.key(i), "made so")
        return structured_image(0, self.first + i, self.side)


class Halves(nn.Module):
    """A made-up autoencoder whose encoder is not linear."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.inward = nn.Conv2d(3, channels, 8, 8)
        self.outward = nn.ConvTranspose2d(channels, 3, 8, 8)
        for parameter, scale in zip(self.parameters(), (0.3, 0.3, 0.15, 0.0), strict=True):
            parameter.data = scale * (2 * torch.rand(parameter.shape, generator=draw) - 1)


class Teacher(Codec):
    def __init__(self, channels: int = 6, weights_hash: str = "0123") -> None:
        spec = LatentSpec(channels=channels, downsampling=8, kind="point")
        super().__init__(Halves(channels), spec, Provenance("toy", "toy", weights_hash))

    def _encode(self, images: Tensor) -> Latent:
        return Point(torch.tanh(self.module.inward(images)) + 0.5)

    def _decode(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(self.module.outward(raw))


def tiny(latent: str, **more: object) -> CloneConfig:
    """Settings that learn something in a second or two."""
    few = {"neurons": 8, "candidates": 32, "layers": 2, "sweeps": 4, "sites": 1500, "views": 1, "size": 64, "channels": 4,
           "context": 6}
    return CloneConfig(latent=latent, **{**few, **more})


def lesson_stores(folder: Path, config: CloneConfig, photos: Pictures, held_out: Pictures, teacher: Codec | None = None,
                  ) -> tuple[LessonStore, LessonStore]:
    """What the toy teacher says of photos and of photos held out."""
    found = []
    for name, source, views in (("lessons", photos, config.views), ("held-out", held_out, 1)):
        write_lessons(folder / name, teacher or Teacher(), source, config.side, views, config.seed)
        found.append(LessonStore(folder / name))
    return found[0], found[1]


def task_on(stores: tuple[LessonStore, LessonStore], config: CloneConfig, teacher: Codec | None = None,
            peers: Peers = ALONE) -> OrganicTask | GradientTask:
    """The task of a clone of the toy teacher on lessons."""
    teacher = teacher or Teacher()
    some = stores[0].read(slice(0, 32))
    return task_of(way_of(teacher, config, torch.device("cpu"), some), *stores, config, peers)


def run_steps(task: OrganicTask, start: int = 0, stop: int | None = None) -> OrganicTask:
    """Some steps, by default all from `start`."""
    stop = task.rounds * task.per_round if stop is None else stop
    for position, batch in zip(range(start, stop), task.batches(start, stop), strict=True):
        task.step(batch, position)
    return task
