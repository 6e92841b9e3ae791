"""`heads` of fused.py on a GPU: one kernel each way.

- `forward`, `backward`: as `plain` and `plain_gradient` there.

Import this only where Triton is installed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 8  # tokens of a program on the way back, whose parts in the weights' gradients it sums


@triton.jit
def _places(h: tl.constexpr, d: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """Of the first halves of all heads `(H, D)`, and which of them there are."""
    heads, columns = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    return heads * d + columns, (heads < h) & (columns < d // 2)


@triton.jit
def _load(pointer, place, inside, d: tl.constexpr):
    """Both halves, float32."""
    first = tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(pointer + place + d // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, place, inside, first, second, d: tl.constexpr):
    tl.store(pointer + place, first, mask=inside)
    tl.store(pointer + place + d // 2, second, mask=inside)


@triton.jit
def _angles(cos_pointer, sin_pointer, token, TURNED: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """Cosines and sines of the pairs of channels `(1, D)`."""
    columns = tl.arange(0, D)[None, :]
    if TURNED:
        cos = tl.load(cos_pointer + token * d + columns, mask=columns < d // 2, other=1.0).to(tl.float32)
        sin = tl.load(sin_pointer + token * d + d // 2 + columns, mask=columns < d // 2, other=0.0).to(tl.float32)
    else:
        cos, sin = tl.full((1, D), 1.0, tl.float32), tl.zeros((1, D), tl.float32)
    return cos, sin


@triton.jit
def _inverse(first, second, d: tl.constexpr, eps: tl.constexpr):
    """One over the root mean square `(H, 1)`."""
    return tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / d + eps)[:, None]


@triton.jit
def _forward(qkv_pointer, temperature_pointer, near_q_pointer, near_k_pointer, cos_pointer, sin_pointer, first_q_pointer,
             first_k_pointer, first_v_pointer, q_pointer, k_pointer, v_pointer, n, prefix, TURNED: tl.constexpr,
             h: tl.constexpr, d: tl.constexpr, H: tl.constexpr, D: tl.constexpr, eps: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // n, row % n
    place, inside = _places(h, d, H, D)
    whole: tl.constexpr = h * d
    qkv_pointer += row * 3 * whole
    cos, sin = _angles(cos_pointer, sin_pointer, token, TURNED, d, D)
    temperature = tl.load(temperature_pointer + tl.arange(0, H), mask=tl.arange(0, H) < h, other=0.0)[:, None]

    a, b = _load(qkv_pointer, place, inside, d)
    scale = _inverse(a, b, d, eps) * temperature
    near_a, near_b = _load(near_q_pointer, place, inside, d)
    a, b = near_a + scale * a, near_b + scale * b
    a, b = a * cos - b * sin, b * cos + a * sin
    early = token < prefix
    _store(first_q_pointer + (batch * prefix + token) * whole, place, inside & early, a, b, d)
    _store(q_pointer + (batch * (n - prefix) + token - prefix) * whole, place, inside & (token >= prefix), a, b, d)

    a, b = _load(qkv_pointer + whole, place, inside, d)
    scale = _inverse(a, b, d, eps)
    near_a, near_b = _load(near_k_pointer, place, inside, d)
    a, b = near_a + scale * a, near_b + scale * b
    a, b = a * cos - b * sin, b * cos + a * sin
    _store(first_k_pointer + (batch * prefix + token) * whole, place, inside & early, a, b, d)
    _store(k_pointer + row * whole, place, inside, a, b, d)

    a, b = _load(qkv_pointer + 2 * whole, place, inside, d)
    _store(first_v_pointer + (batch * prefix + token) * whole, place, inside & early, a, b, d)
    _store(v_pointer + row * whole, place, inside, a, b, d)


@triton.jit
def _through_norm(a, b, scaled_a, scaled_b, d: tl.constexpr, eps: tl.constexpr):
    """Inputs and gradients of what was normalised → gradients of the inputs."""
    inverse = _inverse(a, b, d, eps)
    along = (tl.sum(scaled_a * a, axis=1) + tl.sum(scaled_b * b, axis=1))[:, None] / d * inverse * inverse
    return inverse * (scaled_a - a * along), inverse * (scaled_b - b * along), inverse


@triton.jit
def _backward(qkv_pointer, temperature_pointer, cos_pointer, sin_pointer, first_q_pointer, first_k_pointer, first_v_pointer,
              q_pointer, k_pointer, v_pointer, grad_pointer, parts_pointer, rows, n, prefix, TURNED: tl.constexpr,
              h: tl.constexpr, d: tl.constexpr, H: tl.constexpr, D: tl.constexpr, eps: tl.constexpr, AT_ONCE: tl.constexpr):
    place, there = _places(h, d, H, D)
    whole: tl.constexpr = h * d
    temperature = tl.load(temperature_pointer + tl.arange(0, H), mask=tl.arange(0, H) < h, other=0.0)[:, None]
    near_q_a, near_q_b = tl.zeros((H, D), tl.float32), tl.zeros((H, D), tl.float32)
    near_k_a, near_k_b = tl.zeros((H, D), tl.float32), tl.zeros((H, D), tl.float32)
    product_a, product_b = tl.zeros((H, D), tl.float32), tl.zeros((H, D), tl.float32)
    for step in range(AT_ONCE):
        row = tl.program_id(0).to(tl.int64) * AT_ONCE + step
        batch, token = row // n, row % n
        inside = there & (row < rows)
        early, late = inside & (token < prefix), inside & (token >= prefix)
        first, behind = (batch * prefix + token) * whole, (batch * (n - prefix) + token - prefix) * whole
        cos, sin = _angles(cos_pointer, sin_pointer, token, TURNED, d, D)
        own = row * 3 * whole

        early_a, early_b = _load(first_q_pointer + first, place, early, d)
        late_a, late_b = _load(q_pointer + behind, place, late, d)
        y_a, y_b = early_a + late_a, early_b + late_b
        y_a, y_b = y_a * cos + y_b * sin, y_b * cos - y_a * sin
        a, b = _load(qkv_pointer + own, place, inside, d)
        grad_a, grad_b, inverse = _through_norm(a, b, y_a * temperature, y_b * temperature, d, eps)
        _store(grad_pointer + own, place, inside, grad_a, grad_b, d)
        near_q_a += y_a
        near_q_b += y_b
        product_a += y_a * a * inverse
        product_b += y_b * b * inverse

        early_a, early_b = _load(first_k_pointer + first, place, early, d)
        late_a, late_b = _load(k_pointer + row * whole, place, inside, d)
        y_a, y_b = early_a + late_a, early_b + late_b
        y_a, y_b = y_a * cos + y_b * sin, y_b * cos - y_a * sin
        a, b = _load(qkv_pointer + own + whole, place, inside, d)
        grad_a, grad_b, inverse = _through_norm(a, b, y_a, y_b, d, eps)
        _store(grad_pointer + own + whole, place, inside, grad_a, grad_b, d)
        near_k_a += y_a
        near_k_b += y_b

        early_a, early_b = _load(first_v_pointer + first, place, early, d)
        late_a, late_b = _load(v_pointer + row * whole, place, inside, d)
        _store(grad_pointer + own + 2 * whole, place, inside, early_a + late_a, early_b + late_b, d)
    parts_pointer += tl.program_id(0) * 3 * whole
    _store(parts_pointer, place, there, near_q_a, near_q_b, d)
    _store(parts_pointer + whole, place, there, near_k_a, near_k_b, d)
    _store(parts_pointer + 2 * whole, place, there, product_a, product_b, d)


def _device_of(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()  # the interpreter's tensors are on no GPU


def _form(qkv: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[bool, int, int, int, int]:
    h, d = qkv.shape[3:]
    return turn is not None, h, d, triton.next_power_of_2(h), triton.next_power_of_2(d // 2)


def forward(qkv: Tensor, temperature: Tensor, near_q: Tensor, near_k: Tensor, turn: tuple[Tensor, Tensor] | None,
            prefix: int | None, eps: float) -> tuple[Tensor, ...]:
    """As `plain` in fused.py."""
    qkv = qkv.contiguous()
    (b, n, _, h, d), early = qkv.shape, prefix or 0
    q, k, v = (qkv.new_empty(b, count, h, d) for count in (n - early, n, n))
    first = [q, k, v] if prefix is None else [qkv.new_empty(b, early, h, d) for _ in range(3)]
    cos, sin = (qkv, qkv) if turn is None else turn
    with _device_of(qkv):
        _forward[(b * n,)](qkv, temperature, near_q, near_k, cos, sin, *first, q, k, v, n, early, *_form(qkv, turn), eps, num_warps=2)
    return (q, k, v) if prefix is None else (*first, q, k, v)


def backward(qkv: Tensor, temperature: Tensor, turn: tuple[Tensor, Tensor] | None, prefix: int | None, eps: float,
             gradients: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """As `plain_gradient` in fused.py."""
    qkv, gradients = qkv.contiguous(), tuple(gradient.contiguous() for gradient in gradients)
    (b, n, _, h, d), early = qkv.shape, prefix or 0
    programs = triton.cdiv(b * n, AT_ONCE)
    own, parts = torch.empty_like(qkv), qkv.new_empty(programs, 3, h, d, dtype=torch.float32)
    cos, sin = (qkv, qkv) if turn is None else turn
    with _device_of(qkv):
        _backward[(programs,)](qkv, temperature, cos, sin, *gradients[:3], *gradients[-3:], own, parts, b * n, n, early, *_form(qkv, turn), eps,
                               AT_ONCE, num_warps=2)
    return own, parts.sum(0)
