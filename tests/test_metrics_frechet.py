"""Fréchet distances against closed forms; the networks' real loading code on small local files."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from omnilatent.errors import UserError
from omnilatent.losses.weight_files import MissingNetwork
from omnilatent.metrics import frechet
from omnilatent.metrics.frechet import DinoFeatures, InceptionFeatures, dino_available, inception_available
from omnilatent.metrics.moments import RunningMoments, frechet_distance


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("OMNILATENT_WEIGHTS", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def covariance(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    rows = torch.randn(rank or 3 * dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / len(rows)


def test_one_dimension() -> None:
    """(μ1 − μ2)² + (σ1 − σ2)²."""
    found = frechet_distance(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[0.25]]))
    assert found == pytest.approx(9 + 1.5**2)


def test_diagonal_gaussians() -> None:
    mu1, mu2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, -1.0])
    d1, d2 = torch.tensor([1.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 0.25])
    expected = 10 + float(((d1.sqrt() - d2.sqrt()) ** 2).sum())
    assert frechet_distance(mu1, d1.diag(), mu2, d2.diag()) == pytest.approx(expected)


def test_full_covariances_agree_with_scipy() -> None:
    c1, c2 = covariance(12, 0), covariance(12, 1)
    mu1, mu2 = torch.zeros(12, dtype=torch.float64), torch.linspace(-1, 1, 12, dtype=torch.float64)
    root = scipy.linalg.sqrtm((c1 @ c2).numpy()).real
    expected = float((mu1 - mu2).square().sum() + c1.trace() + c2.trace()) - 2 * float(np.trace(root))
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu2, c2, mu1, c1) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_need_no_jitter() -> None:
    """Fewer images than features: rank 3 of 40."""
    c = covariance(40, 0, rank=3)
    mu = torch.zeros(40, dtype=torch.float64)
    assert 0 <= frechet_distance(mu, c, mu, c) < 1e-5
    assert frechet_distance(mu, c, mu, 4 * c) == pytest.approx(float(c.trace()), rel=1e-6)  # tr C (1 − 2)²
    assert frechet_distance(mu, c, mu + 1, c) == pytest.approx(40, rel=1e-6)


def test_moments_are_those_of_numpy_however_they_arrive() -> None:
    rows = torch.randn(31, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1000  # a mean that cancels
    whole, parts, other = RunningMoments(5), RunningMoments(5), RunningMoments(5)
    whole.update(rows)
    for part in rows[:20].split(3):
        parts.update(part)
    other.update(rows[20:])
    parts.merge(other)
    parts.merge(RunningMoments(5))
    for moments in (whole, parts):
        assert moments.count == 31
        np.testing.assert_allclose(moments.mean, rows.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(rows.double().numpy().T), rtol=1e-9)
    assert whole.distance(parts) < 1e-6


def test_a_covariance_needs_two_rows() -> None:
    moments = RunningMoments(3)
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 rows; got 1"):
        _ = moments.covariance
    with pytest.raises(ValueError, match=r"\(n, 3\)"):
        moments.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="means"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(3))


def test_missing_networks_say_what_to_fetch(no_weights: Path) -> None:
    for available, network, parts in [
        (inception_available, InceptionFeatures, ["weights-inception-2015-12-05-6726825d.pth", "https://github.com/"]),
        (dino_available, DinoFeatures, ["hf download facebook/dinov2-large", "OMNILATENT_WEIGHTS"]),
    ]:
        sentence = available()
        with pytest.raises(MissingNetwork) as raised:
            network()
        assert str(raised.value) == sentence
        assert all(part in sentence for part in parts), sentence


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dino_gives_the_normalised_class_token(tiny_dino: Path) -> None:
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    network = DinoFeatures(tiny_dino)
    images = (torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    found = network(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = Dinov2Model.from_pretrained(tiny_dino).eval()(pixel_values=(images - mean) / std).pooler_output
    assert found.shape == (2, network.dim) == (2, 16)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(found.mean(1), torch.zeros(2), atol=1e-4, rtol=0)  # a layer norm comes last
    assert network(torch.rand(1, 3, 1, 1)).shape == (1, 16) and network(torch.rand(1, 3, 37, 300)).shape == (1, 16)


def test_dino_resizes_as_pillow_does(tiny_dino: Path) -> None:
    """The reference resizes pictures with Pillow's bicubic: the features of that agree with ours."""
    from PIL import Image

    network = DinoFeatures(tiny_dino)
    pixels = (torch.rand(60, 80, 3, generator=torch.Generator().manual_seed(1)) * 255).round().to(torch.uint8)
    small = Image.fromarray(pixels.numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    reference = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].float() / 255
    images = pixels.permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(network(images), network(reference), atol=0.02, rtol=0)


def test_dino_comes_from_the_named_folder_and_has_to_be_the_large_one(no_weights: Path, tiny_dino: Path) -> None:
    (no_weights / "dinov2-large").symlink_to(tiny_dino)
    assert dino_available() is None
    with pytest.raises(UserError, match="is not facebook/dinov2-large: .* hidden_size 16, expected 1024"):
        DinoFeatures()


def test_dino_comes_from_the_hubs_cache(no_weights: Path, tiny_dino: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--facebook--dinov2-large"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text((tiny_dino / "config.json").read_text())
    assert dino_available() is not None  # half a download is none
    (repository / "snapshots" / "abc" / "model.safetensors").write_bytes((tiny_dino / "model.safetensors").read_bytes())
    assert dino_available() is None
    assert frechet._dino_folder() == repository / "snapshots" / "abc"


def test_a_broken_dino_folder_gives_a_sentence(tmp_path: Path, tiny_dino: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_dino / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded as a DINOv2"):
        DinoFeatures(tmp_path)
    json.loads((tmp_path / "config.json").read_text())  # left as it was


class FakeInception(torch.nn.Module):
    """torch-fidelity's constructor and interface: it unpickles what it is given and takes bytes."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: object) -> None:
        super().__init__()
        assert features_list == ["2048"]
        self.weight = torch.nn.Parameter(torch.load(feature_extractor_weights_path, weights_only=False)["weight"])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (x.float().mean((2, 3)) @ self.weight,)


@pytest.fixture
def fake_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity imports torchvision, which does not load everywhere; its interface is what we test against."""
    for name in ("torchvision", "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.FeatureExtractorInceptionV3 = FakeInception
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("fake_fidelity")
def test_inception_gets_bytes_and_plain_tensors(no_weights: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(3, 2048)}, tmp_path / "inception.pth")
    network = InceptionFeatures(tmp_path / "inception.pth")
    found = network(torch.full((2, 3, 5, 7), 0.5))
    assert found.shape == (2, 2048) and found[0, :4].tolist() == [128, 128, 128, 0]
    assert not any(p.requires_grad for p in network.parameters())
    assert "fetch" in inception_available() and "pip install" not in inception_available()


@pytest.mark.usefixtures("fake_fidelity")
def test_an_inception_file_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"weight": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        InceptionFeatures(tmp_path / "attack.pth")
    assert not (tmp_path / "owned").exists()
