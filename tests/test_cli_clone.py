"""`omnilatent clone`: from photos or a video to a checkpoint that every command opens, the seed's files beside it, going
on after Ctrl-C, and what cannot be in one sentence."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_data_video import write_video

import omnilatent
from omnilatent.cli import clone
from omnilatent.cli.main import main
from omnilatent.codec import Codec
from omnilatent.errors import UserError
from omnilatent.organic.clone_task import OrganicTask
from omnilatent.store import Store, StoreWriter

SMALL = "--size 64 --views 1 --neurons 8 --candidates 16 --layers 1 --sweeps 3 --sites 2000 --shown 3"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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
    run(f"clone ovae-f8c4 --data {photos} --latent native --channels 4 {SMALL} --out {tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert "native, without gradients" in said and "12 photos of photos (training), 4 held out" in said
    assert "times as fast as ovae-f8c4" in said and "held out: explained" in said and "latents:" not in said
    codec = omnilatent.load(str(tmp_path / "run"))
    odd = torch.rand(2, 3, 37, 53)
    latent = codec.encode(odd)
    assert latent.mode().shape == (2, 4, 5, 7) and codec.decode(latent).shape == odd.shape
    files = {file.name for file in (tmp_path / "run" / "report").iterdir()}
    assert files >= {"speed_comp.png", "speed_1.png", "orig.png", "sd_recon.png", "o_recon.png", "side_by_side.png"}
    assert "Cosine_sim.png" not in files  # its space is its own, of equal shape by chance
    with Image.open(tmp_path / "run" / "report" / "side_by_side.png") as picture:
        assert picture.size == (3 * 64, 64)
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert "Learned without gradients" in card and f"Command: `omnilatent clone ovae-f8c4 --data {photos}" in card


def test_a_clone_goes_on_after_ctrl_c_as_if_nothing_had_been(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"clone kl-f8-small --data {photos} --latent grid --part encoder {SMALL} --out {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(clone, "_report", lambda *_: None)
        run(f"{line}/whole")
    resume = f"clone --resume {tmp_path / 'cut'}"
    for place, command in (("encode", f"{line}/cut"), (6, resume), (9, f"clone --resume={tmp_path / 'cut'}")):
        with monkeypatch.context() as patch:  # while the teacher teaches, while lessons are read, while neurons are tuned
            if place == "encode":
                patch.setattr(Codec, "encode", interrupted(Codec.encode, lambda *_: True))
            else:
                patch.setattr(OrganicTask, "step", interrupted(OrganicTask.step, lambda _, __, position: position == place))
            assert main(command.split()) == 130
        said = capsys.readouterr().err
        assert said == f"\nomnilatent: stopped; go on with: omnilatent clone --resume {tmp_path / 'cut'}\n"
        if place == "encode":  # a failure of what goes on does not take the run from it
            with monkeypatch.context() as patch:
                patch.setattr(clone, "_teach", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
                assert main(resume.split()) == 2 and "the disk is full" in capsys.readouterr().err
    assert {folder.name for folder in (tmp_path / "cut").glob("step-*")} >= {"step-10"}
    run(resume)
    whole, cut = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    codec, teacher = omnilatent.load(str(tmp_path / "cut")), omnilatent.load("kl-f8-small")
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(codec.decode(z), teacher.decode(z))  # the half that was not cloned
    found = json.loads((tmp_path / "cut" / "report" / "likeness.json").read_text())
    assert len(found["cosine"]) == 3 and np.mean(found["cosine"]) > np.mean(found["shuffled_cosine"])
    assert {"Cosine_sim.png", "L2.png", "Latent_norm.png"} <= {f.name for f in (tmp_path / "cut" / "report").iterdir()}


def interrupted(call: Callable, when: Callable[..., bool]) -> Callable:
    """`call`, before which Ctrl-C is pressed."""
    def pressed(*given: object) -> object:
        if when(*given):
            signal.raise_signal(signal.SIGINT)
        return call(*given)
    return pressed


def test_a_twin_with_gradients_uses_the_lessons_of_another_clone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"clone ovae-f8c4 --data {photos} --latent grid --part decoder {SMALL} --lessons {tmp_path / 'lessons'}"
    run(f"{line} --out {tmp_path / 'organic'}")
    rows = len(Store(tmp_path / "lessons" / "lessons"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", None)  # no lesson is written again
        run(f"{line} --gradients --steps 6 --out {tmp_path / 'twin'}")
    assert rows == len(Store(tmp_path / "lessons" / "lessons")) == 12
    assert "grid, with gradients" in capsys.readouterr().out
    twin = omnilatent.load(str(tmp_path / "twin"))
    assert twin.decode(torch.randn(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    config = json.loads((tmp_path / "twin" / "final" / "config.json").read_text())
    assert config["training"]["gradients"] is True and config["training"]["step"] == 6
    assert "Trained with gradients" in (tmp_path / "twin" / "final" / "README.md").read_text(encoding="utf-8")


def test_a_pooled_clone_of_a_video_only_encodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    run(f"clone kl-f8-small --data {clip} --latent pooled --part encoder --views 1 --most 6 --shown 2 --neurons 8 "
        f"--candidates 16 --sweeps 1 --sites 2000 --out {tmp_path / 'run'}")
    codec = omnilatent.load(str(tmp_path / "run"))
    assert codec.encode(torch.rand(2, 3, 256, 256)).mode().shape == (2, 4, 1, 1)
    found = json.loads((tmp_path / "run" / "report" / "likeness.json").read_text())
    assert all(key.startswith("clip.mp4/0000") and int(key[-6:]) >= 54 for key in found["keys"])  # the end is held out
    fitted = [int(key.split("/")[1][:6]) for key in Store(tmp_path / "run" / "lessons").keys]
    assert len(fitted) == 6 and max(fitted) < 54 - 10 and min(fitted) == 0 and np.ptp(fitted) > 30  # evenly, a gap before
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(clip)]) == 2
    assert "only encodes" in capsys.readouterr().err.splitlines()[-1]


def test_pictures_that_teach_nothing_give_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    line = f"clone pixels --data {tmp_path} --latent native --channels 1 --out {tmp_path / 'run'} {SMALL} --size 16"
    for _ in range(2):  # nothing is left that would stand in the way of the same command, once it is mended
        assert main(line.split()) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("omnilatent: The first layer does no better on held-out pictures than their mean: 3 views of 3")


def test_a_clone_that_is_there_is_not_begun_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(f"clone kl-f8-small --data photos --out {tmp_path}".split()) == 2
    assert f"{tmp_path} holds a clone already: go on with --resume {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"options": {}, "command": ""}', '{"options": {"name": 1}}',
                                     '{"options": {"name": "a", "data": "b", "clone": {"size": 63}}, "command": ""}'])
def test_nothing_to_go_on_with_gives_one_sentence(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main(["clone", "--resume", str(tmp_path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"omnilatent: --resume {tmp_path}: there is no clone's run.json") and "folder of a clone" in said
    for line in (["--resume"], ["--resume", str(tmp_path), "--sweeps", "3"], ["kl-f8-small", "--resume", str(tmp_path)]):
        assert main(["clone", *line]) == 2
        assert "--resume takes a clone's folder and nothing else" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "says"), [
    ("clone nobody --data photos", "neither an existing path"),
    ("clone kl-f8-small --data nowhere", "nowhere does not exist"),
    ("clone kl-f8-small --data photos --latent pooled --part decoder", "mean something only to the encoder"),
    ("clone kl-f8-small --data photos --latent native --part encoder", "halves are learned together"),
    ("clone kl-f8-small --data photos --latent native --channels 193", "--channels is 193"),
    ("clone kl-f8-small --data photos --latent native --reach 2", "its reach is odd"),
    ("clone kl-f8-small --data photos --sites 1", "--sites is 1; the least is 100"),
    ("clone kl-f8-small --data photos --seed 4294967296", "--seed is 4294967296; it must be below"),
    ("clone kl-f8-small --data photos --size 60", "must be a multiple of 8"),
    ("clone pixels --data photos --latent grid", "Dimension mismatch"),
    ("clone ovae --data photos --latent pooled", "latent pixels a side of 256 pixels"),
])
def test_mistakes_are_answered(line: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not any(tmp_path.rglob("*"))  # nothing was begun
