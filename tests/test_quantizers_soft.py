"""The search and the soft assignment: tiles = definition, and the limit τ → 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnilatent.quantizers.search import Tiles, nearest_codes
from omnilatent.quantizers.soft import plain_soft_assignment, soft_assignment


def batch(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * k + d)
    return torch.randn(n, d, generator=generator).to(dtype) + 3, torch.randn(k, d, generator=generator).to(dtype) + 3


def with_gradients(assign, vectors: Tensor, codes: Tensor, tau: float, **more: object) -> list[Tensor]:  # noqa: ANN001
    """All outputs and the gradients of a fixed mixture of them."""
    vectors, codes = vectors.clone().requires_grad_(), codes.clone().requires_grad_()
    soft = assign(vectors, codes, tau, **more)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in soft[:4]]
    return [t.detach() for t in (*soft, *torch.autograd.grad(soft[:4], (vectors, codes), weights))]


@pytest.mark.parametrize("elements", [20, 300, 10**6])  # tiles cut both ways, one way, not at all
@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("pruned", [False, True])
def test_tiles_give_the_definitions_values_and_gradients(elements: int, tau: float, pruned: bool) -> None:
    vectors, codes = batch(37, 53, 5, torch.float64)
    alive = torch.arange(53) % 3 > 0 if pruned else None
    plain = with_gradients(plain_soft_assignment, vectors, codes, tau, alive=alive)
    tiles = with_gradients(soft_assignment, vectors, codes, tau, alive=alive, elements=elements)
    for a, b in zip(tiles, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(nearest_codes(vectors, codes, alive, elements), plain[4])


def test_float32_is_near_float64() -> None:
    vectors, codes = batch(300, 500, 8)
    for tau in (1.0, 0.1):
        exact = with_gradients(plain_soft_assignment, vectors.double(), codes.double(), tau)
        for a, b in zip(with_gradients(soft_assignment, vectors, codes, tau), exact, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_the_gradient_is_that_of_the_values() -> None:
    vectors, codes = (t.requires_grad_() for t in batch(4, 6, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda z, c: soft_assignment(z, c, 0.7, None, 8)[:4], (vectors, codes))


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_tiles_cover_all_and_stay_small(n: int, k: int, elements: int) -> None:
    tiles = Tiles(n, k, elements)
    cells = torch.zeros(n, k, dtype=torch.int64)
    for rows in tiles.rows():
        for codes in tiles.codes():
            cells[rows, codes] += 1
            assert cells[rows, codes].numel() <= max(elements, 1)
    assert (cells == 1).all()


def test_a_cold_temperature_is_the_nearest_neighbour() -> None:
    vectors, codes = batch(200, 64, 8)
    nearest = torch.cdist(vectors, codes).argmin(1)
    soft = soft_assignment(vectors, codes, 1e-6)
    assert torch.equal(soft.indices, nearest) and torch.equal(nearest_codes(vectors, codes), nearest)
    torch.testing.assert_close(soft.average, codes[nearest], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(soft.energy, (vectors - codes[nearest]).square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft.peak, torch.ones(200))
    torch.testing.assert_close(soft.usage, torch.bincount(nearest, minlength=64) / 200.0)


def test_a_hot_temperature_is_the_mean_code() -> None:
    vectors, codes = batch(20, 30, 4)
    soft = soft_assignment(vectors, codes, 1e6)
    torch.testing.assert_close(soft.average, codes.mean(0).expand(20, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft.usage, torch.full((30,), 1 / 30), rtol=1e-4, atol=0)


def test_memory_stays_far_below_vectors_times_codes() -> None:
    """2¹⁶ codes × 256 vectors would be 64 MiB; no tensor made on the way is larger than a tile or the codebook."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return result

    vectors, codes = torch.randn(256, 2, requires_grad=True), torch.randn(2**16, 2, requires_grad=True)
    with Watch():
        soft = soft_assignment(vectors, codes, 0.1)
        sum(t.sum() for t in soft[:4]).backward()
        assert torch.equal(nearest_codes(vectors, codes), soft.indices)
    assert largest <= 2**20 < 256 * 2**16
