"""The Triton kernels give what tiles and plain operations give: on a GPU as they are; without one in Triton's interpreter, in
its own process, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from test_quantizers_soft import batch, with_gradients
from torch import Tensor

from omnilatent.quantizers import build_quantizer, codebook, search, soft, vq
from omnilatent.quantizers.base import Quantizer
from omnilatent.quantizers.search import nearest_codes
from omnilatent.quantizers.soft import SoftAssignment, plain_soft_assignment, soft_assignment

SHAPES = ((70, 150, 8), (33, 65, 40), (90, 80, 3), (20, 40, 128))


@contextmanager
def everywhere(kernels: bool) -> Iterator[None]:
    """For the interpreter: whether float32 vectors on the CPU take the kernels too."""
    with ExitStack() as stack:
        for module in (search, soft, codebook, vq):
            stack.enter_context(mock.patch.object(module, "fused", lambda vectors: kernels and vectors.dtype == torch.float32))
        yield


def check_soft_assignment(device: str) -> None:
    """A GPU has room to 1e-5 to 2e-5. It would come to 1e-4 at 128 wide and τ = 0.1 if the compiler made what is added to a
    product its first sum, and at 3 wide if both gradients did not share their halves. The interpreter cuts bf16 off."""
    limit = 4e-5 if device == "cuda" else 1e-4
    for n, k, d in SHAPES:
        vectors, codes = batch(n, k, d)
        vectors, codes = (vectors - 3) * (8 / d) ** 0.5, (codes - 3) * (8 / d) ** 0.5
        alive = torch.arange(k) >= min(64, k - 1)  # the first tile of 64 holds none
        for tau, mask in ((1.0, None), (0.1, None), (0.5, alive)):
            exact = with_gradients(plain_soft_assignment, vectors.double(), codes.double(), tau, alive=mask)
            on_device = None if mask is None else mask.to(device)
            kernels = with_gradients(soft_assignment, vectors.to(device), codes.to(device), tau, alive=on_device)
            for name, a, b in zip((*SoftAssignment._fields, "∂vectors", "∂codes"), kernels, exact, strict=True):
                worst = (a.cpu() - b).abs().max() / b.abs().max()
                assert worst <= limit, f"{name} differs by {worst:.2g} at τ = {tau}, {n} × {k} × {d}"
            found = nearest_codes(vectors.to(device), codes.to(device), on_device).cpu()
            assert torch.equal(found, exact[4]), f"other nearest codes at {n} × {k} × {d}"


def check_long_sums() -> None:
    """On a GPU: sums over 32,768 codes, and over as many vectors in one program, stay as near as short ones."""
    from omnilatent.quantizers import triton_soft

    for n, k in ((64, 2**15), (2**15, 64)):
        vectors, codes = (t - 3 for t in batch(n, k, 8))
        exact = with_gradients(soft_assignment, vectors.double(), codes.double(), 1.0)
        with mock.patch.object(triton_soft, "_PROGRAMS", 1):
            kernels = with_gradients(soft_assignment, vectors.cuda(), codes.cuda(), 1.0)
        for name, a, b in zip((*SoftAssignment._fields, "∂vectors", "∂codes"), kernels, exact, strict=True):
            worst = (a.cpu() - b).abs().max() / b.abs().max()
            assert worst <= 4e-5, f"{name} differs by {worst:.2g} at {n} × {k}"


def train(quantizer: Quantizer, vectors: Tensor) -> dict[str, Tensor]:
    """State, results and gradients of the last of three training steps, on the CPU."""
    for step in range(3):
        rows = (vectors + step / 10).requires_grad_()
        quantizer.zero_grad()
        result = quantizer(rows)
        weights = torch.linspace(-0.02, 0.02, rows.shape[-1]).to(rows)
        ((result.quantized * weights).sum() + sum(result.losses.values())).backward()
    found = {"quantized": result.quantized, "indices": result.indices, "∂vectors": rows.grad} | result.losses
    found |= {f"∂{name}": parameter.grad for name, parameter in quantizer.named_parameters()} | quantizer.state_dict()
    return {name: value.detach().cpu() for name, value in found.items()}


def check_training(device: str) -> None:
    """Steps of every kind, with one book and several, and pruned codes: all state, losses and gradients."""
    cases = [("vq", {}), ("vq", {"rotation": False}), ("simvq", {}), ("lgq", {}), ("lgq", {"dead_codes": "prune"})]
    for kind, options in cases:
        for books in (1, 3):
            torch.manual_seed(0)
            renewal = {"data_init": False, "renew_every": 2, "usage_decay": 0.5, "dead_codes": "keep"}
            renewal = {} if kind == "simvq" else renewal
            quantizer = build_quantizer(kind, 5 * books, 40, books, **(renewal | options)).train()
            other = build_quantizer(kind, 5 * books, 40, books, **(renewal | options)).train()
            other.load_state_dict(quantizer.state_dict())
            vectors = torch.randn(1, 70, 5 * books)
            with everywhere(kernels=False):
                expected = train(quantizer, vectors)
            found = train(other.to(device), vectors.to(device))
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.double().abs().max().item(),
                                           msg=lambda text, name=name: f"{kind}, {options}, {books} books, {name}: {text}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels were not run on a GPU")
@pytest.mark.parametrize("check", [lambda: check_soft_assignment("cuda"), check_long_sums, lambda: check_training("cuda")])
def test_kernels_on_a_gpu(check) -> None:  # noqa: ANN001
    check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (CPU build of PyTorch)")
@pytest.mark.parametrize("check", ["check_soft_assignment", "check_training"])
def test_kernels_in_the_interpreter(check: str) -> None:
    script = ("import sys, warnings; sys.path.insert(0, sys.argv[1]); warnings.simplefilter('ignore')\n"
              "import test_quantizers_kernels as tests\n"
              "with tests.everywhere(kernels=True): getattr(tests, sys.argv[2])('cpu')")
    done = subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__), check], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
