"""Steps of a layer between matrix products: gradients beside autograd's own, the kernels beside plain operations (on a GPU as they
are; without one in Triton's interpreter, where Triton is installed), and attention's gradients where shapes alternate on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from omnilatent.nn import fused
from omnilatent.nn.fused import EPS, HeadWeights, add_norm, heads, norm, plain, plain_gradient
from omnilatent.nn.rotary import Rotary
from omnilatent.omni.config import OmniModelConfig
from omnilatent.omni.model import OmniLatentModel

KINDS = list(itertools.product((True, False), (None, 2)))  # with places or without, of a prefix or not


def inputs(turned: bool, h: int = 3, d: int = 8, n: int = 5) -> tuple[torch.Tensor, HeadWeights, tuple[torch.Tensor, ...] | None]:
    torch.manual_seed(0)
    qkv, weights = torch.randn(2, n, 3, h, d), HeadWeights(torch.rand(h), torch.randn(h, 1, d), torch.randn(h, 1, d))
    return qkv, weights, Rotary(d)(torch.randint(0, 9, (n, 3))) if turned else None


@pytest.mark.parametrize(("turned", "prefix"), KINDS)
def test_gradients_of_heads_are_autograds(turned: bool, prefix: int | None) -> None:
    qkv, weights, turn = inputs(turned)
    leaves = [t.requires_grad_() for t in (qkv, *weights)]
    expected = plain(qkv, weights, turn, prefix)
    found = heads(qkv, weights, turn, prefix)
    upstream = [torch.randn_like(t) for t in expected]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(made, leaves, upstream) for made in (expected, found)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_norms_are_autograds() -> None:
    torch.manual_seed(0)
    x, more, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 16, requires_grad=True), torch.rand(16, requires_grad=True)
    for leaves, expected, found in (([x, more, weight], fused._add_norm(x, more, weight), add_norm(x, more, weight)),
                                    ([x, weight], (fused._norm(x, weight),), (norm(x, weight),))):
        upstream = [torch.randn_like(t) for t in expected]
        for a, b in zip(*(torch.autograd.grad(made, leaves, upstream) for made in (expected, found)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_kernels(device: str, dtype: torch.dtype = torch.float32) -> None:
    from omnilatent.nn import triton_heads

    for (turned, prefix), (h, d, n) in itertools.product(KINDS, ((3, 8, 5), (2, 12, 7), (5, 32, 9))):
        qkv, weights, turn = inputs(turned, h, d, n)
        qkv = qkv.to(dtype).float()
        expected = plain(qkv, weights, turn, prefix)
        upstream = tuple(torch.randn_like(t).to(dtype).float() for t in expected)
        there = [qkv.to(device, dtype), *(t.to(device) for t in weights)]
        angles = None if turn is None else tuple(t.to(device) for t in turn)
        found = triton_heads.forward(*there, angles, prefix, EPS)
        gradients = triton_heads.backward(*there[:2], angles, prefix, EPS, tuple(t.to(device, dtype) for t in upstream))
        for a, b in zip((*expected, *plain_gradient(qkv, weights, turn, prefix, upstream)), (*found, *gradients), strict=True):
            limit = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a, b.cpu().float(), rtol=limit, atol=limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels were not run on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    check_kernels("cuda", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (CPU build of PyTorch)")
def test_kernels_in_the_interpreter() -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_fused; test_fused.check_kernels('cpu')"
    done = subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its attention was not tried")
def test_a_prefix_has_right_gradients_whatever_target_came_before() -> None:
    """cuDNN's attention, whose plans PyTorch keeps without the strides of the gradient."""
    torch.manual_seed(0)
    config = OmniModelConfig(hidden_dim=128, num_layers=2, num_heads=2, gradient_checkpointing=False)
    model = OmniLatentModel(config).cuda()
    image = torch.rand(4, 3, 224, 224, device="cuda")

    def gradients(size: tuple[int, int], bf16: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            made = model.patches(model.prefix({"image": image}), "image", size)
        made.float().square().mean().backward()
        grad = model.modalities["image"].embed.weight.grad
        assert grad is not None
        return grad

    for size in ((224, 224), (64, 64), (160, 160)):
        expected = gradients(size, bf16=False)
        found = gradients(size, bf16=True)
        assert (found - expected).norm() < 0.1 * expected.norm()
