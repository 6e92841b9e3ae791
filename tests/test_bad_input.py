"""Bad input, end to end: every command line ends with one sentence on stderr and exit code 2, and loses nothing."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from omnilatent import hub
from omnilatent.autoencoders.task import AutoencoderTask
from omnilatent.cli.main import main
from omnilatent.errors import UserError
from omnilatent.report.record import read_report

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
TRAIN = ["train", "debug", "--data", "synthetic"]
QUICK = ["--size", "32", "--no-health", "--no-speed", "--metrics", "psnr"]
SHORT = ["--device", "cpu", "--workers", "0", "--steps", "4", "--save-every", "2", "--validate-every", "4"]


def photo(path: Path, seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six readable images."""
    for number in range(6):
        photo(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 4 steps and its photos; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    for number in range(6):
        photo(folder / "photos" / f"{number}.png", number)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "debug", "--data", str(folder / "photos"), "--out", str(folder / "run"), *SHORT]) == 0
    return folder / "run", folder / "photos"


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, to be spoiled."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must be refused; return its one sentence. `before`: output may precede it."""

    def refused(*argv: object, before: bool = False) -> str:
        capsys.readouterr()
        code = main([str(part) for part in argv])
        out, error = capsys.readouterr()
        lines = error.splitlines()
        assert code == 2, (code, error)
        assert "Traceback" not in error and lines[-1].startswith("omnilatent: ") and lines[-1].endswith("."), error
        assert before or len(lines) == 1, error
        return lines[-1].removeprefix("omnilatent: ")

    return refused


def left_over(folder: Path) -> list[Path]:
    return [*folder.rglob(".writing-*"), *folder.rglob(".retired-*")]


# ---------------------------------------------------------------------------------------------------------------
# Images that cannot be read


def truncated_jpeg(path: Path) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


def header_of_a_huge_png(path: Path) -> None:
    """100,000 x 100,000 pixels, of which hardly one is there: whoever decodes them fails in another way."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\0\0"))]
    written = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
               for kind, body in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def forbidden(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file: run the tests as another user to see one refused")
    photo(path)
    path.chmod(0)


UNREADABLE = {
    "truncated.jpg": (truncated_jpeg, "is damaged or truncated"),
    "zero.jpg": (lambda path: path.touch(), "is empty (0 bytes): delete it or copy it again"),
    "text.png": (lambda path: path.write_text("no picture"), "is not an image that Pillow"),
    "huge.png": (header_of_a_huge_png,
                 "has 100000 x 100000 pixels, above the limit of 1000000: raise --max-pixels or make the image"),
    "forbidden.png": (forbidden, "may not be read (permission denied)"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), "does not exist (any more): check the path"),
    "loop.png": (lambda path: path.symlink_to("loop.png"), "cannot be opened (Too many levels of symbolic links)"),
    "bytes\udcff.png": (lambda path: path.write_text("no picture"), "is not an image that Pillow"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_among_others_is_skipped_aloud(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = UNREADABLE[name]
    make(photos / name)
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "debug", "--data", str(photos), "--val", str(photos), "--out", str(run),
                 "--max-pixels", "1000000", *SHORT]) == 0
    assert f"1 unreadable image skipped, listed in {run / 'skipped.jsonl'}" in capsys.readouterr().out
    assert main(["compare", "pixels", "--data", str(photos), "--out", str(out), "--max-pixels", "1000000", *QUICK]) == 0
    assert "1 unreadable file(s) skipped, listed in skipped.jsonl; the first:" in capsys.readouterr().err
    for folder in (run, out):
        (row,) = map(json.loads, (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines())
        assert row["file"] == name and row["reason"].startswith(reason), row
    (evaluation,) = read_report(out / "report.json")
    assert evaluation.figures["psnr"].n == 6 and evaluation.conditions["skipped"] == 1


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_alone_is_an_error(name: str, tmp_path: Path, refused: Refused) -> None:
    make, reason = UNREADABLE[name]
    make(tmp_path / name)
    limit = ["--max-pixels", "1000000"]
    shown = name.replace("\udcff", "\\udcff")
    sentence = refused("compare", "pixels", "--data", tmp_path, "--out", tmp_path / "out", *limit, *QUICK, before=True)
    assert sentence.startswith("None of the 1 images of ") and f"{shown} {reason}" in sentence
    assert not (tmp_path / "out").exists()
    data = tmp_path / "train"
    data.mkdir()
    shutil.move(tmp_path / name, data / name)
    sentence = refused("train", "debug", "--data", data, "--val", "photos", "--out", tmp_path / "run", *limit, *SHORT)
    assert sentence.startswith("None of the 1 images of train can be read") and f"{shown} {reason}" in sentence
    assert not (tmp_path / "run" / "run.json").exists(), "the same command works once the data is mended"


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda folder: folder.mkdir(), "{data} holds no image (it is empty): give a folder with "),
    (lambda folder: None, "{data} does not exist: give a folder, an image, a .tar or several, 'synthetic', "),
    (lambda folder: (folder.mkdir(), (folder / "a.txt").touch()), "{data} holds no image (files: 1 with .txt): give "),
    (lambda folder: folder.write_text("x"), "{data} is neither a folder, an image, a video nor a .tar: give one of these"),
    (lambda folder: folder.symlink_to(folder), "{data} does not exist: give a folder"),
])
@pytest.mark.parametrize("command", [["train", "debug"], ["compare", "pixels"]])
def test_no_data(
    make: Callable[[Path], object], sentence: str, command: list[str], tmp_path: Path, refused: Refused
) -> None:
    data = tmp_path / "d"
    make(data)
    assert refused(*command, "--data", data, "--out", tmp_path / "out").startswith(sentence.format(data=data))
    assert not (tmp_path / "out").exists()


def test_names_with_everything_in_them(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are no markup, commas and braces no list; quotes, newlines and bytes that are not UTF-8 survive."""
    data = tmp_path / "a [/b] {1,2} \"q\" 's' ü\n;$(rm)\udcff"
    names = ["a b.png", "[/red].png", "{1..3}.png", '"q".png', "it's.png", "new\nline.png", "日本.png", "*?.png",
             "-rf.png", "a,b.png", "<b>&.png", "%s.png", "bytes\udcfe.png"]
    for number, name in enumerate(names):
        photo(data / name, number)
    (data / "loop").symlink_to(".")
    run, out = tmp_path / "run [/x]\n", tmp_path / "out [/y]"
    assert main(["train", "debug", "--data", str(data), "--out", str(run), *SHORT]) == 0
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    labels = ["L [/red] <b> \"q\" ü", "second"]
    codecs = [f"{label}:{name}" for label, name in zip(labels, (trained[0], "pixels"), strict=True)]
    assert main(["compare", *codecs, str(run), "--data", str(data), "--out", str(out), *QUICK]) == 0
    assert "Traceback" not in capsys.readouterr().err
    evaluations = read_report(out / "report.json")
    assert [e.label for e in evaluations][:2] == labels and sorted(evaluations[0].keys) == sorted(names)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<b> " not in page.split("<main>")[1] and "L [/red] &lt;b&gt;" in page
    assert not (out / "skipped.jsonl").exists() and not (run / "skipped.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------
# Models that cannot be read


@pytest.mark.parametrize("suffix", sorted(hub.PICKLES))
def test_a_pickle_given_as_weights(suffix: str, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / f"model{suffix}"
    torch.save({"w": torch.zeros(1)}, file)
    pickle = f"{file} is a pickle, which can run code when loaded: convert it to .safetensors"
    for command in (["info", file], ["compare", file, "--data", "photos"], [*TRAIN, "--init", file]):
        assert refused(*command).startswith(pickle)
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / f"diffusion_pytorch_model{suffix}")
    assert refused("info", folder) == (
        f"{folder} holds only pickled weights (diffusion_pytorch_model{suffix}): convert them to .safetensors.")
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert refused("info", folder).startswith(f"{folder} holds its weights only as a pickle")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_newer_checkpoint_is_refused_and_an_older_one_loads(
    run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "final" / "config.json"
    edit(config, omnilatent={"format": hub.FORMAT + 1, "version": "9.9.9"})
    sentence = (f"{run / 'final'} was written by omnilatent 9.9.9 (format {hub.FORMAT + 1}; this version reads up to "
                f"{hub.FORMAT}): upgrade with 'pip install --upgrade omnilatent'.")
    for command in (["info", run], ["compare", run, "--data", "photos"], [*TRAIN, "--init", run]):
        assert refused(*command) == sentence
    edit(config, omnilatent={"format": hub.FORMAT - 1, "version": "0.0.1"})
    monkeypatch.setitem(hub.UPGRADES, hub.FORMAT - 1, lambda old: {**old, "upgraded": True})
    assert main(["info", str(run)]) == 0 and "f2" in capsys.readouterr().out


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda f: (f / "config.json").write_text("{oh no"), "{0}/config.json is not valid JSON"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "{0}/config.json is not valid JSON"),
    (lambda f: (f / "config.json").write_text("[1]"), "{0}/config.json holds a JSON list, expected an object."),
    (lambda f: edit(f / "config.json", omnilatent={}), "{0}/config.json does not state its format"),
    (lambda f: edit(f / "config.json", kind="magic"), "{0} holds a model of the unknown kind 'magic'"),
    (lambda f: os.truncate(f / "model.safetensors", 5_000), "{0}/model.safetensors is not a readable"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "{0}/model.safetensors is not a readable"),
    (lambda f: (f / "model.safetensors").write_text("x" * 100), "{0}/model.safetensors is not a readable"),
    (lambda f: (f / "model.safetensors").unlink(), "{0}/model.safetensors is missing"),
    (lambda f: save_file({"w": torch.zeros(1)}, f / "model.safetensors"), "{0}/model.safetensors lacks"),
])
def test_a_damaged_checkpoint(spoil: Callable[[Path], object], sentence: str, run: Path, refused: Refused) -> None:
    spoil(run / "final")
    assert refused("info", run).startswith(sentence.format(run / "final"))
    assert refused("compare", "pixels", run, "--data", "photos", before=True).startswith(sentence.format(run / "final"))


def test_a_damaged_single_file(tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"not safetensors")
    assert refused("info", file).startswith(f"{file} is not a readable .safetensors file")


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = "nobody/nothing is no path here, and the hub could not be reached "
    assert refused("info", "nobody/nothing").startswith(start)
    sentence = refused("compare", "pixels", "nobody/nothing", "--data", "photos", before=True)
    assert sentence.startswith(start) and "fetch its config.json and diffusion_pytorch_model.safetensors" in sentence


def test_lpips_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path, refused: Refused
) -> None:
    monkeypatch.setenv("OMNILATENT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    argv = ["train", "debug", "--data", photos, "--out", tmp_path / "run", "--perceptual", "lpips", *SHORT]
    sentence = refused(*argv)
    assert sentence.startswith(f"LPIPS (vgg) needs vgg16-397923af.pth, which is not in {tmp_path} or ")
    assert "fetch https://download.pytorch.org/models/vgg16-397923af.pth into that folder" in sentence
    assert sentence.endswith("or choose --perceptual laplacian, which needs no network.")
    assert main([*map(str, argv[:-len(SHORT) - 1]), "laplacian", *SHORT]) == 0, "and that remedy works"


# ---------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(("argv", "sentence"), [
    (["nonsense"], "there is no command 'nonsense'; there are demo, train, "),
    (["train", "nonsense", "--data", "photos"], "There is no recipe 'nonsense'; there are kl-f8, "),
    (["train", "--data", "photos"], "train begins with a recipe: omnilatent train RECIPE --data DATA; there are kl-f8"),
    ([*TRAIN, "--size", "33"], "--size 33 is not a multiple of the model's downsampling 2."),
    ([*TRAIN, "--batch-size", "6", "--accumulate", "4"],
     "--batch-size 6 does not split into --accumulate 4 equal parts: take a multiple of 4."),
    ([*TRAIN, "--freeze", "encoder"],
     "--freeze keeps the weights of --init, and no --init was given."),
    ([*TRAIN, "--init", "pixels"], "--init pixels has no weights to start from"),
    ([*TRAIN, "--init", "missing"], "missing is neither an existing path, a bundled model"),
    ([*TRAIN, "--val", "missing"], "missing does not exist: give a folder"),
    ([*TRAIN, "--device", "cuda"], "--device cuda: this torch ("),
    ([*TRAIN, "--out", __file__], f"--out {__file__}: {__file__} is a file: give a folder."),
    ([*TRAIN, "--out", f"{__file__}/in"], f"--out {__file__}/in: {__file__} is a file: give"),
    ([*TRAIN, "--out", "x" * 300], f"{'x' * 300}/run.json cannot be read or written (File"),
    ([*TRAIN, "--out", "a\udcff"], "--out a\\udcff holds bytes that are not UTF-8"),
    (["train", "--resume"], "--resume takes a run's folder: omnilatent train --resume runs/NAME."),
    (["train", "--resume="], "--resume takes a run's folder: omnilatent train --resume runs/NAME."),
    (["train", "--resume", "missing"], "--resume missing: there is no run; give the folder that holds its run.json."),
    (["compare", "pixels", "--data", "photos", "--out", f"{__file__}/in"], f"--out {__file__}/in: {__file__} is a"),
    (["evaluate", "pixels", "--data", "photos", "--json", f"{__file__}/in"], f"--json {__file__}: {__file__} is a"),
])
def test_wrong_arguments(
    argv: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here, so that --device cuda is right")
    monkeypatch.chdir(tmp_path)
    assert refused(*argv).startswith(sentence)
    assert not list(tmp_path.rglob("run.json")), "nothing was begun"


def test_taef2_is_no_model_to_start_from(tmp_path: Path, photos: Path, refused: Refused) -> None:
    if not (SHARED / "taef2").exists():
        pytest.skip("the shared folder taef2 is not on this machine")
    argv = ["train", "debug", "--data", photos, "--out", tmp_path / "run", "--init", SHARED / "taef2", *SHORT]
    sentence = refused(*argv)
    assert sentence.startswith(f"--init {SHARED / 'taef2'} holds a model of the class ")


def test_a_run_is_not_overwritten_and_not_changed(trained: tuple[Path, Path], run: Path, refused: Refused) -> None:
    photos = trained[1]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert refused("train", "debug", "--data", photos, "--out", run) == (
        f"{run} holds a run already: go on with --resume {run}, or choose another --out.")
    other = (f"--resume {run} goes on with the model, loss, data, batch and seed that the run began with: start a new "
             f"run with --init {run} to change them.")
    for change in (["--latent-channels", "8"], ["--l1", "2"], ["--data", "synthetic"], ["--lr", "1"],
                   ["--init", "kl-f8-small"], ["--val", "synthetic"], ["--seed", "7"], ["--batch-size", "8"]):
        assert refused("train", "--resume", run, *change) == other
    assert refused("train", "--resume", run, "--steps", "1").endswith(" beyond --steps 1: give more steps.")
    assert refused("train", "kl-f8", "--resume", run) == f"{run} is a run of debug, not of kl-f8: leave the recipe out."
    own = f"--resume {run} goes on in the run's own folder: leave --out out, or copy the folder."
    assert refused("train", "--resume", run, "--out", "elsewhere") == own
    assert refused("train", "--resume", run / "best").startswith(f"{run / 'best'} holds a model but no training state")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


UNKNOWN = "describes no run that this version knows"


@pytest.mark.parametrize(("content", "sentence"), [
    ("{", "is not valid JSON"), ("{}", f"{UNKNOWN} (KeyError: 'options')"),
    ('{"options": {"config": {"recipe": "from-tomorrow"}}}', f"{UNKNOWN} (KeyError: 'from-tomorrow')"),
    ('{"options": {"config": {"recipe": "debug", "run": {"steps": 0}}}}', f"{UNKNOWN} (ValueError: --steps is 0"),
])
def test_a_damaged_run(content: str, sentence: str, run: Path, refused: Refused) -> None:
    (run / "run.json").write_text(content)
    assert refused("train", "--resume", run).startswith(f"{run / 'run.json'} {sentence}")


def test_help_and_argument_errors_import_no_torch(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """One process answers them all, then says which heavy libraries it has imported."""
    run = str(trained[0])
    train = TRAIN
    lines = [
        ["--help"], ["--version"], ["train", "--help"], ["train", "kl-f8", "--help"], ["compare", "--help"],
        ["info", "--help"],
        ["nonsense"], ["train", "nonsense"], ["train", "--data", "photos"], ["train", "debug"], [*train, "--lr", "abc"],
        [*train, "--nonsense", "1"], [*train, "--steps", "0"], [*train, "--batch-size", "6", "--accumulate", "4"],
        [*train, "--freeze", "encoder"], [*train, "--init", "missing"], [*train, "--val", "missing"],
        [*train, "--out", __file__], ["train", "debug", "--data", "missing"], ["train", "--resume", "missing"],
        ["train", "--resume", run, "--l1", "2"], ["compare", "pixels", "--data", "missing"],
        ["compare", "--data", "photos"], ["evaluate", "pixels"], ["export", "pixels"], ["push"],
        ["info", "nonsense"], ["export", "nonsense", "--to", "diffusers", "--out", "x"], [*train, "--init", "pixels"],
    ]
    program = (f"import sys; from omnilatent.cli.main import main; codes = [main(line) for line in {lines!r}]; "
               "print(codes, [m for m in ('torch', 'numpy', 'PIL', 'diffusers', 'huggingface_hub') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    expected = [0] * 6 + [2] * (len(lines) - 6)
    assert done.stdout.splitlines()[-1] == f"{expected} []", done.stdout[-500:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------
# The machine: disk, memory, libraries, signals


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit of this process on the bytes of a file: writing beyond it fails as on a full disk (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(("size", "where"), [(1, "run.json"), (5_000, None), (30_000, "step-6"), (100_000, "step-6")])
def test_a_disk_that_is_full_while_saving_loses_nothing(
    size: int, where: str | None, trained: tuple[Path, Path], run: Path, refused: Refused
) -> None:
    """At 1 byte nothing can be written, at 5,000 no more log, at 30,000 no weights, at 100,000 no optimiser's state."""
    if where is None:
        with (run / "log.jsonl").open("a") as log:
            log.writelines('{"step": 1, "part": "train", "loss": 0.5}\n' for _ in range(200))
    weights = {part: load_file(run / part / "model.safetensors") for part in ("step-2", "final", "best")}
    edit(run / "run.json", command="omnilatent train debug")
    with largest_file(size):
        sentence = refused("train", "--resume", run, "--steps", "8", "--validate-every", "100")
    place = f" while writing {run / where}" if where else ""
    assert sentence == (f"The disk is full or a quota is reached{place}: free space and repeat the command; what was "
                        "saved before is untouched.")
    assert not left_over(run)
    for part, before in weights.items():
        after = load_file(run / part / "model.safetensors")
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert hub.load(run / part).parameter_count() > 0
    assert json.loads((run / "run.json").read_text())["command"] == "omnilatent train debug"
    assert main(["train", "--resume", str(run), "--steps", "8"]) == 0, "with space again it goes on"
    assert json.loads((run / "final" / "config.json").read_text())["training"]["step"] == 8


def test_a_first_save_that_fails_leaves_the_command_repeatable(photos: Path, tmp_path: Path, refused: Refused) -> None:
    argv = ["train", "debug", "--data", photos, "--out", tmp_path / "run", *SHORT]
    with largest_file(30_000):
        assert refused(*argv).startswith("The disk is full or a quota is reached while writing")
    assert not left_over(tmp_path) and main([str(part) for part in argv]) == 0


def test_a_disk_that_is_full_while_writing_other_things(
    run: Path, photos: Path, tmp_path: Path, refused: Refused
) -> None:
    full = "The disk is full or a quota is reached while writing "
    with largest_file(4_000):
        out = tmp_path / "out"
        sentence = refused("compare", "pixels", "--data", photos, "--out", out, *QUICK, before=True)
        assert sentence.startswith(full + str(out))
        folder = tmp_path / "d"
        assert refused("export", run, "--to", "diffusers", "--out", folder).startswith(full + str(folder))
        file = tmp_path / "f.safetensors"
        assert refused("export", run, "--to", "safetensors", "--out", file).startswith(full + str(file))
    assert not left_over(tmp_path) and not folder.exists() and not file.exists()


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(
    photos: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, run = AutoencoderTask.step, tmp_path / "run"

    def poisoned(self: AutoencoderTask, batch: object, position: int) -> dict:
        logged = real(self, batch, position)
        if position == 4:  # what a NaN in the batch's gradients does
            next(self.bare.parameters()).data.fill_(torch.nan)
        return logged

    monkeypatch.setattr(AutoencoderTask, "step", poisoned)
    argv = ["train", "debug", "--data", photos, "--out", run, *SHORT, "--steps", "8"]
    sentence = refused(*argv)
    assert re.fullmatch(rf"The (loss is|weights are) no longer finite by step 6, and training stopped: the last good "
                        rf"checkpoint is {run}/step-4; begin a new run from it with --init {run}/step-4 and a lower "
                        r"--lr or --clip\.", sentence), sentence
    assert not (run / "step-6").exists() and not left_over(run)
    assert all(t.isfinite().all() for t in load_file(run / "step-4" / "model.safetensors").values())
    assert refused(*argv).startswith(f"{run} holds a run already")
    monkeypatch.setattr(AutoencoderTask, "step", real)
    assert main(["train", "--resume", str(run)]) == 0
    assert all(t.isfinite().all() for t in load_file(run / "final" / "model.safetensors").values())
    new = ["train", "debug", "--data", str(photos), "--out", str(tmp_path / "new"), "--init", f"{run}/step-4"]
    assert main([*new, "--lr", "1e-5", *SHORT]) == 0, "the remedy that was named"


def test_a_learning_rate_out_of_this_world(photos: Path, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "run"
    wild = ["--lr", "1e30", "--log-every", "1", "--clip", "0"]
    sentence = refused("train", "debug", "--data", photos, "--out", run, *SHORT, *wild)
    assert " no longer finite by step " in sentence and not (run / "final").exists()
    for weights in run.rglob("model.safetensors"):
        assert all(t.isfinite().all() for t in load_file(weights).values())


@pytest.mark.parametrize("failure", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 140737488355328 bytes. Error code 12 (Cannot allocate memory)"),
])
def test_out_of_memory_names_a_split_that_fits(
    failure: Exception, photos: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AutoencoderTask._generator_part

    def small_memory(self: AutoencoderTask, images: torch.Tensor, *rest: object) -> object:
        if len(images) > 1:
            raise failure
        return real(self, images, *rest)

    monkeypatch.setattr(AutoencoderTask, "_generator_part", small_memory)
    argv = ["train", "debug", "--data", photos, "--out", tmp_path / "run", *SHORT]
    assert refused(*argv) == (
        "Out of memory at step 0 with --batch-size 4 --accumulate 1: --batch-size 4 --accumulate 4 fits and gives the "
        "same gradients; what was saved before is untouched.")
    assert main([*map(str, argv), "--batch-size", "4", "--accumulate", "4"]) == 0, "the remedy that was named"


def test_out_of_memory_with_a_single_image(
    photos: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoencoderTask, "_generator_part", no_memory)
    assert refused("train", "debug", "--data", photos, "--out", tmp_path / "run", *SHORT).startswith(
        "Out of memory at step 0 even with the smallest part of a batch: train smaller crops (--size) or a smaller ")
    monkeypatch.setattr("omnilatent.autoencoders.pixels.PixelCodec._encode", no_memory)
    sentence = refused("compare", "pixels", "--data", photos, *QUICK, "--batch-size", "4", before=True)
    assert sentence == "pixels ran out of memory on 4 images of 32×32: use --batch-size 2."
    monkeypatch.setattr(AutoencoderTask, "setup", no_memory)
    sentence = refused("train", "debug", "--data", photos, "--out", tmp_path / "run2", *SHORT)
    assert sentence == "Out of memory: use a smaller --batch-size, smaller images or a smaller model."


def test_a_torchvision_that_does_not_load(photos: Path, tmp_path: Path) -> None:
    """Beside the CPU build of torch this is what the usual torchvision does. One process for all command lines."""
    fake = tmp_path / "fake" / "torchvision"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    lines = [["compare", "pixels", "--data", str(photos), "--limit", "1", *QUICK, "ssim"],
             ["train", "debug", "--data", str(photos), "--out", "run", *SHORT]]
    program = f"from omnilatent.cli.main import main; print([main(line) for line in {lines!r}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(fake.parent), "OMP_NUM_THREADS": "1"})
    assert done.stdout.splitlines()[-1] == "[2, 2]" and "Traceback" not in done.stderr, done.stderr[-3000:]
    sentences = [line for line in done.stderr.splitlines() if line.startswith("omnilatent: ")]
    assert len(sentences) == 2 and all(re.fullmatch(
        r"omnilatent: torchvision is installed but does not load beside torch \S+ \(operator torchvision::nms does not "
        r"exist\): install the torchvision made for this torch, or remove it with 'pip uninstall torchvision' "
        r"\(omnilatent does not need it\)\.", sentence) for sentence in sentences), sentences


def test_ctrl_c_while_training_saves_and_says_how_to_go_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, run = AutoencoderTask.step, tmp_path / "run"

    def interrupted(self: AutoencoderTask, batch: object, position: int) -> object:
        if position == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, position)

    monkeypatch.setattr(AutoencoderTask, "step", interrupted)
    assert main(["train", "debug", "--data", str(photos), "--out", str(run), *SHORT]) == 130
    assert f"stopped and saved; go on with: omnilatent train --resume {run}" in capsys.readouterr().err
    assert (run / "step-3" / "state.pt").exists() and not (run / "final").exists() and not left_over(run)
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0 and (run / "final").exists()


@pytest.mark.parametrize(("position", "kept"), [
    (3, "the last checkpoint, {run}/step-2, is kept; go on"), (0, "nothing was saved yet; begin again")])
def test_a_second_ctrl_c_says_what_is_kept(
    position: int, kept: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, run = AutoencoderTask.step, tmp_path / "run"

    def interrupted(self: AutoencoderTask, batch: object, at: int) -> object:
        for _ in range(2 * (at == position)):
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, at)

    monkeypatch.setattr(AutoencoderTask, "step", interrupted)
    assert main(["train", "debug", "--data", str(photos), "--out", str(run), *SHORT]) == 130
    sentence = f"omnilatent: stopped at once; {kept.format(run=run)} with: omnilatent train --resume {run}"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0 and (run / "final").exists() and not left_over(run)


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_while_a_run_is_set_up(
    saved: bool, run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoencoderTask, "setup" if saved else "__init__", interrupt)
    new = ["debug", "--data", str(photos), "--out", str(tmp_path / "new"), *SHORT]
    assert main(["train", *(["--resume", str(run)] if saved else new)]) == 130
    kept = f"the last checkpoint, {run / 'final'}, is kept; go on with: omnilatent train --resume {run}"
    assert capsys.readouterr().err.splitlines()[-1] == "omnilatent: " + (
        f"stopped at once; {kept}" if saved else "stopped by Ctrl-C; what was saved before is untouched.")


class Follower:
    """The fabric of a process that is not rank 0, to which rank 0 has sent `sent`."""

    is_global_zero, global_rank, device = False, 1, "cpu"

    def __init__(self, sent: object) -> None:
        self.sent = sent

    def broadcast(self, own: object) -> object:
        assert own is None, "it decided by itself"
        return self.sent


def test_rank_zero_alone_decides_on_the_folder_and_the_checkpoint(
    photos: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    trained_into = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omnilatent.training.loop.launch_fabric", lambda config: fabric)
    monkeypatch.setattr("omnilatent.training.loop.train", lambda *args: trained_into.append((args[2], args[4])) or {})
    fabric = Follower((Path("runs/by-the-clock-of-rank-0"), None))
    assert main(["train", "debug", "--data", str(photos), *SHORT]) == 0
    (run / "final").rename(run / ".retired-final")
    fabric = Follower((run, run / "step-2"))
    assert main(["train", "--resume", str(run)]) == 0
    assert trained_into == [(Path("runs/by-the-clock-of-rank-0"), None), (run, run / "step-2")]
    assert (run / ".retired-final").exists(), "tidying up is rank 0's"
    fabric = Follower(UserError("What rank 0 refuses, all refuse."))
    assert refused("train", "--resume", run) == "What rank 0 refuses, all refuse."


def test_ctrl_c_elsewhere(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("omnilatent.autoencoders.pixels.PixelCodec._encode", interrupt)
    assert main(["compare", "pixels", "--data", str(photos), *QUICK]) == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "omnilatent: stopped by Ctrl-C; what was saved before is untouched."
    assert "Traceback" not in error


@pytest.mark.parametrize(("failure", "code"), [
    (PermissionError(13, "Permission denied", "/some/file"), 2), (ZeroDivisionError("a bug"), None),
    (OSError("a bug"), None),
])
def test_only_failures_of_the_machine_become_sentences(
    failure: Exception, code: int | None, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours keeps its traceback: hiding it would help nobody."""

    def fail() -> str:
        raise failure

    monkeypatch.setattr("omnilatent.cli.info.overview", fail)
    if code is None:
        with pytest.raises(type(failure)):
            main(["info"])
    else:
        start = "/some/file cannot be read or written (Permission denied): "
        assert refused("info") == f"{start}check the path and your rights."


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    command = f"{sys.executable} -m omnilatent info | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_folders_without_the_right_to_write(photos: Path, tmp_path: Path, refused: Refused) -> None:
    """Data may be read-only; what is written elsewhere needs no right to it."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere: run the tests as another user to see it refused")
    photos.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        sentence = refused("train", "debug", "--data", photos, "--out", photos / "run", *SHORT)
        assert sentence == f"--out {photos / 'run'}: nothing may be written into {photos}: choose another folder."
        assert main(["compare", "pixels", "--data", str(photos), "--out", str(tmp_path / "out"), *QUICK]) == 0
    finally:
        photos.chmod(stat.S_IRWXU)
