"""What every quantizer is: vectors or maps in; their quantized vectors, integer codes and losses out.

- `Quantized`: what `forward` returns.
- `Quantizer`: the base class; it knows the two layouts, so that a quantizer itself only sees rows of vectors.
- `straight_through`: one tensor's values with another's gradient. `stacked`: several books' tensors.
- `project`: a linear layer at the input's precision; `check_divides`: the width of each book's part.

    quantizer = build_quantizer("lgq", dim=8, codebook_size=512)
    result = quantizer(vectors)                             # (b, n, 8), or maps (b, 8, h, w)
    loss = reconstruction + sum(result.losses.values())     # result.quantized goes on to the decoder
    quantizer.indices_to_vectors(result.indices)            # == result.quantized
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """`quantized` is like the input (straight-through gradient, or LGQ's); `indices` int64 are the hard codes,
    `(b, n)` or `(b, h, w)` with one codebook, `(b, n, books)` or `(b, books, h, w)` with several; `losses` are named,
    weighted scalars whose sum training adds (none while evaluating without gradients)."""

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Args: `dim`, the width of the vectors; `codebook_size`, the codes K of each book; `num_codebooks`.

    A subclass gives `quantize` and `look_up`, on rows of vectors in float32, whatever the input's and the module's
    precision, and under autocast too. All state is in parameters and buffers.
    """

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int = 1) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("codebook_size", codebook_size, 2), ("num_codebooks", num_codebooks, 1)):
            if value < least:
                raise ValueError(f"{name} is at least {least}; got {value}")
        self.dim, self.codebook_size, self.num_codebooks = dim, codebook_size, num_codebooks

    @abstractmethod
    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rows `(n, dim)` → their quantized rows, their codes `(n, books)`, the losses."""

    @abstractmethod
    def look_up(self, indices: Tensor) -> Tensor:
        """Codes `(n, books)` → rows `(n, dim)`."""

    def schedule(self, progress: float) -> dict[str, float]:
        """Set what changes along a run by the share of it that is done, 0 … 1, and return it by name, for the log. Here:
        nothing."""
        return {}

    def parameter_count(self) -> int:
        """Numbers that decoding needs: the parameters, and codebooks where these are buffers."""
        return sum(p.numel() for p in self.parameters())

    def split(self, rows: Tensor) -> Tensor:
        """`(n, dim)` → each book's part `(books, n, width)`."""
        return rows.view(len(rows), self.num_codebooks, -1).transpose(0, 1)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""
        return parts.transpose(0, 1).reshape(-1, self.dim)

    @property
    def description(self) -> str:
        """What a command prints about the codebook."""
        books = f"{self.num_codebooks} codebooks of " if self.num_codebooks > 1 else ""
        return f"{books}{self.codebook_size} codes"

    @property
    def learning(self) -> bool:
        """Whether losses are worth their time: while training, or where a gradient may be asked for."""
        return self.training or torch.is_grad_enabled()

    def forward(self, vectors: Tensor) -> Quantized:
        """Vectors `(b, n, dim)` or maps `(b, dim, h, w)` of any float dtype. They must be finite, which is not looked at here: the
        training loop and the codec do.

        Raises:
            ValueError: another rank or width, or nothing in it.
        """
        if vectors.ndim not in (3, 4):
            raise ValueError(f"vectors are (b, n, dim) or maps (b, dim, h, w), 3 or 4 axes; got {vectors.ndim}")
        is_map = vectors.ndim == 4
        last = vectors.movedim(1, -1) if is_map else vectors
        if last.shape[-1] != self.dim:
            raise ValueError(f"the quantizer has dim {self.dim}; the vectors have {last.shape[-1]}")
        if vectors.numel() == 0:
            raise ValueError(f"there must be at least 1 vector; got {tuple(vectors.shape)}")
        rows = last.reshape(-1, self.dim)
        with torch.autocast(vectors.device.type, enabled=False):
            quantized, indices, losses = self.quantize(rows.float())
        quantized = quantized.to(vectors.dtype).view(last.shape)
        indices = indices.view(*last.shape[:-1], self.num_codebooks)
        if self.num_codebooks == 1:
            indices = indices.squeeze(-1)
        elif is_map:
            indices = indices.movedim(-1, 1)
        return Quantized(quantized.movedim(-1, 1) if is_map else quantized, indices, losses)

    def indices_to_vectors(self, indices: Tensor) -> Tensor:
        """The inverse of `forward(…).indices`, in both layouts.

        The number of axes tells them apart without a guess, since `num_codebooks` is known: one book has `(b, n)` or
        `(b, h, w)`, several have `(b, n, books)` or `(b, books, h, w)`.

        Raises:
            ValueError: not integers, another number of axes or books, or a code outside the codebook.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"codes are integers; got {indices.dtype}")
        books, several = self.num_codebooks, self.num_codebooks > 1
        if indices.ndim not in (2 + several, 3 + several):
            raise ValueError(f"codes of {books} codebook(s) have {2 + several} axes, or {3 + several} as maps; got {indices.ndim}")
        is_map = indices.ndim == 3 + several
        last = indices.movedim(1, -1) if several and is_map else indices if several else indices.unsqueeze(-1)
        if last.shape[-1] != books:
            raise ValueError(f"the quantizer has {books} codebooks; the codes have {last.shape[-1]}")
        if last.numel() > 0:
            low, high = (int(v) for v in torch.aminmax(last))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"codes run from 0 to {self.codebook_size - 1}; got {low if low < 0 else high}")
        with torch.autocast(indices.device.type, enabled=False):
            vectors = self.look_up(last.reshape(-1, books).long()).view(*last.shape[:-1], self.dim)
        return vectors.movedim(-1, 1) if is_map else vectors


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, source: Tensor) -> Tensor:  # noqa: ANN001
        return values.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:  # noqa: ANN001
        return None, grad


def straight_through(values: Tensor, source: Tensor) -> Tensor:
    """`values` exactly (`source + (values − source)` would round), with the gradient passed on to `source`."""
    return _StraightThrough.apply(values.detach(), source)


def stacked(tensors: list[Tensor], dim: int) -> Tensor:
    """`torch.stack`, without a copy where there is one."""
    return torch.stack(tensors, dim) if len(tensors) > 1 else tensors[0].unsqueeze(dim)


def project(layer: nn.Module, vectors: Tensor) -> Tensor:
    """A linear layer, or none, at the precision of `vectors` instead of its own."""
    if not isinstance(layer, nn.Linear):
        return layer(vectors)
    bias = None if layer.bias is None else layer.bias.to(vectors.dtype)
    return nn.functional.linear(vectors, layer.weight.to(vectors.dtype), bias)


def check_divides(dim: int, books: int) -> int:
    """The width of each book's part of a vector.

    Raises:
        ValueError: `dim` does not split into `books` equal parts.
    """
    if books < 1 or dim % books:
        raise ValueError(f"dim {dim} does not split into {books} codebooks of equal width")
    return dim // books
