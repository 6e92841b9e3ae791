"""`omnilatent decode STORE --out FOLDER`: a store of latents → pictures.

- `Decode`: the command's options.
- `codec_of`: the codec that a store names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from ..devices import choose_device
from ..hub import load
from .folders import check_writable
from .names import check_names
from .parse import parse

if TYPE_CHECKING:
    import torch

    from ..codec import Codec
    from ..store import LatentStore


@dataclass(frozen=True)
class Decode:
    """Write the pictures that a store's latents stand for, under their keys' names. Repeat the command to go on."""

    store: Annotated[Path, tyro.conf.Positional, arg(metavar="STORE")]
    """a store that 'omnilatent encode' made"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """folder for the pictures"""
    codec: Annotated[str | None, arg(metavar="NAME")] = None
    """the codec that encoded them: a path, a bundled model or a hub id; by default the one that the store names"""
    limit: Annotated[int | None, arg(metavar="INT")] = None
    """at most this many pictures, spread evenly over the store"""
    format: Literal["png", "jpg", "webp"] = "png"
    """png keeps every 8-bit value; jpg and webp have quality 95"""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """pictures at a time; by default 32, on a CPU 4"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run; auto takes a GPU if there is one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the codec"""
    overwrite: bool = False
    """write pictures again that are there; by default they are left as they are"""

    def check(self) -> None:
        """Look at values and places."""
        from ..store.description import read_description

        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least 1.")
        read_description(self.store)
        check_writable(self.out)
        if self.codec is not None:
            check_names([self.codec])


def main(argv: list[str]) -> None:
    options = parse(Decode, "decode", argv)
    options.check()
    import torch
    from rich import progress as rich

    from ..store import LatentStore
    from ..store.decoding import decode_store

    store = LatentStore(options.store)
    if not len(store):
        raise UserError(f"{options.store} holds no rows: repeat the 'omnilatent encode' that began it.")
    device = choose_device(options.device)
    codec = codec_of(store, options.codec, device, getattr(torch, options.dtype))
    print(f"decoding {options.store} with {codec.label} on {device}", flush=True)
    with rich.Progress(
        rich.TextColumn("decoding"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn(),
        rich.TextColumn("left"), rich.TimeRemainingColumn(),
    ) as bar:
        row = bar.add_task("decoding", total=None)
        done = decode_store(
            store, codec, options.out, options.format, options.batch_size or (4 if device == "cpu" else 32),
            options.limit, options.overwrite, lambda total: bar.update(row, total=total),
            lambda count: bar.advance(row, count),
        )
    left = f"; {done.there:,} were there already" if done.there else ""
    print(f"{options.out}: {done.written:,} picture{'s' * (done.written != 1)} written{left}")


def codec_of(store: LatentStore, name: str | None, device: str, dtype: torch.dtype) -> Codec:
    """The codec `name`, or the one that encoded the store, by the name it had then, else where it lay.

    Raises:
        UserError: it cannot be found.
    """
    if name is not None:
        return load(name, device, dtype)
    notes = store.description.notes
    wanted = str(notes.get("name"))
    if notes.get("path") is not None and not Path(wanted).expanduser().exists():
        wanted = str(notes["path"])
        if not Path(wanted).exists():
            raise UserError(f"{store.path} was encoded with {notes.get('name')}, which is not at {wanted} any more: "
                            "say with --codec where it is.")
    return load(wanted, device, dtype)
