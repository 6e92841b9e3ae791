"""FSQ: finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): round a few bounded scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Quantizer, project, straight_through
from .config import FSQConfig, levels_for

_MARGIN = 1e-3  # the bound reaches this much beyond the outermost level, as in the paper's code


class FSQ(Quantizer):
    """Each scalar is bounded by a tanh to its number of levels and rounded, with the gradient passed straight through.

    Args:
        dim: the width of the vectors.
        levels: of each scalar, 2 or more; their product is `codebook_size`.
        codebook_size: instead of levels, the wished size (see `config.levels_for`); beside them it must be their product.
        num_codebooks: every book has the same levels.

    Where `dim` is not the number of scalars (books × levels) one linear layer leads there and one back, as in
    vector-quantize-pytorch, whose codes, indices (the first level counts fastest) and gradients these are. With 2
    levels the paper's bound would put the border at z = −3.8, where nothing learns, and the library refuses them;
    here it is at 0. There is no loss and nothing to revive.
    """

    scale: Tensor
    shift: Tensor
    offset: Tensor
    middle: Tensor
    basis: Tensor

    def __init__(
        self, dim: int, levels: Sequence[int] | None = None, codebook_size: int | None = None, num_codebooks: int = 1,
        config: FSQConfig = FSQConfig(),
    ) -> None:
        given = levels if levels is not None else config.levels
        levels = levels_for(1024 if codebook_size is None else codebook_size) if given is None else tuple(given)
        if min(levels, default=0) < 2:
            raise ValueError(f"there is at least 1 scalar, with at least 2 levels; got the levels {levels}")
        size = math.prod(levels)
        if given is not None and codebook_size not in (None, size):
            raise ValueError(f"the levels {levels} make {size} codes; codebook_size is {codebook_size}")
        super().__init__(dim, size, num_codebooks)
        self.levels, self.wished_size = levels, codebook_size
        counts = torch.tensor(levels, dtype=torch.float32)
        scale = (counts - 1) * (1 + _MARGIN) / 2
        offset = (counts % 2 == 0) / 2
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.where(counts > 2, torch.atanh(offset / scale), 0.0), persistent=False)
        self.register_buffer("middle", (counts / 2).floor(), persistent=False)
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)
        scalars = len(levels) * num_codebooks
        self.project_in = nn.Identity() if dim == scalars else nn.Linear(dim, scalars)
        self.project_out = nn.Identity() if dim == scalars else nn.Linear(scalars, dim)

    @property
    def description(self) -> str:
        """The grid too and, where the wished size is not a product, that."""
        text = f"{super().description}, {' × '.join(map(str, self.levels))}"
        return text if self.wished_size in (None, self.codebook_size) else f"{text}, the nearest below {self.wished_size}"

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scalars = project(self.project_in, rows).view(len(rows), self.num_codebooks, len(self.levels))
        scale, shift, offset, middle = (t.float() for t in (self.scale, self.shift, self.offset, self.middle))
        bounded = torch.tanh(scalars + shift) * scale - offset
        steps = bounded.detach().round()
        indices = ((steps + middle).long() * self.basis).sum(-1)
        grid = straight_through(steps / middle, bounded / middle)
        return project(self.project_out, grid.flatten(1)), indices, {}

    def look_up(self, indices: Tensor) -> Tensor:
        counts = torch.tensor(self.levels, device=indices.device)
        middle = self.middle.float()
        grid = ((indices[..., None] // self.basis) % counts - middle) / middle
        return project(self.project_out, grid.flatten(1))
