"""The tiny autoencoder, and what every trainable autoencoder promises: parity, gradients, freezing, --init."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnilatent
from omnilatent import hub
from omnilatent.autoencoders import kl, recipes, tiny
from omnilatent.autoencoders.config import AutoencoderTraining, KLConfig, LossConfig, TinyConfig, TinyTraining
from omnilatent.autoencoders.task import ARCHITECTURES, AutoencoderTask
from omnilatent.autoencoders.tiny import TinyAutoencoder, TinyCodec, build_vae, config_of
from omnilatent.cli.main import main
from omnilatent.errors import UserError
from omnilatent.codec import Provenance
from omnilatent.latent import LatentSpec, Point
from omnilatent.losses.adversarial import last_layer_gradient
from omnilatent.training.config import from_json
from omnilatent.training.loop import launch_fabric

SMALL = TinyConfig(latent_channels=3, encoder_width=8, decoder_width=12, encoder_blocks=(1, 2), decoder_blocks=(2, 1))
SMALL_KL = KLConfig(widths=(8, 16), layers=1, latent_channels=3, norm_groups=4, attention=(2,))
SPEC = LatentSpec(3, 2, kind="point", shift=(0.25,), scale=(1.5,))
MODELS: dict[str, KLConfig | TinyConfig] = {"kl": SMALL_KL, "tiny": SMALL}


def vae_of(config: KLConfig | TinyConfig, spec: LatentSpec | None = None) -> Any:
    torch.manual_seed(0)
    vae = ARCHITECTURES[type(config)].build_vae(config, spec).eval()
    if isinstance(config, TinyConfig):  # fresh latents are almost 0: bring them to where the decoder bends them
        torch.nn.init.normal_(vae.encoder.layers[-1].weight, std=5.0)
    return vae


@pytest.fixture
def codec() -> TinyCodec:
    return TinyCodec(vae_of(SMALL, SPEC), SPEC, Provenance("small", "tiny"))


# -- the model ---------------------------------------------------------------------------------------------------


def test_tiny_f8_is_taesd() -> None:
    from diffusers import AutoencoderTiny

    config = recipes.tiny_f8()
    with torch.device("meta"):
        ours, theirs = build_vae(config.model), AutoencoderTiny()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 2_445_063 <= 3_500_000
    assert config.model.downsampling == 8 and config_of(theirs) == config.model
    assert config.recipe == "tiny-f8" and "omnilatent train tiny-f8" in (recipes.tiny_f8.__doc__ or "")
    assert hub.RECIPES["tiny-f8"].endswith(":tiny_f8") and config.loss.kl_weight == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_forward_is_diffusers(checkpointing: bool) -> None:
    vae = vae_of(SMALL)
    model = TinyAutoencoder(vae, checkpointing).train()
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    out = model(images)
    z = vae.encode(images).latents
    assert z.abs().max() > 3  # the decoder's bend is in the comparison
    torch.testing.assert_close(out.mean, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.images, vae.decode(z).sample, atol=1e-5, rtol=0)
    assert out.logvar is None


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    config = MODELS[name]
    images, found = torch.rand(2, 3, 8, 8) * 2 - 1, []
    for checkpointing in (False, True):
        model = ARCHITECTURES[type(config)].module(vae_of(config), checkpointing).train()
        model(images, None).images.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", MODELS)
def test_the_adaptive_weight_sees_the_gradient_of_the_last_layer(name: str) -> None:
    """`output_gain` · the closed form equals what autograd says, so the range of the last layer is accounted for."""
    config = MODELS[name]
    model = ARCHITECTURES[type(config)].module(vae_of(config), False)
    out = model(torch.rand(2, 3, 8, 8) * 2 - 1, None, features=True)
    toward = torch.randn_like(out.images)
    (expected,) = torch.autograd.grad((out.images * toward).sum(), model.last_layer)
    found = model.output_gain * last_layer_gradient(out.features, model.last_layer.shape, toward)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- the codec ---------------------------------------------------------------------------------------------------


def test_the_codec_is_diffusers_with_the_normalisation(codec: TinyCodec) -> None:
    images = torch.rand(2, 3, 16, 12)
    z = codec.module.encode(images * 2 - 1).latents
    latent = codec.encode(images)
    assert isinstance(latent, Point)
    torch.testing.assert_close(latent.mode(), (z - 0.25) * 1.5, atol=1e-5, rtol=0)
    expected = (codec.module.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latent), expected, atol=1e-5, rtol=0)


def checkpoint(folder: Path, codec: Any, config: KLConfig | TinyConfig) -> Path:
    with hub.new_folder(folder) as temporary:
        kind = ARCHITECTURES[type(config)].kind
        hub.write_model(temporary, kind, asdict(config), codec.spec, codec.module.state_dict(), "card")
    return folder


def test_a_checkpoint_opens_here_and_in_plain_diffusers(codec: TinyCodec, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    again = hub.load(checkpoint(tmp_path / "ours", codec, SMALL))
    images = torch.rand(1, 3, 9, 21)
    assert isinstance(again, TinyCodec) and torch.equal(again.reconstruct(images), codec.reconstruct(images))
    again.to_diffusers().save_pretrained(tmp_path / "theirs")
    plain = AutoencoderTiny.from_pretrained(tmp_path / "theirs")
    assert (plain.config.scaling_factor, plain.config.shift_factor) == (1.5, 0.25)
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        z = plain.encode(images * 2 - 1).latents
        assert torch.equal(plain.decode(z).sample, codec.module.decode(z).sample)
    torch.testing.assert_close(codec.encode(images).mode(), (z - 0.25) * 1.5)
    assert torch.equal(hub.load(tmp_path / "theirs").reconstruct(images), codec.reconstruct(images))


def test_half_precision_weights_open(codec: TinyCodec, tmp_path: Path) -> None:
    codec.to(dtype=torch.float16)
    again = hub.load(checkpoint(tmp_path / "half", codec, SMALL))
    assert again.dtype == torch.float32
    assert torch.equal(again.module.encoder.layers[0].weight, codec.module.encoder.layers[0].weight.float())


def test_a_normalisation_a_channel_cannot_go_to_diffusers() -> None:
    spec = LatentSpec(3, 2, kind="point", scale=(1.0, 2.0, 3.0))
    with pytest.raises(UserError, match="normalised a channel, which diffusers' AutoencoderTiny cannot state"):
        TinyCodec(vae_of(SMALL), spec, Provenance("small", "tiny")).to_diffusers()


@pytest.mark.parametrize("size", [(37, 53), (1, 1), (40, 24)])
def test_any_size_comes_back(codec: TinyCodec, size: tuple[int, int]) -> None:
    latent = codec.encode(torch.rand(1, 3, *size))
    assert latent.mode().shape[-2:] == codec.spec.grid(size) and codec.decode(latent).shape[-2:] == size


ONE_PIXEL = {
    "kl-f8-small": recipes.kl_f8_small().model,
    "kl-f8, narrow": KLConfig(widths=(8, 16, 32, 32), norm_groups=4),
    "as many groups as channels": KLConfig(widths=(8, 8), layers=1, norm_groups=8),
    "tiny-f8": recipes.tiny_f8().model,
}


@pytest.mark.parametrize("name", ONE_PIXEL)
def test_one_pixel_passes_every_layout(name: str) -> None:
    """A 1×1 latent of one image: torch's group_norm refuses groups of a single value."""
    config = ONE_PIXEL[name]
    row = ARCHITECTURES[type(config)]
    spec = LatentSpec(config.latent_channels, config.downsampling, "gaussian" if config.variational else "point")
    codec = row.codec(row.build_vae(config, spec), spec, Provenance(name, row.kind))
    image = torch.rand(1, 3, 1, 1)
    latent = codec.encode(image)
    assert latent.mode().shape == (1, config.latent_channels, 1, 1)
    alone, paired = codec.decode(latent), codec.reconstruct(torch.cat([image, torch.rand(1, 3, 1, 1)]))[:1]
    assert alone.shape == (1, 3, 1, 1)
    torch.testing.assert_close(alone, paired, atol=1e-5, rtol=0)


# -- configurations ----------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: TinyConfig(latent_channels=0), "--latent-channels is 0; possible are 1 to 64"),
    (lambda: TinyConfig(encoder_width=0), "--encoder-width has 0; the least is 1"),
    (lambda: TinyConfig(decoder_blocks=(3, 3, 0, 1)), "--decoder-blocks has 0; the least is 1"),
    (lambda: TinyConfig(encoder_blocks=()), "--encoder-blocks names no level; give the blocks of at least one"),
    (lambda: TinyConfig(encoder_blocks=(1, 3)),
     "--encoder-blocks has 2 levels and --decoder-blocks 4; images keep their size only with as many in both"),
    (lambda: TinyTraining("tiny-f8", loss=LossConfig()),
     "--kl-weight is 1e-06, but a tiny autoencoder has no posterior; leave it at 0"),
    (lambda: KLConfig(widths=()), "--widths names no level; give the channels of at least one"),
    (lambda: KLConfig(widths=(32, 33)), "--widths holds 33, which is no positive multiple of --norm-groups 32"),
    (lambda: KLConfig(norm_groups=0), "--norm-groups has 0; the least is 1"),
    (lambda: KLConfig(layers=0), "--layers has 0; the least is 1"),
]


@pytest.mark.parametrize(("build", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_impossible_configurations_are_refused(build: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        build()
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("recipe", [recipes.kl_f8, recipes.ae_f8_small, recipes.tiny_f8, recipes.debug])
def test_a_saved_configuration_comes_back(recipe: Callable[[], AutoencoderTraining]) -> None:
    config = recipe()
    assert from_json(type(config), json.loads(json.dumps(asdict(config)))) == config


def test_help_shows_its_own_models_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny-f8", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--encoder-blocks" in shown and "--decoder-width" in shown
    assert not any(option in shown for option in ("--widths", "--norm-groups", "--attention", "variational"))


# -- training ----------------------------------------------------------------------------------------------------


def ready(model: KLConfig | TinyConfig, init: Path | None = None, freeze: str | None = None, accumulate: int = 1,
          clip: float = 1.0, loss: LossConfig | None = None) -> AutoencoderTask:
    """A task after `setup`, on 16² crops of patterns, without a discriminator."""
    base = recipes.debug() if isinstance(model, KLConfig) else recipes.tiny_f8()
    loss = loss or replace(base.loss, l2=1.0, adversarial_weight=0.0, perceptual="none",
                           kl_weight=1e-3 if isinstance(model, KLConfig) else 0.0)
    config = replace(
        base, model=model, loss=loss, crops=replace(base.crops, size=16, validation_images=2),
        optimizer=replace(base.optimizer, warmup=0, clip=clip),
        run=replace(base.run, batch_size=4, accumulate=accumulate, device="cpu", workers=0, steps=4),
    )
    fabric = launch_fabric(config.run)
    name = None if init is None else str(init)
    task = AutoencoderTask(config, "synthetic", "synthetic", lambda file, reason: None, name, freeze)
    torch.manual_seed(0)
    task.setup(fabric)
    return task


def gradients(task: AutoencoderTask) -> dict[str, Tensor | None]:
    """Of the first step, whose update is left out."""
    found: dict[str, Tensor | None] = {}
    task.optimizer.step = lambda: found.update(
        {name: None if p.grad is None else p.grad.clone() for name, p in task.bare.named_parameters()})
    task.step(next(task.batches(0, 1)), 0)
    return found


def invariant(name: str) -> bool:
    """A bias of attention's keys adds the same to all logits of a softmax, so nothing depends on it."""
    return name.endswith("to_k.bias")


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    task = ready(MODELS[name])
    found = gradients(task)
    optimised = {id(p) for group in task.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in task.bare.parameters()}
    silent = [key for key, g in found.items() if g is None or not g.abs().max() > 1e-9]
    assert [key for key in silent if not invariant(key)] == [] and len(found) > 20


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_parts_give_the_whole_batchs_gradients(name: str) -> None:
    whole, parts = (gradients(ready(MODELS[name], accumulate=n, clip=0.0)) for n in (1, 2))
    largest = max(float(g.abs().max()) for g in whole.values())
    assert largest > 1e-4
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) / largest <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_all_loss_terms_train(name: str) -> None:
    loss = LossConfig(l2=1.0, kl_weight=1e-3 if name == "kl" else 0.0, perceptual="laplacian", adversarial_weight=0.5,
                      disc_start_step=0, disc_width=8, disc_layers=1)
    task = ready(MODELS[name], loss=loss)
    logged = [{k: float(v) for k, v in task.step(batch, step).items()} for step, batch in enumerate(task.batches(0, 3))]
    terms = {"loss", "pixel", "perceptual", "adversarial", "adaptive_weight", "disc_loss", "gradient_norm"}
    assert set(logged[0]) == terms | ({"kl"} if name == "kl" else set())
    assert logged[0]["adaptive_weight"] > 0 and all(map(torch.isfinite, map(torch.tensor, logged[-1].values())))


def source_of(name: str, form: str, folder: Path) -> tuple[Path, Any]:
    """A model to start from, as a checkpoint of ours or a diffusers folder, and its loaded codec."""
    config = MODELS[name]
    row = ARCHITECTURES[type(config)]
    spec = SPEC if name == "tiny" else replace(SPEC, kind="gaussian")
    codec = row.codec(vae_of(config, spec), spec, Provenance(name, row.kind))
    if form == "ours":
        checkpoint(folder / "source", codec, config)
    else:
        codec.to_diffusers().save_pretrained(folder / "source")
    return folder / "source", codec


@pytest.mark.parametrize("form", ["ours", "diffusers"])
@pytest.mark.parametrize("name", MODELS)
def test_init_begins_where_the_source_stands(name: str, form: str, tmp_path: Path) -> None:
    path, source = source_of(name, form, tmp_path)
    elsewhere: dict[str, KLConfig | TinyConfig] = {"kl": KLConfig(widths=(8, 8), layers=1, norm_groups=4),
                                                   "tiny": TinyConfig(encoder_width=4)}
    task = ready(elsewhere[name], init=path)
    assert task.config.model == MODELS[name]  # the source's architecture replaces the recipe's
    images = torch.rand(2, 3, 16, 16)
    latent = source.encode(images)
    out = task.bare.eval()(images * 2 - 1, None)
    torch.testing.assert_close(out.mean, source.spec.denormalise(latent.mode()), atol=1e-5, rtol=0)
    torch.testing.assert_close((out.images / 2 + 0.5).clamp(0, 1), source.decode(latent), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
@pytest.mark.parametrize("name", MODELS)
def test_freezing_keeps_exactly_its_half(name: str, frozen: str, tmp_path: Path) -> None:
    path, source = source_of(name, "ours", tmp_path)
    task = ready(MODELS[name], init=path, freeze=frozen)
    for step, batch in enumerate(task.batches(0, 2)):
        task.step(batch, step)
    with hub.new_folder(tmp_path / "out") as folder:
        task.export(folder, task.validate(), 2)
    before = source.module.state_dict()
    half = ARCHITECTURES[type(MODELS[name])].halves[frozen]
    trained, saved = task.bare.vae.state_dict(), hub.load(tmp_path / "out").module.state_dict()
    for key, tensor in before.items():
        if key.split(".")[0] in half:
            assert torch.equal(trained[key], tensor) and torch.equal(saved[key], tensor), key
        elif not invariant(key):
            assert not torch.equal(trained[key], tensor) and not torch.equal(saved[key], tensor), key
    spec = hub.load(tmp_path / "out").spec
    assert (spec == source.spec) is (frozen == "encoder")
    assert spec.kind == source.spec.kind


def test_init_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path, _ = source_of("kl", "diffusers", tmp_path)
    with pytest.raises(UserError) as refusal:
        ready(SMALL, init=path)
    assert str(refusal.value) == (f"--init {path} holds a model of the class AutoencoderKL, but the recipe tiny-f8 "
                                  "trains one of the class AutoencoderTiny: train it with the recipe kl-f8-small.")
    path, _ = source_of("tiny", "diffusers", tmp_path / "other")
    with pytest.raises(UserError, match="recipe debug trains one of the class AutoencoderKL: train it with the recipe tiny-f8"):
        ready(SMALL_KL, init=path)


@pytest.mark.parametrize("build", [
    lambda: vae_like(tiny, SMALL, act_fn="mish"), lambda: vae_like(tiny, SMALL, in_channels=1),
    lambda: vae_like(kl, SMALL_KL, act_fn="relu"), lambda: vae_like(kl, SMALL_KL, out_channels=4),
])
def test_layers_that_ours_have_not_are_refused(build: Callable[[], tuple[Any, Any]]) -> None:
    module, vae = build()
    with pytest.raises(UserError, match="--init: this Autoencoder.* has .* and we train only .*: choose another model"):
        module.config_of(vae)


def vae_like(module: Any, config: Any, **other: Any) -> tuple[Any, Any]:
    vae = module.build_vae(config)
    added = {"block_out_channels"} if module is tiny else set()  # by AutoencoderTiny to what it was given
    stated = {key: value for key, value in vae.config.items() if not key.startswith("_") and key not in added}
    return module, type(vae)(**{**stated, **other})


def test_a_damaged_configuration_is_named(codec: TinyCodec, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "ours", codec, SMALL)
    config = hub.read_json(folder / "config.json")
    config["model"]["encoder_blocks"] = [1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json does not describe a model of the kind tiny .*restore it from its"):
        hub.load(folder)


# -- the command -------------------------------------------------------------------------------------------------


def test_a_run_resumes_bit_equal_loads_and_states_its_figures(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    options = ("--encoder-width 4 --decoder-width 4 --encoder-blocks 1 1 --decoder-blocks 1 1 --size 16 --steps 4 "
               "--validation-images 2 --save-every 2 --batch-size 2 --workers 0 --device cpu").split()
    assert main(["train", "tiny-f8", "--data", "synthetic", "--out", str(run), *options]) == 0
    shutil.copytree(run, again)
    for part in ("final", "best"):
        shutil.rmtree(again / part)
    shutil.rmtree(again / "step-4", ignore_errors=True)
    assert main(["train", "--resume", str(again)]) == 0
    whole, resumed = omnilatent.load(run), omnilatent.load(again)
    assert isinstance(resumed, TinyCodec) and resumed.provenance.kind == "tiny" and resumed.spec == whole.spec
    for key, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[key]), key
    card = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert "| PSNR | " in card and " dB |" in card and "Licence: not stated. It is yours to state" in card
    assert whole.provenance.licence == "not stated" and f"{whole.parameter_count():,} parameters" in card
    assert whole.reconstruct(torch.rand(1, 3, 7, 9)).shape == (1, 3, 7, 9)
