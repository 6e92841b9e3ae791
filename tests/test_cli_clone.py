"""`omnilatent clone`: each kind of latent from photos or a video to a checkpoint that every command opens, the seed's
files beside it, and what cannot be in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_video import write_video

import omnilatent
from omnilatent.cli.main import main

SMALL = "--size 64 --neurons 8 --candidates 16 --layers 1 --sites 2000 --shown 3"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):  # smooth pictures, so that there is something to learn
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        coarse.resize((72, 64), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


def run(line: str) -> None:
    assert main(line.split()) == 0, line


def test_a_native_clone_is_a_codec_like_any_other(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"clone kl-f8-small --data {photos} --latent native --channels 4 --crops 2 {SMALL} --out {tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert "times as fast as kl-f8-small" in said and "held out: PSNR" in said and "latents:" not in said
    codec = omnilatent.load(str(tmp_path / "run"))
    odd = torch.rand(2, 3, 37, 53)
    latent = codec.encode(odd)
    assert latent.mode().shape == (2, 4, 5, 7) and codec.decode(latent).shape == odd.shape
    files = {file.name for file in (tmp_path / "run" / "report").iterdir()}
    assert files >= {"speed_comp.png", "speed_1.png", "orig.png", "sd_recon.png", "o_recon.png", "side_by_side.png"}
    assert "Cosine_sim.png" not in files  # its space is its own, of equal shape by chance
    with Image.open(tmp_path / "run" / "report" / "side_by_side.png") as picture:
        assert picture.size == (3 * 64, 64)


def test_a_grid_clone_takes_the_place_of_one_half(photos: Path, tmp_path: Path) -> None:
    run(f"clone kl-f8-small --data {photos} --latent grid --part encoder --crops 1 {SMALL} --out {tmp_path / 'run'}")
    codec, teacher = omnilatent.load(str(tmp_path / "run")), omnilatent.load("kl-f8-small")
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(codec.decode(z), teacher.decode(z))  # the half that was not cloned
    found = json.loads((tmp_path / "run" / "report" / "likeness.json").read_text())
    assert len(found["cosine"]) == 3 and np.mean(found["cosine"]) > np.mean(found["shuffled_cosine"])
    assert {"Cosine_sim.png", "L2.png", "Latent_norm.png"} <= {f.name for f in (tmp_path / "run" / "report").iterdir()}


def test_a_pooled_clone_of_a_video_only_encodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    run(f"clone kl-f8-small --data {clip} --latent pooled --crops 1 --most 6 --shown 2 --neurons 8 --candidates 16 "
        f"--out {tmp_path / 'run'}")
    codec = omnilatent.load(str(tmp_path / "run"))
    assert codec.encode(torch.rand(2, 3, 256, 256)).mode().shape == (2, 4, 1, 1)
    found = json.loads((tmp_path / "run" / "report" / "likeness.json").read_text())
    assert all(key.startswith("clip.mp4/0000") and int(key[-6:]) >= 54 for key in found["keys"])  # the end is held out
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(clip)]) == 2
    assert "only encodes" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("line", "says"), [
    ("clone nobody --data photos", "neither an existing path"),
    ("clone kl-f8-small --data nowhere", "nowhere does not exist"),
    ("clone kl-f8-small --data photos --latent pooled --part decoder", "a pooled clone only encodes"),
    ("clone kl-f8-small --data photos --latent native --channels 5", "--channels is 5"),
    ("clone kl-f8-small --data photos --sites 1", "--sites is 1; the least is 100"),
    ("clone kl-f8-small --data photos --size 60", "must be a multiple of 8"),
    ("clone pixels --data photos --latent grid --size 64 --most 2 --shown 1", "Dimension mismatch"),
])
def test_mistakes_are_answered(line: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
