"""`omnilatent export NAME --to diffusers --out FOLDER`: a codec, or a store of latents, in another library's format.

- `ExportOptions`, `main`: the command.
- `export_folder`: a diffusers folder with its card, whole or not at all.
- `export_file`: one .safetensors file that also states its class and configuration.
- `export_store`: a store of latents as WebDataset's tar files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from .. import __version__, hub
from ..errors import UserError, is_disk_full
from .info import card_body
from .names import check_names
from .parse import parse

if TYPE_CHECKING:
    from ..codec import Codec


@dataclass(frozen=True)
class ExportOptions:
    """Write a codec, or a store of latents, in another library's format."""

    name: tyro.conf.Positional[str]
    """A path, a bundled model or a hub id; with --to webdataset a store's folder."""
    to: Literal["diffusers", "safetensors", "webdataset"]
    """A folder that diffusers' from_pretrained opens, one .safetensors file with diffusers' tensor names, or tar files
    as the WebDataset library reads them."""
    out: Path
    """The folder or file to write."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Floating point type of the written weights, by default float32; with --to webdataset of the latents, by default
    the one they are stored in."""
    rows_per_shard: int = 10_000
    """Rows of a tar, with --to webdataset."""
    overwrite: bool = False
    """Replace what is at --out."""


def main(argv: list[str]) -> None:
    options = parse(ExportOptions, "export", argv)
    out = options.out.expanduser().resolve()
    check_target(out, options.to, options.overwrite)
    if options.to == "webdataset":
        export_store(Path(options.name).expanduser(), out, options.rows_per_shard, options.dtype)
        return
    check_names([options.name])
    import torch

    codec = hub.load(options.name, dtype=getattr(torch, options.dtype or "float32"))
    if options.to == "diffusers":
        export_folder(codec, out)
        print(f"wrote {out}: diffusers' {type(_model(codec)).__name__}.from_pretrained opens it")
    else:
        export_file(codec, out)
        print(f"wrote {out}")


def check_target(out: Path, to: str, overwrite: bool) -> None:
    """Refuse, before anything is loaded, to destroy what is at `out`.

    Raises:
        UserError: it exists and `overwrite` is not given, or it is not a model that could be overwritten.
    """
    if to == "safetensors" and out.suffix != ".safetensors":
        raise UserError(f"--out {out} is to be one file: give it a name that ends with .safetensors.")
    if to == "safetensors":
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: give a file's name.")
        if out.exists() and not overwrite:
            raise UserError(f"--out {out} exists: add --overwrite to replace it.")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder's name.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"--out {out} is a folder with something in it: give a new one, or add --overwrite.")
        kind, sign = ("an export", "provenance.json") if to == "webdataset" else ("a model", "config.json")
        if not (out / sign).exists():
            raise UserError(
                f"--out {out} holds other things than {kind}, which --overwrite would delete: give a new folder."
            )


def export_folder(codec: Codec, folder: Path) -> None:
    """Write a diffusers folder: config.json, safetensors and README.md."""
    model = _model(codec)
    with hub.new_folder(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        (temporary / "README.md").write_text(card(codec, type(model).__name__), encoding="utf-8")


def export_file(codec: Codec, file: Path) -> None:
    """Write one .safetensors file; its metadata says what shapes cannot."""
    from safetensors.torch import save_file

    from ..autoencoders.single_file import METADATA

    model = _model(codec)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    metadata = {"format": "pt", METADATA: json.dumps({"class": type(model).__name__, "config": config})}
    if codec.provenance.licence != "not stated":
        metadata["license"] = codec.provenance.licence
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in model.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".writing-{file.name}-{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, file)
    except Exception as failure:
        if is_disk_full(failure):
            raise UserError(f"The disk is full or a quota is reached while writing {file}: free space.") from failure
        raise
    finally:
        temporary.unlink(missing_ok=True)


def export_store(store: Path, folder: Path, rows_per_tar: int, dtype: str | None) -> None:
    """Write the rows of a store of latents as tar files, with a line that says how many."""
    from ..store.description import read_description

    if rows_per_tar < 1:
        raise UserError(f"--rows-per-shard {rows_per_tar} is too small: give at least 1.")
    tensors = read_description(store).about.get("tensors", {})  # a wrong folder is answered without torch
    if dtype == "bfloat16":
        raise UserError("--dtype bfloat16 is no type of NumPy's files: give float32 or float16.")
    if dtype is not None and "codes" in tensors:
        raise UserError(f"{store} holds codes, which are integers: leave out --dtype.")
    from ..store import LatentStore
    from ..store.webdataset import export_webdataset

    latents = LatentStore(store)
    if not len(latents):
        raise UserError(f"{store} holds no rows: repeat the 'omnilatent encode' that began it.")
    tars = export_webdataset(latents, folder, rows_per_tar, dtype)
    print(f"wrote {folder}: {len(latents):,} rows in {tars} tar file{'s' if tars > 1 else ''}")


def card(codec: Codec, class_name: str) -> str:
    """The README.md of an export: what it is, how to use it, and the card of what was exported."""
    origin, spec = codec.provenance, codec.spec
    known = hub.card_licence(Path(origin.path)) if origin.path and Path(origin.path).is_dir() else "not stated"
    front = "---\nlibrary_name: diffusers\n" + (f"license: {known}\n" if known != "not stated" else "") + "---\n"
    original = card_body(origin.card)
    return (
        f"{front}# {codec.label}\n\n"
        f"Exported by omnilatent {__version__} from `{origin.name}` (weights {origin.weights_hash}). "
        f"Licence: {origin.licence}.\n\n"
        f"{spec.channels} channels, one latent row for {spec.downsampling} pixels.\n\n"
        f"```python\nfrom diffusers import {class_name}\n\n"
        f"vae = {class_name}.from_pretrained(\"FOLDER\")  # images in [-1, 1]\n```\n"
        + (f"\n## The original's card\n\n{original}\n" if original else "")
    )


def _model(codec: Any) -> Any:
    if not hasattr(codec, "to_diffusers"):
        raise UserError(
            f"{codec.label} cannot be exported: diffusers has no class for a codec of the kind {codec.provenance.kind}."
        )
    return codec.to_diffusers()
