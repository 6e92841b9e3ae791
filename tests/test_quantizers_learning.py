"""How quantizers learn: LGQ's losses, codebooks that start at the data and recover, two ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from omnilatent.metrics.codebooks import CodebookUsage
from omnilatent.quantizers import LGQ, VQ, build_quantizer
from omnilatent.quantizers.base import Quantized, Quantizer
from omnilatent.quantizers.config import LGQConfig, VQConfig
from omnilatent.quantizers.soft import soft_assignment


# LGQ


def lgq_losses(vectors: Tensor, codes: Tensor, tau: float) -> dict[str, Tensor]:
    config = LGQConfig(tau_start=tau, energy_weight=1, peak_weight=1, usage_weight=1, data_init=False, tau_unit="absolute")
    quantizer = LGQ(vectors.shape[1], len(codes), config=config)
    quantizer._parameters["codebook"] = codes[None]
    return quantizer(vectors[None]).losses


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.1])
def test_the_regularisers_do_not_cancel(tau: float) -> None:
    """At equal weights their gradients are far from opposite, with and without the free energy, and their sum can
    be lowered. (The seed's pair has a cosine of −1 and a constant sum: KL(p ‖ uniform) + H(p) = log K.)"""
    torch.manual_seed(0)
    vectors, codes = torch.randn(300, 4, requires_grad=True), (0.7 * torch.randn(32, 4)).requires_grad_()
    before = lgq_losses(vectors, codes, tau)
    energy, peak, usage = (
        torch.cat([t.flatten() for t in torch.autograd.grad(before[name], (vectors, codes), retain_graph=True)])
        for name in ("energy", "peak", "usage")
    )
    assert torch.cosine_similarity(peak, usage, dim=0) > -0.5
    assert (peak + usage).norm() > 0.8 * max(peak.norm(), usage.norm())
    assert (energy + peak + usage).norm() > 0.8 * max(energy.norm(), peak.norm(), usage.norm())
    optimizer = torch.optim.SGD([vectors, codes], lr=1.0)
    for _ in range(60):
        losses = lgq_losses(vectors, codes, tau)
        (losses["peak"] + losses["usage"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = lgq_losses(vectors, codes, tau)
    assert after["peak"] + after["usage"] < 0.93 * (before["peak"] + before["usage"])
    assert after["usage"] < before["usage"] + 0.005  # sharper, and used as evenly


def test_usage_alone_spreads_the_vectors_over_the_codes() -> None:
    torch.manual_seed(0)
    vectors, codes = torch.randn(300, 4), torch.randn(16, 4)
    codes[8:] += 1.5
    codes.requires_grad_()
    before, optimizer = lgq_losses(vectors, codes, 1.0)["usage"], torch.optim.Adam([codes], lr=0.05)
    for _ in range(150):
        lgq_losses(vectors, codes, 1.0)["usage"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 0.1 and lgq_losses(vectors, codes, 1.0)["usage"] < 0.25 * before


def test_the_seeds_pair_would_have_cancelled() -> None:
    """The same measure on the pair of the seed's repository, so that the test above is known to be able to fail."""
    torch.manual_seed(0)
    logits = torch.randn(50, 16, requires_grad=True)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    divergence = (p * (p * 16).log()).sum(1).mean()
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0].flatten() for loss in (entropy, divergence)]
    assert torch.cosine_similarity(*gradients, dim=0) < -0.999


def test_losses_are_finite_and_bounded_down_to_any_temperature() -> None:
    torch.manual_seed(0)
    quantizer = LGQ(8, 64, config=LGQConfig(tau_end=1e-6, energy_weight=1, peak_weight=1, usage_weight=1))
    vectors = torch.randn(1, 500, 8, requires_grad=True)
    for progress in (0, 0.5, 0.9, 0.99, 1):
        quantizer.schedule(progress)
        losses = quantizer(vectors).losses
        assert 0 <= losses["energy"] <= 8 and 0 <= losses["peak"] <= 1 and 0 <= losses["usage"] <= 1.0001
        gradients = torch.autograd.grad(sum(losses.values()), (vectors, quantizer.codebook))
        assert all(g.isfinite().all() for g in gradients)
    assert quantizer.tau == pytest.approx(1e-6)
    nearest = torch.cdist(vectors[0].detach(), quantizer.codebook[0].detach()).min(1).values
    assert losses["energy"].item() == pytest.approx((nearest.square() / 8).mean().item(), rel=1e-3)


def test_temperature_schedules() -> None:
    ends = {"constant": (1.0, 1.0, 1.0), "linear": (1.0, 0.775, 0.1), "cosine": (1.0, 0.8682, 0.1)}
    for name, expected in ends.items():
        quantizer = LGQ(2, 4, config=LGQConfig(tau_schedule=name))
        for progress, tau in zip((0, 0.25, 2), expected, strict=True):
            quantizer.schedule(progress)
            assert quantizer.tau == pytest.approx(tau, abs=1e-4) == pytest.approx(float(quantizer.temperature), abs=1e-4)


def test_forward_is_hard_and_the_gradient_is_the_soft_averages() -> None:
    torch.manual_seed(0)
    quantizer = LGQ(4, 16, config=LGQConfig(data_init=False, tau_start=0.5, tau_unit="absolute"))
    vectors, weights = torch.randn(1, 60, 4, requires_grad=True), torch.randn(60, 4)
    result = quantizer(vectors)
    codes = quantizer.codebook[0]
    assert torch.equal(result.quantized[0], codes[torch.cdist(vectors[0], codes).argmin(1)])
    ours = torch.autograd.grad((result.quantized[0] * weights).sum(), (vectors, quantizer.codebook))
    average = soft_assignment(vectors[0], codes, 0.5).average
    theirs = torch.autograd.grad((average * weights).sum(), (vectors, quantizer.codebook))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_assignment_does_not_depend_on_the_scale(scale: float) -> None:
    torch.manual_seed(0)
    quantizer = LGQ(4, 16, config=LGQConfig(data_init=False))
    vectors = torch.randn(1, 60, 4)
    one, gradient = results(quantizer, vectors)
    with torch.no_grad():
        quantizer.codebook *= scale
    other, scaled = results(quantizer, vectors * scale)
    torch.testing.assert_close(other.quantized, one.quantized * scale)
    torch.testing.assert_close(scaled, gradient)
    for name, factor in (("energy", scale**2), ("peak", 1), ("usage", 1)):
        torch.testing.assert_close(other.losses[name], one.losses[name] * factor)


def results(quantizer: Quantizer, vectors: Tensor) -> tuple[Quantized, Tensor]:
    """What comes of vectors, and the gradient of the first coordinate's sum."""
    vectors = vectors.clone().requires_grad_()
    result = quantizer(vectors)
    return result, torch.autograd.grad(result.quantized[..., 0].sum(), vectors)[0]


def test_a_small_encoder_learns_through_lgq_as_through_vq() -> None:
    """In absolute units the same latent, of standard deviation 0.1 at first, goes to a constant."""
    errors = {}
    for name, kind, options in (("lgq", "lgq", {}), ("absolute", "lgq", {"tau_unit": "absolute"}), ("vq", "vq", {})):
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)
        with torch.no_grad():
            encoder.weight *= 0.2
        quantizer = build_quantizer(kind, 4, 64, **options)
        mixing = torch.randn(3, 6)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()], lr=1e-2)
        for step in range(300):
            quantizer.schedule(step / 300)
            inputs = torch.randn(256, 3) @ mixing
            result = quantizer(encoder(inputs)[None])
            error = (decoder(result.quantized[0]) - inputs).square().mean() / inputs.square().mean()
            (error + sum(result.losses.values())).backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[name] = error.item()
    assert errors["lgq"] < 1.3 * errors["vq"] < 0.3 < 0.8 < errors["absolute"], errors


def test_pruned_codes_are_never_chosen_and_stay_out() -> None:
    torch.manual_seed(0)
    quantizer = LGQ(2, 8, config=LGQConfig(dead_codes="prune", data_init=False, usage_decay=0.5, renew_every=5))
    with torch.no_grad():
        quantizer.codebook[0, :5] += 50
    vectors = torch.randn(1, 100, 2)
    for _ in range(10):
        result = quantizer(vectors)
    assert quantizer.alive[0].tolist() == [False] * 5 + [True] * 3
    far = quantizer((vectors + 50).requires_grad_())
    assert far.indices.min() >= 5 and all(loss.isfinite() for loss in far.losses.values())
    quantizer.eval()
    with torch.no_grad():
        assert quantizer(vectors + 50).indices.min() >= 5
    quantizer.counts.zero_()
    quantizer.prune()
    assert quantizer.alive.any(1).all() and result.losses["usage"].isfinite()


# Codebooks


def perplexity(quantizer: Quantizer, vectors: Tensor) -> float:
    usage = CodebookUsage(quantizer.codebook_size)
    with torch.no_grad():
        usage.update(quantizer.eval()(vectors).indices)
    quantizer.train()
    return usage.perplexity


@pytest.mark.parametrize("kind", ["lgq", "vq"])
@pytest.mark.parametrize("revive", [True, False])
def test_a_collapsed_codebook_recovers(kind: str, revive: bool) -> None:
    torch.manual_seed(0)
    options = {"data_init": False, "usage_decay": 0.8, "renew_every": 5, "dead_codes": "revive" if revive else "keep"}
    quantizer = build_quantizer(kind, 4, 64, **options)
    with torch.no_grad():  # all codes in one far place, one a little nearer
        quantizer.codebook.copy_(20 + 1e-3 * torch.randn(1, 64, 4))
        if kind == "vq":
            quantizer.sums.copy_(quantizer.codebook)
    vectors = torch.randn(1, 2000, 4)
    before = perplexity(quantizer, vectors)
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=1e-2)
    for _ in range(60):
        result = quantizer(vectors)
        if kind == "lgq":
            sum(result.losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 8
    assert (perplexity(quantizer, vectors) > 40) is revive


@pytest.mark.parametrize("kind", ["lgq", "vq"])
def test_the_first_batch_places_the_codes(kind: str) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(1, 1000, 4) * 0.1 + 7
    quantizer = build_quantizer(kind, 4, 256)
    result = quantizer(vectors)
    used = result.indices.unique().numel()
    assert used > 200 and (result.quantized - vectors).square().mean() < 0.005
    few = build_quantizer(kind, 4, 256)
    few(vectors[:, :10])
    assert few.codebook.detach()[0].unique(dim=0).shape[0] == 256  # copies are told apart


def test_vq_learns_the_means_of_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    quantizer = VQ(2, 4, config=VQConfig(usage_decay=0.8, seed=3))
    for _ in range(80):
        quantizer((centres[torch.randint(0, 4, (400,))] + 0.1 * torch.randn(400, 2))[None])
    assert torch.cdist(centres, quantizer.codebook[0]).min(1).values.max() < 0.05


# Ranks


def step_on_a_rank(rank: int, world: int, kind: str, address: str, folder: str) -> None:
    """Two training steps on this rank's half of a batch (or on all of it), with gradients averaged as DDP does."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    torch.manual_seed(5)
    batches = torch.randn(2, 64, 4)
    torch.manual_seed(0)
    quantizer = build_quantizer(kind, 4, 16, data_init=False)
    gradients = []
    for batch in batches:
        result = quantizer(batch.chunk(world)[rank][None])
        if kind == "lgq":
            quantizer.zero_grad()
            sum(result.losses.values()).backward()
            gradient = quantizer.codebook.grad
            if world > 1:
                dist.all_reduce(gradient)
            gradients.append(gradient / world)
    fresh = build_quantizer(kind, 4, 16, renew_every=1, dead_below=1.0, usage_decay=0.0)
    for batch in batches:
        fresh(batch.chunk(world)[rank][None])
    state = {f"{name}.{key}": value for name, q in (("averages", quantizer), ("drawn", fresh))
             for key, value in q.state_dict().items()}
    torch.save((gradients, state), f"{folder}/{kind}-{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def steps_of_both(rank: int, folder: str) -> None:
    for kind in ("lgq", "vq"):
        step_on_a_rank(rank, 2, kind, f"{folder}/{kind}", folder)


def test_two_ranks_give_one_ranks_averages_and_gradients_and_agree_on_draws(tmp_path) -> None:  # noqa: ANN001
    multiprocessing.spawn(steps_of_both, args=(str(tmp_path),), nprocs=2)
    for kind in ("lgq", "vq"):
        step_on_a_rank(0, 1, kind, "", str(tmp_path))
        (one, state), (first, state0), (second, state1) = (
            torch.load(tmp_path / f"{kind}-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
        assert all(torch.equal(state0[name], state1[name]) for name in state)
        for name, value in state.items():
            if name.startswith("averages"):
                torch.testing.assert_close(state0[name], value, msg=name)
        assert len(one) == (2 if kind == "lgq" else 0)
        for a, b, c in zip(one, first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
            assert torch.equal(b, c) and math.isfinite(a.abs().sum())
