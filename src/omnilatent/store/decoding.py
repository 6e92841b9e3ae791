"""A store of latents → pictures.

- `decode_store`: every row as a picture under its key's name.
- `refuse_other_codec`: a codec whose latents these are not.
- `refuse_other_pictures`: a folder of other things than this store's pictures.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.workers import own_cores
from ..errors import UserError, is_disk_full
from ..hub import read_json
from ..codec import Codec
from .files import replace_text, temporary_name
from .naming import picture_names
from .reader import LatentStore

# Pillow's settings: PNG keeps every value; the other two are for looking at.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}


RECORD = "decoded.json"  # in the folder of pictures: what they were decoded from


@dataclass(frozen=True)
class Decoded:
    """How many pictures were written, and how many were there already."""

    written: int
    there: int


def refuse_other_codec(store: LatentStore, codec: Codec) -> None:
    """Raise a `UserError` unless `store` holds latents of exactly this codec and it has a decoder."""
    wanted = store.description.about["weights"]
    if codec.provenance.weights_hash != wanted or codec.spec != store.spec:
        name = store.description.notes.get("name")
        what = f"weights {codec.provenance.weights_hash}" if codec.provenance.weights_hash != wanted else (
            "the same weights in another normalisation")
        raise UserError(f"{store.path} holds latents of {name} with weights {wanted}, and {codec.label} has {what}: "
                        "give the codec that encoded them with --codec.")
    if not codec.spec.decodes:
        raise UserError(f"{codec.label} only encodes: it has no decoder.")


def refuse_other_pictures(out: Path, store: LatentStore, dtype: str) -> dict[str, str]:
    """Raise a `UserError` unless `out` is new, empty, or holds pictures of this store in this precision: pictures that
    are there are kept, and those of another store would pass for this one's.

    Returns:
        What `RECORD` in `out` says, or is to say.
    """
    path = str(store.path.resolve())
    record = {"id": store.description.notes.get("id", path), "store": path, "dtype": dtype}
    names = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")] if out.is_dir() else []
    if not names:
        return record
    if RECORD not in names:
        raise UserError(f"{out} holds other things than decoded pictures ({names[0]}): give a new folder.")
    there = read_json(out / RECORD)
    if (there.get("id"), there.get("dtype")) != (record["id"], dtype):
        earlier = "an earlier " if there.get("store") == path and there.get("id") != record["id"] else ""
        raise UserError(f"{out} holds pictures that were decoded from {earlier}{there.get('store')} in "
                        f"{there.get('dtype')}, and these are from {path} in {dtype}: give a new folder.")
    return record


def decode_store(
    store: LatentStore, codec: Codec, out: Path, form: str = "png", batch_size: int = 32, limit: int | None = None,
    overwrite: bool = False, begin: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Decoded:
    """Write the pictures of a store's rows, each whole or not at all.

    Args:
        out: the folder; a row's picture lies under its key, with the format's suffix (see `picture_names`).
        form: a key of `FORMATS`.
        batch_size: rows of one size that are decoded together.
        limit: at most this many rows, evenly spread.
        overwrite: write pictures again that are there.
        begin, progress: told the number of pictures to write, and of those written.

    Raises:
        UserError: the codec is another one, `out` holds other things, or the disk is full.
    """
    refuse_other_codec(store, codec)
    record = refuse_other_pictures(out, store, str(codec.dtype).removeprefix("torch."))
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / RECORD, json.dumps(record, indent=2) + "\n")
    names = picture_names(store.keys, f".{form}")
    count = len(store) if limit is None else min(limit, len(store))
    rows = [place * len(store) // count for place in range(count)]
    todo = [row for row in rows if overwrite or not (out / names[row]).exists()]
    if begin is not None:
        begin(len(todo))
    with ThreadPoolExecutor(min(8, own_cores())) as pool:
        writing: list[Future[None]] = []
        for batch in _batches(store, todo, batch_size):
            for done in writing:  # one batch is written while the next is decoded
                done.result()
            if progress is not None:
                progress(len(writing))
            pixels = _pixels(codec.decode(store.latent(batch, codec)))
            writing = [pool.submit(_write, picture, out / names[row], form)
                       for picture, row in zip(pixels, batch, strict=True)]
        for done in writing:
            done.result()
        if progress is not None:
            progress(len(writing))
    return Decoded(len(todo), len(rows) - len(todo))


def _batches(store: LatentStore, rows: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of one latent shape and one image size together, in the order in which they lie on the disk."""
    wanted = np.zeros(len(store), bool)
    wanted[list(rows)] = True
    waiting: dict[Any, list[int]] = {}
    for row in store.in_place_order().tolist():
        if not wanted[row]:
            continue
        alike = (tuple(sorted(store.shapes(row).items())), store.size(row))
        batch = waiting.setdefault(alike, [])
        batch.append(row)
        if len(batch) == batch_size:
            yield waiting.pop(alike)
    yield from waiting.values()


def _pixels(images: Tensor) -> np.ndarray:
    """Images `(b, 3, h, w)` in [0, 1] → uint8 `(b, h, w, 3)`, rounded as the protocol does."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _write(pixels: np.ndarray, path: Path, form: str) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(picture, **FORMATS[form])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(picture.getvalue())
        os.replace(temporary, path)
    except OSError as failure:
        if is_disk_full(failure):
            raise UserError(f"The disk is full or a quota is reached while writing {path}: free space and repeat the "
                            "command, which leaves the pictures that are there.") from failure
        raise
    finally:
        temporary.unlink(missing_ok=True)
