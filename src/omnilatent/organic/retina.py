"""The retina: projections fitted on inputs alone. No function here takes targets, and only here are eigenvectors used.

- `Axes`, `principal_axes`: mean, spread and principal axes of inputs, which whiten them.
- `Moments`: the same of inputs that come in parts.
- `Retina`: a projection that is saved: `fit_principal`, `area_retina`, `cosine_retina`. Its `identity` tells which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .neurons import chunks
from .peers import Peers


@dataclass(frozen=True)
class Axes:
    """The principal axes of standardised inputs: (x − mean) / spread has covariance V diag(variances) Vᵀ.

    mean, spread: `(d,)`; spread is 1 for a constant input. axes V: `(d, r)`, orthonormal columns; variances: `(r,)`,
    falling. All fp64; r ≤ d, since axes along which the inputs do not vary are left out.
    """

    mean: Tensor
    spread: Tensor
    axes: Tensor
    variances: Tensor

    def whitening(self, ridge: float = 0.0) -> Tensor:
        """`(d, r)` fp64: (x − mean) @ it has orthogonal columns, of unit variance where `ridge` is 0."""
        return self.axes / (self.variances + ridge).sqrt() / self.spread[:, None]


class Moments:
    """Number, sum and second moments of inputs `(n, d)` that come in parts, in any order and in any process."""

    NAMES = ("count", "sum", "second")

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)
        self.second = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        for rows in chunks(inputs):
            part = inputs[rows].float()
            mean = part.mean(0)
            near = part - mean  # products about the chunk's own mean: fp32 within a chunk, fp64 between chunks
            self.second += near.mT @ near
            mean = mean.double()
            rest = near.sum(0, dtype=torch.float64)  # what rounding leaves of 0
            self.second += len(part) * torch.outer(mean, mean) + torch.outer(mean, rest) + torch.outer(rest, mean)
            self.sum += len(part) * mean + rest
            self.count += len(part)

    def part(self, inputs: Tensor) -> Moments:
        """Those of some of the inputs, by their indices."""
        found = Moments(0)
        found.count, found.sum, found.second = self.count, self.sum[inputs], self.second[inputs][:, inputs]
        return found

    def over(self, peers: Peers) -> Moments:
        """Those of the inputs of all processes."""
        found = Moments(0)
        for name in self.NAMES:
            setattr(found, name, peers.sum(getattr(self, name)))
        return found

    def axes(self, floor: float = 1e-7) -> Axes:
        """The principal axes; those with less than `floor` of the largest variance are left out."""
        mean = self.sum / self.count
        second = self.second / self.count - mean[:, None] * mean
        spread = second.diagonal().clamp(min=0).sqrt()
        varies = spread > 1e-6 * mean.abs()  # else rounding of a constant
        spread = torch.where(varies & (spread > 0), spread, 1.0)
        variances, axes = torch.linalg.eigh(second * (varies[:, None] & varies) / spread[:, None] / spread)
        variances, axes = variances.flip(0), axes.flip(1)
        kept = variances > max(floor * float(variances[0]), 1e-12)
        return Axes(mean, spread, axes[:, kept], variances[kept])

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in self.NAMES}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in self.NAMES:
            setattr(self, name, state[name].clone())


def principal_axes(inputs: Tensor, floor: float = 1e-7) -> Axes:
    """Principal axes of inputs `(N, d)`, read once in chunks; N·d² multiplications."""
    moments = Moments(inputs.shape[1], inputs.device)
    moments.add(inputs)
    return moments.axes(floor)


class Retina(nn.Module):
    """A fixed linear projection of flat inputs: z = (x − mean) P.

    Args:
        mean: `(d,)`.
        projection P: `(d, r)`.
        identity: what it is, to be saved beside it: its kind, the size and range of the inputs it is meant for.
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, mean: Tensor, projection: Tensor, identity: dict[str, Any]) -> None:
        super().__init__()
        if projection.dim() != 2 or mean.shape != projection.shape[:1]:
            raise UserError(f"Dimension mismatch: the projection has shape {tuple(projection.shape)} and the mean "
                            f"{tuple(mean.shape)}; expected are (d, r) and (d,).")
        self.register_buffer("mean", mean.float())
        self.register_buffer("projection", projection.float())
        self.identity = dict(identity)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(…, d)` → `(…, r)`."""
        if inputs.shape[-1] != len(self.mean):
            raise UserError(f"Dimension mismatch: the retina {self.identity} takes (…, {len(self.mean)}), the input "
                            f"has shape {tuple(inputs.shape)}.")
        return (inputs - self.mean) @ self.projection


def fit_principal(inputs: Tensor, size: int, whiten: bool = True, **identity: Any) -> Retina:
    """The first `size` principal components of inputs `(N, d)`, of unit variance with `whiten`.

    Inputs are not standardised first: those of one unit, such as pixels, keep their weights.
    """
    moments = Moments(inputs.shape[1], inputs.device)
    moments.add(inputs)
    mean = moments.sum / moments.count
    variances, axes = torch.linalg.eigh(moments.second / moments.count - mean[:, None] * mean)
    variances, axes = variances.flip(0)[:size], axes.flip(1)[:, :size]
    if size > int((variances > 1e-7 * variances[0]).sum()):
        raise UserError(f"The retina is to have {size} components, but inputs of shape {tuple(inputs.shape)} vary "
                        f"along {int((variances > 1e-7 * variances[0]).sum())} axes only: ask for fewer.")
    projection = axes / variances.sqrt() if whiten else axes
    return Retina(mean, projection, {"kind": "principal", "whitened": whiten, **identity})


def area_retina(channels: int, side: int, cells: int, **identity: Any) -> Retina:
    """Means over `cells` × `cells` areas of images `(channels, side, side)`, flattened; nothing is fitted.

    Raises:
        UserError: `cells` does not divide `side`.
    """
    if side % cells:
        raise UserError(f"{cells} cells do not divide a side of {side} pixels.")
    pixels = torch.eye(channels * side * side).unflatten(1, (channels, side, side))
    projection = F.avg_pool2d(pixels, side // cells).flatten(1)
    return Retina(torch.zeros(len(projection)), projection,
                  {"kind": "area", "channels": channels, "side": side, "cells": cells, **identity})


def cosine_retina(channels: int, side: int, kept: int, **identity: Any) -> Retina:
    """The lowest `kept` × `kept` frequencies of the orthonormal DCT-II of flattened images `(channels, side, side)`."""
    if not 1 <= kept <= side:
        raise UserError(f"{kept} frequencies of a side of {side} pixels: possible are 1 to {side}.")
    wave = torch.cos(math.pi / side * (torch.arange(side) + 0.5)[:, None] * torch.arange(kept)) * math.sqrt(2 / side)
    wave[:, 0] /= math.sqrt(2)
    projection = torch.block_diag(*[torch.kron(wave, wave)] * channels)  # (c h w, c kept kept)
    return Retina(torch.zeros(len(projection)), projection,
                  {"kind": "cosine", "channels": channels, "side": side, "kept": kept, **identity})
