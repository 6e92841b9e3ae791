"""The benchmark of fine-tuning: disjoint pictures, a page that shows what was measured; and the sheets of crops."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import domains  # noqa: E402
import finetune  # noqa: E402
import variants  # noqa: E402


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    domains.build(folder)
    return folder


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_nothing_held_out_is_trained_on(pictures: Path) -> None:
    """No row of 32 pixels of a held-out region, on a grid of 16, is anywhere in the region that is learned from."""
    for domain, name in (("microscopy", "ihc"), ("microscopy", "cell"), ("text", "page"), ("text", "text")):
        image = read(pictures / domain / "train" / f"{name}.png")
        learned = {image[y, x : x + 32].tobytes() for y in range(image.shape[0]) for x in range(image.shape[1] - 31)}
        for file in (pictures / domain / "val").glob(f"{name}*.png"):
            held_out = read(file)
            assert not [(y, x) for y in range(0, held_out.shape[0], 16) for x in range(0, held_out.shape[1] - 31, 16)
                        if held_out[y, x : x + 32].tobytes() in learned], file
    names = {part: {file.stem for file in (pictures / "photos" / part).iterdir()} for part in ("train", "val")}
    assert not names["train"] & names["val"] and "ihc" not in names["train"] | names["val"]
    counts = {name: len(list((pictures / name / "val").iterdir())) for name in domains.SETS}
    assert counts == {"microscopy": 5, "text": 6, "photos": 5}


def test_the_pictures_are_the_same_each_time(pictures: Path, tmp_path: Path) -> None:
    domains.build(tmp_path)
    for file in pictures.glob("[mt]*/*/*.png"):
        assert file.read_bytes() == (tmp_path / file.relative_to(pictures)).read_bytes()


def test_the_page_shows_what_was_measured() -> None:
    rows = json.loads((RESULTS / "finetune.json").read_text(encoding="utf-8"))["rows"]
    assert finetune.table(rows) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    before = rows["before (bundled)"]["figures"]
    for domain in ("microscopy", "text"):
        after, null = (rows[name]["figures"] for name in (f"tuned on {domain}", finetune.NULL))
        assert after[domain]["psnr"] > max(before[domain]["psnr"], null[domain]["psnr"]), "fine-tuning pays"
    assert (RESULTS / "finetune.png").stat().st_size <= 300_000


def test_the_busiest_crop_is_where_the_detail_is() -> None:
    image = np.full((64, 96, 3), 100, np.uint8)
    image[40:56, 64:80] = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    top, left = variants.busiest(image, 32)
    assert top <= 40 and top + 32 >= 56 and left <= 64 and left + 32 >= 80
    assert variants.busiest(image[:32, :32], 32) == (0, 0)


def test_a_sheet_shows_every_pixel_of_a_crop_as_a_square() -> None:
    crops = [np.random.default_rng(i).integers(0, 255, (80, 80, 3), dtype=np.uint8) for i in range(4)]
    sheet = np.asarray(variants.grid({"a": crops[:2], "b": crops[2:]}, {"b": ["20.00 dB", "0.1 ×"]}, zoom=2))
    step = 160 + variants.GAP
    for number, part in enumerate(crops):
        x, y = variants.GAP + number // 2 * step, variants.GAP + variants.LINE + number % 2 * step
        assert np.array_equal(sheet[y : y + 160 : 2, x : x + 160 : 2], part)
        assert np.array_equal(sheet[y + 1 : y + 160 : 2, x + 1 : x + 160 : 2], part)
    assert (sheet[-2 * variants.LINE :, step:] < 128).any() and (sheet[-2 * variants.LINE :, :step] == 255).all()
