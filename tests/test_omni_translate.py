"""Translation from file to file: every modality, several sources at once, and what cannot be."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from omnilatent.cli.main import main
from omnilatent.data.mel import MelSpec, read_sound, write_sound
from omnilatent.omni.files import write_target
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.recipes import debug_omni
from omnilatent.omni.saving import save
from omnilatent.omni.tokenizer import ByteTokenizer

SPEC = MelSpec(rate=8_000, n_fft=512, hop=128, bands=64, low=50.0, high=4_000.0)


def sine(hertz: float, amplitude: float = 1.0, samples: int = 8_000) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / SPEC.rate)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model, a picture, a sound, a video and a text."""
    folder = tmp_path_factory.mktemp("translate")
    torch.manual_seed(0)
    model = OmniLatentModel(debug_omni().model).eval()
    (folder / "model").mkdir()
    save(folder / "model", model, ByteTokenizer(), SPEC, "---\nlicense: mit\n---\n# A card")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8)).save(folder / "picture.jpg")
    write_sound(folder / "sound.wav", sine(440.0, 0.5), 8_000)
    write_target(torch.rand(3, 10, 33, 48), "video", folder / "video.mp4", model)
    (folder / "words.txt").write_text("three ☂\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("source", ["picture.jpg", "sound.wav", "video.mp4", "words.txt"])
def test_any_file_becomes_any_other(source: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = {"image": tmp_path / "o.png", "audio": tmp_path / "o.wav", "video": tmp_path / "o.mp4", "text": tmp_path / "o.txt"}
    for target, out in outs.items():
        assert main(["translate", str(place / "model"), str(place / source), "--to", target, "--out", str(out)]) == 0
        assert str(out) in capsys.readouterr().out
    with Image.open(outs["image"]) as picture:
        assert picture.size == (32, 32)
    assert len(read_sound(outs["audio"], 8_000)) == 63 * 128
    with av.open(str(outs["video"])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 8 and video.streams.video[0].width == 32
    outs["text"].read_text(encoding="utf-8")


def test_several_files_are_one_source_and_sizes_are_asked_for(place: Path, tmp_path: Path) -> None:
    base = ["translate", str(place / "model"), str(place / "picture.jpg")]
    one, both, other = (tmp_path / f"{name}.png" for name in ("one", "both", "other"))
    for out, more in ((one, []), (both, [str(place / "sound.wav")]), (other, ["--seed", "1"])):
        assert main([*base, *more, "--to", "image", "--size", "20", "24", "--out", str(out)]) == 0
    pixels = [np.asarray(Image.open(out).convert("RGB")) for out in (one, both, other)]
    assert all(p.shape == (20, 24, 3) for p in pixels)
    assert (pixels[0] != pixels[1]).any() and (pixels[0] != pixels[2]).any()
    assert main([*base, "--to", "image", "--size", "20", "24", "--out", str(one)]) == 2  # it is there already
    assert main([*base, "--to", "image", "--size", "20", "24", "--out", str(one), "--overwrite", "--as-is"]) == 0
    assert (np.asarray(Image.open(one).convert("RGB")) != pixels[0]).any()  # the source as it is has other pixels


def test_info_describes_an_any_to_any_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(place / "model")]) == 0
    said = capsys.readouterr().out
    assert "text, audio, image, video" in said and "8000 Hz, 64 bands" in said and "# A card" in said


@pytest.mark.parametrize(("argv", "sentence"), [
    (["picture.jpg", "--to", "image", "--out", "x.wav"], "image is written as .png"),
    (["missing.png", "--to", "text"], "missing.png is not there"),
    (["model/config.json", "--to", "text"], "has the ending .json, which is no picture's"),
    (["--to", "text"], "translate takes a source"),
    (["--text", "", "--to", "image"], "--text is empty"),
    (["picture.jpg", "picture.jpg", "--to", "text"], "give at most one of each modality"),
    (["picture.jpg", "--to", "video", "--size", "1", "2", "3", "4"], "--size of video has 3 numbers; got 4"),
    (["picture.jpg", "--to", "text", "--beams", "0"], "beams >= 1"),
    (["broken.png", "--to", "text"], "broken.png"),
    (["empty.txt", "--to", "text"], "empty.txt is empty"),
])
def test_bad_input_gives_one_sentence(
    argv: list[str], sentence: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    Path("broken.png").write_bytes(b"\x89PNG no")
    Path("empty.txt").write_text("")
    assert main(["translate", "model", *argv]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert sentence in told and "Traceback" not in told
    assert not Path("x.wav").exists()


def test_a_model_without_its_tokenizer_or_without_sound_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = tmp_path / "silent"
    silent.mkdir()
    save(silent, OmniLatentModel(debug_omni().model), ByteTokenizer(), None, "card")
    assert main(["translate", str(silent), str(place / "sound.wav"), "--to", "text"]) == 2
    assert "does not say what its mel spectrograms are" in capsys.readouterr().err
    (silent / "tokenizer.json").unlink()
    assert main(["translate", str(silent), str(place / "picture.jpg"), "--to", "text"]) == 2
    assert "lacks its tokenizer" in capsys.readouterr().err
    assert main(["compare", str(silent), "--data", "photos"]) == 2
    assert "is an any-to-any model, which 'omnilatent translate' takes, and no codec" in capsys.readouterr().err
