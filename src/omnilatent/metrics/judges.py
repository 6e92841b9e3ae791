"""One object a metric, fed with originals and reconstructions, that ends in a `Figure`.

- `Judge`: the interface.
- `PerImage`: a value an image, then their mean.
- `Frechet`: two running Gaussians over a network's features.
- `Absent`: the reason why there is no value.
- `open_judges`: those for a choice of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses.lpips import LPIPS, NETWORKS, NetworkName
from .frechet import DinoFeatures, InceptionFeatures
from .moments import RunningMoments
from .pixel import MIN_SIDE, high_frequency_ratio, ms_ssim, psnr, ssim, vif
from .precision import ieee_float32
from .results import Figure

_FLOOR = 1e-6  # what a power ratio of 0 counts as in a geometric mean


class Judge(Protocol):
    """A metric in the making. `values` holds one number an image, NaN where undefined; empty if it has none."""

    values: list[float]

    def add(self, reconstruction: Tensor, original: Tensor) -> None:
        """Take in two batches `(b, 1 or 3, h, w)`, 8-bit values in [0, 1]."""

    def figure(self, n: int) -> Figure:
        """The result over the `n` images taken in."""


class PerImage:
    """Values by image; images with a side below `min_side`, and those where the value is not defined, are left out of
    the mean and counted in the note."""

    def __init__(
        self, measure: Callable[[Tensor, Tensor], Tensor], min_side: int = 1,
        mean: Literal["arithmetic", "geometric"] = "arithmetic", undefined: str = "gave no finite value",
    ) -> None:
        self.measure, self.min_side, self.mean, self.undefined = measure, min_side, mean, undefined
        self.values: list[float] = []
        self.small = 0

    def add(self, reconstruction: Tensor, original: Tensor) -> None:
        if min(original.shape[-2:]) < self.min_side:
            self.small += len(original)
            self.values += [math.nan] * len(original)
        else:
            self.values += self.measure(reconstruction, original).tolist()

    def figure(self, n: int) -> Figure:
        good = [value for value in self.values if math.isfinite(value)]
        notes = [f"{self.small} of {n} images have a side below {self.min_side} pixels"] if self.small else []
        odd = len(self.values) - len(good) - self.small
        notes += [f"{odd} of {n} images {self.undefined}"] if odd else []
        if not good:
            return Figure(None, 0, ("; ".join(notes) or "there are no images") + ".")
        if self.mean == "geometric":
            value = math.exp(math.fsum(math.log(max(value, _FLOOR)) for value in good) / len(good))
            notes.insert(0, "geometric mean")
        else:
            value = math.fsum(good) / len(good)
        return Figure(value, len(good), "; ".join(notes))


class Frechet:
    """The Fréchet distance between originals and reconstructions in the features of `network`."""

    def __init__(self, network: nn.Module, dim: int) -> None:
        self.network = network
        self.values: list[float] = []
        self.ours, self.theirs = RunningMoments(dim), RunningMoments(dim)

    def add(self, reconstruction: Tensor, original: Tensor) -> None:
        with ieee_float32():
            self.ours.update(self.network(_colour(reconstruction)))
            self.theirs.update(self.network(_colour(original)))

    def figure(self, n: int) -> Figure:
        if n < 2:
            return Figure(None, n, f"A Fréchet distance needs at least 2 images; there is {n}.")
        few = f", fewer than the {self.ours.dim} features: biased upwards" if n < self.ours.dim else ""
        return Figure(self.ours.distance(self.theirs), n, f"N = {n}{few}; compare only at equal N")


class Absent:
    """A metric that cannot be had here; the cell says why."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self.values: list[float] = []

    def add(self, reconstruction: Tensor, original: Tensor) -> None:
        pass

    def figure(self, n: int) -> Figure:
        return Figure(None, n, self.sentence)


def open_judges(metrics: Sequence[str], device: torch.device) -> dict[str, Judge]:
    """The judges of those `metrics` that look at images, their networks on `device`.

    A network whose weights or library are missing gives an `Absent`: the sentence stands in the table instead of a
    number from something else.
    """
    return {name: open_judge(name, device) for name in metrics if name in _PIXEL or name in _NETWORK}


def open_judge(name: str, device: torch.device) -> Judge:
    """One judge by its metric's key."""
    if name in _PIXEL:
        return _PIXEL[name]()
    try:
        return _NETWORK[name](device)
    except UserError as missing:
        return Absent(str(missing))


def _lpips(net: NetworkName, device: torch.device) -> Judge:
    network = LPIPS(net).to(device)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with ieee_float32():
            return network(_colour(x), _colour(y))

    return PerImage(distance, NETWORKS[net].min_side)


def _inception(device: torch.device) -> Judge:
    return Frechet(InceptionFeatures().to(device), InceptionFeatures.dim)


def _dino(device: torch.device) -> Judge:
    network = DinoFeatures()
    return Frechet(network.to(device), network.dim)


def _colour(images: Tensor) -> Tensor:
    """The networks want three channels: grey images repeat theirs."""
    return images.expand(-1, 3, -1, -1)


_PIXEL: dict[str, Callable[[], Judge]] = {
    "psnr": lambda: PerImage(psnr),
    "ssim": lambda: PerImage(ssim, MIN_SIDE["ssim"]),
    "ms_ssim": lambda: PerImage(ms_ssim, MIN_SIDE["ms_ssim"]),
    "vif": lambda: PerImage(vif, MIN_SIDE["vif"], undefined="are flat and hold no information"),
    "spectrum_high": lambda: PerImage(high_frequency_ratio, MIN_SIDE["spectrum_high"], "geometric",
                                      "have no power at high frequencies"),
}
_NETWORK: dict[str, Callable[[torch.device], Judge]] = {
    "lpips_vgg": lambda device: _lpips("vgg", device),
    "lpips_alex": lambda device: _lpips("alex", device),
    "rfid": _inception,
    "fd_dinov2": _dino,
}
