"""The Gaussian autoencoder: its size, its twin, its codec; and its recipe through the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_commands import ROOT, bash_lines, blocks
from PIL import Image
from safetensors.torch import load_file

import omnilatent
from omnilatent import GaussianAutoencoder, GaussianConv2d
from omnilatent.autoencoders import recipes
from omnilatent.autoencoders.gaussian import GaussianCodec
from omnilatent.autoencoders.gaussian_config import GaussianConfig
from omnilatent.autoencoders.gaussian_pictures import filter_sheet, sigma_figures
from omnilatent.autoencoders.gaussian_task import GaussianTask, parameter_groups
from omnilatent.cli.main import main
from omnilatent.codec import Provenance
from omnilatent.data import open_images, subset
from omnilatent.data.digits import Digits
from omnilatent.latent import LatentSpec, Point

SMALL = ["--data", "digits", "--epochs", "1", "--steps", "4", "--batch-size", "16", "--latent-dim", "16", "--lr",
         "3e-3", "--device", "cpu", "--workers", "0"]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_seeds_example() -> None:
    model = GaussianAutoencoder(in_ch=1, latent_dim=32).eval()
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        reconstructed, latent = model(images)
    assert reconstructed.shape == images.shape and latent.shape == (3, 32)
    assert reconstructed.min() >= 0 and reconstructed.max() <= 1
    assert parameters(model) <= 119_969
    assert isinstance(model.encoder[0], GaussianConv2d) and model.encoder[0].kernel_size == (5, 5)


@pytest.mark.parametrize("config", [
    GaussianConfig(), recipes.gaussian().model, GaussianConfig(16, widths=(8, 16, 24), decoder_widths=(24, 16, 8)),
    GaussianConfig(widths=(24,), decoder_widths=(8,)), GaussianConfig(widths=(10, 20), num_gaussians=2)])
def test_the_twin_has_as_many_parameters_and_never_fewer(config: GaussianConfig) -> None:
    ours, twin = (GaussianAutoencoder.of(replace(config, plain=plain)) for plain in (False, True))
    assert not any(isinstance(m, GaussianConv2d) for m in twin.modules())
    assert parameters(ours) <= parameters(twin) <= 1.02 * parameters(ours)
    assert [p.shape for p in ours.decoder.parameters()] == [p.shape for p in twin.decoder.parameters()]
    for model in (ours, twin):
        assert model.config.encoder_parameters() == parameters(model.encoder)
        assert model(torch.rand(2, 1, 28, 28))[0].shape == (2, 1, 28, 28)


@pytest.mark.parametrize("shape", [(2, 1, 27, 28), (2, 1, 56, 56), (2, 3, 28, 28), (1, 28, 28)])
def test_other_sizes_are_refused_by_the_model(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape \(b, 1, 28, 28\); got .*: resize them, or"):
        GaussianAutoencoder()(torch.rand(shape))


def test_every_parameter_learns_and_the_geometry_at_its_own_rate() -> None:
    torch.manual_seed(0)
    model = GaussianAutoencoder()
    model(torch.rand(4, 1, 28, 28))[0].square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    slow, fast = parameter_groups(model, 10.0)
    assert (slow["multiple"], fast["multiple"]) == (1.0, 10.0)
    counts = [len(model.config.widths) * 3, sum(len(group["params"]) for group in (slow, fast))]
    assert len(fast["params"]) == counts[0] and counts[1] == len(list(model.parameters()))
    assert len(parameter_groups(GaussianAutoencoder.of(GaussianConfig(plain=True)), 10.0)) == 1


@pytest.fixture
def codec() -> GaussianCodec:
    torch.manual_seed(0)
    spec = LatentSpec(32, 28, "point", 1, shift=(0.1,), scale=(3.0,))
    return GaussianCodec(GaussianAutoencoder(), spec, Provenance("test", "gaussian"))


def test_the_codec_tiles_larger_pictures(codec: GaussianCodec) -> None:
    images = torch.rand(2, 1, 56, 84)
    whole = codec.encode(images)
    assert isinstance(whole, Point) and whole.z.shape == (2, 32, 2, 3)
    assert codec.encode(images[..., :28, :28]).z.shape == (2, 32, 1, 1)
    for row in range(2):
        for column in range(3):
            tile = images[..., 28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            assert torch.allclose(codec.encode(tile).z[..., 0, 0], whole.z[..., row, column], atol=1e-5)
            again = codec.decode(whole)[..., 28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            assert torch.allclose(codec.reconstruct(tile), again, atol=1e-5)
    assert codec.reconstruct(torch.rand(1, 1, 30, 5)).shape == (1, 1, 30, 5)
    tile = images[..., :28, :28]
    with torch.no_grad():
        assert torch.allclose(codec.reconstruct(tile), codec.module(tile)[0], atol=1e-5)


def test_pictures_of_the_filters() -> None:
    torch.manual_seed(0)
    layer = GaussianConv2d(1, 9, 5)
    sheet, plain = filter_sheet(layer), filter_sheet(torch.nn.Conv2d(1, 9, 5))
    assert sheet.shape == (3, 2 * plain.shape[1], plain.shape[2]) and 0 <= sheet.min() and sheet.max() <= 1
    figures = sigma_figures(layer)
    assert 0.4 < figures["sigma_min"] < figures["sigma_mean"] < figures["sigma_max"] < 2.5
    assert 1.3 <= figures["sigma_ratio"] <= 2.0 and sigma_figures(torch.nn.Conv2d(1, 2, 3)) == {}


# ---------------------------------------------------------------------------------------------------------------
# The recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    out = tmp_path_factory.mktemp("gaussian") / "run"
    assert main(["train", "gaussian", *SMALL, "--save-every", "2", "--validate-every", "2", "--out", str(out)]) == 0
    return out


def test_a_run_can_be_loaded_and_looked_at(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = run / "final"
    codec = omnilatent.load(run)
    assert codec.spec.kind == "point" and codec.spec.image_channels == 1 and codec.spec.channels == 16
    saved, held = load_file(final / "model.safetensors"), codec.module.state_dict()
    assert saved.keys() == held.keys() and all(torch.equal(saved[name], held[name]) for name in saved)
    test = open_images("digits").test
    images = torch.from_numpy(np.stack([test.pixels[i] for i in range(297)]))[:, None]
    latent = codec.encode(images)
    assert latent.z.shape == (297, 16, 1, 1) and abs(float(latent.z.std()) - 1) < 0.5
    card = (final / "README.md").read_text()
    mse = float((codec.decode(latent) - images.float() / 255).square().mean())
    assert f"| MSE | {mse:.5f} |" in card, "the card states what the loaded model does"
    assert "First layer's σ: " in card and "px" in card and "--latent-dim 16" in card
    with Image.open(final / "samples.png") as samples, Image.open(final / "filters.png") as filters:
        assert samples.size == (10 * 28 * 3, 2 * 28 * 3) and filters.size[0] > 100
    assert main(["info", str(run)]) == 0 and "point, 16 channels, f28" in capsys.readouterr().out


def test_it_can_be_measured_and_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", "digits", "--size", "28", "--limit", "8", "--no-speed", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["compare", f"a:{run}", f"b:{run / 'best'}", *argv]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())["evaluations"][0]["figures"]
    assert figures["psnr"]["value"] > 5 and figures["psnr"]["n"] == 8 and figures["bits_per_pixel"]["value"] > 0
    capsys.readouterr()


def test_resumed_is_uninterrupted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "gaussian", *SMALL, "--save-every", "2", "--out", str(out)]) == 0
    (out / "final").rename(out / "whole")
    assert main(["train", "--resume", str(out / "step-2")]) == 0
    ours, theirs = (load_file(out / name / "model.safetensors") for name in ("final", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main(["train", "--resume", str(out), "--steps", "5", "--epochs", "2"]) == 0, "longer"
    assert json.loads((out / "final" / "config.json").read_text())["training"]["step"] == 5
    assert main(["train", "--resume", str(out), "--steps", "5", "--batch-size", "16", "--epochs", "2"]) == 0, "done"
    assert main(["train", "--resume", str(out), "--latent-dim", "8"]) == 2
    assert "goes on with the model" in capsys.readouterr().err


def test_the_pages_commands_and_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks((ROOT / "docs" / "gaussian.md").read_text(encoding="utf-8"))
    for line in [line for block in found if block.language == "bash" for line in bash_lines(block.code)]:
        words = line.split()
        if words[0] == "omnilatent":
            short = ["--steps", "2", "--batch-size", "4", "--workers", "0"] if words[1] == "train" else [
                "--limit", "2", "--no-health", "--no-speed"]
            assert main([*words[1:], *short]) == 0, line
    (code,) = [block.code for block in found if block.language == "python"]
    names: dict = {}
    exec(code, names)
    assert names["latent"].shape == (2, 32) and names["layer"].kernel().shape == (32, 16, 5, 5)


def test_epochs_say_how_long(tmp_path: Path) -> None:
    config = recipes.gaussian()
    assert config.epochs == 5 and config.steps(20_000) == 1563 and config.steps(100) == 8
    assert replace(config, run=replace(config.run, steps=7)).steps(20_000) == 7
    small = Digits(np.zeros((9, 28, 28), np.uint8), None, "nine")
    task = GaussianTask(config, small, subset(small, range(2)), lambda *_: None)
    assert task.config.run.steps == 1 and "9 images (nine)" in str(task)
    task = GaussianTask(config, small, None, lambda *_: None)
    assert len(task.images.source) + len(task.validation) == 9, "without test images a share is held out"


def test_the_twin_and_a_fine_tuned_half(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gaussian", *SMALL, "--plain", "--out", str(tmp_path / "twin")]) == 0
    twin = omnilatent.load(tmp_path / "twin")
    assert isinstance(twin.module.encoder[0], torch.nn.Conv2d)
    assert "(plain)" in (tmp_path / "twin" / "final" / "README.md").read_text()
    argv = [*SMALL, "--init", str(run), "--freeze", "encoder", "--out", str(tmp_path / "tuned")]
    assert main(["train", "gaussian", *argv]) == 0
    before, after = omnilatent.load(run).module.state_dict(), omnilatent.load(tmp_path / "tuned").module.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    assert main(["train", "gaussian", *SMALL, "--init", "kl-f8-small", "--out", str(tmp_path / "no")]) == 2
    assert "trains a GaussianAutoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "sentence"), [
    (["--data", "nowhere"], "nowhere does not exist"), (["--optimizer", "muon"], "take adamw"),
    (["--batch-size", "3", "--accumulate", "2"], "does not split"),
])
def test_bad_input_gets_one_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "gaussian", *SMALL, *options, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(("values", "sentence"), [
    ({"widths": ()}, "--widths names 0 levels; possible are 1 to 3"), ({"widths": (4, 0)}, "--widths has 0"),
    ({"decoder_widths": (4,) * 4}, "--decoder-widths names 4"), ({"latent_dim": 0}, "--latent-dim is 0")])
def test_impossible_models_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianConfig(**values)


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "final" / "config.json").read_text())
    for change, sentence in (({"latent_dim": 8}, "of shape"), ({"widths": []}, "does not describe a model of the ki")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model": config["model"] | change}))
        (tmp_path / "model.safetensors").write_bytes((run / "final" / "model.safetensors").read_bytes())
        with pytest.raises(omnilatent.UserError, match=sentence):
            omnilatent.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(omnilatent.UserError, match="model.safetensors is missing"):
        omnilatent.load(tmp_path)
