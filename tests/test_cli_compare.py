"""`compare` and `evaluate`: arguments are checked before torch, codecs before measuring, and the report is whole."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnilatent import hub
from omnilatent.cli.compare import Measuring, choose_device, main
from omnilatent.cli.evaluate import main as evaluate_main
from omnilatent.cli.main import main as omnilatent
from omnilatent.cli.names import distinct, short_label
from omnilatent.errors import UserError
from omnilatent.report.record import read_report

QUICK = ["--size", "32", "--no-health", "--no-speed", "--metrics", "psnr", "ssim", "bits_per_pixel"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three readable images and a truncated one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a JPEG")
    return folder


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["compare", "--data", "photos"], "compare needs codecs to measure: omnilatent compare NAME NAME … --data DATA."),
    (["compare", "nope", "--data", "photos"], "nope is neither an existing path, a bundled model"),
    (["compare", "pixels", "--data", "missing-folder"], "missing-folder does not exist"),
    (["compare", "pixels", "--data", "photos", "--size", "big"], "--size big is no size: give a number of pixels"),
    (["compare", "pixels", "--data", "photos", "--size", "0"], "--size 0 is no size"),
    (["compare", "pixels", "--data", "photos", "--limit", "0"], "--limit 0 is too small: give at least 1."),
    (["evaluate", "pixels", "--data", "photos", "--batch-size", "-1"], "--batch-size -1 is too small"),
    (["evaluate", "pixels", "--data", "photos", "--metrics", "beauty"], "There is no metric 'beauty'"),
    (["evaluate", "pixels", "--data", "photos", "--json", "."], "--json . is a folder: give a file"),
    (["evaluate", "pixels", "--data", "photos", "--out", __file__], "test_cli_compare.py is a file: give a folder."),
])
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert omnilatent(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_and_argument_errors_do_without_torch(tmp_path: Path) -> None:
    """One process answers several command lines, then says which heavy libraries it has imported."""
    lines = [["compare", "--help"], ["evaluate", "--help"], ["compare", "nope", "--data", "photos"], ["evaluate"],
             ["compare", "pixels", "--data", "missing"], ["compare", "pixels", "--data", "x", "--dtype", "int8"],
             ["evaluate", "pixels", "--data", "photos", "--limit", "0"]]
    program = (f"import sys; from omnilatent.cli.main import main; codes = [main(line) for line in {lines!r}]; "
               "print('codes', codes, [m for m in ('torch', 'matplotlib', 'diffusers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines()[-1] == "codes [0, 0, 2, 2, 2, 2, 2] []", done.stdout[-500:] + done.stderr[-500:]


def test_compare_writes_a_report(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    main(["pixels", "again:pixels", "pixels", "--data", str(photos), "--out", str(out), "--pictures", "2", *QUICK])
    printed = capsys.readouterr()
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt", "report.html", "report.json", "skipped.jsonl"]
    evaluations = read_report(out / "report.json")
    assert [e.label for e in evaluations] == ["pixels", "again", "pixels (2)"]
    for evaluation in evaluations:
        assert evaluation.figures["psnr"].value == 100 and evaluation.figures["psnr"].n == 3
        assert evaluation.keys == ["0.png", "1.png", "2.png"] and evaluation.conditions["size"] == 32
        assert set(evaluation.figures) == {"psnr", "ssim", "bits_per_pixel"} and not evaluation.health
    assert [json.loads(row)["file"] for row in (out / "skipped.jsonl").read_text().splitlines()] == ["cut.jpg"]
    assert "1 unreadable file(s) skipped, listed in skipped.jsonl; the first: cut.jpg" in printed.err
    assert "on cpu" in printed.err and "float32" in printed.err, "which device is used is said"
    assert all(text in printed.out for text in (str(out / "report.html"), str(out / "report.json"), "100.00"))
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.count('<article class="row"') == 2 and "pixels (2)" in html and "--metrics psnr" in html


def test_native_size_and_limit(photos: Path, tmp_path: Path) -> None:
    (photos / "cut.jpg").unlink()
    main(["pixels", "--data", str(photos), "--out", str(tmp_path / "out"), "--limit", "2", *QUICK, "--size", "native"])
    (evaluation,) = read_report(tmp_path / "out" / "report.json")
    assert evaluation.conditions["size"] is None and evaluation.conditions["n"] == 2
    assert not (tmp_path / "out" / "skipped.jsonl").exists()


@pytest.mark.parametrize("option", ["--json", "--output"])
def test_evaluate_writes_its_figures_where_asked(
    option: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate_main(["pixels", "--data", str(photos), option, "deep/results.json", *QUICK])
    (folder,) = (tmp_path / "reports").iterdir()
    assert folder.name.startswith("evaluate-") and (folder / "report.html").exists()
    assert (tmp_path / "deep" / "results.json").read_bytes() == (folder / "report.json").read_bytes()


def test_a_codec_that_cannot_decode_stops_before_anything_is_measured(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hub.load

    def load(name: str, *arguments: object) -> object:
        codec = real("pixels", *arguments)
        codec.spec = replace(codec.spec, decodes=name != "only:pixels")
        return codec

    monkeypatch.setattr(hub, "load", load)
    with pytest.raises(UserError, match="^only only encodes: there is no reconstruction to compare; leave it out.$"):
        main(["pixels", "only:pixels", "--data", str(photos), "--out", str(tmp_path / "out"), *QUICK])
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu" and choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"--device cuda: this torch \(.*\) sees no such device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"


def test_labels(tmp_path: Path) -> None:
    assert distinct(["a", "b", "a", "a", "a (2)"]) == ["a", "b", "a (3)", "a (4)", "a (2)"]
    run = tmp_path / "runs" / "kl" / "final"
    run.mkdir(parents=True)
    (run / "vae.safetensors").touch()
    assert short_label(str(run)) == "kl" and short_label(str(run / "vae.safetensors")) == "vae"
    assert short_label("mine:owner/model") == "mine" and short_label("owner/model") == "owner/model"


def test_the_shared_options_accept_their_own_defaults() -> None:
    Measuring(data="photos").check()
    assert Measuring(data="photos").side == 256 and Measuring(data="photos", size="native").side is None
