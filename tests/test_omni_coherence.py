"""Judges of digits, and the matrix that they fill."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnilatent.data.digit_world import WORDS, moving, open_world
from omnilatent.metrics.digit_readers import Reader, centred, fit_reader, read_words
from omnilatent.omni.coherence import coherence
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.recipes import debug_omni
from omnilatent.omni.tokenizer import ByteTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import omni_digits  # noqa: E402

TRAINING, TEST = open_world("digits")


def stacked(world, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN001
    samples = [world.sample(i) for i in range(count)]
    return torch.stack([getattr(s, name) for s in samples]), torch.tensor([s.label for s in samples])


@pytest.fixture(scope="module")
def reader() -> Reader:
    state = torch.get_rng_state()
    found = fit_reader(*stacked(TRAINING, "image", 600), *stacked(TEST, "image", 200), steps=60, batch=32)
    assert torch.equal(torch.get_rng_state(), state)  # it leaves everybody else's random numbers alone
    return found


def test_a_judge_reads_held_out_handwriting_and_knows_how_well(reader: Reader) -> None:
    images, labels = stacked(TEST, "image", 200)
    assert reader.accuracy > 0.8 and reader.accuracy == (reader.read(images) == labels).float().mean().item()
    assert reader.features(images[:3]).shape == (3, 128)
    assert not any(p.requires_grad for p in reader.parameters())


def test_a_moving_digit_stands_still_for_its_judge() -> None:
    video = moving(TEST.sample(0).pixels, [2**63, 2**62, 2**63 + 2**62, 2**60])
    frames = video[:1].transpose(0, 1)
    assert (frames[0] - frames[-1]).abs().max() > 0.5  # it moves
    still = centred(frames)
    assert (still - still[:1]).abs().mean() < 0.02 < frames.mean()


def test_text_is_read_only_as_it_is() -> None:
    assert read_words([*WORDS, "Three", "thre", ""]).tolist() == [*range(10), -1, -1, -1]


def test_the_matrix_has_a_null_a_ceiling_and_a_distance_in_every_cell(reader: Reader) -> None:
    torch.manual_seed(0)
    model = OmniLatentModel(debug_omni().model).eval()
    model.tokenizer = ByteTokenizer()
    readers = {"image": reader, "audio": reader, "video": reader}
    cells = coherence(model, TEST, {name: _any_shape(r) for name, r in readers.items()}, 20, [("image",), ("image", "text")], steps=0)
    assert {source for source, _ in cells} == {"image", "image+text"} and len(cells) == 8
    assert cells["image", "text"].ceiling == 1.0 and cells["image", "text"].frechet is None
    assert cells["image", "image"].ceiling == reader.accuracy and cells["image", "image"].frechet > 1
    assert cells["image", "image"].psnr is not None and cells["image+text", "image"].psnr is None


def _any_shape(reader: Reader) -> Reader:
    """The image judge, shown the first frame of a video, and a sound as a picture."""
    class Shown(Reader):
        accuracy = reader.accuracy

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def features(self, data: torch.Tensor) -> torch.Tensor:
            picture = data[:, :, 0] if data.ndim == 5 else data[:, None, :32, :32].expand(-1, 3, -1, -1) if data.ndim == 3 else data
            return reader.features(picture)

        def forward(self, data: torch.Tensor) -> torch.Tensor:
            return reader.last(self.features(data))

    return Shown()


def test_a_model_that_copies_is_read_as_well_as_the_real_thing(reader: Reader) -> None:
    """The matrix against an oracle: a model whose pictures are its source's own."""
    class Copies(OmniLatentModel):
        def answer(self, source, target, size=None, generator=None, steps=None):  # noqa: ANN001, ANN202
            return self.shown if target == "image" else super().answer(source, target, size, generator, steps)

        def read(self, inputs, vectors=None, keep=False):  # noqa: ANN001, ANN202
            self.shown = inputs["image"]
            return super().read(inputs, vectors, keep)

    model = Copies(debug_omni().model).eval()
    model.tokenizer = ByteTokenizer()
    shown = _any_shape(reader)
    cell = coherence(model, TEST, {"image": shown, "audio": shown, "video": shown}, 200, [("image",)], steps=0)["image", "image"]
    assert cell.accuracy == reader.accuracy and cell.null < 0.3 and cell.frechet == pytest.approx(0, abs=1e-3) and cell.psnr == 100


def test_a_trial_is_not_written_over_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni_digits, "RESULTS", tmp_path / "record.json")
    trial = omni_digits.OmniDigits("digits", small=True)
    omni_digits.write(trial, {"steps": 60})
    assert not any(tmp_path.iterdir())
    omni_digits.write(replace(trial, results=tmp_path / "trial.json"), {"steps": 60})
    omni_digits.write(replace(trial, small=False), {"steps": 12_000})
    assert (tmp_path / "record.json").read_text(encoding="utf-8") == json.dumps({"omni": {"steps": 12_000}}, indent=1) + "\n"
    assert (tmp_path / "trial.json").exists()
