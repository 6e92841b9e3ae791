"""Parity with vector-quantize-pytorch where it has the same thing: codes, values, losses and gradients."""

from dataclasses import replace

import pytest
import torch

from omnilatent.quantizers import FSQ, VQ, SimVQ, build_quantizer
from omnilatent.quantizers.codebook import assign
from omnilatent.quantizers.config import VQConfig

library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed: no parity tests")


@pytest.mark.parametrize(("levels", "dim", "books"), [((8, 5, 5, 5), 4, 1), ((7, 4, 3), 10, 1), ((5, 4), 8, 4)])
def test_fsq_is_the_librarys(levels: tuple[int, ...], dim: int, books: int) -> None:
    torch.manual_seed(0)
    theirs, ours = library.FSQ(list(levels), dim=dim, num_codebooks=books), FSQ(dim, levels, num_codebooks=books)
    ours.load_state_dict(theirs.state_dict())
    vectors, weights = (2 * torch.randn(3, 40, dim)).requires_grad_(), torch.randn(3, 40, dim)
    expected, codes = theirs(vectors)
    result = ours(vectors)
    assert torch.equal(result.indices, codes.long())
    torch.testing.assert_close(result.quantized, expected)
    torch.testing.assert_close(ours.indices_to_vectors(codes), theirs.indices_to_codes(codes))
    gradients = [torch.autograd.grad((q * weights).sum(), vectors)[0] for q in (result.quantized, expected)]
    torch.testing.assert_close(*gradients)


def test_vq_and_one_step_of_its_moving_averages_are_the_librarys() -> None:
    torch.manual_seed(0)
    theirs = library.VectorQuantize(6, 32, decay=0.9, commitment_weight=0.25, rotation_trick=True)
    ours = VQ(6, 32, config=VQConfig(usage_decay=0.9, data_init=False))
    start = torch.randn(1, 32, 6)
    theirs._codebook.embed.data.copy_(start)
    theirs._codebook.embed_avg.data.copy_(start)
    theirs._codebook.cluster_size.data.fill_(1)
    ours.codebook.copy_(start)
    ours.sums.copy_(start)
    vectors, weights = torch.randn(2, 50, 6, requires_grad=True), torch.randn(2, 50, 6)
    expected, codes, loss = theirs(vectors)
    result = ours(vectors)
    assert torch.equal(result.indices, codes)
    torch.testing.assert_close(result.quantized, expected)
    torch.testing.assert_close(result.losses["commitment"], loss.squeeze())
    torch.testing.assert_close(ours.codebook, theirs._codebook.embed)
    gradients = [torch.autograd.grad((q * weights).sum() + extra, vectors)[0]
                 for q, extra in ((result.quantized, result.losses["commitment"]), (expected, loss.sum()))]
    torch.testing.assert_close(*gradients)


def test_the_rotation_turns_a_vectors_gradient_as_the_vector_was() -> None:
    """Against the explicit matrix λ R of the paper, that takes the vector to its code."""
    torch.manual_seed(0)
    vector, code, weights = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    a, b = vector / vector.norm(), code / code.norm()
    middle = (a + b) / (a + b).norm()
    matrix = code.norm() / vector.norm() * (torch.eye(3) - 2 * torch.outer(middle, middle) + 2 * torch.outer(b, a))
    torch.testing.assert_close(matrix @ vector, code)
    vector = vector[None].requires_grad_()
    gradient, = torch.autograd.grad((assign(vector, code[None], True)[0] * weights).sum(), vector)
    torch.testing.assert_close(gradient[0], matrix.T @ weights)


@pytest.mark.parametrize("rotation", [True, False])
def test_simvq_is_the_librarys(rotation: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = library.SimVQ(6, 64, rotation_trick=rotation), SimVQ(6, 64)
    ours.config = replace(ours.config, rotation=rotation)
    ours.frozen.copy_(theirs.frozen_codebook[None])
    ours.maps[0].load_state_dict(theirs.code_transform.state_dict())
    vectors, weights = torch.randn(2, 50, 6, requires_grad=True), torch.randn(2, 50, 6)
    expected, codes, loss = theirs(vectors)
    result = ours(vectors)
    assert torch.equal(result.indices, codes)
    torch.testing.assert_close(result.quantized, expected)
    torch.testing.assert_close(sum(result.losses.values()), loss)
    gradients = [torch.autograd.grad((q * weights).sum() + extra, (vectors, w))
                 for q, extra, w in ((result.quantized, sum(result.losses.values()), ours.maps[0].weight),
                                     (expected, loss, theirs.code_transform.weight))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["lfq", "bsq"])
def test_binary_codes_are_the_librarys_and_the_entropy_of_a_vector_is_exact(kind: str) -> None:
    torch.manual_seed(0)
    theirs = library.LFQ(dim=5, codebook_size=64, spherical=kind == "bsq", entropy_loss_weight=1)
    ours = build_quantizer(kind, 5, 64, entropy_weight=1.0, diversity=0.0, inverse_temperature=3.0)
    ours.inner.load_state_dict(theirs.state_dict())
    vectors = torch.randn(2, 50, 5)
    returned, breakdown = theirs(vectors, inv_temperature=3.0, return_loss_breakdown=True)
    result = ours(vectors)
    assert torch.equal(result.indices, returned.indices.long())
    torch.testing.assert_close(result.quantized, returned.quantized)
    torch.testing.assert_close(result.losses["entropy"], breakdown.per_sample_entropy, rtol=5e-3, atol=5e-3)
