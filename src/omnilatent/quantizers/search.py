"""The code nearest to each vector, without ever holding all distances.

- `nearest_codes`: the search; tiles of distances on the CPU, one fused Triton kernel on CUDA.
- `Tiles`: how vectors × codes is cut.
- `centred`: vectors and codes about the codes' mean, with squared norms.

Vectors on CUDA up to `MAX_FUSED_DIM` wide take the kernels where Triton is installed (it comes with PyTorch for
CUDA on Linux); elsewhere, and wider, the tiles do the same there, with matrix products as precise as
`torch.set_float32_matmul_precision` has them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MAX_ELEMENTS = 2**24  # of one tile of distances: 64 MiB
CPU_ELEMENTS = 2**20  # tiles that stay in a CPU's cache are faster
MAX_FUSED_DIM = 128


@dataclass(frozen=True)
class Tiles:
    """How `n` vectors × `k` codes is cut into tiles of at most `elements`."""

    n: int
    k: int
    elements: int

    @property
    def width(self) -> int:
        """Codes of a tile: all of them unless fewer than 16 vectors would fit beside them."""
        return min(self.k, max(1, self.elements // 16))

    def rows(self) -> Iterator[slice]:
        height = max(1, self.elements // self.width)
        return (slice(i, min(self.n, i + height)) for i in range(0, self.n, height))

    def codes(self) -> Iterator[slice]:
        return (slice(i, min(self.k, i + self.width)) for i in range(0, self.k, self.width))


@torch.no_grad()
def nearest_codes(vectors: Tensor, codes: Tensor, alive: Tensor | None = None, elements: int | None = None) -> Tensor:
    """`argmin_k ‖z − c_k‖²` for each vector `(n, d)` over codes `(k, d)`, as int64 `(n,)`.

    Args:
        alive: bool `(k,)`; the other codes are never chosen.
        elements: distances held at once; by default as the device likes, at most `MAX_ELEMENTS`.
    """
    if fused(vectors):
        from .triton_search import nearest

        return nearest(vectors.contiguous(), codes.contiguous(), codes.mean(0), alive)
    vectors, codes, norms, _ = centred(vectors, codes, alive)
    tiles = Tiles(len(vectors), len(codes), elements or tile_elements(vectors))
    indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for rows in tiles.rows():
        low = vectors.new_full((rows.stop - rows.start,), torch.inf)
        best = indices.new_zeros(len(low))
        for part in tiles.codes():
            tile_low, tile_best = distances(vectors[rows], codes[part], norms[part]).min(1)
            best = torch.where(tile_low < low, tile_best + part.start, best)
            low = torch.minimum(low, tile_low)
        indices[rows] = best
    return indices


def centred(vectors: Tensor, codes: Tensor, alive: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors and codes less the codes' mean, the codes' squared norms `(k,)`, infinite for those not alive, and that mean.

    Distances stay the same; ‖c‖² − 2 z·c loses fewer digits when both lie about 0.
    """
    centre = codes.mean(0)
    vectors, codes = (vectors - centre).contiguous(), (codes - centre).contiguous()
    norms = codes.square().sum(1)
    return vectors, codes, norms if alive is None else norms.masked_fill(~alive, torch.inf), centre


def distances(vectors: Tensor, codes: Tensor, norms: Tensor) -> Tensor:
    """‖z − c‖² − ‖z‖² `(n, k)`: what differs between codes."""
    return torch.addmm(norms, vectors, codes.T, alpha=-2)


def tile_elements(like: Tensor) -> int:
    return CPU_ELEMENTS if like.device.type == "cpu" else MAX_ELEMENTS


def fused(vectors: Tensor) -> bool:
    """Whether the Triton kernels take these vectors `(…, d)`."""
    return vectors.is_cuda and vectors.dtype == torch.float32 and vectors.shape[-1] <= MAX_FUSED_DIM and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
