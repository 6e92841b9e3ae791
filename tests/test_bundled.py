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
from omnilatent.data import EvaluationImages, demo_photos, open_images
from omnilatent.metrics.protocol import evaluate

DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.mark.parametrize("name", hub.bundled_names())
def test_bundled_weights_are_small_half_precision_and_have_a_card(name: str) -> None:
    folder = hub.BUNDLED / name
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 7e6
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license:" in card and "Licence:" in card
    assert re.search(r"Command: `(omnilatent \w+|python benchmarks/\w+\.py) ", card)  # what made it
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["kind"] in hub.OPENERS


def test_all_bundled_weights_stay_within_twenty_megabytes() -> None:
    assert "kl-f8-small" in hub.bundled_names()
    assert sum(path.stat().st_size for path in hub.BUNDLED.rglob("*") if path.is_file()) <= 20e6


def test_kl_f8_small_reaches_what_its_card_says() -> None:
    place = DATA / "imagenet-1k-sample" / "val.tar"
    if not place.exists():
        pytest.skip("../shared/data/imagenet-1k-sample is not here")
    codec = hub.load("kl-f8-small")
    assert codec.parameter_count() <= 3_500_000 and codec.spec.channels == 4
    images = EvaluationImages(open_images(str(place)), 256, limit=10)
    measured, _ = evaluate(codec, images, batch_size=5, metrics=("psnr",), health=False, speed=False)
    assert measured.figures["psnr"].n == 10
    assert measured.figures["psnr"].value == pytest.approx(27.45, abs=0.01)  # 27.02 dB over all 100


def test_the_demo_measures_on_photos_that_it_did_not_train_on(tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    for source, held in ((demo_photos(), 4), (open_images(str(tmp_path)), 3)):
        training, held_out = parts(source)
        keys = [{part.key(i) for i in range(len(part))} for part in (training, held_out)]
        assert not keys[0] & keys[1] and len(keys[0]) + len(keys[1]) == len(source)
        assert held <= len(held_out) <= SHOWN_MOST
