"""The native O-VAE: learned without gradients, any size in and out, a latent of unit scale, better than its nulls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from omnilatent import hub
from omnilatent.data import EvaluationImages, demo_photos
from omnilatent.errors import UserError
from omnilatent.metrics.pixel import psnr
from omnilatent.organic.native import NativeAutoencoder, NativeCodec, NativeConfig
from omnilatent.organic.native_learning import (
    NativeLearning, held_out_psnr, learn, measured_spec, principal_components, turned_round,
)

SMALL = NativeLearning(sites=2000, turns=2, held_out=6)
CONFIGS = {"linear": NativeConfig(channels=6, context=5, hidden=0), "neurons": NativeConfig(channels=4, hidden=8)}
FORBIDDEN = {"backward", "solve", "lstsq", "inv", "pinv", "inverse", "linalg_solve", "linalg_lstsq", "linalg_inv",
             "linalg_pinv", "cholesky_solve", "cholesky_inverse", "linalg_solve_ex", "linalg_inv_ex", "lu_solve"}


class NoSolving(TorchFunctionMode):
    """Raises where a gradient is asked for or a system of equations is solved."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in FORBIDDEN, f"learning calls {name}"
        return func(*args, **(kwargs or {}))


@contextmanager
def gradient_free() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), NoSolving():
        yield


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


@pytest.fixture(scope="module", params=CONFIGS)
def learned(request: pytest.FixtureRequest) -> tuple[NativeAutoencoder, Tensor]:
    crops = pictures(40)
    with gradient_free():
        return learn(crops, CONFIGS[request.param], SMALL), crops


def codec_of(model: NativeAutoencoder, crops: Tensor, folder: Path) -> NativeCodec:
    """Saved and opened again."""
    with hub.new_folder(folder) as new:
        hub.write_model(new, "ovae", vars(model.config), measured_spec(model, crops), model.state_dict(), "")
    codec = hub.load(folder)
    assert isinstance(codec, NativeCodec)
    return codec


def test_the_mode_refuses_what_it_should() -> None:
    matrix = torch.eye(2)
    for call in (lambda: torch.linalg.solve(matrix, matrix), lambda: torch.linalg.pinv(matrix),
                 lambda: torch.inverse(matrix), lambda: torch.linalg.lstsq(matrix, matrix),
                 lambda: torch.ones(1, requires_grad=True).sum().backward()):
        with pytest.raises(AssertionError, match="learning calls"), gradient_free():
            call()


def test_it_beats_the_mean_colour_and_is_deterministic(learned: tuple[NativeAutoencoder, Tensor]) -> None:
    model, crops = learned
    held = pictures(60)[40:]

    def means(x: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)

    assert held_out_psnr(model, held) > held_out_psnr(means, held) + 3
    again = learn(crops, model.config, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_saved_and_loaded_is_the_same(learned: tuple[NativeAutoencoder, Tensor], tmp_path: Path) -> None:
    model, crops = learned
    codec = codec_of(model, crops, tmp_path / "model")
    images = crops[:2].float() / 255
    assert torch.equal(codec.spec.normalise(model.encode(images)), codec.encode(images).mode())
    for saved, loaded in zip(model.state_dict().values(), codec.module.state_dict().values(), strict=True):
        assert torch.equal(saved, loaded)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 40), (65, 33)])
def test_any_size_comes_back(size: tuple[int, int], learned: tuple[NativeAutoencoder, Tensor], tmp_path: Path) -> None:
    model, crops = learned
    codec = codec_of(model, crops, tmp_path / "model")
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    latent = codec.encode(images)
    assert latent.mode().shape == (2, model.config.channels, *codec.spec.grid(size))
    assert codec.decode(latent).shape == images.shape


def test_a_batch_is_its_images(learned: tuple[NativeAutoencoder, Tensor]) -> None:
    model, crops = learned
    images = crops[:3].float() / 255
    one_by_one = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), one_by_one, rtol=0, atol=1e-5)


def test_the_latent_has_unit_scale_and_no_correlations(learned: tuple[NativeAutoencoder, Tensor]) -> None:
    model, crops = learned
    fitting = crops[:34]
    spec = measured_spec(model, fitting)
    z = spec.normalise(model.encode(fitting.float() / 255)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(len(z)), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std(1), torch.ones(len(z)), rtol=0, atol=1e-3)
    assert torch.corrcoef(z).fill_diagonal_(0).abs().max() < 0.02


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


def test_wrong_sizes_and_damaged_weights_are_refused(
    learned: tuple[NativeAutoencoder, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="odd"):
        NativeConfig(window=2)
    with pytest.raises(UserError, match="crops"):
        learn(torch.zeros(9, 3, 63, 64, dtype=torch.uint8), CONFIGS["linear"], SMALL)
    model, crops = learned
    codec_of(model, crops, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="restore"):
        hub.load(tmp_path / "model")


@pytest.mark.parametrize(("name", "floor"), [("ovae-f8c4", 20.0), ("ovae-f8c16", 24.0), ("ovae-f8c32", 27.0)])
def test_bundled_models_reconstruct_the_embedded_photos(name: str, floor: float) -> None:
    codec = hub.load(name)
    assert (hub.BUNDLED / name / "model.safetensors").stat().st_size <= 1.5e6
    found = [psnr(image[None], codec.reconstruct(image[None])).item()
             for _, image in EvaluationImages(demo_photos(), 256, limit=5)]
    assert sum(found) / len(found) > floor, found
