"""The adversarial loss and how it enters the generator's step, against oracles and plain autograd."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omnilatent.autoencoders.config import LossConfig
from omnilatent.autoencoders.recipes import debug
from omnilatent.autoencoders.task import AutoencoderTask
from omnilatent.losses.adversarial import (
    PatchDiscriminator, adaptive_weight, hinge_loss, last_layer_gradient,
)
from omnilatent.losses.perceptual import perceptual_loss
from omnilatent.training.loop import launch_fabric


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers: int, side: int) -> None:
    """The pixels that one logit has a gradient by, GroupNorm's statistics over the whole image left aside."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, layers=layers)
    assert sum(isinstance(block, nn.GroupNorm) for block in discriminator.blocks) == layers
    discriminator.blocks = nn.Sequential(*(b for b in discriminator.blocks if not isinstance(b, nn.GroupNorm)))
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(images)
    row, column = logits.shape[2] // 2, logits.shape[3] // 2
    logits[0, 0, row, column].backward()
    seen = images.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1) == (side, side)
    assert seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_images_of_a_batch_do_not_leak_into_each_other() -> None:
    discriminator = PatchDiscriminator(width=8, layers=2)
    real, fake = torch.rand(2, 3, 32, 32), torch.rand(3, 3, 32, 32)
    together = discriminator(torch.cat([real, fake]))
    torch.testing.assert_close(together, torch.cat([discriminator(real), discriminator(fake)]))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_with_a_logit(layers: int) -> None:
    discriminator, side = PatchDiscriminator(width=2, layers=layers), LossConfig(disc_layers=layers).disc_least_side
    assert discriminator(torch.rand(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        discriminator(torch.rand(1, 3, side - 1, side - 1))


def test_any_width_has_groups_and_the_usual_ones_have_sixteen() -> None:
    for width in range(1, 70):
        norms = [b for b in PatchDiscriminator(width, layers=2).blocks if isinstance(b, nn.GroupNorm)]
        assert [norm.num_channels for norm in norms] == [2 * width, 4 * width]
    assert [b.num_groups for b in PatchDiscriminator(64, 3).blocks if isinstance(b, nn.GroupNorm)] == [16, 16, 16]
    for wrong in ({"width": 0}, {"layers": 0}):
        with pytest.raises(ValueError, match="both are at least 1"):
            PatchDiscriminator(**wrong)


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[-3.0, -1.0, 0.0, 2.0]])
    # real: 0, 0, 0.5, 2 → mean 0.625; fake: 0, 0, 1, 3 → mean 1
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.625 + 1.0))
    assert hinge_loss(torch.full((2, 2), 1.5), torch.full((2, 2), -1.5)).item() == 0


def test_hinge_loss_pulls_only_at_patches_inside_the_margin() -> None:
    real = torch.tensor([2.0, 0.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0], requires_grad=True)
    hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25] and fake.grad.tolist() == [0.0, 0.25]


def test_the_adaptive_weight_is_the_ratio_of_norms() -> None:
    reconstruction, adversarial = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert adaptive_weight(reconstruction, adversarial).item() == pytest.approx(5 / (2 + 1e-4))
    assert adaptive_weight(reconstruction, torch.zeros(1, 2)).item() == pytest.approx(1e4), "at most 10⁴"
    assert adaptive_weight(torch.zeros(1, 2), adversarial).item() == 0
    grown = adaptive_weight(reconstruction.requires_grad_(), adversarial)
    assert not grown.requires_grad, "the generator must not learn to change its own weight"


def test_the_last_layers_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 3, 3, padding=1)
    features, target = torch.randn(2, 8, 9, 7), torch.randn(2, 3, 9, 7)
    out = layer(features)
    loss = (out - target).abs().mean()
    (by_output,) = torch.autograd.grad(loss, out, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, layer.weight)
    torch.testing.assert_close(last_layer_gradient(features, layer.weight.shape, by_output), expected)


@pytest.fixture
def task() -> AutoencoderTask:
    """The debug recipe with its discriminator at work from the first step, set up on the CPU."""
    config = debug()
    config = replace(
        config, loss=replace(config.loss, disc_start_step=0, kl_weight=0.01, l1=1.0, l2=0.5),
        optimizer=replace(config.optimizer, clip=0.0), run=replace(config.run, device="cpu", batch_size=4),
    )
    task = AutoencoderTask(config, "synthetic", "photos", lambda file, reason: None)
    torch.manual_seed(0)
    task.setup(launch_fabric(config.run))
    return task


def test_the_generators_combined_gradient_is_plain_autograds(task: AutoencoderTask) -> None:
    """One gradient through the decoder = the gradient of loss_rec + w · loss_adv + kl_weight · kl, parameter by
    parameter, with the weight of Esser et al. 2021 computed the slow way."""
    batch = next(task.batches(0, 1))
    images = batch.images.float() / 127.5 - 1
    loss_config, model = task.config.loss, task.bare
    out = model(images, task._noise(batch.positions.tolist()))
    difference = out.images - images
    reconstruction = difference.abs().mean() + 0.5 * difference.square().mean()
    perceptual = perceptual_loss("laplacian")(out.images / 2 + 0.5, images / 2 + 0.5).mean()
    reconstruction = reconstruction + loss_config.perceptual_weight * perceptual
    adversarial = -task.bare_disc(out.images).mean()
    norms = [torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0].norm()
             for loss in (reconstruction, adversarial)]
    weight = loss_config.adversarial_weight * norms[0] / (norms[1] + 1e-4)
    kl = 0.5 * (out.mean**2 + out.logvar.exp() - 1 - out.logvar).flatten(1).sum(1).mean()
    total = reconstruction + weight.detach() * adversarial + 0.01 * kl / images[0].numel()
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))

    found = {}
    task.optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in model.named_parameters()})
    logged = task.step(batch, 0)
    assert logged["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-4) and weight > 0.01
    assert logged["loss"].item() == pytest.approx((total - weight * adversarial).item(), rel=1e-5)
    assert logged["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    worst = max((found[name] - expected[name]).abs().max() / largest for name in expected)
    assert worst < 1e-5, f"relative difference {worst:.2e}"


def test_the_generators_step_leaves_the_discriminator_alone(task: AutoencoderTask) -> None:
    """The discriminator learns from the hinge loss only, on reconstructions cut off from the generator."""
    batch = next(task.batches(0, 1))
    images = batch.images.float() / 127.5 - 1
    with torch.no_grad():
        fakes = task.bare(images, task._noise(batch.positions.tolist())).images
    real, fake = task.bare_disc(images), task.bare_disc(fakes)
    loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    expected = torch.autograd.grad(loss, list(task.bare_disc.parameters()))
    found: list[torch.Tensor] = []
    task.disc_optimizer.step = lambda: found.extend(p.grad.clone() for p in task.bare_disc.parameters())
    assert task.step(batch, 0)["disc_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) / largest < 1e-5


def test_the_discriminator_waits_for_its_start() -> None:
    config = debug()
    config = replace(config, loss=replace(config.loss, disc_start_step=1), run=replace(config.run, device="cpu"))
    task = AutoencoderTask(config, "synthetic", "photos", lambda file, reason: None)
    task.setup(launch_fabric(config.run))
    before = [p.clone() for p in task.bare_disc.parameters()]
    steps = [task.step(batch, position) for position, batch in enumerate(task.batches(0, 2))]
    assert "adversarial" not in steps[0] and "disc_loss" not in steps[0] and "adversarial" in steps[1]
    changed = [not torch.equal(a, b) for a, b in zip(before, task.bare_disc.parameters(), strict=True)]
    assert any(changed)
