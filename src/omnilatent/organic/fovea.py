"""The drop-in's retina: around every 8×8 cell of a picture its surroundings, the coarser the farther, as few numbers.

- `Fovea`: which windows there are. - `fit_fovea`: their principal components, from pictures alone.
- `FoveaCode`: pictures → a code on the latent's grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .pooled import halved
from .retina import principal_axes


@dataclass(frozen=True)
class Fovea:
    """Windows centred on each cell of `cell`² pixels.

    Attributes:
        scales: the picture averaged by each.
        sides: of each window, in pixels of the averaged picture.
        components: principal components kept of each.
        thumbnail: side of the whole picture's thumbnail, whose pixels every cell sees.
    """

    cell: int = 8
    scales: tuple[int, ...] = (1, 2, 4, 8)
    sides: tuple[int, ...] = (8, 8, 8, 7)
    components: tuple[int, ...] = (96, 48, 48, 32)
    thumbnail: int = 4
    low: float = 0.0
    high: float = 1.0
    kind: str = "fovea"

    def __post_init__(self) -> None:
        for scale, side in zip(self.scales, self.sides, strict=True):
            if self.cell % scale or (side - self.cell // scale) % 2:
                raise UserError(f"No {self.identity()}: a window of {side} pixels at 1/{scale} cannot be centred on a "
                                f"cell of {self.cell}.")

    def identity(self) -> str:
        """In one line, for errors."""
        windows = ", ".join(f"{n} of {s * d} px at 1/{s}" for s, d, n in
                            zip(self.scales, self.sides, self.components, strict=True))
        return f"{self.kind} ({windows}, thumbnail {self.thumbnail}²) in [{self.low:g}, {self.high:g}]"

    @property
    def outputs(self) -> int:
        return sum(self.components) + 3 * self.thumbnail**2

    def windows(self, pictures: Tensor) -> list[Tensor]:
        """The padded picture of every scale, whose windows at `stride` are centred on the cells."""
        found, last, done = [], pictures, 1
        for scale, side in zip(self.scales, self.sides, strict=True):
            while done < scale:
                last, done = halved(last), 2 * done
            rim = (side - self.cell // scale) // 2
            found.append(F.pad(last, (rim, rim, rim, rim), mode="replicate") if rim else last)
        return found


class FoveaCode(nn.Module):
    """Pictures `(b, 3, h, w)` in [0, 1], sides multiples of the cell → code `(b, r, h/cell, w/cell)`, each number of
    about unit variance on the pictures that it was fitted on.

    Args:
        kernels: for each scale `(n, 3, side, side)`; biases: `(n,)`.
    """

    def __init__(self, fovea: Fovea, kernels: list[Tensor], biases: list[Tensor]) -> None:
        super().__init__()
        self.fovea = fovea
        for scale, side, n, kernel, bias in zip(fovea.scales, fovea.sides, fovea.components, kernels, biases,
                                                strict=True):
            if kernel.shape != (n, 3, side, side):
                raise UserError(f"Dimension mismatch: a kernel of shape {tuple(kernel.shape)} at 1/{scale}, and "
                                f"{fovea.identity()} has {(n, 3, side, side)}.")
            self.register_buffer(f"kernel_{scale}", kernel.clone())
            self.register_buffer(f"bias_{scale}", bias.clone())

    def forward(self, pictures: Tensor) -> Tensor:
        fovea, codes = self.fovea, []
        for scale, picture in zip(fovea.scales, fovea.windows(pictures), strict=True):
            kernel, bias = getattr(self, f"kernel_{scale}"), getattr(self, f"bias_{scale}")
            codes.append(F.conv2d(picture, kernel, bias, stride=fovea.cell // scale))
        height, width = codes[0].shape[-2:]
        if fovea.thumbnail:
            whole = F.adaptive_avg_pool2d(picture, fovea.thumbnail) * 4 - 2  # of the coarsest scale
            codes.append(whole.flatten(1)[..., None, None].expand(-1, -1, height, width))
        return torch.cat(codes, 1)


@torch.no_grad()
def fit_fovea(pictures: Tensor, fovea: Fovea, generator: torch.Generator, sites: int = 40_000) -> FoveaCode:
    """Principal components of each window, from about `sites` windows of the pictures `(N, 3, h, w)` uint8; fewer than
    asked for where the pictures vary along fewer."""
    kernels, biases, counts = [], [], []
    cells = (pictures.shape[-2] // fovea.cell) * (pictures.shape[-1] // fovea.cell)
    some = torch.randperm(len(pictures), generator=generator)[: max(2, 4 * sites // cells)]
    for place, (scale, side) in enumerate(zip(fovea.scales, fovea.sides, strict=True)):
        found = []
        for part in pictures[some].split(16):
            windows = F.unfold(fovea.windows(part.float() / 255)[place], side, stride=fovea.cell // scale)
            rows = windows.mT.flatten(0, 1)
            found.append(rows[torch.randperm(len(rows), generator=generator)[: max(8, len(rows) // 4)]])
        axes = principal_axes(torch.cat(found))
        count = min(fovea.components[place], axes.axes.shape[1])
        counts.append(count)
        white = axes.whitening()[:, :count].mT
        kernels.append(white.float().reshape(count, 3, side, side))
        biases.append((-white @ axes.mean).float())
    return FoveaCode(replace(fovea, components=tuple(counts)), kernels, biases)
