"""The native O-VAE: learned without gradients, any size in and out, a latent of unit scale, better than its nulls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clones import forward_only
from torch import Tensor

from omnilatent import hub
from omnilatent.data import EvaluationImages, demo_photos
from omnilatent.errors import UserError
from omnilatent.metrics.pixel import psnr
from omnilatent.organic import native_learning
from omnilatent.organic.grid_learning import GridConfig
from omnilatent.organic.learning import Pace
from omnilatent.organic.lessons import Lessons
from omnilatent.organic.native import NativeAutoencoder, NativeCodec, NativeConfig
from omnilatent.organic.native_learning import NativeLearning, measured_spec, principal_components, turned_round
from omnilatent.organic.peers import ALONE

CONFIGS = {"narrow": (NativeConfig(channels=6, window=1, reach=1, context=8), 2),
           "wide": (NativeConfig(channels=4, window=3, reach=3, context=8), 1)}


def pictures(count: int, side: int = 64) -> Tensor:
    """Smooth colour with edges at any angle and a little texture, uint8 `(count, 3, side, side)`."""
    g = torch.Generator().manual_seed(3)
    ramp = torch.linspace(-1, 1, side)
    out = []
    for _ in range(count):
        angle, shift, *_ = torch.rand(4, generator=g) * 6.28
        line = ramp[:, None] * angle.sin() + ramp * angle.cos() + 0.3 * (shift - 3.14) / 3.14
        edge = torch.sigmoid(line * 40)
        colours = torch.rand(2, 3, 1, 1, generator=g)
        rough = F.interpolate(torch.randn(1, 3, side // 2, side // 2, generator=g), size=side, mode="bilinear")[0]
        out.append(colours[0] * edge + colours[1] * (1 - edge) + 0.03 * rough)
    return (torch.stack(out).clamp(0, 1) * 255).round().byte()


def learning_of(crops: Tensor, name: str, turns: int = 2) -> NativeLearning:
    """All rounds; the last sixth is held out."""
    config, layers = CONFIGS[name]
    held = len(crops) // 6
    learning = NativeLearning(config, GridConfig(layers, neurons=10, candidates=40), turns,
                              Pace(len(crops) - held, held, 3000, 0), ALONE, torch.device("cpu"))
    while learning.round < learning.rounds:
        learning.see(Lessons(crops[:-held], None), False, 0)
        learning.see(Lessons(crops[-held:], None), True, 1)
        for left in range(4):
            learning.work(left == 3)
    return learning


Learned = tuple[NativeAutoencoder, Tensor]


@pytest.fixture(scope="module", params=CONFIGS)
def learned(request: pytest.FixtureRequest) -> Learned:
    torch.set_num_threads(1)
    crops = pictures(42)
    with forward_only():
        return learning_of(crops, request.param).model(), crops


def raw(model: NativeAutoencoder, crops: Tensor) -> Tensor:
    return model.encode(crops.float() / 255)


def codec_of(model: NativeAutoencoder, crops: Tensor, folder: Path) -> NativeCodec:
    """Saved and opened again."""
    spec = measured_spec(model.config.channels, raw(model, crops))
    with hub.new_folder(folder) as new:
        hub.write_model(new, "ovae", vars(model.config), spec, model.state_dict(), "")
    codec = hub.load(folder)
    assert isinstance(codec, NativeCodec)
    return codec


def decibels(model: NativeAutoencoder, crops: Tensor) -> float:
    images = crops.float() / 255
    return float(psnr(images, model(images).clamp(0, 1)).mean())


def test_it_beats_the_mean_colour_and_is_deterministic(learned: Learned, request: pytest.FixtureRequest) -> None:
    model, crops = learned
    held = pictures(60)[42:]
    images = held.float() / 255
    means = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8)
    assert decibels(model, held) > float(psnr(images, means).mean()) + 3
    name = next(name for name, (config, _) in CONFIGS.items() if config.channels == model.config.channels)
    again = learning_of(crops, name).model()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_turns_and_layers_explain_more() -> None:
    """Of the held-out variance; the best turn is kept, so that none can do harm."""
    crops = pictures(42)
    none, some = (learning_of(crops, "wide", turns) for turns in (0, 3))
    assert some.lowest < 0.97 * none.lowest  # filters that overlap, against blocks
    assert 0 < some.left < 0.5 and some.left <= none.left
    assert some.rounds == none.rounds + 3 and some.fits == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_learning, "turned_round", lambda *_: torch.randn(4, 3, 24, 24))
        spoiled = learning_of(crops, "wide", 2)
    assert spoiled.lowest == none.lowest and torch.equal(spoiled.filters, none.filters)


def test_saved_and_loaded_is_the_same(learned: Learned, tmp_path: Path) -> None:
    model, crops = learned
    codec = codec_of(model, crops, tmp_path / "model")
    images = crops[:2].float() / 255
    assert torch.equal(codec.spec.normalise(model.encode(images)), codec.encode(images).mode())
    for saved, loaded in zip(model.state_dict().values(), codec.module.state_dict().values(), strict=True):
        assert torch.equal(saved, loaded)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 40), (65, 33)])
def test_any_size_comes_back(size: tuple[int, int], learned: Learned, tmp_path: Path) -> None:
    model, crops = learned
    codec = codec_of(model, crops, tmp_path / "model")
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    latent = codec.encode(images)
    assert latent.mode().shape == (2, model.config.channels, *codec.spec.grid(size))
    assert codec.decode(latent).shape == images.shape


def test_a_batch_is_its_images(learned: Learned) -> None:
    model, crops = learned
    images = crops[:3].float() / 255
    one_by_one = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), one_by_one, rtol=0, atol=1e-5)


def test_the_latent_has_unit_scale_and_no_correlations(learned: Learned) -> None:
    model, crops = learned
    fitted = raw(model, crops[:35])
    spec = measured_spec(model.config.channels, fitted)
    z = spec.normalise(fitted).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(len(z)), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std(1), torch.ones(len(z)), rtol=0, atol=1e-3)
    assert torch.corrcoef(z).fill_diagonal_(0).abs().max() < 0.02
    assert 0.98 < float(fitted.transpose(0, 1).flatten(1).std(1).min())  # before it is measured, too


def test_principal_components_are_the_eigenvectors() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    values = 2.0 ** -torch.arange(12, dtype=torch.float64)
    found = principal_components(basis * values @ basis.mT, 5)
    overlap = (found.mT @ basis[:, :5]).abs()
    torch.testing.assert_close(overlap, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-8)


def test_turned_round_is_the_adjoint() -> None:
    """<synthesis(z), x> = <z, analysis(x)> for what stays away from the border."""
    g = torch.Generator().manual_seed(0)
    synthesis = torch.randn(192, 2, 3, 3, generator=g)
    filters = turned_round(synthesis, 3)
    z = torch.zeros(1, 2, 8, 8)
    z[:, :, 2:6, 2:6] = torch.randn(1, 2, 4, 4, generator=g)
    x = torch.randn(1, 3, 64, 64, generator=g)
    scale = synthesis.flip(-2, -1).transpose(0, 1).flatten(1).norm(dim=1).view(1, 2, 1, 1)
    left = (F.pixel_shuffle(F.conv2d(z, synthesis, padding=1), 8) * x).sum()
    right = (z * scale * F.conv2d(x, filters, stride=8, padding=8)).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)


def test_wrong_sizes_and_damaged_weights_are_refused(learned: Learned, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="window 2, reach 3: expected odd"):
        NativeConfig(window=2)
    with pytest.raises(ValueError, match="channels 193: expected 1 to 192"):
        NativeConfig(channels=193)
    model, crops = learned
    codec = codec_of(model, crops, tmp_path / "model")
    channels = model.config.channels
    with pytest.raises(ValueError, match=rf"shape \(b, {channels}, h, w\); got \(1, {channels + 1}, 2, 2\)"):
        codec.decode(torch.zeros(1, channels + 1, 2, 2))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="restore"):
        hub.load(tmp_path / "model")


@pytest.mark.parametrize(("name", "floor"), [("ovae-f8c4", 24.0), ("ovae-f8c16", 27.8), ("ovae-f8c32", 31.3)])
def test_bundled_models_reconstruct_the_embedded_photos(name: str, floor: float) -> None:
    codec = hub.load(name)
    assert (hub.BUNDLED / name / "model.safetensors").stat().st_size <= 1.5e6
    found = [psnr(image[None], codec.reconstruct(image[None])).item()
             for _, image in EvaluationImages(demo_photos(), 256, limit=5)]
    assert sum(found) / len(found) > floor, found
