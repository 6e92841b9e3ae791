"""Names, recognition, formats, and folders that are written whole or not at all."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilatent import LatentSpec, UserError, hub
from omnilatent.errors import is_disk_full

SPEC = LatentSpec(channels=2, downsampling=4)


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A folder that looks like a checkpoint of ours; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    hub.write_model(folder, "kl", {"a": 1}, SPEC, {"w": torch.arange(3.0)}, "---\nlicense: mit\n---\n# Card\n", seed=7)
    config = hub.read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


# Names


@pytest.mark.parametrize(
    ("name", "label", "target"),
    [("Mine:runs/a", "Mine", "runs/a"), ("runs/a", None, "runs/a"), ("A b:owner/m", "A b", "owner/m"),
     ("A:pixels", "A", "pixels"), (":pixels", None, ":pixels"), ("SD:a:b", "SD", "a:b")],
)
def test_labels(name: str, label: str | None, target: str) -> None:
    assert hub.split_label(name) == (label, target)


def test_an_existing_path_with_a_colon_has_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "step:3")
    assert hub.split_label("step:3") == (None, "step:3")
    assert hub.locate("step:3") == Path("step:3")


def test_a_label_names_the_codec() -> None:
    assert hub.load("Null:pixels").label == "Null" and hub.load("pixels").label == "pixels"


def test_bundled_models_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match="kl-f8 is a recipe without bundled weights: train it with 'omnilatent train"):
        hub.load("kl-f8")
    with pytest.raises(UserError, match=r"nonsense is neither an existing path, a bundled model \(pixels\) nor"):
        hub.load("nonsense")
    checkpoint(tmp_path / "kl-f8")
    assert hub.bundled_names() == ["kl-f8"] and hub.locate("kl-f8") == tmp_path / "kl-f8"
    with pytest.raises(UserError, match=r"a bundled model \(kl-f8, pixels\)"):
        hub.load("nonsense")


def test_a_path_wins_over_a_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "weights")
    checkpoint(tmp_path / "weights" / "kl-f8")
    checkpoint(tmp_path / "kl-f8")
    assert hub.locate("kl-f8") == Path("kl-f8")


@pytest.mark.parametrize("name", ["models/vae.safetensors", "a/b.ckpt"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"There is no file {name}"):
        hub.locate(name)


def test_the_registered_functions_exist() -> None:
    from importlib import import_module

    for entry in [*hub.OPENERS.values(), *hub.RECIPES.values()]:
        module, function = entry.split(":")
        assert callable(getattr(import_module(module), function)), entry
    assert set(hub.WEIGHTLESS.values()) <= set(hub.OPENERS)


# Runs


def test_a_run_stands_for_its_final_then_best_then_newest_step(tmp_path: Path) -> None:
    for part in ("step-9", "step-10", "step-x"):
        checkpoint(tmp_path / part)
    (tmp_path / "step-11").mkdir()  # a kill before its config.json: cannot happen through new_folder, but is survived
    assert hub.locate(str(tmp_path)) == tmp_path / "step-10"
    checkpoint(tmp_path / "best")
    assert hub.locate(str(tmp_path)) == tmp_path / "best"
    checkpoint(tmp_path / "final")
    assert hub.locate(str(tmp_path)) == tmp_path / "final"
    assert hub.locate(str(tmp_path / "step-9")) == tmp_path / "step-9"


# Recognition


@pytest.mark.parametrize("suffix", sorted(hub.PICKLES))
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    file = tmp_path / f"model{suffix}"
    torch.save(Bomb(), file)
    with pytest.raises(UserError, match=r"is a pickle, which can run code when loaded: convert it to \.safetensors"):
        hub.load(file)
    with pytest.raises(UserError, match="holds only pickled weights"):
        hub.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match="photo.png is not a model"):
        hub.load(tmp_path / "photo.png")
    with pytest.raises(UserError, match="is not a model folder"):
        hub.load(tmp_path)
    for text, sentence in (("{", "not valid JSON"), ("[]", "holds a JSON list"), ('{"omnilatent": {}}', "its format")):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            hub.load(tmp_path)


# Formats


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = hub.read_config(checkpoint(tmp_path))
    assert config["kind"] == "kl" and config["model"] == {"a": 1} and config["seed"] == 7
    assert LatentSpec.from_json(config["spec"]) == SPEC
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.arange(3.0))
    assert hub.card_licence(tmp_path) == "mit"
    assert hub.card_licence(tmp_path / "absent") == "not stated"


def test_a_newer_format_is_refused_and_an_older_one_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, omnilatent={"format": hub.FORMAT + 1, "version": "9.9"})
    with pytest.raises(UserError, match=rf"by omnilatent 9\.9 \(format {hub.FORMAT + 1}; .* {hub.FORMAT}\): upgrade"):
        hub.load(tmp_path)
    monkeypatch.setattr(hub, "FORMAT", hub.FORMAT + 2)
    monkeypatch.setattr(hub, "UPGRADES", {
        hub.FORMAT - 2: lambda c: {**c, "steps": ["a"]}, hub.FORMAT - 1: lambda c: {**c, "steps": [*c["steps"], "b"]}})
    checkpoint(tmp_path, omnilatent={"format": hub.FORMAT - 2, "version": "0.1"})
    assert hub.read_config(tmp_path)["steps"] == ["a", "b"]


def test_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model of the unknown kind 'future': known are kl, pixels"):
        hub.load(checkpoint(tmp_path, kind="future"))


# Folders


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "best"
    with hub.new_folder(target) as folder:
        (folder / "a").write_text("old", encoding="utf-8")
    with pytest.raises(type(failure)), hub.new_folder(target) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
        raise failure
    assert (target / "a").read_text(encoding="utf-8") == "old" and left_over(tmp_path) == []
    with hub.new_folder(target) as folder:
        assert not (folder / "a").exists()
        (folder / "b").write_text("new", encoding="utf-8")
    assert [p.name for p in target.iterdir()] == ["b"] and left_over(tmp_path) == []


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "best"
    with hub.new_folder(target) as folder:
        (folder / "a").write_text("old", encoding="utf-8")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.startswith(".writing-"):
            raise OSError(errno.EIO, "input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="input/output"), hub.new_folder(target) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
    assert (target / "a").read_text(encoding="utf-8") == "old" and left_over(tmp_path) == []


def test_an_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    checkpoint(tmp_path / ".retired-best")  # killed between the two renames
    checkpoint(tmp_path / ".retired-final"), checkpoint(tmp_path / "final", seed=8)  # killed just after them
    (tmp_path / ".writing-step-3-123").mkdir()
    hub.restore_interrupted(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "final"]
    assert hub.read_config(tmp_path / "final")["seed"] == 8


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of file sizes stands in for a full disk: POSIX only")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "best", seed=1)
    script = textwrap.dedent("""
        import resource, signal, sys, torch
        from pathlib import Path
        from omnilatent import LatentSpec, UserError, hub
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with hub.new_folder(Path(sys.argv[1])) as folder:
                hub.write_model(folder, "kl", {}, LatentSpec(2, 4), {"w": torch.zeros(1_000_000)}, "card")
        except UserError as failure:
            print(failure)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "best")], capture_output=True, text=True)
    assert done.stdout.startswith(f"The disk is full or a quota is reached while writing {tmp_path / 'best'}"), done
    assert hub.read_config(tmp_path / "best")["seed"] == 1 and left_over(tmp_path) == []


def test_which_errors_mean_a_full_disk() -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_disk_full(OSError(code, "x"))
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.ENOENT, "x")) and not is_disk_full(RuntimeError("shape mismatch"))


def test_the_hash_sees_order_and_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"abc"), b.write_bytes(b"def")
    assert hub.file_hash(a) == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2
    assert hub.file_hash(a, b) != hub.file_hash(b, a)


# The hub


@pytest.mark.skipif(os.name != "nt", reason="drives are Windows'")
def test_a_drive_is_no_label() -> None:
    assert hub.split_label("C:/models/a") == (None, "C:/models/a")


@pytest.mark.parametrize("name", ["nobody/nothing", "L:nobody/nothing"])
def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sentence = r"^nobody/nothing is no path here, and the hub could not be reached .*: fetch its config\.json and diffu"
    with pytest.raises(UserError, match=sentence):
        hub.load(name)


def test_a_cards_licence(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert hub.card_licence(tmp_path) == "not stated"
    card.write_text("---\nlicense: mit\n---\nLicence: something else.\n", encoding="utf-8")
    assert hub.card_licence(tmp_path) == "mit"
    card.write_text("---\nlicense: other\n---\nLicence: MIT, photos of others.\n", encoding="utf-8")
    assert hub.card_licence(tmp_path) == "MIT, photos of others"


@pytest.mark.parametrize("name", ["", "label:", "/dev/null"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(UserError, match="is empty|is not a model"):
        hub.load(name)
