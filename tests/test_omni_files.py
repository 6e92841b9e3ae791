"""What the any-to-any model learns from and writes: sound and its mel spectrograms, tokenizers, the digits world."""

import math
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from clips import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from test_digits import write_set
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from omnilatent import OmniLatentConfig, OmniLatentModel, UserError
from omnilatent.cli.main import main
from omnilatent.data.digit_world import FRAMES, INNER, MEL, TONES, WORDS, moving, open_world
from omnilatent.data.digits import embedded_digits
from omnilatent.data.mel import MelSpec, _filters, read_sound, write_sound
from omnilatent.omni.config import PairConfig
from omnilatent.omni.saving import load
from omnilatent.omni.tokenizer import ByteTokenizer, LibraryTokenizer, open_tokenizer, pad
from omnilatent.training import Trainer, collate_multimodal
from omnilatent.training.config import RunConfig

SPECS = {"default": MelSpec(), "digits": MEL}


# -- sound ---------------------------------------------------------------------------------------------------------


def spoken(spec: MelSpec, seconds: float = 1.0) -> Tensor:
    """A gliding voice with overtones that fall off, in syllables."""
    time = torch.arange(round(spec.rate * seconds)) / spec.rate
    phase = torch.cumsum(120 + 20 * torch.sin(4 * math.pi * time), 0) * (2 * math.pi / spec.rate)
    voice = torch.stack([torch.sin(k * phase) / k for k in range(1, 20)]).sum(0)
    return 0.1 * voice * torch.sin(6 * math.pi * time).square()


def edges(spec: MelSpec) -> np.ndarray:
    """Hz of the bands' edges and centres."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (spec.low, spec.high))
    return 700 * (10 ** (np.linspace(low, high, spec.bands + 2) / 2595) - 1)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_sine_is_in_its_band_at_its_level(spec: MelSpec) -> None:
    time = torch.arange(spec.rate) / spec.rate
    sine, at = torch.sin(2 * math.pi * 440 * time), spec.frames(spec.rate) // 2
    middle = {level: spec.to_mel(level * sine)[:, at] for level in (1.0, 0.1)}
    for mel in middle.values():
        assert int(mel.argmax()) == np.abs(edges(spec)[1:-1] - 440).argmin()
    assert middle[1.0].max() == pytest.approx(1, abs=0.01)  # full scale
    assert middle[0.1].max() == pytest.approx(1 - 20 / 80, abs=0.01)  # 20 of 80 dB below it
    assert spec.to_mel(torch.zeros(1_000)).max() == 0
    with pytest.raises(ValueError, match="at least one sample"):
        spec.to_mel(torch.zeros(0))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_sound_that_was_made_from_a_mel_spectrogram_has_it(spec: MelSpec) -> None:
    wave = spoken(spec)
    mel = spec.to_mel(wave)
    back = spec.to_wave(mel)
    assert back.shape == ((mel.shape[1] - 1) * spec.hop,) and back.abs().max() <= 1
    assert torch.equal(back, spec.to_wave(mel))  # the phases begin from one seed
    error = (spec.to_mel(back) - mel).abs().mean()
    noise = spec.to_mel(torch.randn(len(wave), generator=torch.Generator().manual_seed(0)) * wave.std())
    assert error < 0.015 < 0.2 < (noise - mel).abs().mean()
    assert spec.to_wave(torch.zeros(spec.bands, 5)).abs().max() == 0
    batch = spec.to_wave(torch.stack((mel, mel.flip(0))))
    assert batch.shape == (2, len(back))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_filters_are_those_of_another_library_where_no_band_is_too_narrow(spec: MelSpec) -> None:
    theirs = mel_filter_bank(spec.n_fft // 2 + 1, spec.bands, spec.low, spec.high, spec.rate, norm=None, mel_scale="htk").T
    sides, bin_width = np.diff(edges(spec)), spec.rate / spec.n_fft
    wide = (sides[:-1] >= bin_width) & (sides[1:] >= bin_width)
    ours = _filters(spec).numpy()
    assert wide.sum() > 0.9 * spec.bands and np.abs(ours - theirs)[wide].max() < 1e-6
    assert (ours.max(1) > 0.4).all()  # a narrow band hears something too


def test_a_wav_file_comes_back_to_its_last_bit(tmp_path: Path) -> None:
    wave = spoken(MEL)
    wave[:3] = torch.tensor([1.0, -1.0, 1.7])
    write_sound(tmp_path / "sound.wav", wave, MEL.rate)
    back = read_sound(tmp_path / "sound.wav", MEL.rate)
    assert back.shape == wave.shape and (back - wave.clamp(-1, 1)).abs().max() <= 1 / 32768


def test_the_sound_track_of_a_video_is_read(tmp_path: Path) -> None:
    wave = spoken(MEL, 0.5)
    write_clip(tmp_path / "clip.mkv", sound=wave)
    assert (read_sound(tmp_path / "clip.mkv", MEL.rate) - wave).abs().max() <= 1 / 32768
    twice = read_sound(tmp_path / "clip.mkv", 2 * MEL.rate)
    assert abs(len(twice) - 2 * len(wave)) < 64
    write_clip(tmp_path / "silent.mkv")
    with pytest.raises(UserError, match=r"^\S+silent.mkv holds no sound track: give a file that does.$"):
        read_sound(tmp_path / "silent.mkv", MEL.rate)
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(UserError, match=r"broken.wav cannot be read as sound"):
        read_sound(tmp_path / "broken.wav", MEL.rate)


# -- tokenizers ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text())
def test_every_string_has_one_form_in_bytes_and_comes_back(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert all(3 <= i < 259 for i in ids) and len(ids) == len(text.encode("utf-8"))
    padded = pad([ids, ids[: len(ids) // 2]])
    assert ByteTokenizer().decode(padded[0].tolist()) == text and not padded[1, len(ids) // 2 :].any()


def test_bytes_that_are_no_text_and_ids_that_are_no_bytes_do_not_fail() -> None:
    assert ByteTokenizer().decode([0, 1, 2, 0xFF + 3, ord("a") + 3, 5_000]) == "�a"


def library_file(folder: Path) -> Path:
    """A byte-level BPE of Hugging Face's tokenizers, trained on the digits' words."""
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.train_from_iterator(WORDS * 5, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    file = folder / "their-tokenizer.json"
    own.save(str(file))
    return file


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> LibraryTokenizer:
    return LibraryTokenizer(library_file(tmp_path_factory.mktemp("tokenizer")))


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_tokenizer_of_hugging_face_comes_back_too(theirs: LibraryTokenizer, text: str) -> None:
    ids = theirs.encode(text)
    assert all(3 <= i < theirs.vocab_size for i in ids) and theirs.decode([*ids, 2, 0]) == text


def test_a_tokenizer_is_saved_with_the_model(theirs: LibraryTokenizer, tmp_path: Path) -> None:
    assert len(theirs.encode("seven")) == 1  # it learned the word
    assert theirs.encode("!") == [3] and theirs.decode([0, 1, 2, 3]) == "!"  # its own first id comes after ours
    theirs.save(tmp_path)
    assert open_tokenizer(tmp_path).encode("seven eight") == theirs.encode("seven eight")
    (tmp_path / "bytes").mkdir()
    ByteTokenizer().save(tmp_path / "bytes")
    assert isinstance(open_tokenizer(tmp_path / "bytes"), ByteTokenizer)
    with pytest.raises(UserError, match=r"empty lacks its tokenizer \(tokenizer.json or tokenizer.model\)"):
        open_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match=r"none.json is not there: give a tokenizer.json"):
        LibraryTokenizer(tmp_path / "none.json")


def test_a_model_learns_from_writes_and_is_saved_with_a_tokenizer_of_hugging_face(theirs: LibraryTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OmniLatentConfig(hidden_dim=32, num_layers=1, num_heads=2, vocab_size=theirs.vocab_size, modalities=("text", "image"),
                              image_size=(16, 16), batch_size=3, learning_rate=1e-2, max_steps=120, gradient_checkpointing=False)
    colours, texts = torch.eye(3)[..., None, None].expand(-1, -1, 16, 16), ["seven", "seven eight", "nine"]
    batch = collate_multimodal([{"text": torch.tensor(theirs.encode(text)), "image": colour}
                                for text, colour in zip(texts, colours, strict=True)])
    assert batch["text"].max() >= 256 + 3  # a word, which no byte is
    Trainer(OmniLatentModel(config), config, [batch], out=tmp_path / "run", tokenizer=theirs, run=RunConfig(device="cpu"),
            pairs=PairConfig(jobs=1, fused_share=0.0, reconstruction_share=0.0)).train()
    model = load(tmp_path / "run")
    assert isinstance(model.tokenizer, LibraryTokenizer) and model.tokenizer.vocab_size == theirs.vocab_size == model.config.vocab_size
    for how in ({}, {"beams": 3}, {"temperature": 9.0}):
        ids = model.generate("image", colours, max_len=20, **how)
        assert ids.min() >= 0 and ids.max() < theirs.vocab_size
        assert ([model.tokenizer.decode(row.tolist()) for row in ids] == texts) == ("temperature" not in how)
    assert all(model.tokenizer.encode(text) == theirs.encode(text) and model.tokenizer.decode(theirs.encode(text)) == text
               for text in (*WORDS, "seven ☂ eight"))


def test_a_recipe_takes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = library_file(tmp_path), tmp_path / "run"
    command = ["train", "debug-omni", "--tokenizer", str(file), "--batch-size", "2", "--validation-examples", "2"]
    assert main([*command, "--steps", "2", "--save-every", "1", "--keep", "1", "--out", str(run)]) == 0
    file.unlink()  # the run has its own,
    shutil.rmtree(run / "final")
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0  # which outlives the checkpoint that it was read from
    model = load(run)
    assert isinstance(model.tokenizer, LibraryTokenizer) and model.config.vocab_size == model.tokenizer.vocab_size > 259
    assert not (run / "step-1").exists() and not (run / "step-2").exists()
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "their-tokenizer.json is not there: give a tokenizer.json or a sentencepiece .model" in capsys.readouterr().err
    assert main([*command, "--init", str(run), "--out", str(tmp_path / "other")]) == 2
    assert "has its own, which its weights know" in capsys.readouterr().err


def test_a_file_that_is_no_tokenizer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: str) -> None:
        raise RuntimeError("no model proto")

    monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=refuse))  # it is no dependency
    for name, sentence in (("own.json", "own.json is no tokenizer of Hugging Face (expected ident at line 1 column 2)"),
                           ("own.model", "own.model is no sentencepiece model (no model proto)")):
        (tmp_path / name).write_text("nothing", encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(f"{sentence}: copy it again from its source.")):
            LibraryTokenizer(tmp_path / name)


def test_a_sentencepiece_model_plugs_in(tmp_path: Path) -> None:
    pieces = pytest.importorskip("sentencepiece", exc_type=ImportError)
    pieces.SentencePieceTrainer.train(sentence_iterator=iter(WORDS * 20), model_prefix=str(tmp_path / "own"), vocab_size=40,
                                      hard_vocab_limit=False, minloglevel=2)
    own = LibraryTokenizer(tmp_path / "own.model")
    assert own.decode([*own.encode("seven"), 2, 0]) == "seven" and min(own.encode("seven")) >= 3
    own.save(tmp_path)
    assert open_tokenizer(tmp_path).encode("eight") == own.encode("eight")


# -- the digits world ----------------------------------------------------------------------------------------------


def test_an_example_is_a_function_of_seed_and_position() -> None:
    training, again, other = open_world("digits")[0], open_world("digits")[0], open_world("digits", seed=1)[0]
    for position in (3, 1_499, 1_500, 40_000):
        one, same, another = (world.sample(position) for world in (training, again, other))
        assert one.label == same.label
        assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in ("image", "audio", "video"))
        assert not torch.equal(one.audio, another.audio)
    epoch = [training.sample(position).label for position in range(len(training))]
    assert len(training) == 1_500 and np.array_equal(np.bincount(epoch), np.bincount(training.digits.labels))
    assert not torch.equal(training.sample(0).audio, training.sample(1_500 + epoch.index(epoch[0])).audio)


def test_the_test_part_stays_as_it_is_and_shares_no_handwriting() -> None:
    training, test = open_world("digits")
    assert len(test) == 297 and not test.varied
    for position in (0, 5, 296):
        first, later = test.sample(position), test.sample(position + 297)
        assert first.label == later.label == int(test.digits.labels[position]) and torch.equal(first.image, later.image)
        assert torch.equal(first.audio, test.sample(position).audio)
    seen = {pixels.tobytes() for pixels in training.digits.pixels}
    assert not any(pixels.tobytes() in seen for pixels in test.digits.pixels)


def test_the_modalities_of_an_example_agree() -> None:
    world = open_world("digits")[0]
    heard: dict[int, list[int]] = {}
    for position in range(60):
        sample = world.sample(position)
        image, video = sample.image, sample.video
        assert sample.text == WORDS[sample.label] and image.shape == (3, 32, 32) and video.shape == (3, FRAMES, 32, 32)
        assert torch.equal(image[0, 2:30, 2:30], sample.pixels)
        mass = video[0].sum((1, 2))  # the digit is whole in every frame, whatever it does at the borders
        assert torch.allclose(mass, mass[0].expand(FRAMES), rtol=1e-5)
        assert mass[0] == pytest.approx(float(image[0].sum()) * (INNER / 28) ** 2, rel=0.1)
        assert 0 <= min(image.min(), video.min()) and max(image.max(), video.max()) <= 1
        heard.setdefault(sample.label, []).append(int(sample.audio.mean(1).topk(1).indices))
    # what is loudest throughout is one of the key's two tones
    centres = edges(MEL)[1:-1]
    for label, bands in heard.items():
        assert all(min(abs(centres[band] - hertz) for hertz in TONES[label]) < 60 for band in bands)


def test_a_digit_moves_straight_on_and_turns_round_at_the_border() -> None:
    pixels = torch.ones(28, 28)
    still, fast = (moving(pixels, [2**63, 2**63, 2**63, speed]) for speed in (2**63, 2**64 - 1))
    assert torch.equal(still, still[:, :1].expand_as(still))
    lefts = [int(frame.any(0).nonzero()[0]) for frame in fast[0]]
    assert lefts == [6, 9, 12, 9, 6, 3, 0, 3]


def fsdd(tar: Path, names: Iterable[str], pitch: int = 0) -> None:
    """Recordings of half a second, each a tone of 100 Hz more for each next digit."""
    tar.parent.mkdir(exist_ok=True)
    time = torch.arange(MEL.rate // 2) / MEL.rate
    with tarfile.open(tar, "w") as archive:
        for name in names:
            write_sound(tar.with_suffix(".wav"), 0.5 * torch.sin(2 * math.pi * (500 + pitch + 100 * int(name[0])) * time), MEL.rate)
            archive.add(tar.with_suffix(".wav"), f"recordings/{name}.wav")


def hertz(wave: Tensor) -> float:
    return float(torch.fft.rfft(wave).abs().argmax()) * MEL.rate / len(wave)


def test_a_world_of_mnists_files_and_recordings(tmp_path: Path) -> None:
    write_set(tmp_path / "mnist", ".xz", n=40)
    write_set(tmp_path / "mnist", n=20, part="t10k")
    fsdd(tmp_path / "fsdd" / "train.tar", [f"{digit}_{who}_{n}" for digit in range(10) for who in ("ann", "bo_b") for n in range(2)])
    fsdd(tmp_path / "fsdd" / "test.tar", [f"{digit}_cy_0" for digit in range(10)], pitch=1_500)
    training, test = open_world(str(tmp_path))
    assert len(training) == 40 and len(test) == 20 and len(training.recordings) == 40 and len(test.recordings) == 10
    assert {r.speaker for r in training.recordings} == {"ann", "bo_b"} and {r.speaker for r in test.recordings} == {"cy"}
    assert [r.digit for r in test.recordings] == list(range(10)) and all(len(r.wave) == MEL.rate // 2 for r in test.recordings)
    for position in range(20):
        held_out, later = test.sample(position), test.sample(position + 20)
        assert held_out.label == test.digits.labels[position] and held_out.text == WORDS[held_out.label]
        assert held_out.wave.shape == (8_064,) and held_out.audio.shape == (64, 64) and torch.equal(held_out.wave, later.wave)
        assert hertz(held_out.wave) == pytest.approx(2_000 + 100 * held_out.label, abs=2)
        sample = training.sample(position)
        assert sample.wave.shape == (8_064,) and torch.equal(sample.wave, training.sample(position).wave)
        assert 0.84 < (500 + 100 * sample.label) / hertz(sample.wave) < 1.16  # its own digit's, slower or faster
    draws = [training.sample(position).draw for position in (0, 1)]
    assert not torch.allclose(*(training.wave(3, draw) for draw in draws), atol=1e-2)
    assert torch.equal(*(test.wave(3, draw) for draw in draws))  # there is one recording of three
    fsdd(tmp_path / "fsdd" / "test.tar", [f"{digit}_cy_0" for digit in range(10) if digit != 7])
    with pytest.raises(UserError, match="test.tar holds no recording of seven: expected DIGIT_SPEAKER_NUMBER.flac for every digit"):
        open_world(str(tmp_path))


def test_a_world_without_labels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlabelled = embedded_digits()
    unlabelled.labels = None
    monkeypatch.setattr("omnilatent.data.digit_world.embedded_digits", lambda: unlabelled)
    with pytest.raises(UserError, match="digits: the digits world needs labels and test pictures"):
        open_world("digits")
    with pytest.raises(UserError, match="holds no digits: give 'digits', or a folder with MNIST's files"):
        open_world(str(tmp_path))
