"""Perceptual losses: LPIPS against its formula, its weight files, and the pyramid's closed forms."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omnilatent.errors import UserError
from omnilatent.losses import weight_files
from omnilatent.losses.lpips import LPIPS, NETWORKS, _read_heads
from omnilatent.losses.perceptual import laplacian_pyramid_l1, perceptual_loss
from omnilatent.losses.weight_files import MissingNetwork, NetworkFile


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty search path; returns the folder that OMNILATENT_WEIGHTS names."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("OMNILATENT_WEIGHTS", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture(scope="session")
def alex_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AlexNet file with torchvision's key names, classifier included, and random weights."""
    generator = torch.Generator().manual_seed(0)
    state = {f"features.{key}": torch.randn(t.shape, generator=generator) * (2 / t[0].numel()) ** 0.5
             for key, t in NETWORKS["alex"].build().state_dict().items()}
    state["classifier.6.bias"] = torch.zeros(1000)
    path = tmp_path_factory.mktemp("alex") / "random.pth"
    torch.save(state, path)
    return path


def pictures(seed: int, size: int = 48, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_backbones_have_torchvisions_layers() -> None:
    """Key names and parameter counts of the published files' `features` (14,714,688 and 2,469,696)."""
    vgg, alex = NETWORKS["vgg"].build(), NETWORKS["alex"].build()
    assert sum(p.numel() for p in vgg.parameters()) == 14_714_688
    assert sum(p.numel() for p in alex.parameters()) == 2_469_696
    convolutions = [i for i, layer in enumerate(vgg) if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert [i for i, layer in enumerate(alex) if isinstance(layer, torch.nn.Conv2d)] == [0, 3, 6, 8, 10]


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_the_taps_are_relus_and_the_heads_fit_them(net: str) -> None:
    network, channels = NETWORKS[net], 3
    activation = torch.zeros(1, channels, network.min_side, network.min_side)
    heads = iter(_read_heads(net))
    for index, layer in enumerate(network.build()):
        activation = layer(activation)
        if index in network.taps:
            assert isinstance(layer, torch.nn.ReLU)
            head = next(heads)
            assert head.shape == (1, activation.shape[1], 1, 1) and bool((head >= 0).all())
    assert next(heads, None) is None
    assert 1 in activation.shape[-2:]  # min_side is the smallest that gets through: one less loses the last position
    with pytest.raises((RuntimeError, ValueError)):
        network.build()(torch.zeros(1, 3, network.min_side - 1, network.min_side - 1))


def test_lpips_is_the_formula_of_the_paper(alex_file: Path) -> None:
    x, y = pictures(0), pictures(1)
    state = torch.load(alex_file, weights_only=True)
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(images: torch.Tensor) -> list[torch.Tensor]:
        a = ((images * 2 - 1).permute(0, 2, 3, 1) - mean).div(std).permute(0, 3, 1, 2)
        found = []
        for index, stride, padding in [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]:
            if index in (3, 6):
                a = F.max_pool2d(a, 3, 2)
            a = F.relu(F.conv2d(a, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding))
            found.append(a)
        return found

    expected = torch.zeros(2)
    for fx, fy, head in zip(features(x), features(y), _read_heads("alex"), strict=True):
        difference = (F.normalize(fx, dim=1) - F.normalize(fy, dim=1)) ** 2
        expected += torch.einsum("bchw,c->bhw", difference, head.flatten()).mean((1, 2))
    network = LPIPS("alex", weights=alex_file)
    torch.testing.assert_close(network(x, y), expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 1e-3


def test_lpips_agrees_with_torchmetrics(alex_file: Path) -> None:
    from torchmetrics.functional.image import lpips as reference

    # Its own network wants torchvision for the backbone; everything after the features is its code.
    network, x, y = LPIPS("alex", weights=alex_file), pictures(0), pictures(1)
    scale = reference.ScalingLayer()
    total = torch.zeros(2)
    a, b = scale(2 * x - 1), scale(2 * y - 1)
    taps = iter(network.heads)
    for index, layer in enumerate(network.features):
        a, b = layer(a), layer(b)
        if index in NETWORKS["alex"].taps:
            difference = (reference._normalize_tensor(a) - reference._normalize_tensor(b)) ** 2
            total += reference._spatial_average(F.conv2d(difference, next(taps)))[:, 0, 0, 0]
    torch.testing.assert_close(network(x, y), total, rtol=1e-5, atol=1e-7)


def test_lpips_is_zero_on_equal_images_symmetric_and_grows(alex_file: Path) -> None:
    network, x, noise = LPIPS("alex", weights=alex_file), pictures(0), pictures(1) - 0.5
    assert torch.equal(network(x, x), torch.zeros(2))
    a, b = network(x, (x + 0.1 * noise).clamp(0, 1)), network(x, (x + 0.5 * noise).clamp(0, 1))
    assert bool((a > 0).all() and (b > a).all())
    torch.testing.assert_close(network(noise, x), network(x, noise))


def test_gradients_reach_the_images_and_not_the_network(alex_file: Path) -> None:
    network, x = LPIPS("alex", weights=alex_file), pictures(0).requires_grad_()
    network(x, pictures(1)).sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().max()) > 0
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    same = pictures(0).requires_grad_()
    network(same, pictures(0)).sum().backward()  # the root's gradient at equal and at dead features stays finite
    assert bool(torch.isfinite(same.grad).all())


def test_too_small_or_odd_shaped_images_are_refused(alex_file: Path) -> None:
    network = LPIPS("alex", weights=alex_file)
    with pytest.raises(ValueError, match="at least 31 pixels"):
        network(pictures(0, 30), pictures(1, 30))
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        network(pictures(0)[:, :1], pictures(1)[:, :1])


def test_missing_weights_give_one_sentence_and_never_a_random_network(no_weights: Path) -> None:
    for net, name in [("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth")]:
        sentence = NETWORKS[net].file.missing()
        with pytest.raises(MissingNetwork) as raised:
            LPIPS(net)
        assert str(raised.value) == sentence
        assert f"https://download.pytorch.org/models/{name}" in sentence and str(no_weights) in sentence
    with pytest.raises(MissingNetwork, match="vgg16"):
        perceptual_loss("lpips")


def test_a_file_with_other_bytes_is_refused(no_weights: Path, alex_file: Path) -> None:
    (no_weights / "alexnet-owt-7be5be79.pth").write_bytes(alex_file.read_bytes())
    assert NETWORKS["alex"].file.missing() is None
    with pytest.raises(UserError, match="not the published file.*expected 7be5be79"):
        LPIPS("alex")


def test_the_published_file_is_found_by_its_hash(
    no_weights: Path, alex_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = hashlib.sha256(alex_file.read_bytes()).hexdigest()[:8]
    file = NetworkFile(f"net-{digest}.pth", "https://example.org/net.pth", "a test")
    checkpoints = tmp_path / "home" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / file.name).write_bytes(alex_file.read_bytes())
    assert file.path() == checkpoints / file.name  # torch.hub's folder
    (no_weights / file.name).write_bytes(alex_file.read_bytes())
    assert file.path() == no_weights / file.name  # the named folder goes first


def test_foreign_files_give_sentences(tmp_path: Path, alex_file: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="bad.pth cannot be read as weights"):
        LPIPS("alex", weights=bad)
    torch.save({"features.0.weight": torch.zeros(1)}, bad)
    with pytest.raises(UserError, match="of shape"):
        LPIPS("alex", weights=bad)
    with pytest.raises(UserError, match="of shape|no weight"):
        LPIPS("vgg", weights=alex_file)
    with pytest.raises(UserError, match="does not exist"):
        LPIPS("alex", weights=tmp_path / "none.pth")


def test_a_pickle_that_runs_code_does_not(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"features.0.weight": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        weight_files.read_state_dict(tmp_path / "attack.pth")
    assert not (tmp_path / "owned").exists()


def test_the_pyramid_counts_a_constant_and_a_checkerboard_once() -> None:
    """A constant difference survives every blur; a checkerboard dies in the first one (edges aside)."""
    x = torch.full((1, 3, 64, 64), 0.25)
    torch.testing.assert_close(laplacian_pyramid_l1(x, x + 0.5, 4), torch.tensor([0.5]))
    rows = torch.arange(256)
    board = 0.1 * (1 - 2 * ((rows[:, None] + rows[None]) % 2)).float().expand(1, 3, 256, 256)
    found = laplacian_pyramid_l1(torch.full_like(board, 0.5) + board, torch.full_like(board, 0.5), 4)
    torch.testing.assert_close(found, torch.tensor([0.1]), rtol=0.03, atol=0)


def test_without_levels_the_pyramid_is_l1() -> None:
    x, y = pictures(0), pictures(1)
    torch.testing.assert_close(laplacian_pyramid_l1(x, y, 0), (x - y).abs().flatten(1).mean(1))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (37, 53), (5, 64)])
def test_the_pyramid_takes_any_size(size: tuple[int, int]) -> None:
    x, y = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    found = laplacian_pyramid_l1(x, y, 4)
    assert found.shape == (2,) and bool((found > 0).all())
    assert torch.equal(laplacian_pyramid_l1(x, x, 4), torch.zeros(2))
    constant = torch.full((2, 3, *size), 0.5)  # exact at the edges of odd sizes too
    torch.testing.assert_close(laplacian_pyramid_l1(constant, constant + 0.25, 4), torch.full((2,), 0.25))


def test_the_pyramid_weighs_structure_above_noise() -> None:
    """What L1 cannot tell apart: noise, and the same amount of error in large patches."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 64, 64, generator=generator) - 0.5
    patches = F.interpolate(noise[..., :4, :4], 64, mode="nearest")
    patches = patches * noise.abs().mean() / patches.abs().mean()
    x = torch.full((1, 3, 64, 64), 0.5)
    assert laplacian_pyramid_l1(x + patches, x, 4) > 1.1 * laplacian_pyramid_l1(x + noise, x, 4)


def test_losses_by_name() -> None:
    x, y = pictures(0).requires_grad_(), pictures(1)
    perceptual_loss("laplacian")(x, y).sum().backward()
    assert float(x.grad.abs().min()) > 0
    assert perceptual_loss("none") is None
    with pytest.raises(UserError, match="no perceptual loss 'vgg': choose none, lpips or laplacian"):
        perceptual_loss("vgg")
