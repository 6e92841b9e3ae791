"""Latent regularisers: τ on images and latents, the spectrum's pull, and how both enter a training step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnilatent.autoencoders.config import KLConfig, KLTraining, LossConfig, TinyConfig, TinyTraining, shrunk_sides
from omnilatent.autoencoders.kl import KLAutoencoder, build_vae
from omnilatent.autoencoders.objective import Objective
from omnilatent.autoencoders.recipes import debug
from omnilatent.autoencoders.regularisers import Transform, choose_transform, spectrum_loss, transform_latent
from omnilatent.autoencoders.task import AutoencoderTask
from omnilatent.errors import UserError
from omnilatent.metrics.health import spectrum_slope
from omnilatent.training.loop import launch_fabric

CPU = torch.device("cpu")
BOTH = LossConfig(scale_equivariance=0.5, rotation_equivariance=0.5)


def smooth(*shape: int) -> Tensor:
    """Pictures with a falling spectrum: white noise blurred twice."""
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(F.avg_pool2d(noise, 5, 1, 2), 3, 1, 1) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------
# τ


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("side", [16, 12, 8])
def test_the_latents_matrices_are_interpolation_and_rot90(side: int, turns: int) -> None:
    z = torch.randn(2, 3, 16, 16)
    shrunk = z if side == 16 else F.interpolate(z, (side, side), mode="bilinear", antialias=True)
    expected = torch.rot90(shrunk, turns, (2, 3))
    found = transform_latent(z, Transform(side, turns).latents(CPU))
    torch.testing.assert_close(found, expected, atol=1e-6 if side < 16 else 0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform_latent(z, Transform(side, turns).latents(CPU)), found), "fp32 under autocast"


def test_images_and_latents_take_the_same_turn() -> None:
    """A bright corner of the latent's grid lands where the bright corner of the image lands."""
    z = torch.zeros(1, 1, 8, 8)
    z[..., :2, 6:] = 1
    images = F.interpolate(z, scale_factor=4, mode="nearest").expand(1, 3, 32, 32)
    for turns in (1, 2, 3):
        transform = Transform(4, turns)
        small = transform_latent(z, transform.latents(CPU))
        corners = F.avg_pool2d(transform.images(images, 4), 8)[0, 0]
        assert small.shape[-1] * 4 == transform.images(images, 4).shape[-1] == 16
        assert corners.flatten().argmax() == F.avg_pool2d(small, 2).flatten().argmax()


def test_the_schedule_is_eq_vaes_and_a_function_of_seed_and_step() -> None:
    chosen = [choose_transform(BOTH, 7, step, 32) for step in range(2000)]
    assert chosen == [choose_transform(BOTH, 7, step, 32) for step in range(2000)]
    assert chosen != [choose_transform(BOTH, 8, step, 32) for step in range(2000)]
    some = [t for t in chosen if t is not None]
    assert abs(len(some) / 2000 - 0.5) < 0.05, "equal shares happen in the same steps"
    kinds = {(side, turns) for side in shrunk_sides(32) for turns in (1, 2, 3)}
    counts = {kind: sum((t.side, t.turns) == kind for t in some) for kind in kinds}
    assert sum(counts.values()) == len(some) and min(counts.values()) > len(some) / 6 * 0.7
    only = replace(BOTH, scale_equivariance=0.0)
    assert {(t.side, t.turns) for t in (choose_transform(only, 7, s, 32) for s in range(300)) if t} == {
        (32, turns) for turns in (1, 2, 3)}
    assert {choose_transform(LossConfig(), 7, step, 32) for step in range(50)} == {None}


def test_an_equivariant_model_has_no_loss() -> None:
    """The identity at f1 commutes with every τ; turning one side only does not."""
    images = smooth(2, 3, 16, 16)
    fabric = launch_fabric(debug().run)
    objective = Objective(LossConfig(perceptual="none"), fabric, None, None, None)
    for side in (16, *shrunk_sides(16)):
        for turns in (0, 1, 2, 3):
            transform = Transform(side, turns)
            decoded, goal = transform_latent(images, transform.latents(CPU)), transform.images(images, 1)
            assert objective.pull(decoded, goal, False).numbers["loss"] < 1e-6
            if turns:
                straight = Transform(side, 0).images(images, 1)
                assert objective.pull(decoded, straight, False).numbers["loss"] > 1e-2


# ---------------------------------------------------------------------------------------------------------------
# The spectrum


def test_the_downsampled_image_has_no_spectrum_loss() -> None:
    """Channels that are the image averaged to the grid, each with a mean and a scale of its own; and not others."""
    images = smooth(2, 1, 64, 64).expand(2, 3, 64, 64)
    grey = F.avg_pool2d(images, 4)[:, :1]
    latents = torch.cat([grey, 3 * grey - 2, -0.1 * grey], 1)
    assert float(spectrum_loss(latents, images).max()) < 1e-6
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    white = spectrum_loss(noise, images)
    assert white.shape == (2,) and float(white.min()) > 1
    assert float(spectrum_loss(torch.cat([latents, noise], 1), images).mean()) == pytest.approx(
        float(white.mean()) / 2, rel=1e-4), "the mean over channels"


def test_the_spectrum_loss_by_numpy() -> None:
    """One channel and one image, by the definition: windowed power, bands by |f|, shares, squared log ratio."""
    import numpy as np

    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 8, 8)).astype(np.float32)
    window = np.outer(*[0.5 - 0.5 * np.cos(2 * np.pi * np.arange(8) / 7)] * 2)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(8), np.fft.fftfreq(8))) * 2
    band = np.minimum((frequency * 4).astype(int), 3)
    shares = []
    for single in maps:
        power = np.abs(np.fft.fft2((single - single.mean()) * window)) ** 2
        bands = np.array([power[band == k].sum() for k in range(4)])
        shares.append(np.log(bands / bands.sum() + 1e-4))
    expected = ((shares[0] - shares[1]) ** 2).mean()
    latent, image = (torch.from_numpy(m)[None, None] for m in maps)
    found = spectrum_loss(latent, image.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, 3, 16, 16))
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_flat_images_and_dead_channels_stay_finite() -> None:
    latents = torch.randn(1, 2, 8, 8)
    latents[:, 1] = 3.0
    latents.requires_grad_()
    assert spectrum_loss(latents, torch.full((1, 3, 64, 64), 0.3)).item() == 0
    spectrum_loss(latents, smooth(1, 3, 64, 64)).sum().backward()
    assert latents.grad.isfinite().all() and latents.grad[:, 0].abs().sum() > 0 and not latents.grad[:, 1].any()


def test_optimising_the_spectrum_loss_gives_the_images_spectrum() -> None:
    images = smooth(2, 3, 128, 128)
    latents = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([latents], 0.05)
    start, slope = spectrum_loss(latents, images).mean().item(), spectrum_slope(latents.detach())
    for _ in range(60):
        loss = spectrum_loss(latents, images).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    goal = spectrum_slope(F.avg_pool2d(images, 8))
    assert loss.item() < 0.05 * start
    assert abs(spectrum_slope(latents.detach()) - goal) < 0.3 * abs(slope - goal)


# ---------------------------------------------------------------------------------------------------------------
# In a training step


TINY = TinyTraining(recipe="tiny-f8", model=TinyConfig(encoder_width=8, decoder_width=8, encoder_blocks=(1, 1),
                                                      decoder_blocks=(1, 1)), crops=debug().crops, run=debug().run)


def made(config: KLTraining | TinyTraining, freeze: str | None = None, **loss: float) -> AutoencoderTask:
    """A task set up on the CPU, without discriminator unless asked for, whose optimiser keeps the gradients."""
    plain = {"perceptual": "none", "adversarial_weight": 0.0, "kl_weight": 0.0}
    config = replace(config, loss=replace(config.loss, **(plain | loss)), optimizer=replace(config.optimizer, clip=0.0),
                     run=replace(config.run, device="cpu", workers=0, batch_size=4))
    task = AutoencoderTask(config, "synthetic", "photos", lambda file, reason: None, freeze=freeze)
    torch.manual_seed(0)
    task.setup(launch_fabric(config.run))
    task.optimizer.zero_grad = lambda: None
    return task


def step(task: AutoencoderTask, position: int = 0) -> dict[str, float]:
    return {k: float(v) for k, v in task.step(next(task.batches(position, position + 1)), position).items()}


def gradients(task: AutoencoderTask) -> dict[str, Tensor]:
    return {name: p.grad for name, p in task.bare.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [debug(), TINY], ids=["kl", "tiny"])
@pytest.mark.parametrize("loss", [{"scale_equivariance": 1.0, "rotation_equivariance": 1.0}, {"spectrum_weight": 0.1}],
                         ids=["equivariance", "spectrum"])
def test_gradients_reach_the_encoder_and_change_what_is_learned(
    config: KLTraining | TinyTraining, loss: dict[str, float]
) -> None:
    """The spectrum's own gradient is the encoder's; the decoder's stays bit-equal."""
    task, plain = made(config, **loss), made(config)
    logged, before = step(task), step(plain)
    with_it, without = gradients(task), gradients(plain)
    first = next(name for name in with_it if ".encoder." in name)
    assert with_it[first].abs().max() > 0 and not torch.equal(with_it[first], without[first])
    if "spectrum_weight" in loss:
        assert logged["loss"] == pytest.approx(before["loss"] + 0.1 * logged["spectrum"]) and logged["spectrum"] > 0.1
        assert all(torch.equal(g, without[name]) for name, g in with_it.items() if ".decoder." in name)
    else:
        assert logged["pixel"] != before["pixel"] and "spectrum" not in logged


@pytest.mark.parametrize("config", [debug(), TINY], ids=["kl", "tiny"])
def test_the_equivariance_step_is_plain_autograd_of_its_definition(config: KLTraining | TinyTraining) -> None:
    """|D(τ(μ + σ ε)) − τ x|, the KL of the untransformed posterior beside it."""
    kl_weight = 0.01 if isinstance(config, KLTraining) else 0.0
    task = made(config, scale_equivariance=1.0, rotation_equivariance=1.0, l1=1.0, l2=0.0, kl_weight=kl_weight)
    batch = next(task.batches(0, 1))
    images = batch.images.float() / 127.5 - 1
    whole = images.shape[-1] // task.config.model.downsampling
    chosen = choose_transform(task.config.loss, task.config.run.seed, 0, whole)
    model, vae = task.bare, task.bare.vae
    if kl_weight:
        q = vae.encode(images).latent_dist
        z = q.mean + q.std * task._noise(batch.positions.tolist())
    else:
        z = vae.encode(images).latents
    small, goal = (
        torch.rot90(F.interpolate(maps, (side, side), mode="bilinear", antialias=True), chosen.turns, (2, 3))
        for maps, side in ((z, chosen.side), (images, 2 * chosen.side)))
    total = (vae.decode(small).sample - goal).abs().mean()
    if kl_weight:
        total = total + kl_weight * q.kl().mean() / images[0].numel()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))
    assert float(task.step(batch, 0)["loss"]) == pytest.approx(total.item(), rel=1e-5)
    found = gradients(task)
    largest = max(g.abs().max() for g in expected.values() if g is not None)
    assert max((found[n] - g).abs().max() / largest for n, g in expected.items() if g is not None) < 1e-5


def test_the_discriminator_sees_the_transformed_pair() -> None:
    task = made(debug(), adversarial_weight=0.5, disc_start_step=0, disc_layers=1, scale_equivariance=1.0)
    seen = []
    task.bare_disc.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    batch = next(task.batches(0, 1))
    logged = task.step(batch, 0)
    asked, judged = seen
    chosen = choose_transform(task.config.loss, task.config.run.seed, 0, 16)
    assert asked.shape[-1] == judged.shape[-1] == 2 * chosen.side < 32
    real = chosen.images(batch.images.float() / 127.5 - 1, 2)
    assert torch.equal(judged[:4], real) and torch.equal(judged[4:], asked)
    assert logged["adaptive_weight"] > 0


def test_steps_that_draw_no_transform_and_a_weight_of_zero_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything at zero neither function is asked; and asking draws from no global generator."""
    rare = made(debug(), rotation_equivariance=1e-9)
    loss = [step(rare, position) for position in range(2)]
    monkeypatch.setattr("omnilatent.autoencoders.regularisers.draws", None)
    monkeypatch.setattr("omnilatent.autoencoders.objective.spectrum_loss", None)
    off = made(debug())
    assert [step(off, position) for position in range(2)] == loss
    a, b = gradients(off), gradients(rare)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_features_are_returned_only_for_the_adaptive_weight() -> None:
    task = made(debug(), adversarial_weight=0.5, disc_start_step=1, disc_layers=1)
    outs = []
    task.bare.register_forward_hook(lambda module, args, out: outs.append(out.features))
    step(task, 0)
    step(task, 1)
    assert outs[0] is None and outs[1].shape == (4, 8, 32, 32)


def test_compiled_once_a_shape() -> None:
    """Turns share one graph; sizes and the features have one each."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    config = KLConfig(widths=(4, 4), layers=1, latent_channels=2, norm_groups=2, mid_attention=False)
    eager = KLAutoencoder(build_vae(config)).eval()
    model = torch.compile(eager, backend=counter, dynamic=False)
    images = smooth(1, 3, 16, 16)
    for side, features in ((8, False), (6, False), (4, False), (8, True)):
        for turns in (1, 2, 3):
            transform = Transform(side, turns).latents(CPU)
            out = model(images, None, transform, features)
            torch.testing.assert_close(out.images, eager(images, None, transform, features).images)
    assert counter.frame_count == 4
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(("change", "sentence"), [
    ({"scale_equivariance": 1.5}, "--scale-equivariance is 1.5; a share of the steps is at most 1"),
    ({"rotation_equivariance": -0.1}, "--rotation-equivariance is -0.1; the least is 0"),
    ({"spectrum_weight": float("nan")}, "--spectrum-weight is nan; the least is 0"),
    ({"l1": 0.0, "perceptual": "none"}, "--l1, --l2 and --perceptual leave nothing to compare the image by; give one "
                                        "of them a weight"),
    ({"l1": 0.0, "perceptual_weight": 0.0}, "--l1, --l2 and --perceptual leave nothing .*"),
])
def test_impossible_settings(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        LossConfig(**change)


@pytest.mark.parametrize(("size", "change", "sentence"), [
    (32, {"scale_equivariance": 0.5, "disc_layers": 3},
     "--size 32 is too small for --scale-equivariance, which shrinks the crops to 16 pixels where the loss needs 24: "
     "enlarge the crops."),
    (24, {"scale_equivariance": 0.5, "perceptual": "lpips", "disc_layers": 1},
     "--size 24 is too small for --scale-equivariance, which shrinks the crops to 12 pixels where the loss needs 16: "
     "enlarge the crops."),
    (2, {"scale_equivariance": 0.5, "perceptual": "none", "adversarial_weight": 0.0},
     "--size 2 is too small for --scale-equivariance, which shrinks the crops to 0 pixels where the loss needs 1: "
     "enlarge the crops."),
    (14, {"spectrum_weight": 0.1, "disc_layers": 1},
     "--size 14 is too small for --spectrum-weight, which needs 8 latent positions a side: enlarge the crops to at "
     "least 16 pixels."),
])
def test_crops_that_are_too_small(size: int, change: dict[str, object], sentence: str) -> None:
    config = debug()
    config = replace(config, crops=replace(config.crops, size=size), loss=replace(config.loss, **change))
    with pytest.raises(UserError) as refused:
        config.check(None)
    assert str(refused.value) == sentence
    config.check("some-model")  # whose downsampling is not known yet: the task asks again
    with pytest.raises(UserError) as again:
        AutoencoderTask(config, "synthetic", "photos", lambda file, reason: None)
    assert str(again.value) == sentence


def test_a_frozen_encoder_has_no_spectrum_to_pull() -> None:
    with pytest.raises(UserError, match="^--spectrum-weight changes the encoder, which --freeze encoder keeps: leave "
                                        "one of them out.$"):
        made(debug(), freeze="encoder", spectrum_weight=0.1)
    logged = step(made(debug(), freeze="encoder", scale_equivariance=1.0))
    assert logged["pixel"] > 0


def test_a_turn_survives_what_fabric_casts() -> None:
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    z, plain = torch.randn(2, 3, 16, 16), Transform(8, 1).latents(CPU)
    precision = MixedPrecision("bf16-mixed", "cpu")
    _, cast = precision.convert_input((z, plain))
    with precision.forward_context():
        assert torch.equal(transform_latent(z, cast), transform_latent(z, plain))
