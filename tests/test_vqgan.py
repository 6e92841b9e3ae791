"""Tokenizers: every quantizer trains, is saved, resumed, fine-tuned, packed to bits and measured, its codebook counted."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import omnilatent
from omnilatent import hub
from omnilatent.autoencoders import recipes, recipes_vqgan
from omnilatent.autoencoders.task import AutoencoderTask
from omnilatent.autoencoders.vqgan import VQGANAutoencoder, VQGANCodec, build_vae, latent_spec
from omnilatent.autoencoders.vqgan_config import MODELS, FSQModel, LGQModel, VQGANTraining
from omnilatent.cli.main import main
from omnilatent.cli.parse import parse
from omnilatent.cli.train import TrainOptions
from omnilatent.codec import Provenance
from omnilatent.data import EvaluationImages, open_images
from omnilatent.errors import UserError
from omnilatent.latent import Codes, LatentSpec
from omnilatent.metrics.protocol import evaluate
from omnilatent.quantizers.config import FSQConfig
from omnilatent.store import LatentStore
from omnilatent.training.config import from_json
from omnilatent.training.loop import launch_fabric
from omnilatent.training.muon import is_matrix

KINDS = ("lgq", "simvq", "vq", "fsq")
RECIPES = [name for name, place in hub.RECIPES.items() if "recipes_vqgan" in place]
TOY = shlex.split("--data photos --val photos --batch-size 4 --size 32 --workers 0 --validation-images 4 --widths 8 8 "
                  "--layers 1 --norm-groups 4 --codes 64 --warmup 0 --log-every 1 --device cpu")
LOSSES = {"lgq": {"energy", "peak", "usage", "temperature"}, "simvq": {"codebook", "commitment"}, "vq": {"commitment"},
          "fsq": set()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and a run of three steps of each kind, vq with 4 codebooks."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "photos").mkdir()
    for i in range(4):
        coarse = np.random.default_rng(i).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in KINDS:
            books = ["--codebooks", "4"] if kind == "vq" else []
            assert main(["train", f"{kind}-small", *TOY, "--steps", "3", "--out", kind, *books]) == 0
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def codec_of(kind: str, **more: object) -> VQGANCodec:
    torch.manual_seed(0)
    config = MODELS[kind](**{"widths": (8, 8), "layers": 1, "norm_groups": 4, "codebook_size": 64, **more})
    spec = replace(latent_spec(config), shift=(0.013,), scale=(2.34,))
    return VQGANCodec(build_vae(config), spec, Provenance(kind, "vqgan"))


def refusal(argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(argv)) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return " ".join((output.out + output.err).replace("│", " ").split())


# -- recipes and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_states_itself_and_keeps_its_budget(name: str) -> None:
    recipe = getattr(import_module("omnilatent.autoencoders.recipes_vqgan"), hub.RECIPES[name].split(":")[1])
    config = recipe()
    assert config.recipe == name and f"omnilatent train {name}" in recipe.__doc__
    assert from_json(type(config), json.loads(json.dumps(asdict(config)))) == config
    if name.endswith("-small"):
        codec = VQGANCodec(build_vae(config.model), latent_spec(config.model), Provenance(name, "vqgan"))
        assert codec.parameter_count() <= 3_500_000 and codec.spec.bits_per_pixel() == 13 / 8**2
        alike = replace(config, recipe="", model=recipes_vqgan.lgq_small().model)
        assert asdict(alike) == asdict(replace(recipes_vqgan.lgq_small(), recipe=""))  # the quantizer alone differs
    elif name != "debug-lgq":
        assert config.model.backbone().widths == recipes.kl_f8().model.widths and config.loss.disc_ramp > 0
        assert config.optimizer.betas == (0.5, 0.9) and config.loss.perceptual == "lpips"


def test_the_seeds_flags_reach_their_fields() -> None:
    argv = shlex.split("--data synthetic --codes 512 --codebooks 4 --lr 2e-4 --tau-end 0.2 --dead-codes prune")
    config = parse(TrainOptions[type(recipes_vqgan.lgq())], "train lgq", argv, TrainOptions(recipes_vqgan.lgq())).config
    assert (config.model.codes, config.model.books, config.optimizer.lr) == (512, 4, 2e-4)
    assert (config.model.quantizer.tau_end, config.model.quantizer.dead_codes) == (0.2, "prune")
    for recipe in (recipes_vqgan.fsq(), recipes_vqgan.fsq_small()):  # a recipe's usual size contradicts no levels
        argv = shlex.split("--data synthetic --levels 8 6 5")
        model = parse(TrainOptions[type(recipe)], "train fsq", argv, TrainOptions(recipe)).config.model
        assert model.codes == 240 and model.description == "fsq, 240 codes (8 × 6 × 5)"


def test_a_wished_size_becomes_the_nearest_product_and_is_said() -> None:
    model = FSQModel(codebook_size=16384, num_codebooks=2)
    assert model.description == "fsq, 2 codebooks of 16128 codes (8 × 8 × 7 × 6 × 6, the nearest below 16384)"
    assert build_vae(FSQModel(widths=(8,), norm_groups=4, codebook_size=300)).quantizer.codebook_size == 294


@pytest.mark.parametrize(("options", "sentence"), [
    ("lgq --codes 1", "--codes is 1; possible are 2 to 262144"),
    ("vq --codes 262145", "--codes is 262145; possible are 2 to 262144"),
    ("simvq --codebooks 17", "--codebooks is 17; possible are 1 to 16"),
    ("lgq --codebooks 3", "--latent-channels 8 does not split into --codebooks 3 of equal width"),
    ("vq --codebooks 2 --residual-stages 2", "--codebooks 2 and --residual-stages 2 do not go together"),
    ("fsq --residual-stages 2", "--residual-stages 2 must be 1"),
    ("fsq --levels 8 1", "--levels is 8 1; there is at least one, and each is at least 2"),
    ("fsq --levels 8 5 5 5 --codes 512", "--levels 8 5 5 5 make 1000 codes; --codes is 512"),
    ("lgq --kl-weight 1", "--kl-weight is 1, but a tokenizer has no posterior"),
    ("lgq --size 100", "--size 100 is not a multiple of the model's downsampling 8"),
    ("lgq --size 16 --widths 32 32", "--size 16 is too small for --disc-layers 3, which needs 24 pixels"),
])
def test_impossible_options_are_one_sentence(options: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refusal(f"train {options} --data synthetic", capsys)


def test_options_are_refused_before_torch_is_imported() -> None:
    code = ("import sys; from omnilatent.cli.main import main; "
            "assert main('train lgq --data synthetic --codes 1'.split()) == 2; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 8, 8, 8), (8, 8, 8, 8, 8)])
def test_f4_f8_and_f16(widths: tuple[int, ...]) -> None:
    codec = codec_of("lgq", widths=widths, num_codebooks=2)
    f = codec.spec.downsampling
    assert f == 2 ** (len(widths) - 1) and codec.spec.bits_per_pixel() == 2 * 6 / f**2
    latent = codec.encode(torch.rand(1, 3, 37, 29))
    assert latent.indices.shape == (1, 2, *codec.spec.grid((37, 29)))
    assert codec.decode(latent).shape == (1, 3, 37, 29)
    assert codec.reconstruct(torch.rand(1, 3, 1, 1)).shape == (1, 3, 1, 1)  # padded by its own pixel


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_the_codebook_counts(kind: str) -> None:
    """Whether it is learned, a moving average, frozen, or a grid that needs none."""
    small, large = (codec_of(kind, codebook_size=size) for size in (64, 256))
    third_scalar = 8 + 1 + 8  # of fsq's linear layers into and out of 8 · 8 = 64 and 7 · 6 · 6 = 252 codes
    grown = third_scalar if kind == "fsq" else (256 - 64) * 8
    assert large.parameter_count() - small.parameter_count() == grown
    figures, _ = evaluate(large, EvaluationImages(open_images("synthetic"), 32, 1), metrics=["parameters", "weights_mb"],
                          health=False, speed=False)
    assert figures.figures["parameters"].value == large.parameter_count() == figures.figures["weights_mb"].value * 1e6 / 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_that_trains_is_the_codec_that_is_used(kind: str) -> None:
    codec = codec_of(kind, num_codebooks=2)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        out = VQGANAutoencoder(codec.module).eval()(images * 2 - 1)
    latent = codec.encode(images)
    torch.testing.assert_close(codec.spec.denormalise(latent.mode()), out.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latent), (out.images / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert out.losses == {} and out.logvar is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_alone_decode_to_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    codec = codec_of(kind, num_codebooks=4).to(dtype=dtype)
    latent = codec.encode(torch.rand(3, 3, 24, 16))
    again = codec.lookup(latent.indices)
    assert torch.equal(again, latent.quantized)
    assert torch.equal(codec.decode(again), codec.decode(latent))


def test_an_overflow_is_not_hidden_by_the_nearest_code() -> None:
    codec = codec_of("vq").to(dtype=torch.float16)
    assert codec.encode(torch.rand(1, 3, 8, 8)).mode().isfinite().all() and codec.dtype == torch.float16
    codec.module.encoder.conv_in.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="vq gives infinite values or NaN in float16 and in float32: check its weights"):
        codec.encode(torch.rand(1, 3, 8, 8))


def test_tiles_give_the_codes_of_the_whole_image() -> None:
    codec = codec_of("vq", widths=(8, 8, 8))
    images = torch.rand(1, 3, 100, 70)
    whole, codec.tile = codec.encode(images), 16
    tiled = codec.encode(images)
    assert (tiled.indices == whole.indices).float().mean() > 0.99  # rounding decides between two codes as near
    torch.testing.assert_close(codec.decode(whole), codec_of("vq", widths=(8, 8, 8)).decode(whole), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at it
def test_the_compiler_leaves_the_quantizer_alone() -> None:
    model = VQGANAutoencoder(codec_of("lgq").module.requires_grad_(True)).train()
    model.before_compile()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(torch.rand(2, 3, 8, 8))
    assert explained.graph_break_count == 1 and "_quantize" in str(explained.break_reasons[0])


def test_no_optimizer_makes_a_stack_of_codebooks_orthogonal() -> None:
    quantizer = codec_of("lgq", latent_channels=64, num_codebooks=16).module.quantizer
    assert quantizer.codebook.shape == (16, 64, 4) and not is_matrix(quantizer.codebook)


def test_a_spec_of_before_there_were_several_books_is_read_and_written_as_it_was() -> None:
    spec = LatentSpec(8, 8, "codes", codebook_size=1024)
    assert "num_codebooks" not in spec.to_json() and LatentSpec.from_json(spec.to_json()) == spec
    several = replace(spec, num_codebooks=4)
    assert LatentSpec.from_json(several.to_json()) == several and several.bits_per_pixel() == 40 / 64


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_is_what_it_was_measured_as(kind: str, here: Path) -> None:
    drawn = torch.get_rng_state()
    codec = omnilatent.load(kind)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert isinstance(codec, VQGANCodec) and codec.spec.num_codebooks == (4 if kind == "vq" else 1)
    rows = [json.loads(line) for line in Path(kind, "log.jsonl").read_text().splitlines()]
    learned, validated = rows[0], rows[-1]
    assert LOSSES[kind] <= learned.keys() and learned["loss"] == pytest.approx(
        learned["pixel"] + sum(learned[name] for name in LOSSES[kind] - {"temperature"}), rel=1e-5)
    figures, _ = evaluate(codec, EvaluationImages(open_images("photos"), 32, 4), metrics=["psnr", "codes_used", "perplexity"],
                          health=False, speed=False)
    for name, figure in figures.figures.items():
        assert figure.value == pytest.approx(validated[name], rel=1e-4), name
    assert torch.equal(omnilatent.load(f"{kind}/best").reconstruct(torch.ones(1, 3, 9, 7)),
                       codec.reconstruct(torch.ones(1, 3, 9, 7)))
    z = torch.cat([codec.encode(images).mode() for _, images in EvaluationImages(open_images("photos"), 32, 4).batches(4)])
    assert abs(z.mean()) < 0.5 and 0.5 < z.std() < 2  # the normalisation was measured


def test_the_temperature_follows_the_position_alone(here: Path) -> None:
    rows = [json.loads(line) for line in Path("lgq/log.jsonl").read_text().splitlines()]
    seen = [row["temperature"] for row in rows if row["part"] == "train"]
    assert seen == pytest.approx([0.1 + 0.9 * (1 + np.cos(np.pi * step / 3)) / 2 for step in range(3)])


def task_of(config: VQGANTraining, **more: object) -> AutoencoderTask:
    task = AutoencoderTask(config, "synthetic", "synthetic", lambda file, reason: None, **more)
    torch.manual_seed(0)
    task.setup(launch_fabric(config.run))
    return task


def debug(**changes: object) -> VQGANTraining:
    base = recipes_vqgan.debug_lgq()
    return replace(base, run=replace(base.run, device="cpu"), **changes)


def test_the_loss_falls() -> None:
    config = debug(loss=replace(debug().loss, adversarial_weight=0.0), optimizer=replace(debug().optimizer, lr=4e-3, warmup=0))
    task = task_of(replace(config, run=replace(config.run, steps=60)))
    batch = next(task.batches(0, 1))
    losses = [float(task.step(batch, position)["loss"]) for position in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_averaged_codes_are_the_codebook_that_was_trained() -> None:
    """VQ's codes are moving averages already: what is saved holds the newest, under the averaged encoder."""
    task = task_of(debug(model=MODELS["vq"](widths=(8, 8), layers=1, norm_groups=4, latent_channels=4, codebook_size=32)))
    for position, batch in enumerate(task.batches(0, 3)):
        task.step(batch, position)
    ours, kept = task.bare.vae, task.ema.average.vae
    for name in ("codebook", "sums", "counts", "clock"):
        assert torch.equal(getattr(ours.quantizer, name), getattr(kept.quantizer, name)), name
    assert not torch.equal(ours.encoder.conv_in.weight, kept.encoder.conv_in.weight)


def test_the_discriminators_opinion_grows_along_its_ramp() -> None:
    task = AutoencoderTask(debug(), "synthetic", "synthetic", lambda file, reason: None)
    assert [task._adversarial_strength(position) for position in range(2, 10)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_parts_of_a_batch_see_the_weight_of_the_whole_and_teach_the_codebook_once_each() -> None:
    config = debug(loss=replace(debug().loss, disc_start_step=0))
    task = task_of(replace(config, run=replace(config.run, accumulate=2)))
    logged = task.step(next(task.batches(0, 1)), 0)
    assert {"adaptive_weight", "energy", "temperature"} <= logged.keys()
    assert task.bare.vae.quantizer.clock.tolist()[1] == 2  # the pass that weighs the whole batch teaches nothing


@pytest.mark.parametrize("kind", ["lgq", "vq"])
def test_a_resumed_run_ends_bit_equal(kind: str, here: Path, tmp_path: Path) -> None:
    options = [*TOY, "--steps", "6", "--save-every", "3", "--renew-every", "2", "--adversarial-weight", "0.1",
               "--disc-start-step", "2", "--disc-ramp", "3", "--disc-width", "8", "--disc-layers", "2"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(["train", f"{kind}-small", *options, "--out", str(whole)]) == 0
    shutil.copytree(whole, again)
    saved = json.loads((again / "run.json").read_text())
    saved["options"]["out"] = str(again)
    (again / "run.json").write_text(json.dumps(saved))
    shutil.rmtree(again / "final")
    assert main(["train", "--resume", str(again / "step-3")]) == 0
    states = [torch.load(run / "final" / "state.pt", weights_only=True)["task"] for run in (whole, again)]
    for part in ("model", "ema", "disc"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), f"{part} {name}"
    assert any("quantizer" in name for name in states[0]["model"])


@pytest.mark.parametrize(("kind", "half"), [("lgq", "encoder"), ("vq", "encoder"), ("vq", "decoder")])
def test_a_frozen_half_keeps_every_bit(kind: str, half: str, here: Path, tmp_path: Path) -> None:
    options = [*TOY, "--steps", "2", "--renew-every", "1", "--init", kind, "--freeze", half]
    assert main(["train", f"{kind}-small", *options, "--out", str(tmp_path / "tuned")]) == 0
    before, after = (load_file(run / "final" / "model.safetensors") for run in (Path(kind), tmp_path / "tuned"))
    kept = ("encoder", "quant_conv", "quantizer") if half == "encoder" else ("decoder", "post_quant_conv")
    for name, tensor in before.items():
        if name.startswith(kept):
            assert torch.equal(tensor, after[name]), name
    assert sum(not torch.equal(tensor, after[name]) for name, tensor in before.items()) > 10
    specs = [omnilatent.load(run).spec for run in (kind, tmp_path / "tuned")]
    assert half == "decoder" or specs[0] == specs[1]


def test_init_of_another_kind_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = shlex.join(TOY)
    assert "this tokenizer has --codes 64, and --codes 32 was asked for" in refusal(
        f"train lgq-small {toy} --init lgq --codes 32 --out no", capsys)
    assert "this tokenizer has --codebooks 1, and --codebooks 2 was asked for" in refusal(
        f"train lgq-small {toy} --init lgq --codebooks 2 --out no", capsys)
    assert "this tokenizer's quantizer is lgq, and the recipe trains vq: take the recipe lgq" in refusal(
        f"train vq-small {toy} --init lgq --out no", capsys)
    assert "lgq holds a model of the class VQGAN, but the recipe kl-f8-small trains one of the class AutoencoderKL" in refusal(
        f"train kl-f8-small --data photos --init lgq --size 32 --out no", capsys)


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "books"), [("lgq", 1), ("vq", 4)])
def test_a_store_holds_bits_and_gives_the_same_pictures(
    kind: str, books: int, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--workers", "0", "--device", "cpu", "--batch-size", "4"]
    assert main(["encode", kind, "photos", "--out", f"{tmp_path}/store", "--size", "32", *options]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "store" / "shards").iterdir())
    assert f"{size * 8 / (4 * 32 * 32):.3f} bits a pixel" in " ".join(capsys.readouterr().out.split())
    (packed,) = load_file(tmp_path / "store" / "shards" / "00000.safetensors").values()
    assert packed.dtype == torch.uint8 and packed.shape == (4, 16 * 16 * books * 6 // 8)
    codec, store = omnilatent.load(kind), LatentStore(tmp_path / "store")
    assert store.spec == codec.spec and not any(name.startswith("/") for name in store.keys)
    assert main(["decode", f"{tmp_path}/store", "--out", f"{tmp_path}/pictures", "--device", "cpu", "--batch-size", "4"]) == 0
    ((names, images),) = EvaluationImages(open_images("photos"), 32, 4).batches(4)
    latent = codec.encode(images)
    assert isinstance(latent, Codes) and latent.indices.shape[1:] == ((16, 16) if books == 1 else (4, 16, 16))
    expected = (codec.decode(latent) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for name, picture in zip(names, expected, strict=True):
        (file,) = (tmp_path / "pictures").glob(f"{Path(name).stem}*")
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), picture)


def test_compare_shows_codebooks_where_there_are_some(here: Path, tmp_path: Path) -> None:
    assert main(["compare", "lgq:lgq", "four:vq", "pixels", "--data", "photos", "--size", "32", "--no-health", "--no-speed",
                 "--device", "cpu", "--out", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "report.json").read_text())["evaluations"]
    lgq, four, pixels = (row["figures"] for row in measured)
    assert lgq["bits_per_pixel"]["value"] == 6 / 4 and lgq["compression"]["value"] == 16
    assert four["bits_per_pixel"]["value"] == 4 * 6 / 4 and four["compression"]["value"] == 4
    assert 0 < lgq["active_ratio"]["value"] == lgq["codes_used"]["value"] / 64 <= 1
    assert not {"active_ratio", "codes_used", "perplexity"} & pixels.keys()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Active ratio", "Perplexity", "Code entropy", "Bits per pixel", "Compression"):
        assert heading in page


def test_export_to_diffusers_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "lgq cannot be exported: diffusers has no class for a tokenizer with the quantizer lgq" in refusal(
        "export lgq --to diffusers --out no", capsys)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 64])
def test_codes_outside_the_codebook_are_refused(wrong: int) -> None:
    codec = codec_of("vq")
    indices = torch.zeros(1, 4, 4, dtype=torch.int64)
    indices[0, 1, 2] = wrong
    with pytest.raises(UserError, match=f"vq has the codes 0 to 63, and the indices hold {wrong}: decode them with"):
        codec.lookup(indices)
    with pytest.raises(ValueError, match="codes are integers; got torch.float32"):
        codec.lookup(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="codes of 1 codebook.s. have 2 axes, or 3 as maps; got 4"):
        codec.lookup(torch.zeros(1, 2, 4, 4, dtype=torch.int64))


def test_a_store_with_codes_that_do_not_exist_is_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word if word != "64" else "48" for word in TOY]
    assert main(["train", "simvq-small", *options, "--steps", "1", "--out", f"{tmp_path}/run"]) == 0
    assert main(shlex.split(f"encode {tmp_path}/run photos --out {tmp_path}/store --size 32 --workers 0 --device cpu")) == 0
    shard = tmp_path / "store" / "shards" / "00000.safetensors"
    save_file({name: torch.full_like(tensor, 255) for name, tensor in load_file(shard).items()}, shard)
    said = refusal(f"decode {tmp_path}/store --out {tmp_path}/pictures --device cpu", capsys)
    assert "has the codes 0 to 47, and the indices hold 63: decode them with the tokenizer that made them" in said


def test_damaged_checkpoints_are_one_sentence(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("vq/final", tmp_path / "vq")
    config = json.loads((tmp_path / "vq" / "config.json").read_text())

    def said(**model: object) -> str:
        changed = {**config, "model": {**config["model"], **model}}
        (tmp_path / "vq" / "config.json").write_text(json.dumps(changed))
        return refusal(f"info {tmp_path}/vq", capsys)

    assert "holds quantizer.codebook of shape (4, 64, 2), but its VQGAN needs (4, 128, 2)" in said(codebook_size=128)
    assert "does not describe a model of the kind vqgan (--codes is 1; possible are 2 to 262144)" in said(codebook_size=1)
    assert "does not describe a model of the kind vqgan ('pq')" in said(kind="pq")
    (tmp_path / "vq" / "config.json").unlink()
    assert refusal(f"info {tmp_path}/vq", capsys) == (
        f"omnilatent: {tmp_path}/vq has weights but no config.json, which says what they are: restore it, or take another "
        "checkpoint of its run.")


def test_losses_of_a_continuous_latent_are_refused() -> None:
    base = recipes_vqgan.lgq_small()
    with pytest.raises(ValueError, match="are terms of a continuous latent; leave them at 0 for a tokenizer"):
        replace(base, loss=replace(base.loss, spectrum_weight=1.0))
    assert LGQModel().variational is False and FSQModel(quantizer=FSQConfig(levels=(8, 5, 5, 5))).codes == 1000
