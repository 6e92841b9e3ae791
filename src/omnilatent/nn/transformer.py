"""One transformer layer that reads a prefix once and extends it: prefix-LM attention without a mask.

- `Norm`: RMSNorm.
- `Keys`: what a layer remembers of the tokens that may be attended to.
- `Layer`: RMSNorm, attention with rotary positions and normalised queries and keys, SwiGLU.
- `attend`: scaled dot-product attention over remembered keys and, after them, a causal or a full target.

A prefix attends to itself alone, so its keys do not depend on what is asked of it: it runs through all layers once,
and any number of targets, or a text token by token, then attend to what was remembered. Two attention calls without
a mask take the place of one with a dense mask of all tokens; only padding needs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .fused import HeadWeights, add_norm, heads, norm, swiglu

NEAR = 2.0  # of the head that looks most to its own place when training begins


class Norm(nn.Module):
    """RMSNorm whose scale is taken in the input's dtype, which lets a GPU do it in one kernel under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.fast = nn.Parameter(torch.ones(dim)), False

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.fast)


class Keys(NamedTuple):
    """Keys and values `(b, heads, n, d)`, turned by their positions, and which are no padding, `(b, n)` bool or None: all."""

    k: Tensor
    v: Tensor
    valid: Tensor | None = None

    def then(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Keys:
        """These and, after them, others, by default all valid."""
        if self.valid is not None or valid is not None:
            valid = torch.cat([k.new_ones(len(k), t.shape[2], dtype=torch.bool) if known is None else known
                               for t, known in ((self.k, self.valid), (k, valid))], 1)
        return Keys(torch.cat((self.k, k), 2), torch.cat((self.v, v), 2), valid)


@dataclass(frozen=True)
class LayerConfig:
    """Width, heads, and the inner width of SwiGLU (by default 8/3 of the width, rounded up to 64)."""

    dim: int = 768
    heads: int = 12
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(f"a width of {self.dim} does not split into {self.heads} heads of an even number of channels")

    @property
    def inner(self) -> int:
        return self.hidden or -(-self.dim * 8 // 3 // 64) * 64


class Layer(nn.Module):
    """x + attention(norm x), then + SwiGLU(norm x).

    Queries and keys are normalised to unit root mean square (Henry et al. 2020, arXiv 2010.04245) and then multiplied by a
    learned temperature for each head: without it no pair of tokens can be told from another, and nothing is learned. A learned
    vector is added to both before they are turned; it begins alike in both, so that the heads begin by looking near a token's
    own place, some more and some less.

    Attributes:
        fast: whether what stands between matrix products and attention is compiled.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.norm, self.mlp_norm = Norm(dim), Norm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.temperature = nn.Parameter(torch.ones(config.heads))
        near = torch.linspace(0, NEAR, config.heads)[:, None, None].repeat(1, 1, dim // config.heads)
        self.near_q, self.near_k = nn.Parameter(near), nn.Parameter(near.clone())
        self.gate_up, self.down = nn.Linear(dim, 2 * config.inner, bias=False), nn.Linear(config.inner, dim, bias=False)
        self.fast = False

    def project(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, prefix: int | None = None) -> tuple[Tensor, ...]:
        """Tokens `(b, n, dim)` → queries, keys, values `(b, heads, n, d)`, the first two normalised and turned.

        Args:
            prefix: so many tokens come first. Then: their queries, keys, values, the others' queries, all keys, all values.
        """
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        weights = HeadWeights(self.temperature, self.near_q, self.near_k)
        return tuple(part.transpose(1, 2) for part in heads(qkv, weights, turn, prefix))

    def finish(self, x: Tensor, *attended: Tensor) -> Tensor:
        """Tokens and what their heads attended to, `(b, heads, n, d)`, in one piece or several → the layer's output."""
        pieces = [piece.transpose(1, 2).flatten(2) for piece in attended]
        x, normed = add_norm(x, self.out(torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]), self.mlp_norm.weight, self.fast)
        return x + self.down(swiglu(self.gate_up(normed), self.fast))


def attend(q: Tensor, keys: Keys, causal: bool = False) -> Tensor:
    """Queries `(b, heads, m, d)` over all valid keys; `causal`: they are the keys' last m, and none looks beyond itself."""
    m, n = q.shape[2], keys.k.shape[2]
    causal = causal and m > 1
    mask = None
    if keys.valid is not None:
        mask = keys.valid[:, None, None]
        if causal:
            mask = mask & torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
    elif causal:
        mask = causal_lower_right(m, n)
    attended = scaled_dot_product_attention(q, keys.k, keys.v, attn_mask=mask)
    return _Laid.apply(attended) if attended.is_cuda else attended


class _Laid(torch.autograd.Function):
    """A tensor as it is; its gradient comes with the tensor's own strides. Without it cuDNN's attention under PyTorch 2.11 read beyond a
    later gradient of other strides, as if it were laid out like the first of its shape (docs/experiments.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.strides = x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if gradient.stride() == ctx.strides:
            return gradient
        return torch.empty_strided(gradient.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
