"""What every quantizer promises: layouts, codes and back, any sizes, gradients, bad input, saving."""

import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilatent.quantizers import FSQ, LGQ, ProductQuantizer, ResidualQuantizer, SimVQ, VQ, build_quantizer
from omnilatent.quantizers.base import Quantizer
from omnilatent.quantizers.fsq import levels_for

_without_library = pytest.mark.skipif(importlib.util.find_spec("vector_quantize_pytorch") is None,
                                      reason="vector-quantize-pytorch is not installed")
KINDS = ("lgq", "simvq", "vq", "fsq", *(pytest.param(kind, marks=_without_library) for kind in ("lfq", "bsq")))


def small(kind: str, dim: int = 8, codebook_size: int = 64, **more: object) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(kind, dim, codebook_size, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", [1, 4, 16])
@pytest.mark.parametrize("size", [2, 1000, 2**18])
def test_any_size_and_number_of_books_trains(kind: str, size: int, books: int) -> None:
    torch.manual_seed(0)
    if kind in ("lfq", "bsq") and size == 1000:
        with pytest.raises(ValueError, match="as 512; got 1000"):
            build_quantizer(kind, 16, size, books)
        return
    if size == 2**18 and books == 16 and kind == "lgq":
        books = 8  # 16 work as well, in 3 s
    quantizer = build_quantizer(kind, 16, size, books)
    maps = torch.randn(1, 16, 3, 2, requires_grad=True)
    result = quantizer(maps)
    assert result.quantized.shape == maps.shape and result.indices.dtype == torch.int64
    assert result.indices.shape == ((1, 3, 2) if books == 1 else (1, books, 3, 2))
    assert 0 <= result.indices.min() and result.indices.max() < quantizer.codebook_size <= size
    assert all(loss.ndim == 0 and loss.isfinite() for loss in result.losses.values())
    (result.quantized.square().sum() + sum(result.losses.values())).backward()
    assert maps.grad.isfinite().all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    quantizer.eval()
    with torch.no_grad():
        again = quantizer(maps)
    assert again.losses == {}
    torch.testing.assert_close(quantizer.indices_to_vectors(again.indices), again.quantized, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", [1, 2])
def test_maps_and_sequences_are_the_same(kind: str, books: int) -> None:
    quantizer = small(kind, num_codebooks=books).eval()
    maps = torch.randn(2, 8, 3, 5)
    as_maps, as_rows = quantizer(maps), quantizer(maps.flatten(2).mT)
    assert torch.equal(as_maps.quantized.flatten(2).mT, as_rows.quantized)
    codes = as_maps.indices.flatten(-2)
    assert torch.equal(codes.mT if books > 1 else codes, as_rows.indices)
    assert torch.equal(quantizer.indices_to_vectors(as_rows.indices), quantizer.indices_to_vectors(as_maps.indices).flatten(2).mT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_every_vector_gets_a_gradient(kind: str) -> None:
    quantizer = small(kind)
    vectors = torch.randn(2, 50, 8, requires_grad=True)
    result = quantizer(vectors)
    (result.quantized * torch.randn_like(result.quantized)).sum().add(sum(result.losses.values())).backward()
    assert (vectors.grad.abs().sum(-1) > 0).all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast_keep_the_codes_of_float32(kind: str) -> None:
    quantizer = small(kind).eval()
    vectors = torch.randn(2, 40, 8).bfloat16()
    exact = quantizer(vectors.float())
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(vectors)
        back = quantizer.indices_to_vectors(result.indices)
    assert torch.equal(result.indices, exact.indices) and result.quantized.dtype == torch.bfloat16
    assert torch.equal(back, quantizer.indices_to_vectors(exact.indices)) and back.dtype == torch.float32
    assert torch.equal(result.quantized, exact.quantized.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_of_another_precision_still_quantizes(kind: str, dtype: torch.dtype) -> None:
    quantizer = small(kind).to(dtype).eval()
    result = quantizer(torch.randn(2, 40, 8, dtype=dtype))
    back = quantizer.indices_to_vectors(result.indices)
    assert result.quantized.dtype == dtype and torch.equal(back.to(dtype), result.quantized)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_resumed_is_as_if_never_stopped(kind: str, depth: int) -> None:
    """Every draw (first codes, revived codes), moving average and temperature is in the state."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(1, 30, 8, generator=generator) for _ in range(12)]
    if depth > 1 and kind in ("fsq", "lfq", "bsq"):
        return
    renewal = {"renew_every": 3, "usage_decay": 0.3, "dead_below": 0.5} if kind in ("lgq", "vq") else {}
    renewal["depth"] = depth

    def train(quantizer: Quantizer, first: int, last: int) -> list[torch.Tensor]:
        quantizer.train()
        optimizer = torch.optim.SGD([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
        outputs = []
        for step in range(first, last):
            quantizer.schedule(step / 12)
            result = quantizer(batches[step])
            sum(result.losses.values(), (result.quantized**2).sum()).backward() if list(quantizer.parameters()) else None
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(result.quantized.detach())
        return outputs

    whole = train(one := small(kind, **renewal), 0, 12)
    half = train(two := small(kind, **renewal), 0, 5)
    torch.manual_seed(99)
    three = build_quantizer(kind, 8, 64, **renewal)
    three.load_state_dict(two.state_dict())
    rest = train(three, 5, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, half + rest, strict=True))
    assert all(torch.equal(value, three.state_dict()[name]) for name, value in one.state_dict().items())
    if kind == "lgq" and depth == 1:
        fresh = build_quantizer(kind, 8, 64)
        fresh.load_state_dict(three.state_dict())
        assert fresh.tau == three.tau < 1


@pytest.mark.parametrize("kind", ["lgq", "vq", "simvq"])
def test_residual_stages_lower_the_error_and_pass_the_gradient_once(kind: str) -> None:
    options = {"rotation": False} if kind != "lgq" else {}
    quantizer = small(kind, codebook_size=16, depth=4, **options)
    vectors = torch.randn(1, 400, 8, requires_grad=True)
    result = quantizer(vectors)
    assert isinstance(quantizer, ResidualQuantizer) and result.indices.shape == (1, 400, 4)
    if kind != "lgq":
        weights = torch.randn_like(vectors)
        gradient, = torch.autograd.grad((result.quantized * weights).sum(), vectors)
        torch.testing.assert_close(gradient, weights)
    quantizer.eval()
    result = quantizer(vectors)
    torch.testing.assert_close(quantizer.indices_to_vectors(result.indices), result.quantized)
    rest, errors = vectors.detach()[0], []
    for stage in quantizer.stages:
        rest = rest - stage.quantize(rest)[0].detach()
        errors.append(rest.square().mean().item())
    assert kind == "simvq" or errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_what_the_gradient_needs_is_not_overwritten_unnoticed() -> None:
    vectors = torch.randn(1, 30, 8, requires_grad=True)
    quantized = small("vq")(vectors).quantized
    quantized.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        quantized.sum().backward()


def test_a_product_of_different_quantizers() -> None:
    product = ProductQuantizer([small("vq", 3), small("lgq", 5)])
    vectors = torch.randn(2, 9, 8, requires_grad=True)
    result = product(vectors)
    assert result.indices.shape == (2, 9, 2) and set(result.losses) == {"commitment", "energy", "peak", "usage"}
    product.eval()
    with torch.no_grad():
        result = product(vectors)
    assert torch.equal(product.indices_to_vectors(result.indices), result.quantized)
    product.schedule(1.0)
    assert product.parts[1].tau == pytest.approx(0.1)


def test_as_the_issue_writes_them() -> None:
    assert LGQ(dim=8, codebook_size=512, num_codebooks=1).codebook_size == 512
    assert FSQ(dim=8, levels=[8, 5, 5, 5]).codebook_size == 1000
    assert VQ(dim=8, codebook_size=32).codebook_size == SimVQ(dim=8, codebook_size=32).codebook_size == 32


@pytest.mark.parametrize("kind", KINDS)
def test_what_decoding_needs_is_counted(kind: str) -> None:
    """The codebook wherever it is kept, and nothing that only learning needs."""
    codes, maps = 64 * 8, {"simvq": 64, "fsq": 2 * 8 * 2 + 2 + 8, "lfq": 2 * 8 * 6 + 6 + 8, "bsq": 2 * 8 * 6 + 6 + 8}
    wanted = codes + maps.get(kind, 0) if kind in ("lgq", "vq", "simvq") else maps[kind]
    assert build_quantizer(kind, 8, 64).parameter_count() == wanted


@given(st.integers(2, 2**18))
@settings(max_examples=25, deadline=None)
def test_levels_stay_below_the_wished_size_and_near_it(size: int) -> None:
    product = math.prod(levels_for(size))
    assert 0.8 * size < product <= size  # at worst 0.82, at 624
    assert min(levels_for(size)) >= (5 if size >= 256 else 2)


def test_fsq_says_what_it_took() -> None:
    assert FSQ(dim=8, codebook_size=16384).description == "16128 codes, 8 × 8 × 7 × 6 × 6, the nearest below 16384"
    assert FSQ(dim=8, codebook_size=16384, num_codebooks=2).description.startswith("2 codebooks of 16128 codes")
    assert FSQ(dim=8, levels=(8, 5, 5, 5)).description == "1000 codes, 8 × 5 × 5 × 5"


@pytest.mark.parametrize(("call", "words"), [
    (lambda: build_quantizer("lgq", 8, 64, 3), "dim 8 does not split into 3 codebooks"),
    (lambda: build_quantizer("vq", 8, 1), "codebook_size is at least 2; got 1"),
    (lambda: build_quantizer("vq", 8, 64, 0), "num_codebooks is at least 1; got 0"),
    (lambda: build_quantizer("sim", 8), "lgq, simvq, vq, fsq, lfq, bsq; got 'sim'"),
    (lambda: build_quantizer("vq", 8, tau_start=1), "got 'tau_start'"),
    (lambda: build_quantizer("vq", 8, 64, 2, depth=3), "depth 3 and num_codebooks 2"),
    (lambda: build_quantizer("fsq", 8, depth=2), "depth must be 1, got 2"),
    (lambda: build_quantizer("fsq", 8, 512, levels=(8, 8)), r"\(8, 8\) make 64 codes; codebook_size is 512"),
    (lambda: build_quantizer("fsq", 8, levels=(8, 1)), r"at least 2 levels; got the levels \(8, 1\)"),
    (lambda: build_quantizer("lgq", 8, 64, tau_end=0.0), "between 1e-06 and 1e.06; got 0"),
    (lambda: small("vq")(torch.zeros(1, 4, 7)), "dim 8; the vectors have 7"),
    (lambda: small("vq")(torch.zeros(4, 8)), "3 or 4 axes; got 2"),
    (lambda: small("vq")(torch.zeros(0, 4, 8)), r"at least 1 vector; got \(0, 4, 8\)"),
    (lambda: small("vq").indices_to_vectors(torch.tensor([[3, 64]])), "from 0 to 63; got 64"),
    (lambda: small("fsq").indices_to_vectors(torch.tensor([[-1, 3]])), "from 0 to 63; got -1"),
    (lambda: small("vq").indices_to_vectors(torch.zeros(1, 2)), "integers; got torch.float32"),
    (lambda: small("vq").indices_to_vectors(torch.zeros(3, dtype=int)), "2 axes, or 3 as maps; got 1"),
    (lambda: small("vq", num_codebooks=2).indices_to_vectors(torch.zeros(1, 4, 3, dtype=int)), "2 codebooks; the codes have 3"),
])
def test_bad_input_is_one_sentence_with_both_numbers(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_names_and_settings_come_without_torch() -> None:
    code = ("import sys; from omnilatent.quantizers.config import FSQConfig, levels_for; FSQConfig(levels_for(1000)); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("kind", "wrong"), [("lgq", {"tau_schedule": "slow"}), ("lgq", {"tau_unit": "pixels"}),
                                             ("lgq", {"dead_codes": "bury"}), ("vq", {"dead_codes": "prune"})])
def test_a_word_that_a_setting_does_not_have_is_refused(kind: str, wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is one of .*; got '{value}'"):
        build_quantizer(kind, 8, codebook_size=16, **wrong)
