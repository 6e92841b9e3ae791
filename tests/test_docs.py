"""The pages are true: their commands and code run, their links lead somewhere, their tables are what was measured.

The commands run in process in a folder as docs/commands.md describes it ("How the tests run a row").
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_commands import PAGES, ROOT, bash_lines, blocks, rows, seed_lines, shortened, text_of
from PIL import Image

import omnilatent.hub
from omnilatent.cli.main import COMMANDS
from omnilatent.cli.main import main as command
from omnilatent.hub import RECIPES

SEEDS = ROOT.parent / "shared" / "seeds"
PLANNED = {"generate"}  # promised, not built
OTHERS = {"make", "pip"}  # first words of lines in bash blocks that are not ours to run
TABLE = rows(text_of("docs/commands.md"))
LINES = [row for row in TABLE if row.ours.startswith("omnilatent ")]
PYTHON = [row for row in TABLE if row.ours.startswith(("omnilatent.", "codec."))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, shards/, photo.jpg, runs/mine (a run of the recipe debug) and vae.safetensors (made of it)."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "photos").mkdir()
    (folder / "shards").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        if i % 2:
            with tarfile.open(folder / "shards" / f"{i // 2:03}.tar", "w") as tar:
                for number in (i - 1, i):
                    tar.add(folder / "photos" / f"{number}.png", f"{number}.png")
    Image.fromarray(pixels[:37, :29]).save(folder / "photo.jpg")
    with contextlib.chdir(folder):
        run("omnilatent train debug --data DATA --out RUN")
        run("omnilatent export RUN --to safetensors --out vae.safetensors")
        (folder / "data" / "annotations").mkdir(parents=True)
        shutil.copytree(folder / "photos", folder / "data" / "train2014")
        captions = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
                    "annotations": [{"image_id": i, "caption": f"noise {i}"} for i in range(4)]}
        (folder / "data" / "annotations" / "captions_train2014.json").write_text(json.dumps(captions), encoding="utf-8")
        run("omnilatent train debug-omni --out runs/omni")
        run("omnilatent train omni-coco --data data/ --out runs/omni-coco")
    return folder


@pytest.fixture
def here(prepared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the prepared folder as the current one, so that no test sees another's runs."""
    folder = shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(omnilatent.hub, "fetch", lambda name: pytest.fail(f"{name} would be fetched from the hub"))
    return folder


def run(line: str) -> str:
    """Run a documented line; what it printed. A failure shows the line and what it said."""
    arguments = shortened(line)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(arguments)
    assert code == 0, f"{line}\nas {arguments}\nended with {code}: {said.getvalue()}"
    return said.getvalue()


# -- the pages' own commands and code ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/omni.md"])
def test_the_commands_of_a_page_run_one_after_the_other(page: str, here: Path) -> None:
    ran = 0
    for block in blocks(text_of(page)):
        for line in bash_lines(block.code) if block.language == "bash" else ():
            if line.startswith("python examples/"):
                _, example, *arguments = shlex.split(line)
                runpy.run_path(str(ROOT / example))["main"]([*arguments, "--steps", "2"])
            elif line.split()[0] not in OTHERS:
                run(line)
                ran += 1
    assert ran >= 8


def test_the_readme_python_runs(here: Path) -> None:
    (code,) = [block.code for block in blocks(text_of("README.md")) if block.language == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    assert names["same"].shape == names["draw"].shape == (1, 3, 37, 29) and names["z"].shape == (1, 4, 5, 4)


def test_the_python_of_the_any_to_any_page_runs(here: Path) -> None:
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for block in blocks(text_of("docs/omni.md")):
            if block.language == "python":
                exec(block.code, names)
    assert names["logits"].shape == (1, 196, 32_000) and set(names["results"]) == {"text", "image"}
    assert Path("runs/own/final/tokenizer.json").exists() and Path("style/hook.safetensors").exists()


@pytest.mark.parametrize(("example", "arguments"), [
    ("walk.py", ["photos/0.png", "photos/1.png", "--size", "32", "--steps", "3"]),
    ("demo.py", ["--out", "demo"]),
    ("own_codec.py", ["--data", "photos/", "--size", "32", "--limit", "2"]),
    ("hooks.py", ["modality", "--model", "runs/omni", "--steps", "2"]),
])
def test_an_example_runs(example: str, arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / example))["main"]
    main(arguments)
    printed = capsys.readouterr().out
    if example == "walk.py":
        with Image.open("walk.png") as strip:
            assert strip.size == (96, 32)
    elif example == "demo.py":
        assert "without it the logits are the same, bit by bit" in printed and Path("demo/three.wav").stat().st_size > 16_000
        with Image.open("demo/pictures.png") as sheet:
            assert sheet.size == (100 + 2 * (20 * 32 + 16), 24 + 2 * 5 * 32)
        read = {name: int(right) for name, right in re.findall(r"from +(\w+): +(\d+) of 10", printed)}
        assert read["text"] == read["image"] == 10 and read["audio"] >= 8 and read["video"] >= 5
        with pytest.raises(SystemExit, match="no-such-model is neither an existing path"):
            main(["--model", "no-such-model"])
    elif example == "hooks.py":
        assert re.search("by touch +[0-9.]+%", printed) and re.search("weights as before +yes", printed)
    else:
        assert "| blocks |" in printed and "| kl-f8-small |" in printed


def test_every_example_is_tested_and_named_in_the_readme() -> None:
    named = set(re.findall(r"\(examples/(\w+\.py)\)", text_of("README.md")))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")} == {"demo.py", "hooks.py", "walk.py", "own_codec.py"}


# -- docs/commands.md ----------------------------------------------------------------------------------------------


WORKING = {row.ours: row for row in LINES if row.state.startswith("works")}  # several of the seeds' are one of ours


@pytest.mark.parametrize("row", WORKING.values(), ids=WORKING)
def test_a_row_that_works_runs(row, here: Path) -> None:
    assert run(row.ours)
    if "--output" in row.ours:
        assert Path("results.json").stat().st_size > 500


@pytest.mark.parametrize("row", [row for row in LINES if row.state.startswith("waits")], ids=lambda row: row.ours)
def test_a_row_that_waits_is_refused_today(row, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise it is built: say so in the table. It is the command, recipe or model that is missing, no more."""
    assert command(shortened(row.ours)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search("there is no command|There is no recipe|there is no run|is neither an existing path|Unrecognized",
                     said), said


@pytest.mark.parametrize("row", PYTHON, ids=lambda row: row.ours)
def test_python_of_the_seeds(row, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"omnilatent": omnilatent, "torch": torch, "images": torch.rand(2, 3, 40, 48),
             "codec": omnilatent.load("runs/mine")}
    if row.state == "works":
        result = eval(row.ours, names)
        shapes = {"reconstruct": (2, 3, 40, 48), ".shape": (2, 3, 37, 29), "kl(": (2,), "sample": (2, 4, 5, 6)}
        expected = next((shape for part, shape in reversed(shapes.items()) if part in row.ours), None)
        assert expected is None or tuple(getattr(result, "shape", result)) == expected
    else:
        with pytest.raises(omnilatent.UserError):
            eval(row.ours, names)


def test_every_row_has_a_state_and_make_rows_are_made() -> None:
    assert len(LINES) + len(PYTHON) + sum(row.state in ("make", "example") for row in TABLE) == len(TABLE) >= 60
    for row in TABLE:
        assert re.match(r"works$|works; .*waits for: \w+$|make$|example$|waits for: \w+$", row.state), row
    makefile = text_of("Makefile")
    assert "pip install" in makefile and "--editable '.[test]'" in makefile and "-m pytest" in makefile


def test_no_command_of_the_seeds_is_forgotten() -> None:
    if not SEEDS.is_dir():
        pytest.skip("the seeds are not beside this checkout (../shared/seeds)")
    texts = [path.read_text(encoding="utf-8") for path in sorted(SEEDS.glob("0*.txt"))]
    listed = {row.seed.strip("`") for row in TABLE}
    page = text_of("docs/commands.md")
    lines = [line for text in texts for line in seed_lines(text)]
    assert len(lines) >= 45 and not [line for line in lines if line not in listed]
    scripts = {name for text in texts for name in re.findall(r"\w+\.py\b", text.replace("\\_", "_"))}
    flags = {flag for text in texts for flag in re.findall(r"(?<=[\s`(])--[a-z][\w-]*", text)}
    assert {"precompute_latents.py", "train_coco.py"} <= scripts and {"--save-every", "--ssv2-dir"} <= flags
    assert not [name for name in [*scripts, *flags] if name not in page]


# -- every page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = text_of(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        heads = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in anchors, f"{page} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/results/*.json", "examples/*.py"])
def test_no_place_of_one_machine_is_named(page: str) -> None:
    for path in ROOT.glob(page):
        text = path.read_text(encoding="utf-8")
        found = re.search(r"(?<![\w.~:/])/(?:work|root|home|tmp|mnt|Users|workspace)\b", text)
        assert not found, f"{path.name} names {found}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_recipes_and_targets_that_a_page_names_exist(page: str) -> None:
    text, planned_recipes = text_of(page), {row.ours.split()[2] for row in LINES if row.state.startswith("waits")}
    for name in re.findall(r"(?:`|^|-m )omnilatent ([a-z]\w*)", text, re.M):
        assert name in COMMANDS or name in PLANNED - set(COMMANDS), f"{page} names the command {name}"
    for name in re.findall(r"omnilatent train ([a-z][\w-]*)", text):
        assert name in RECIPES or name in planned_recipes, f"{page} names the recipe {name}"
    targets = re.findall(r"^([a-z]+):", text_of("Makefile"), re.M)
    for name in re.findall(r"(?:`|^)make ([a-z]+)", text, re.M):
        assert name in targets, f"{page} names the target {name}"


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/experiments.md"])
def test_the_tables_are_those_of_the_results(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    render = runpy.run_path(str(ROOT / "benchmarks" / "render.py"))
    assert render["rendered"](page) == text_of(page), f"{page} is stale: python benchmarks/render.py"


def test_what_is_not_measured_yet_is_said_and_shown_when_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    made = runpy.run_path(str(ROOT / "benchmarks" / "omni_tables.py"))
    assert made["found"]("omni_speed", tmp_path) is None
    for block, script in (("speed", "omni_speed"), ("memory", "omni_speed"), ("digits", "omni_digits")):
        assert made[block](None).startswith(f"Not measured yet: `python benchmarks/{script}.py")
    record = {"device": "a GPU", "torch": "2.13", "batch_size": 16, "parameters": 120_000_000, "generate_ms": 54.0,
              "rows": [{"pair": "image→image", "checkpointing": True, "tokens": 392, "ms": 36.0, "k_tokens": 174.2}],
              "memory": {"peak_allocated_gb": 3.0, "peak_reserved_gb": 3.5, "cap_gb": 8.0}}
    assert "| train image→image | on | 392 | 36.0 | 174 | 72 | 2.0 × |" in made["speed"](record)
    assert "| write 64 tokens, batch 1, not compiled | – | 64 | 54.0 | 1.19 | 540 | 10 × |" in made["speed"](record)
    assert "1.08 (peak less the rows above)" in made["memory"](record) and "| **3.7 to 4.7** | **3.00** allocated" in made["memory"](record)
    cell = {"accuracy": 0.9, "null": 0.1, "ceiling": 1.0, "frechet": None, "psnr": None}
    cells = {"image+text→text": cell, "image→text": cell, "image→image": cell | {"frechet": 1.5, "psnr": 20.0, "ceiling": 0.99},
             "image+text→image": cell}
    run = {"judges": {"image": 0.99}, "ways": {"regression": cells}, "parameters": 5e6, "steps": 10, "seconds": 120, "count": 1_000,
           "device": "a GPU", "torch": "2.13", "data": "data", "recordings": 0.95, "guidance": 2.0,
           "speakers": {"ann": 0.7, "bob": 0.8}, "speakers_steps": 50, "class_mean_psnr": {"image": 13.0}}
    table = made["digits"]({"omni": run})
    rows = ["| image | 90.0 of 100.0 (10.0) | 90.0 of 99.0 (10.0), FD 1.50, 20.0 dB |", "| image + text |"]
    assert -1 < table.index(rows[0]) < table.index(rows[1]) and "--steps 50" in table and "bob 80.0 %; mean 75.0 %" in table


def test_a_kept_report_names_places_of_the_project(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run("omnilatent evaluate own:RUN --data DATA --out reports/own")
    render = runpy.run_path(str(ROOT / "benchmarks" / "render.py"))
    record = json.loads(Path("reports/own/report.json").read_text(encoding="utf-8"))
    record["command"] = "omnilatent compare own:/home/me/a/benchmarks/b --data /mnt/shared/data/kodak --out /tmp/x"
    rfid = record["evaluations"][0]["figures"]["rfid"]
    rfid["note"] = "not in /home/me/.cache/torch: fetch https://example.org/home/x"
    Path("report.json").write_text(json.dumps(record), encoding="utf-8")
    render["add"].__globals__["RESULTS"] = here / "results"
    kept = json.loads(render["add"]("own", here / "report.json").read_text(encoding="utf-8"))
    assert kept["command"] == "omnilatent compare own:benchmarks/b --data ../shared/data/kodak"
    rfid = kept["evaluations"][0]["figures"]["rfid"]
    assert rfid["note"] == "not in ~/.cache/torch: fetch https://example.org/home/x"
    table = render["results_table"]("own", ("psnr", "rfid"))
    assert "| own | " in table and "Not measured: rFID; " in table and kept["command"] in table


def test_the_picture_is_small() -> None:
    assert os.path.getsize(ROOT / "docs" / "report.jpg") <= 300_000
