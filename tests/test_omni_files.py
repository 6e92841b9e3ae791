"""Sound and its spectrogram, strings and their tokens, the digits world, and translation from file to file."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilatent.data.digit_world import SAMPLES, TONES, WORDS, open_world, tone
from omnilatent.data.mel import MelSpec, _filters, read_sound, write_sound
from omnilatent.errors import UserError
from omnilatent.omni.files import write_target
from omnilatent.omni.saving import save
from omnilatent.omni.tokenizer import ByteTokenizer, LibraryTokenizer, open_tokenizer, pad

SPEC = MelSpec(rate=8_000, n_fft=512, hop=128, bands=64, low=50.0, high=4_000.0)


def sine(hertz: float, amplitude: float = 1.0, samples: int = 8_000) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / SPEC.rate)


def test_a_sine_is_in_its_band_at_its_level() -> None:
    filters = _filters(SPEC)
    for hertz in (300.0, 1_000.0, 3_000.0):
        mel = SPEC.to_mel(sine(hertz))[:, 20]
        assert mel.argmax() == filters[:, round(hertz / SPEC.rate * SPEC.n_fft)].argmax()
        quieter = SPEC.to_mel(sine(hertz, 0.1))[:, 20].max()
        assert (mel.max() - quieter).item() == pytest.approx(20 / 80, abs=0.01)  # 20 dB of the 80
    assert SPEC.to_mel(sine(1_000.0)).max() > 0.97 and SPEC.to_mel(torch.zeros(512)).max() == 0


def test_filters_are_the_usual_triangles_where_they_are_wide_enough() -> None:
    from transformers.audio_utils import mel_filter_bank

    theirs = torch.from_numpy(mel_filter_bank(257, 64, 50.0, 4_000.0, 8_000, norm=None, mel_scale="htk").T).float()
    wide = (theirs > 0).sum(1) >= 4
    assert wide.sum() > 25 and (_filters(SPEC) - theirs)[wide].abs().max() < 1e-3
    assert (_filters(SPEC).sum(1) > 0.9).all()  # every band hears something


def test_sound_comes_back_from_its_spectrogram() -> None:
    wave = tone(7, [2**62, 2**63, 1, 2, 2**63, 2**61])
    mel = SPEC.to_mel(wave)
    again = SPEC.to_mel(SPEC.to_wave(mel))
    assert mel.shape == again.shape == (64, SPEC.frames(SAMPLES))
    assert (mel - again).abs().mean() < 0.03 < mel.mean()
    peaks = torch.fft.rfft(SPEC.to_wave(mel)).abs()
    heard = {round(i.item() * SPEC.rate / SAMPLES) for i in peaks.topk(20).indices}
    assert all(min(abs(hertz - h) for h in heard) < 25 for hertz in TONES[7])


def test_a_wav_file_holds_what_was_written(tmp_path: Path) -> None:
    wave = sine(440.0, 0.5, 1_000)
    write_sound(tmp_path / "a.wav", wave, 8_000)
    assert (read_sound(tmp_path / "a.wav", 8_000) - wave).abs().max() < 1.5 / 32_767
    assert read_sound(tmp_path / "a.wav", 16_000).shape[0] == pytest.approx(2_000, abs=40)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    for name, sentence in (("b.wav", "cannot be read as sound"), ("c.wav", "is not there")):
        with pytest.raises(UserError, match=sentence):
            read_sound(tmp_path / name, 8_000)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_every_string_comes_back_from_its_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and all(3 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([0, 1, *ids, 2, 0]) == text


def test_a_librarys_tokenizer_is_saved_with_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    built = Tokenizer(models.WordLevel({"[UNK]": 0, "three": 1, "four": 2}, unk_token="[UNK]"))
    built.pre_tokenizer, built.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    built.save(str(tmp_path / "words.json"))
    tokenizer = LibraryTokenizer(tmp_path / "words.json")
    assert tokenizer.encode("four three") == [5, 4] and tokenizer.vocab_size == 6
    (tmp_path / "model").mkdir()
    tokenizer.save(tmp_path / "model")
    assert open_tokenizer(tmp_path / "model").encode("three") == [4]
    assert pad([[5, 4], [4]]).tolist() == [[5, 4], [4, 0]]
    with pytest.raises(UserError, match="lacks its tokenizer"):
        open_tokenizer(tmp_path)


def test_the_digits_world_is_one_world() -> None:
    training, test = open_world("digits", seed=3)
    for position in (0, 5, 1_499, 1_500, 4_000):
        one, same = training.sample(position), training.sample(position)
        assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in ("image", "audio", "video"))
        assert one.text == WORDS[one.label] and one.video.shape == (3, 8, 32, 32) and one.audio.shape == (64, 64)
        mass = one.video.sum((0, 2, 3))
        assert mass.std() < 1e-3 * mass.mean()  # the same digit in every frame
    epochs = [[training.sample(epoch * 1_500 + i).pixels for i in range(3)] for epoch in (0, 1)]
    assert not all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))
    first = [test.sample(i).label for i in range(20)]
    assert first == [int(label) for label in test.digits.labels[:20]]  # the test part stays in its order
    assert open_world("digits", seed=4)[0].sample(0).draw != training.sample(0).draw
    with pytest.raises(UserError, match="nowhere holds no digits"):
        open_world("nowhere")


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
    assert "text, audio, image, video" in said and "64 bands of 8000 Hz" in said and "# A card" in said


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
