"""A store of latents → tar files as the WebDataset library reads them.

- `export_webdataset`: NNNNNN.tar with NAME.latent.npy (or NAME.codes.npy), NAME.logvar.npy and NAME.json a row.

WebDataset takes the members that share a name up to the first dot of its last part for one sample, and the rest for
the name of a field; fields that end in .npy it decodes to arrays.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..hub import new_folder
from .naming import sample_names
from .reader import LatentStore

FIELDS = {"mean": "latent", "codes": "codes", "logvar": "logvar"}


def export_webdataset(
    store: LatentStore, folder: Path, rows_per_tar: int = 10_000, dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write `folder`, as a whole or not at all; an existing one is replaced.

    Rows come in the order in which they lie on the disk. NAME.json holds the key as it was, the image's size and the
    file's SHA-256; `provenance.json` beside the tars is the store's description. The tars of one store are equal to
    the byte.

    Args:
        rows_per_tar: samples of a tar.
        dtype: NumPy's name of the latents' type; None: as they are stored. Codes have the smallest that holds them.
        progress: told of rows written.

    Returns:
        The number of tars.

    Raises:
        UserError: the disk is full, or a latent is not finite in `dtype`.
    """
    names = sample_names(store.keys)
    order = store.in_place_order().tolist()
    tars = -(-len(order) // rows_per_tar)
    with new_folder(folder) as temporary:
        for number in range(tars):
            rows = order[number * rows_per_tar : (number + 1) * rows_per_tar]
            with tarfile.open(temporary / f"{number:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                for row in rows:
                    _add_row(tar, store, row, names[row], dtype)
            if progress is not None:
                progress(len(rows))
        (temporary / "provenance.json").write_text(store.description.to_json(), encoding="utf-8")
    return tars


def _add_row(tar: tarfile.TarFile, store: LatentStore, row: int, name: str, dtype: str | None) -> None:
    for tensor in store.description.about["tensors"]:
        values = store[row].numpy() if tensor != "logvar" else store.array(row, "logvar")
        if tensor == "codes":
            assert store.spec.codebook_size is not None
            values = values.astype(np.min_scalar_type(store.spec.codebook_size - 1))
        elif dtype is not None:
            with np.errstate(over="ignore"):
                values = values.astype(dtype)
            if not np.isfinite(values).all():
                raise UserError(f"The {tensor} of {store.keys[row]} is not finite in {dtype}: leave out --dtype.")
        contents = io.BytesIO()
        np.lib.format.write_array(contents, np.ascontiguousarray(values), allow_pickle=False)
        _add(tar, f"{name}.{FIELDS[tensor]}.npy", contents.getvalue())
    fields = store.fields(row)
    known = {key: value for key, value in fields.items() if key not in ("size", "mtime_ns")}
    _add(tar, f"{name}.json", json.dumps(known).encode())


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(contents), 0o644
    tar.addfile(member, io.BytesIO(contents))
