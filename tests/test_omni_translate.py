"""`omnilatent translate` from file to file, and `info` of an any-to-any model: every pair, several sources, what cannot be."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import write_clip
from PIL import Image

import omnilatent
from omnilatent.cli.main import main
from omnilatent.data.digit_world import heard
from omnilatent.data.mel import MelSpec, read_sound, write_sound
from omnilatent.omni import files
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.recipes import debug_omni
from omnilatent.omni.saving import load, save
from omnilatent.omni.tokenizer import ByteTokenizer

SPEC = MelSpec(rate=8_000, n_fft=512, hop=128, bands=64, low=50.0, high=4_000.0)
SOURCES = ["picture.jpg", "sound.wav", "video.mkv", "words.txt"]
ENDING = {"image": ".png", "audio": ".wav", "video": ".mp4", "text": ".txt"}


def sine(hertz: float, amplitude: float = 0.5, samples: int = 8_000) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / SPEC.rate)


def saved(folder: Path, mel: MelSpec | None = SPEC, modalities: tuple[str, ...] = ("text", "audio", "image", "video"),
          **more: object) -> Path:
    """An untrained model."""
    torch.manual_seed(0)
    folder.mkdir()
    model = OmniLatentModel(replace(debug_omni().model, modalities=modalities)).eval()
    save(folder, model, ByteTokenizer(), mel, "---\nlicense: mit\n---\n# A card", **more)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture, a sound, a video with a sound, a text; and files that are none."""
    folder = tmp_path_factory.mktemp("translate")
    saved(folder / "model")
    saved(folder / "mute", mel=None)
    saved(folder / "guided", training={"unconditional_share": 0.1})
    saved(folder / "pictures", mel=None, modalities=("text", "image"))
    (saved(folder / "lost") / "tokenizer.json").unlink()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8)).save(folder / "picture.jpg")
    write_sound(folder / "sound.wav", sine(440), 8_000)
    for name, samples in (("long", 12_000), ("short", 2_000), ("usual", 63 * 128)):
        write_sound(folder / f"{name}.wav", sine(440, samples=samples), 8_000)
    write_clip(folder / "video.mkv", frames=10, size=(34, 48), sound=sine(300))
    write_clip(folder / "silent.mkv", frames=2)
    write_clip(folder / "heard.mkv", frames=0, sound=sine(440))
    (folder / "words.txt").write_text("three ☂\n", encoding="utf-8")
    write_sound(folder / "nothing.wav", torch.zeros(0), 8_000)
    with av.open(str(folder / "frameless.mp4"), "w") as video:  # a track of pictures and none in it
        video.add_stream("mpeg4", rate=8).width = 32
        video.streams.video[0].height = 32
        video.start_encoding()
    (folder / "subtitles.mkv").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("früh".encode("latin-1"))
    (folder / "taken.png").write_bytes(b"mine")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def made(tmp_path: Path, *argv: str, model: str = "model") -> Path:
    """The file that `translate MODEL …` wrote."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}{ENDING[argv[argv.index('--to') + 1]]}"
    assert main(["translate", model, *argv, "--out", str(out)]) == 0
    return out


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("target", ENDING)
@pytest.mark.parametrize("source", SOURCES)
def test_any_file_becomes_any_other(
    source: str, target: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path, source, "--to", target)
    said = capsys.readouterr().out
    assert said.endswith(f"{out}\n")
    if target == "image":
        assert pixels(out).shape == (32, 32, 3)
    elif target == "audio":
        assert len(read_sound(out, 8_000)) == 63 * 128 and len(read_sound(out, 4_000)) == pytest.approx(63 * 64, abs=40)
    elif target == "video":
        with av.open(str(out)) as video:
            assert [frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)] == [(32, 32, 3)] * 8
            assert video.streams.video[0].average_rate == 8
    else:
        assert out.read_text(encoding="utf-8") in said


def test_a_file_holds_what_the_model_gives_in_python(here: Path, tmp_path: Path) -> None:
    model = load("here:model")
    image, text = files.read_source(Path("picture.jpg"), "image", model), files.text_source("three ☂", model, "a string")
    assert image.shape == (1, 3, 32, 32) and text.shape == (1, 9)  # the file's line break is no part of it
    with torch.no_grad():
        source = model.read({"image": image, "text": text})
        image, sound = (model.answer(source, name, generator=torch.Generator().manual_seed(0))[0].clamp(0, 1)
                        for name in ("image", "audio"))
    picture = pixels(made(tmp_path, "picture.jpg", "words.txt", "--to", "image"))
    assert np.abs(picture / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.501 / 255
    heard = read_sound(made(tmp_path, "words.txt", "picture.jpg", "--to", "audio"), 8_000)
    assert (heard - SPEC.to_wave(sound)).abs().max() <= 1.51 / 32768


def test_every_source_counts_and_a_text_is_the_same_from_a_file(here: Path, tmp_path: Path) -> None:
    given = [["picture.jpg"], ["picture.jpg", "sound.wav"], ["picture.jpg", "--text", "three ☂"], ["video.mkv"],
             ["video.mkv", "--sound"], ["words.txt"], ["words.txt", "--seed", "1"], ["words.txt", "--steps", "0"], ["picture.jpg", "--steps", "2"]]
    several = [pixels(made(tmp_path, *sources, "--to", "image")) for sources in given]
    for i, one in enumerate(several):
        assert all((one != other).any() for other in several[:i])
    assert (several[2] == pixels(made(tmp_path, "words.txt", "picture.jpg", "--to", "image"))).all()
    assert (several[0] == pixels(made(tmp_path, "picture.jpg", "--to", "image", "--steps", "0"))).all()  # what is a source is regressed
    drawn = [made(tmp_path, "picture.jpg", "--to", "text", "--temperature", "5", "--seed", seed).read_bytes() for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]
    assert made(tmp_path, "picture.jpg", "--to", "text", "--beams", "3", "--max-len", "2").stat().st_size <= 2 * 3 + 1


def test_sizes_that_are_asked_for(here: Path, tmp_path: Path) -> None:
    assert pixels(made(tmp_path, "--text", "one", "--to", "image", "--size", "21", "50")).shape == (21, 50, 3)
    assert len(read_sound(made(tmp_path, "--text", "one", "--to", "audio", "--size", "101"), 8_000)) == 100 * 128
    for size, wanted in ((["3"], (3, 32, 32)), (["20", "24"], (8, 20, 24)), (["9", "20", "24"], (9, 20, 24))):
        with av.open(str(made(tmp_path, "--text", "one", "--to", "video", "--size", *size, "--rate", "12.5"))) as video:
            assert np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).shape == (*wanted, 3)
            assert video.streams.video[0].average_rate == 12.5


def test_a_source_is_resized_only_aloud(here: Path) -> None:
    model, said = load("model"), []

    def read(file: str, modality: str, fit: files.Fit) -> tuple[tuple[int, ...], str]:
        said.clear()
        return tuple(files.read_source(Path(file), modality, model, fit, said.append).shape), "; ".join(said)

    for file, modality, fit, shape, sentences in (
        ("picture.jpg", "image", files.Fit(), (1, 3, 32, 32), "picture.jpg: 50 x 41 pixels are brought to 32 x 32"),
        ("picture.jpg", "image", files.Fit(as_is=True), (1, 3, 50, 41), ""),
        ("picture.jpg", "image", files.Fit((60, 20)), (1, 3, 60, 20), "are brought to 60 x 20"),
        ("video.mkv", "video", files.Fit(), (1, 3, 8, 32, 32), "8 of 10 frames are taken, evenly"),
        ("video.mkv", "video", files.Fit(as_is=True), (1, 3, 10, 34, 48), ""),
        ("silent.mkv", "video", files.Fit((16, 16)), (1, 3, 2, 16, 16), "silent.mkv: 48 x 64 pixels are brought to 16 x 16"),
        ("long.wav", "audio", files.Fit(), (1, 64, 64), "long.wav: the middle 1.01 s of 1.50 s are taken; --as-is takes all"),
        ("long.wav", "audio", files.Fit(as_is=True), (1, 64, 94), ""),
        ("short.wav", "audio", files.Fit(), (1, 64, 64), "short.wav: its 0.25 s are put in the middle of 1.01 s of silence"),
        ("short.wav", "audio", files.Fit(as_is=True), (1, 64, 16), ""),
        ("usual.wav", "audio", files.Fit(), (1, 64, 64), ""),
    ):
        got, told = read(file, modality, fit)
        assert got == shape and sentences in told and bool(sentences) == bool(told)
    whole = files.read_source(Path("picture.jpg"), "image", model, files.Fit(as_is=True))
    assert (whole[0].permute(1, 2, 0) * 255).round().byte().numpy().tolist() == pixels(Path("picture.jpg")).tolist()


def test_a_sound_is_cropped_and_padded_as_in_the_digits_world(here: Path) -> None:
    model = load("model")
    for file in ("long.wav", "short.wav", "usual.wav"):
        wave = read_sound(Path(file), 8_000)
        assert torch.equal(files.read_source(Path(file), "audio", model)[0], heard(wave))
    loud = files.read_source(Path("short.wav"), "audio", model)[0].amax(0) > 0
    first, last = int(loud.nonzero()[0]), int(loud.nonzero()[-1])
    assert first > 20 and abs(first - (63 - last)) <= 1


def test_a_container_without_pictures_is_a_sound(here: Path, tmp_path: Path) -> None:
    same = [made(tmp_path, file, "--to", "image").read_bytes() for file in ("heard.mkv", "sound.wav", "video.mkv")]
    assert same[0] == same[1] != same[2]


def test_a_file_that_was_there_is_kept_until_the_new_one_is_whole(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["translate", "model", "picture.jpg", "--to", "image", "--out", "taken.png"]
    assert main(argv) == 2 and "taken.png is there already: give another --out, or --overwrite" in capsys.readouterr().err

    def full(file: Path, pixels: np.ndarray) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_picture", full)
        assert main([*argv, "--overwrite"]) == 2
        assert "disk is full" in capsys.readouterr().err
    assert Path("taken.png").read_bytes() == b"mine" and not list(Path().glob(".writing-*"))
    assert main([*argv, "--overwrite"]) == 0 and pixels(Path("taken.png")).shape == (32, 32, 3)


def test_evaluate_turns_one_file_into_another(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, kind in zip(SOURCES, ("image", "audio", "video", "text"), strict=True):
        for target, ending in ENDING.items():
            mode = ["evaluate", str(here / "model"), "--mode", "file", "--input-file", str(here / file), "--target", target]
            assert main([*mode, "--source", kind, "--output", f"{target}{ending}", "--overwrite", "--device", "cpu"]) == 0
            again = made(tmp_path, str(here / file), "--to", target, model=str(here / "model"))
            if target != "video":  # whose container holds the time of writing
                assert Path(f"{target}{ending}").read_bytes() == again.read_bytes()
    capsys.readouterr()
    assert main([*mode, "--output", "text.txt"]) == 2 and "text.txt is there already" in capsys.readouterr().err
    assert main([*mode, "--source", "image"]) == 2 and f"--source image: {here / 'words.txt'} is text" in capsys.readouterr().err


def test_info_describes_an_any_to_any_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "mine:model"]) == 0
    facts, card = capsys.readouterr().out.split("\n\n")
    said = {line.partition(":")[0]: line.partition(":")[2].strip() for line in facts.splitlines()}
    assert said["name"] == "mine" and "text, audio, image, video" in said["kind"] and said["licence"] == "mit"
    assert said["mel"].startswith("8000 Hz, 64 bands of 50 to 4000 Hz") and said["video"] == (
        "any frames, height, width; usually 8x32x32, 64 tokens")
    assert said["parameters"] == f"{sum(p.numel() for p in load('model').parameters()):,}" and card == "# A card\n"
    assert main(["info", "pictures"]) == 0 and "mel:" not in capsys.readouterr().out


def test_guidance_is_for_a_model_that_learned_without_a_source(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picture(*options: str) -> bytes:
        return made(tmp_path, "words.txt", "--to", "image", *options, model="guided").read_bytes()

    assert picture("--guidance", "1") == picture() != picture("--guidance", "2") != picture("--guidance", "0")
    capsys.readouterr()
    assert main(["translate", "model", "words.txt", "--to", "image", "--guidance", "2", "--out", str(tmp_path / "x.png")]) == 2
    assert "--guidance 2: model never learned to make anything of no source" in capsys.readouterr().err
    for name, said in (("guided", "8 steps, guidance 1 (none), unless asked for otherwise"), ("model", "8 steps, no guidance: it")):
        assert main(["info", name]) == 0 and said in capsys.readouterr().out


BAD = [
    ("picture.jpg --to image --out x.wav", "x.wav does not fit: image is written as .png"),
    ("picture.jpg --to image --out model.png/x.png --size 2 2 2", "--size of image has 2 numbers; got 3"),
    ("picture.jpg --to image --out words.txt/x.png", "words.txt is a file: give a folder"),
    ("missing.png --to text", "missing.png is not there"),
    ("model --to text", "model is a folder: give a picture"),
    ("model/config.json --to text", "has the ending .json, which is no picture's"),
    ("--to text", "translate takes a source"),
    ("broken.png --to text", "broken.png"),
    ("broken.mp4 --to text", "broken.mp4 is no video that can be read"),
    ("nothing.wav --to text", "nothing.wav"),
    ("frameless.mp4 --to text", "frameless.mp4"),
    ("empty.txt --to text", "empty.txt is empty: give a text"),
    ("latin.txt --to text", "latin.txt is not UTF-8 (invalid start byte at byte 2): convert it"),
    ("picture.jpg picture.jpg --to text", "the sources are image, image: give at most one of each modality"),
    ("video.mkv sound.wav --sound --to text", "the sources are video, audio, audio: give at most one"),
    ("picture.jpg --sound --to text", "--sound takes the sound track of a video"),
    ("silent.mkv --sound --to text", "omnilatent: silent.mkv holds no sound track: give a file that does."),
    ("picture.jpg --as-is --input-size 8 8 --to text", "give one of them"),
    ("picture.jpg --to text --max-len 0", "--max-len 0: give at least 1"),
    ("picture.jpg --to text --size 3", "--size is for image, audio, video: leave it out with --to text"),
    ("picture.jpg --to image --beams 2", "--beams is for text: leave it out with --to image"),
    ("picture.jpg --to image --rate 2", "--rate is for video"),
    ("picture.jpg --to image --steps -1", "--steps -1: give at least 0"),
    ("picture.jpg --to image --guidance nan", "--guidance nan: give at least 0"),
    ("picture.jpg --to text --guidance 2", "--guidance is for image, audio, video: leave it out with --to text"),
    ("picture.jpg --to image --guidance 2 --steps 0", "--steps 0 is the regression: leave one of them out"),
    ("picture.jpg --to image --seed -1", "--seed -1: give at least 0"),
    ("picture.jpg --to video --rate nan", "--rate nan: give 0.1 to 1000 frames a second"),
    ("picture.jpg --to video --size 1 2 3 4", "--size of video has 3 numbers; got 4"),
    ("picture.jpg --to video --size 3 5", "--size 8 3 5: a video's height and width are even."),
    ("picture.jpg --to audio --size 1", "a sound has at least 2 frames."),
    ("picture.jpg --to text --beams 0", "beams >= 1"),
    ("picture.jpg --to text --beams 2 --temperature 1", "beam search takes no temperature"),
    *((f"picture.jpg --to text --temperature {value}", f"--temperature {value}: give a number from 0 on")
      for value in ("nan", "inf", "-1")),
    *((f"picture.jpg --to text --top-p {value}", f"--top-p {value}: give more than 0, at most 1") for value in ("nan", "0", "2")),
    ("picture.jpg --to image --guidance -1", "--guidance -1: give at least 0"),
    ("subtitles.mkv --to text", "subtitles.mkv has no picture track (its tracks: subtitle): give a video"),
    ("picture.jpg --to image --size 2000 2000", "the model's max_tokens is 8192: give smaller or shorter data"),
]


@pytest.mark.parametrize(("line", "sentence"), [*BAD, ("--to image --text", "--text is empty: give a text")])
def test_bad_input_gives_one_sentence(line: str, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.iterdir())
    assert main(["translate", "model", *line.split(), *([""] if line.endswith("--text") else [])]) == 2
    *notes, told = capsys.readouterr().err.splitlines()
    assert sentence in told and told.count(".") == told.rstrip(".").count(".") + 1
    assert all("are brought to" in note for note in notes) and sorted(here.iterdir()) == before


@pytest.mark.parametrize(("model", "line", "sentence"), [
    ("mute", "sound.wav --to text", "this model does not say what its mel spectrograms are"),
    ("mute", "picture.jpg --to audio", "this model does not say what its mel spectrograms are"),
    ("pictures", "sound.wav --to text", "sound.wav is audio, and this model takes text, image"),
    ("pictures", "picture.jpg --to video", "pictures makes text, image, and no video"),
    ("lost", "picture.jpg --to text", "lost lacks its tokenizer (tokenizer.json or tokenizer.model)"),
    ("kl-f8-small", "picture.jpg --to text", "kl-f8-small is a model of the kind 'kl', which turns no modality into another"),
    ("photo", "picture.jpg --to text", "photo is neither an existing path"),
])
def test_a_model_that_cannot_says_so(
    model: str, line: str, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["translate", model, *line.split()]) == 2
    assert sentence in capsys.readouterr().err


def changed(folder: Path, **changes: object) -> None:
    """Another config.json; `model` is changed in part."""
    file = folder / "config.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**own, **changes, "model": {**own["model"], **changes.get("model", {})}}), encoding="utf-8")


SPOILED = {
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing: copy it"),
    "weights are garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is not a readable"),
    "width": (lambda f: changed(f, model={"hidden_dim": 64}), "model.safetensors holds other weights than config.json describes, the first "
                                                              "nothing (shape (32,), expected (64,)): restore both"),
    "depth": (lambda f: changed(f, model={"num_layers": 1}), "(shape (32, 128), expected none): restore both"),
    "unknown key": (lambda f: changed(f, model={"smell": 1}), "config.json describes no model that this version knows (unknown: smell)"),
    "unknown modality": (lambda f: changed(f, model={"modalities": ["text", "smell"]}), "(there is no modality 'smell'; there are text"),
    "number": (lambda f: changed(f, model={"num_heads": "2"}), "(num_heads is a whole number, at least 1; got '2')"),
    "mel": (lambda f: changed(f, mel={"bands": 0}), "(bands is at least 1 and floor_db below 0; got 0 and -80.0)"),
    "tokenizer gone": (lambda f: (f / "tokenizer.json").unlink(), "lacks its tokenizer (tokenizer.json or tokenizer.model)"),
    "tokenizer no JSON": (lambda f: (f / "tokenizer.json").write_text("{no"), "tokenizer.json is not valid JSON"),
    "tokenizer a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json holds a JSON list, expected an object"),
    "tokenizer nobody's": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer of Hugging Face ("),
    "tokenizer too large": (lambda f: changed(f, model={"vocab_size": 200}), "its tokenizer has 259 ids and its config.json 200"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_damaged_model_is_told_in_a_sentence(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, sentence = SPOILED[what]
    spoil(saved(tmp_path / "model"))
    for argv in (["info", "model"], ["translate", "model", "--text", "one", "--to", "text"], ["evaluate", "model"]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("omnilatent: model") and error.count("\n") == 1, error
    with pytest.raises(omnilatent.UserError):
        load(tmp_path / "model")


@pytest.mark.parametrize("line", ["compare model --data photos", "encode model photos --out s", "clone model --data photos",
                                  "export model --to safetensors --out x.safetensors"])
def test_a_command_for_codecs_says_what_this_model_is_for(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert "model is an any-to-any model, which 'omnilatent translate' takes, and no codec" in capsys.readouterr().err


def test_a_wrong_file_or_option_is_told_without_torch(here: Path) -> None:
    code = """if True:
        import sys
        from omnilatent.cli.main import main
        codes = [main(["translate", "model", *line.split(), "--to", "image"]) for line in ("none.png", "picture.jpg --beams 2")]
        sys.exit(0 if codes == [2, 2] and "torch" not in sys.modules else 1)"""
    path = {"PYTHONPATH": str(Path(omnilatent.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | path, check=False, capture_output=True).returncode == 0
