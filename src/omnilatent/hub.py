"""Load and save: one kind of NAME everywhere, one checkpoint folder for every family.

- `load(NAME)`: an existing path (a run, a checkpoint, a diffusers folder, a single .safetensors file),
  else a bundled model, else a hub id (download.py); `LABEL:NAME` names it in a report.
- `OPENERS`: kind → "module:function", imported on use, so this file knows no family.
- `write_model`, `read_config`: the checkpoint folder (`model.safetensors`, `config.json`, `README.md`).
- `read_tensors`, `open_safetensors`: safetensors files, with a sentence for what is none.
- `new_folder`: a folder written under a temporary name and renamed, so that a kill leaves no half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .download import fetch
from .errors import UserError, is_disk_full

if TYPE_CHECKING:
    import torch

    from .codec import Codec, Provenance
    from .latent import LatentSpec

FORMAT = 1  # of config.json; raise it when older readers would misread what is written
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # format n → n + 1

# kind → "module:function" with the signature (path, name) -> Codec
OPENERS = {
    "kl": "omnilatent.autoencoders.kl:open_checkpoint",
    "pixels": "omnilatent.autoencoders.pixels:open_pixels",
    "gaussian": "omnilatent.autoencoders.gaussian:open_checkpoint",
    "diffusers": "omnilatent.autoencoders.diffusers_codecs:open_folder",
    "single-file": "omnilatent.autoencoders.single_file:open_file",
    "ovae": "omnilatent.organic.native:open_checkpoint",
    "ovae-grid": "omnilatent.organic.dropin:open_checkpoint",
    "ovae-pooled": "omnilatent.organic.pooled:open_checkpoint",
    "taef2": "omnilatent.autoencoders.taef2:open_folder",
    "tiny": "omnilatent.autoencoders.tiny:open_checkpoint",
    "vqgan": "omnilatent.autoencoders.vqgan:open_checkpoint",
}

# kinds of checkpoints that are no codecs, and how a sentence calls them
OTHERS = {"omni": "an any-to-any model, which 'omnilatent translate' takes"}

# recipe name → "module:function" that returns the frozen configuration; importing it never imports torch
RECIPES = {
    "kl-f8": "omnilatent.autoencoders.recipes:kl_f8",
    "kl-f4": "omnilatent.autoencoders.recipes:kl_f4",
    "kl-f16": "omnilatent.autoencoders.recipes:kl_f16",
    "kl-f8-small": "omnilatent.autoencoders.recipes:kl_f8_small",
    "kl-f8-small-gan": "omnilatent.autoencoders.recipes:kl_f8_small_gan",
    "kl-f8-small-c16": "omnilatent.autoencoders.recipes:kl_f8_small_c16",
    "kl-f8-small-c32": "omnilatent.autoencoders.recipes:kl_f8_small_c32",
    "ae-f8": "omnilatent.autoencoders.recipes:ae_f8",
    "ae-f8-small": "omnilatent.autoencoders.recipes:ae_f8_small",
    "tiny-f8": "omnilatent.autoencoders.recipes:tiny_f8",
    "gaussian": "omnilatent.autoencoders.recipes:gaussian",
    "lgq": "omnilatent.autoencoders.recipes_vqgan:lgq",
    "lgq-small": "omnilatent.autoencoders.recipes_vqgan:lgq_small",
    "simvq": "omnilatent.autoencoders.recipes_vqgan:simvq",
    "simvq-small": "omnilatent.autoencoders.recipes_vqgan:simvq_small",
    "vq": "omnilatent.autoencoders.recipes_vqgan:vq",
    "vq-small": "omnilatent.autoencoders.recipes_vqgan:vq_small",
    "fsq": "omnilatent.autoencoders.recipes_vqgan:fsq",
    "fsq-small": "omnilatent.autoencoders.recipes_vqgan:fsq_small",
    "debug": "omnilatent.autoencoders.recipes:debug",
    "omni": "omnilatent.omni.recipes:omni",
    "omni-small": "omnilatent.omni.recipes:omni_small",
    "omni-coco": "omnilatent.omni.recipes:omni_coco",
    "debug-lgq": "omnilatent.autoencoders.recipes_vqgan:debug_lgq",
    "debug-omni": "omnilatent.omni.recipes:debug_omni",
}

WEIGHTLESS = {"pixels": "pixels"}  # name → kind: codecs that have nothing to load
BUNDLED = Path(__file__).parent / "weights"
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Codec:
    """Open a codec for use.

    Args:
        name: an existing path, a bundled model's name, or a hub id `owner/model`, with `LABEL:` before it or not.
        device: where to put it.
        dtype: its floating point type; by default float32, whatever the weights are stored as.

    Raises:
        UserError: the name is none of these, its format is not recognised, its weights are pickles, or the hub
            cannot be reached (the sentence says which file to fetch where).
    """
    label, target = split_label(str(name))
    if target in WEIGHTLESS and not Path(target).exists():
        path, kind = Path(target), WEIGHTLESS[target]
    else:
        path = locate(target)
        kind = recognise(path)
    import torch  # only now: a wrong name is answered at once

    codec = open_kind(kind, path, target)
    codec.label = label or codec.label
    return codec.to(device, dtype or torch.float32)


def split_label(name: str) -> tuple[str | None, str]:
    """`LABEL:NAME` → (LABEL, NAME). A name that is a path as it stands, or that begins with a drive, has no label."""
    label, colon, target = name.partition(":")
    drive = os.name == "nt" and len(label) == 1 and target.startswith(("/", "\\"))
    if not label or not colon or drive or Path(name).exists():
        return None, name
    return label, target


def open_kind(kind: str, path: Path, name: str) -> Codec:
    """Call the opener registered for `kind`.

    Raises:
        UserError: it is no codec.
    """
    refuse_others(kind, name)
    module, function = OPENERS[kind].split(":")
    return getattr(import_module(module), function)(path, name)


def refuse_others(kind: str, name: str) -> None:
    """Raise a UserError where what `name` stands for is a model of ours, and no codec."""
    if kind in OTHERS:
        raise UserError(f"{name} is {OTHERS[kind]}, and no codec: give an autoencoder or a tokenizer here.")


def bundled_names() -> list[str]:
    """The models whose weights ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def locate(target: str) -> Path:
    """The folder or file that a NAME stands for, fetched from the hub if it is a hub id."""
    if not target:
        raise UserError("The name of a codec is empty: give a path, a bundled model or a hub id.")
    path = Path(target).expanduser()
    if path.exists():
        return _newest_part(path)
    if target in bundled_names():
        return BUNDLED / target
    if path.suffix in {".safetensors", *PICKLES}:
        raise UserError(f"There is no file {target}: check the path.")
    if _HUB_ID.fullmatch(target):
        return fetch(target)
    if target in RECIPES:
        raise UserError(
            f"{target} is a recipe without bundled weights: train it with 'omnilatent train {target} --data DATA' "
            "and give the run's folder."
        )
    known = ", ".join([*bundled_names(), *WEIGHTLESS])
    raise UserError(f"{target} is neither an existing path, a bundled model ({known}) nor a hub id owner/model.")


def _newest_part(path: Path) -> Path:
    """A run's folder → its final/, else best/, else newest step-N/; anything else as it is."""
    if not path.is_dir() or (path / "config.json").exists():
        return path
    steps = [step for step in path.glob("step-*") if step.name.removeprefix("step-").isdigit()]
    steps.sort(key=lambda step: int(step.name.removeprefix("step-")), reverse=True)
    for part in [path / "final", path / "best", *steps]:
        if (part / "config.json").exists():
            return part
    return path


def recognise(path: Path) -> str:
    """The kind of what lies at `path`: a key of `OPENERS`.

    Raises:
        UserError: a pickle, or nothing that we read.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return "single-file"
        if path.suffix in PICKLES:
            raise UserError(
                f"{path} is a pickle, which can run code when loaded: convert it to .safetensors "
                "(safetensors.torch.save_file of its state_dict) and give that file."
            )
    if not path.is_dir():
        raise UserError(f"{path} is not a model: give a .safetensors file or a folder with a config.json.")
    if (path / "config.json").exists():
        config = read_json(path / "config.json")
        if "omnilatent" in config:
            return read_config(path)["kind"]
        if isinstance(config.get("_class_name"), str):
            return "diffusers"
    if (path / "vae" / "config.json").exists():
        return "diffusers"
    if all((path / f"taef2_{part}.safetensors").exists() for part in ("encoder", "decoder")):
        return "taef2"
    if (path / "model.safetensors").exists() and not (path / "config.json").exists():
        raise UserError(f"{path} has weights but no config.json, which says what they are: restore it, or take another "
                        "checkpoint of its run.")
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(f"{path} holds only pickled weights ({pickles[0]}): convert them to .safetensors.")
    raise UserError(
        f"{path} is not a model folder: expected a run, a checkpoint or a diffusers folder with its config.json."
    )


# ---------------------------------------------------------------------------------------------------------------
# The checkpoint folder


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, or say which file is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as failure:
        raise UserError(f"{path} is not valid JSON ({failure}): restore it from its source.") from failure
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint of ours, brought to the present format.

    Raises:
        UserError: it was written by a newer omnilatent, or its kind is unknown.
    """
    config = read_json(folder / "config.json")
    written = config.get("omnilatent")
    form = written.get("format") if isinstance(written, dict) else None
    if not isinstance(form, int):
        raise UserError(f"{folder / 'config.json'} does not state its format: restore it from its source.")
    if form > FORMAT:
        raise UserError(
            f"{folder} was written by omnilatent {config['omnilatent'].get('version')} (format {form}; this version "
            f"reads up to {FORMAT}): upgrade with 'pip install --upgrade omnilatent'."
        )
    for older in range(form, FORMAT):
        config = UPGRADES[older](config)
    if config.get("kind") not in OPENERS and config.get("kind") not in OTHERS:
        known = ", ".join(OPENERS)
        raise UserError(f"{folder} holds a model of the unknown kind {config.get('kind')!r}: known are {known}.")
    return config


def write_model(
    folder: Path, kind: str, model: dict[str, Any], spec: LatentSpec | None, tensors: dict[str, torch.Tensor], card: str,
    **more: Any,
) -> None:
    """Write a checkpoint of ours into an existing folder (see `new_folder`).

    Args:
        kind: a key of `OPENERS`.
        model: the model's configuration, enough to rebuild it.
        spec: the latent's; None for a model that is no codec.
        tensors: its state_dict.
        card: the README.md: metrics, data, licence, command.
        more: further JSON entries, such as the resolved training configuration.
    """
    import torch
    from safetensors.torch import save_file

    versions = {"omnilatent": __version__, "torch": torch.__version__}
    config = {"omnilatent": {"format": FORMAT, "version": __version__}, "kind": kind, "model": model,
              "spec": None if spec is None else spec.to_json(), "versions": versions, **more}
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def read_tensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of some safetensors files, in memory of their own (not mapped: the file may be replaced).

    Raises:
        UserError: a file is not safetensors, or is cut short.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with open_safetensors(file) as handle:
            tensors.update((key, handle.get_tensor(key).clone()) for key in handle.keys())
    return tensors


def open_safetensors(file: Path) -> Any:
    """`safetensors.safe_open` with a sentence for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as failure:
        raise UserError(
            f"{file} is not a readable .safetensors file ({failure}): it is cut short or another thing; fetch it again."
        ) from failure


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` on success and vanishes on failure.

    An existing `path` is replaced. A full disk becomes a `UserError`.
    """
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    retired = path.with_name(f".retired-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
            path.rename(retired)
        temporary.rename(path)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException as failure:  # Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)
        if retired.exists() and not path.exists():
            retired.rename(path)
        if is_disk_full(failure):
            raise UserError(f"The disk is full or a quota is reached while writing {path}: free space and repeat "
                            "the command; what was saved before is untouched.") from failure
        raise


def restore_interrupted(run: Path) -> None:
    """Undo what a kill inside `new_folder` left: put back a retired folder, remove half-written ones."""
    for retired in run.glob(".retired-*"):
        original = run / retired.name.removeprefix(".retired-")
        if original.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(original)
    for half in run.glob(".writing-*"):
        shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)


def file_hash(*paths: Path) -> str:
    """The first 16 hex digits of the SHA-256 over the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def provenance_of(folder: Path, name: str, kind: str) -> Provenance:
    """Of a checkpoint folder of ours that was asked for as `name`."""
    from .codec import Provenance

    card = folder / "README.md"
    return Provenance(name=name, kind=kind, weights_hash=file_hash(folder / "model.safetensors"),
                      licence=card_licence(folder), path=str(folder),
                      card=card.read_text(encoding="utf-8") if card.exists() else "")


def card_licence(folder: Path) -> str:
    """What a folder's README.md says of its licence: `license:` of its head, where that is "other" the sentence after
    `Licence:`; else "not stated"."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    head = re.search(r"^license:\s*(.+)$", text, re.M)
    sentence = re.search(r"^Licence: (.+)$", text, re.M)
    found = sentence if sentence and head and head.group(1).strip() == "other" else head
    return found.group(1).strip().removesuffix(".") if found else "not stated"
