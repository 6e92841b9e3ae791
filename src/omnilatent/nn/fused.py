"""What a transformer layer does between its matrix products and attention, with gradients that read and write once.

- `heads`: one projection → queries, keys and values of all heads, also split into a prefix and what comes after it; on a GPU by
  triton_heads.py. `plain`, `plain_gradient`: by plain operations.
- `norm`, `add_norm`, `swiglu`: RMSNorm, that of a residual sum, and SwiGLU. With `fast` they are compiled, each one kernel, of any
  number of tokens. A process that mixes widths, precisions and gradients comes to the eight variants that PyTorch's compiler allows;
  further ones run uncompiled, with its warning. `over_tokens`: sums.

Autograd's own gradients would pad, copy and add where parts of one tensor go different ways, and sum over all tokens in slow
kernels where a vector is shared by them. There are no gradients of these gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, rms_norm, silu

from .rotary import rotate, rotate_back

EPS = 1e-6
HAS_TRITON = importlib.util.find_spec("triton") is not None
Turn = tuple[Tensor, Tensor]


class HeadWeights(NamedTuple):
    """Of queries and keys: a learned temperature of queries `(h,)`, learned vectors that are added `(h, 1, d)`."""

    temperature: Tensor
    near_q: Tensor
    near_k: Tensor

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """`(2, h, 1)` and `(2, h, d)`."""
        scale = torch.stack((self.temperature, torch.ones_like(self.temperature)))[..., None]
        return scale, torch.stack((self.near_q, self.near_k)).squeeze(2)


def heads(qkv: Tensor, weights: HeadWeights, turn: Turn | None, prefix: int | None = None) -> tuple[Tensor, ...]:
    """Queries and keys, normalised to unit root mean square, scaled, shifted and turned, and values.

    Args:
        qkv: `(b, n, 3, h, d)`.
        turn: the tokens' angles, of `Rotary`; None: they have no places.
        prefix: how many tokens come first.

    Returns:
        Queries, keys, values, each `(b, n, h, d)`; with `prefix` those of the prefix, then the others' queries, all keys, all values.
    """
    return _Heads.apply(turn, prefix, qkv, *weights)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, turn: Turn | None, prefix: int | None, qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.prefix = prefix
        ctx.save_for_backward(qkv, *weights, *(turn or ()))
        if _has_kernels(qkv):
            from .triton_heads import forward

            return forward(qkv, *weights, turn, prefix, EPS)
        return plain(qkv, HeadWeights(*weights), turn, prefix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, temperature, near_q, near_k, *angles = ctx.saved_tensors
        turn = (angles[0], angles[1]) if angles else None
        if _has_kernels(qkv):
            from .triton_heads import backward

            own, (q, k, product) = backward(qkv, temperature, turn, ctx.prefix, EPS, gradients)
        else:
            own, (q, k, product) = plain_gradient(qkv, HeadWeights(temperature, near_q, near_k), turn, ctx.prefix, gradients)
        return None, None, own, product.sum(-1).to(temperature), q[:, None].to(near_q), k[:, None].to(near_k)


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and HAS_TRITON


def plain(qkv: Tensor, weights: HeadWeights, turn: Turn | None, prefix: int | None) -> tuple[Tensor, ...]:
    """`heads` by plain operations."""
    scale, shift = weights.scale_and_shift()
    normal = rms_norm(qkv[:, :, :2], qkv.shape[-1:], eps=EPS)
    both = torch.addcmul(shift.to(normal.dtype), normal, scale.to(normal.dtype))
    q, k = (both if turn is None else rotate(both, turn)).to(qkv.dtype).unbind(2)
    v = qkv[:, :, 2].clone()
    if prefix is None:
        return q, k, v
    return q[:, :prefix], k[:, :prefix].clone(), v[:, :prefix].clone(), q[:, prefix:], k, v


def plain_gradient(
    qkv: Tensor, weights: HeadWeights, turn: Turn | None, prefix: int | None, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of what `heads` returns → that of `qkv`, and `(3, h, d)`: those of both shifts, and of the scale before its sum
    over channels."""
    if prefix is None:
        q, k, v = gradients
    else:
        first, others = gradients[:3], gradients[3:]
        behind = (0, 0, 0, 0, 0, others[0].shape[1])
        q, k, v = torch.cat((first[0], others[0]), 1), others[1] + pad(first[1], behind), others[2] + pad(first[2], behind)
    turned = torch.stack((q, k), 2).float()
    shifted = turned if turn is None else rotate_back(turned, turn)
    scale, _ = weights.scale_and_shift()
    x = qkv[:, :, :2].float()
    inverse = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normal, scaled = x * inverse, shifted * scale.float()
    own = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    parts = torch.cat((shifted, (shifted * normal)[:, :, :1]), 2)
    return torch.cat((own.to(qkv.dtype), v[:, :, None]), 2), over_tokens(parts.flatten(0, 1))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)


def _add_norm(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + more
    return x, _norm(x, weight)


def _norm_gradient(x: Tensor, weight: Tensor, normed: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed, and of what else `x` went into → that of `x`, and each token's part in that of the weight."""
    wide, normed = x.float(), normed.float()
    inverse = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normal, scaled = wide * inverse, normed * weight.float()
    whole = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return (whole if own is None else own.float() + whole).to(x.dtype), (normed * normal).to(x.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def norm(x: Tensor, weight: Tensor, fast: bool = False) -> Tensor:
    """RMSNorm of `(…, dim)` with a weight `(dim,)`, which is taken in the tokens' dtype."""
    return _Norm.apply(fast, x.flatten(0, -2), weight).view(x.shape)


def add_norm(x: Tensor, more: Tensor, weight: Tensor, fast: bool = False) -> tuple[Tensor, Tensor]:
    """x + more, and its `norm`."""
    both, normed = _AddNorm.apply(fast, x.flatten(0, -2), more.flatten(0, -2), weight)
    return both.view(x.shape), normed.view(x.shape)


def swiglu(gate_up: Tensor, fast: bool = False) -> Tensor:
    """silu of the first half of the channels times the second."""
    function = _compiled(_swiglu) if fast else _swiglu
    return function(gate_up.flatten(0, -2)).unflatten(0, gate_up.shape[:-1])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: bool, x: Tensor, weight: Tensor) -> Tensor:
        ctx.fast = fast
        ctx.save_for_backward(x, weight)
        return (_compiled(_norm) if fast else _norm)(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, normed: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_norm_backward(ctx, normed, None)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: bool, x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, normed = (_compiled(_add_norm) if fast else _add_norm)(x, more, weight)
        ctx.fast = fast
        ctx.save_for_backward(x, weight)
        return x, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, own: Tensor, normed: Tensor) -> tuple[Tensor | None, ...]:
        whole, weight = _norm_backward(ctx, normed.contiguous(), own.contiguous())
        return None, whole, whole, weight


def _norm_backward(ctx: Any, normed: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of the tokens, and of the weight where it learns."""
    x, weight = ctx.saved_tensors
    whole, parts = (_compiled(_norm_gradient) if ctx.fast else _norm_gradient)(x, weight, normed, own)
    return whole, over_tokens(parts).to(weight) if ctx.needs_input_grad[-1] else None


def over_tokens(parts: Tensor) -> Tensor:
    """`(n, …)` summed over the first axis, as a matrix product: it fills a GPU where a sum over rows does not."""
    return (parts.new_ones(1, len(parts)) @ parts.flatten(1)).view(parts.shape[1:])
