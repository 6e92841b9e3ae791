"""What ships with the package: the bundled weights are what their card says, and the demo keeps its photos apart."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from omnilatent import hub
from omnilatent.cli.demo import SHOWN_MOST, parts
from omnilatent.cli.main import main
from omnilatent.data import EvaluationImages, demo_photos, open_images
from omnilatent.data.digit_world import open_world
from omnilatent.metrics.digit_readers import read_words
from omnilatent.metrics.pixel import psnr
from omnilatent.metrics.protocol import evaluate
from omnilatent.omni.coherence import recognition
from omnilatent.omni.saving import load

DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.mark.parametrize("name", hub.bundled_names())
def test_bundled_weights_are_small_half_precision_and_have_a_card(name: str) -> None:
    folder = hub.BUNDLED / name
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 7e6
    assert {tensor.dtype for tensor in load_file(weights).values() if tensor.is_floating_point()} == {torch.float16}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license:" in card and "Licence:" in card
    assert re.search(r"Command: `(omnilatent \w+|python benchmarks/\w+\.py) ", card)  # what made it
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["kind"] in {*hub.OPENERS, *hub.OTHERS}


def test_all_bundled_weights_stay_within_twenty_megabytes() -> None:
    assert "kl-f8-small" in hub.bundled_names()
    assert sum(path.stat().st_size for path in hub.BUNDLED.rglob("*") if path.is_file()) <= 20e6


@pytest.mark.parametrize(("name", "channels", "reached"), [("kl-f8-small", 4, 27.45), ("lgq-small", 8, 26.60)])
def test_the_bundled_reach_what_their_cards_say(name: str, channels: int, reached: float) -> None:
    place = DATA / "imagenet-1k-sample" / "val.tar"
    if not place.exists():
        pytest.skip("../shared/data/imagenet-1k-sample is not here")
    codec = hub.load(name)
    assert codec.parameter_count() <= 3_500_000 and codec.spec.channels == channels
    images = EvaluationImages(open_images(str(place)), 256, limit=10)
    measured, _ = evaluate(codec, images, batch_size=5, metrics=("psnr",), health=False, speed=False)
    assert measured.figures["psnr"].n == 10
    assert measured.figures["psnr"].value == pytest.approx(reached, abs=0.01)  # over all 100: 27.02 and 26.21 dB


def test_omni_small_reads_what_its_card_says() -> None:
    if not (DATA / "mnist").exists() or not (DATA / "fsdd").exists():
        pytest.skip("../shared/data/mnist or ../shared/data/fsdd is not here")
    model, test = load("omni-small"), open_world(str(DATA))[1]
    assert sum(p.numel() for p in model.parameters()) == 811_150
    assert recognition(model, test.recordings[::3]) == 1  # 100 of 300, of which the card says 100 %
    samples = [test.sample(i) for i in range(100)]
    written = model.generate("image", torch.stack([s.image for s in samples]), max_len=8)
    digits = read_words([model.tokenizer.decode(row.tolist()) for row in written])
    assert (digits == torch.tensor([s.label for s in samples])).sum() >= 96  # 98.5 % of the first thousand


@pytest.mark.parametrize(("name", "least"), [("kl-f8-small", 32), ("lgq-small", 29)])
def test_a_picture_of_one_texture_keeps_its_contrast(name: str, least: float) -> None:
    bricks = next(image for key, image in EvaluationImages(demo_photos(), 256) if "brick" in key)
    codec = hub.load(name)
    with torch.no_grad():
        found = psnr(codec.decode(codec.encode(bricks[None])), bricks[None])
    assert found.item() > least  # 16.5 and 15.5 dB before the training on textures


def test_lgq_small_gives_the_codes_that_decode_to_its_pictures_and_goes_on_learning(tmp_path: Path) -> None:
    codec, images = hub.load("lgq-small"), torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = codec.encode(images)
        assert codes.indices.shape == (1, 5, 7) and int(codes.indices.max()) < codec.spec.codebook_size == 8192
        assert torch.equal(codec.decode(codec.lookup(codes.indices), size=(40, 56)), codec.decode(codes))
    run = tmp_path / "run"
    assert main(["train", "lgq-small", "--init", "lgq-small", "--data", "photos", "--out", str(run), "--steps", "1", "--size",
                 "32", "--batch-size", "2", "--validation-images", "1", "--workers", "0", "--lr", "1e-5"]) == 0
    before, after = (load_file(place / "model.safetensors") for place in (hub.BUNDLED / "lgq-small", run / "final"))
    assert "quantizer.counts" not in before and after["quantizer.counts"].min() > 0
    assert (after["quantizer.codebook"] - before["quantizer.codebook"].float()).abs().max() < 0.01  # not started anew


def test_the_demo_measures_on_photos_that_it_did_not_train_on(tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    for source, held in ((demo_photos(), 4), (open_images(str(tmp_path)), 3)):
        training, held_out = parts(source)
        keys = [{part.key(i) for i in range(len(part))} for part in (training, held_out)]
        assert not keys[0] & keys[1] and len(keys[0]) + len(keys[1]) == len(source)
        assert held <= len(held_out) <= SHOWN_MOST
