"""The frozen configuration of the Gaussian autoencoder and of its training. Nothing here imports torch.

- `GaussianConfig`: the architecture, and its twin of plain convolutions with as many parameters.
- `GaussianTraining`: a recipe's whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro
from tyro.conf import arg

from ..training.config import OptimizerConfig, RunConfig, check_least

SIDE = 28  # of the pictures
SIDES = (28, 14, 7, 4)  # of the maps after each level
KERNEL = 5


@dataclass(frozen=True)
class GaussianConfig:
    """Encoder: convolutions of 5×5 with stride 2 whose filters are sums of Gaussians, then a linear map to the latent.
    Decoder: a linear map, then transposed convolutions with stride 2."""

    latent_dim: Annotated[int, arg(aliases=["--latent-channels"])] = 32
    """Numbers of the latent."""
    in_channels: tyro.conf.Suppress[int] = 1
    """Channels of the pictures."""
    widths: tuple[int, ...] = (16, 32)
    """Channels of the encoder's levels, at 14×14, 7×7 and 4×4; one to three."""
    decoder_widths: tuple[int, ...] = (32, 16)
    """Channels that the decoder's levels begin with, from the smallest map up; one to three."""
    num_gaussians: int = 3
    """Gaussians a filter, six numbers each."""
    plain: bool = False
    """Plain convolutions in the encoder, narrower, so that there are as many parameters: the twin that the Gaussians
    are measured against."""

    def __post_init__(self) -> None:
        check_least(self, 1, "latent_dim", "in_channels", "num_gaussians")
        for name in ("widths", "decoder_widths"):
            widths, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if not 1 <= len(widths) < len(SIDES):
                raise ValueError(f"{option} names {len(widths)} levels; possible are 1 to {len(SIDES) - 1}")
            if min(widths) < 1:
                raise ValueError(f"{option} has {min(widths)}; the least is 1")

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """The channels that the encoder really has: `widths`, or those of the twin."""
        return self._twin_widths() if self.plain else self.widths

    def encoder_parameters(self) -> int:
        """Parameters of the encoder."""
        return self._parameters(self.encoder_widths, KERNEL**2 if self.plain else 6 * self.num_gaussians)

    def _twin_widths(self) -> tuple[int, ...]:
        """All levels but the last, which feeds the latent, scaled alike, to the least excess over the parameters of the
        Gaussian encoder: the twin never has fewer."""
        wanted = self._parameters(self.widths, 6 * self.num_gaussians)
        *scaled, last = self.widths
        if not scaled:  # one level of one input: only its own width can give way
            return next((n,) for n in range(1, 10 * last) if self._parameters((n,), KERNEL**2) >= wanted)
        choices = {(*(max(1, round(n * share / 200)) for n in scaled), last) for share in range(1, 1_000)}
        counted = [(self._parameters(widths, KERNEL**2) - wanted, widths) for widths in choices]
        return min(row for row in counted if row[0] >= 0)[1]

    def _parameters(self, widths: tuple[int, ...], numbers: int) -> int:
        """Parameters of an encoder with so many numbers a filter."""
        pairs = sum(a * b for a, b in zip((self.in_channels, *widths), widths, strict=False))
        features = widths[-1] * SIDES[len(widths)] ** 2
        return pairs * numbers + sum(widths) + (features + 1) * self.latent_dim


@dataclass(frozen=True)
class GaussianTraining:
    """A recipe's resolved configuration: a Gaussian autoencoder, its optimiser and the run."""

    USUAL_DATA: ClassVar[str] = "mnist"  # where no --data is given

    recipe: tyro.conf.Suppress[str]
    model: GaussianConfig = field(default_factory=GaussianConfig)
    epochs: int = 5
    """How often every image is seen; --steps, where it is less, ends the run earlier."""
    geometry_lr: float = 10.0
    """Learning rate of the Gaussians' centres, widths and angles, as a multiple of --lr."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    held_out: float = 0.1
    """Share of the images kept for validation where the data brings no test images and no --val is given."""
    max_pixels: int = 2**28
    """Pictures with more pixels are skipped, counted and listed."""
    task: tyro.conf.Suppress[str] = "omnilatent.autoencoders.gaussian_task:GaussianTask"
    """The class that trains this configuration."""

    def __post_init__(self) -> None:
        check_least(self, 1, "epochs", "max_pixels")
        check_least(self, 0, "geometry_lr")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is {self.held_out}; possible are numbers between 0 and 1")

    def check(self, init: str | None) -> None:
        """Everything that could be refused has been."""

    def steps(self, images: int) -> int:
        """The optimiser steps that so many training images take; the last batch of the last epoch is filled up."""
        return min(self.run.steps, -(-self.epochs * images // self.run.batch_size))
