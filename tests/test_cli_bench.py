"""`omnilatent bench`: every row is a measurement, ours and diffusers' alike; the store's stages; bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnilatent.cli.main import main


def test_a_recipe_is_timed_and_so_is_the_way_to_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    line = (f"bench debug --train --size 32 --calls 2 --batch-size 2 --train-batch-size 2 --device cpu --workers 0 "
            f"--data {tmp_path / 'photos'} --json {tmp_path / 'bench.json'}")
    assert main(line.split()) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert not [row for row in record["rows"] if row["failure"]]
    assert all(row["images_per_second"] > 0 and row["milliseconds"] > 0 for row in record["rows"])
    assert [(row["what"], row["how"]) for row in record["rows"]] == [
        ("encode", "diffusers"), ("decode", "diffusers"), ("encode", "omnilatent"), ("decode", "omnilatent"),
        ("train: reconstruction + KL", "diffusers, eager"), ("train: reconstruction + KL", "omnilatent"),
        ("train: + laplacian + PatchGAN", "omnilatent")]
    assert record["store"]["new"] == 5 and {"read", "decode", "resize", "encode", "write"} <= set(record["store"]["rates"])
    assert "limited by" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "says"), [
    ("bench nothing", "neither an existing path"),
    ("bench kl-f8-small --calls 0", "--calls 0 is too small"),
    ("bench omni --hidden-dim 30", "hidden_dim 30 does not split into 6 heads"),
    ("bench omni --num-heads 5", "hidden_dim 384 does not split into 5 heads"),
    ("bench taef2 --train", "--train times a recipe's steps"),
    ("bench debug --data nowhere", "nowhere"),
])
def test_mistakes_are_one_sentence(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
