"""The drop-in's retina: around every 8×8 cell of a picture its surroundings, the coarser the farther, as few numbers.

- `Fovea`: which windows there are. - `FoveaFit`: their principal components, from pictures alone.
- `FoveaCode`: pictures → a code on the latent's grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .pooled import halved
from .peers import ALONE, Peers
from .retina import Moments


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
    about unit variance on the pictures that it was fitted on."""

    def __init__(self, fovea: Fovea) -> None:
        super().__init__()
        self.fovea = fovea
        for scale, side, n in zip(fovea.scales, fovea.sides, fovea.components, strict=True):
            for name, shape in ((f"kernel_{scale}", (n, 3, side, side)), (f"bias_{scale}", (n,))):
                self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

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


class FoveaFit:
    """Principal components of each window, from pictures alone, which come in any number of batches."""

    def __init__(self, fovea: Fovea, device: torch.device | str = "cpu") -> None:
        self.fovea = fovea
        self.moments = [Moments(3 * side**2, device) for side in fovea.sides]

    def add(self, pictures: Tensor, draw: torch.Generator, share: float = 0.125) -> None:
        """A random share of the windows of pictures `(b, 3, h, w)` in [0, 1]."""
        for moments, picture, scale, side in zip(self.moments, self.fovea.windows(pictures), self.fovea.scales,
                                                 self.fovea.sides, strict=True):
            rows = F.unfold(picture, side, stride=self.fovea.cell // scale).mT.flatten(0, 1)
            some = torch.randperm(len(rows), generator=draw)[: max(8, round(share * len(rows)))]
            moments.add(rows[some.to(rows.device)])

    def code(self, peers: Peers = ALONE) -> FoveaCode:
        """The code so far; fewer components than asked for where the pictures vary along fewer axes."""
        found = [moments.over(peers).axes() for moments in self.moments]
        counts = [min(n, axes.axes.shape[1]) for n, axes in zip(self.fovea.components, found, strict=True)]
        code = FoveaCode(replace(self.fovea, components=tuple(counts))).to(found[0].mean.device)
        for axes, count, (kernel, bias) in zip(found, counts, zip(*[iter(code.parameters())] * 2, strict=True), strict=True):
            white = axes.whitening()[:, :count].mT
            kernel.data.copy_(white.reshape(kernel.shape))
            bias.data.copy_(-white @ axes.mean)
        return code
