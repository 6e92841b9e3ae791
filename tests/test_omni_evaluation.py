"""`omnilatent evaluate` of an any-to-any model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnilatent.cli.main import main
from omnilatent.omni.diagnostics import ABOUT, contributions, diagnose, effective_rank, ranks
from omnilatent.omni.evaluation import latents, psnr, reconstruction, translation, written_exactly
from omnilatent.omni.examples import collate, open_examples
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.recipes import debug_omni
from omnilatent.omni.saving import save
from omnilatent.omni.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def model() -> OmniLatentModel:
    torch.manual_seed(0)
    return OmniLatentModel(debug_omni().model).eval()


@pytest.fixture(scope="module")
def data(model: OmniLatentModel) -> dict[str, torch.Tensor]:
    held_out = open_examples("digits", None, 0, model.config)[1]
    return collate([held_out.sample(i) for i in range(8)], ByteTokenizer())


def test_figures_have_their_nulls(model: OmniLatentModel, data: dict[str, torch.Tensor]) -> None:
    whole = reconstruction(model, data)
    assert set(whole) == {"text", "audio", "image", "video"} and set(whole["image"]) == {"mse", "psnr", "cosine"}
    pairs = translation(model, data)
    assert len(pairs) == 8 and all(f["valid"] == 1 for f in pairs.values())
    assert all(f["moves"] > 0 for f in pairs.values())
    found = latents(model, data)
    assert found["image↔video"]["chance"] == 1 / 8 and len(found) == 4 + 6


def test_the_figures_of_one_example() -> None:
    true = torch.zeros(3, 2, 5)
    assert psnr(torch.stack([true[0], true[0] + 0.1, true[0] + 1]), true).tolist() == pytest.approx([100, 20, 0], abs=1e-4)
    wanted = torch.tensor([[5, 6, 0], [5, 6, 7], [5, 6, 7]])
    assert written_exactly(torch.tensor([[5, 6], [5, 6], [5, 6]]), wanted).tolist() == [True, False, False]
    assert written_exactly(torch.tensor([[5, 6, 0, 8], [5, 6, 7, 0], [5, 6, 7, 8]]), wanted).tolist() == [False, True, False]


def test_a_model_that_looks_at_no_source_does_not_move(data: dict[str, torch.Tensor]) -> None:
    class Deaf(OmniLatentModel):
        def read(self, inputs, vectors=None, keep=False):  # noqa: ANN001, ANN202
            return super().read({name: torch.full_like(t, 5) if name == "text" else torch.zeros_like(t)
                                 for name, t in inputs.items()}, vectors, keep)

    pairs = translation(Deaf(debug_omni().model).eval(), data)
    assert all(f["moves"] < 1e-5 for f in pairs.values())


def test_latents_that_are_one_find_each_other(data: dict[str, torch.Tensor]) -> None:
    class Oracle(OmniLatentModel):
        def read(self, inputs, vectors=None, keep=False):  # noqa: ANN001, ANN202
            source = super().read(inputs, vectors, keep)
            return replace(source, latent=torch.eye(8, 32))

    found = latents(Oracle(debug_omni().model).eval(), data)
    assert found["text↔video"] == pytest.approx({"cosine": 1, "cosine_of_others": 0, "recall_at_1": 1, "chance": 1 / 8})


def test_diagnostics_add_up(model: OmniLatentModel, data: dict[str, torch.Tensor]) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = diagnose(model, data, calls=1)
    sizes = found["parameters"]
    assert sizes["all"]["parameters"] == sum(p.numel() for p in model.parameters())
    for title in ("parameters", "time", "loss"):
        assert sum(row["share"] for name, row in found[title].items() if name != "all") == pytest.approx(1)
    ranks = found["effective rank"]
    assert all(1 <= rank[what] <= rank[f"{what} at most"] for rank in ranks.values() for what in ("entering", "leaving", "latents"))
    assert ranks["text"]["latents at most"] == 7 and set(ABOUT) == set(found)
    assert len(found["layers"]) == 2 * model.config.num_layers and found["scaling"]["image"]["1 times"] == 1
    assert found["sizes"]["half the layers"]["parameters, times"] < 1 > found["sizes"]["half the width"]["parameters, times"]
    hooks = found["hooks"]
    assert all(hooks["fresh, gates at σ(−4)"][name] < hooks["fresh, gates open"][name] for name in data)
    assert not model.hooks and all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_padding_counts_in_no_figure(model: OmniLatentModel, data: dict[str, torch.Tensor]) -> None:
    text, longer = {"text": data["text"]}, {"text": torch.nn.functional.pad(data["text"], (0, 9))}
    for measure in (ranks, contributions):
        one, other = measure(model, text), measure(model, longer)
        assert all(other[row] == pytest.approx(one[row], rel=1e-3) for row in one)


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    rows = torch.cat((torch.eye(5), -torch.eye(5)))
    assert effective_rank(rows) == pytest.approx(5) and effective_rank(rows[:, :1]) == pytest.approx(1)


def test_the_command_writes_what_it_says(model: OmniLatentModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "model"
    run.mkdir()
    save(run, model, ByteTokenizer(), None, "card")
    assert main(["evaluate", str(run), "--count", "4", "--output", str(tmp_path / "figures.json")]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert set(record["translate"]) >= {"image→text", "text→video"} and "reconstruct, 4 examples of digits/test" in said
    assert main(["evaluate", str(run), "--mode", "latent", "--count", "4"]) == 0
    assert "recall at 1" in capsys.readouterr().out
    for argv, sentence in ((["--count", "1"], "take at least 2 examples"), (["--mode", "file"], "takes --input-file FILE"),
                           (["--target", "text"], "--target is for --mode file: leave it out with --mode all"),
                           (["--data", "nowhere"], "nowhere")):
        assert main(["evaluate", str(run), *argv]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", "kl-f8-small", "--mode", "all"]) == 2
    assert "is a model of the kind 'kl'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["evaluate", "MODEL", "--count", "2"], ["bench", "debug-omni", "--batch-size", "2"],
                                  ["bench", "pixels"], ["evaluate", "pixels", "--data", "photos"]])
def test_figures_that_cannot_be_written_are_refused_before_anything_is_measured(
    argv: list[str], model: OmniLatentModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    save(tmp_path / "model", model, ByteTokenizer(), None, "card")
    argv = [str(tmp_path / "model") if word == "MODEL" else word for word in argv]
    taken = tmp_path / "a file"
    taken.touch()
    for file, sentence in ((tmp_path, f"--json {tmp_path} is a folder: give a file, such as {tmp_path / 'results.json'}."),
                           (taken / "x.json", f"--json {taken}: {taken} is a file: give a folder.")):
        assert main([*argv, "--json", str(file)]) == 2
        told = capsys.readouterr()
        assert told.err == f"omnilatent: {sentence}\n" and not told.out


def test_a_benchmark_takes_no_more_examples_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "debug-omni", "--batch-size", "298"]) == 2
    assert capsys.readouterr().err == "omnilatent: --batch-size 298: digits/test has 297 examples; take no more.\n"
