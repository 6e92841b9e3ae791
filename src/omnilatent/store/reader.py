"""Rows out of a store, at the speed of a memory map.

- `Store`: any store: named arrays by row.
- `LatentStore`: one of latents: tensors as `Codec.decode` takes them; a torch data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.names import Names
from ..errors import UserError
from ..codec import Codec
from ..latent import Codes, DiagonalGaussian, Latent, LatentSpec, Point, Size
from .description import Description, read_description
from .index import Index, Shape, read_index
from .packing import unpack
from .rows import RowTable, map_tensors, used_groups
from .shards import shard_file


class Store:
    """The rows of a store, in the order of their keys, as they were when its index was first looked at.

    Opening costs nothing; the index is read on first use, and shards are mapped when rows are. It can be pickled, and
    used by forked workers.

    Attributes:
        path: its folder.
        description: its `store.json`.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises `UserError` where there is no store."""
        self.path = Path(path).expanduser()
        self.description: Description = read_description(self.path)
        self._maps: dict[int, dict[str, np.ndarray]] = {}
        self._tables: dict[str, RowTable] = {}

    @cached_property
    def index(self) -> Index:
        return read_index(self.path, self.description)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def keys(self) -> Names:
        """The rows' names: of images their paths in the data they came from."""
        return self.index.keys

    def find(self, key: str) -> int:
        """The row of a key; raises `KeyError`."""
        return self._rows[key]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def shapes(self, i: int) -> dict[str, Shape]:
        """Tensor name → its shape in row i."""
        shard, group, _ = self._place(i)
        return self.index.groups[shard][group]

    def array(self, i: int, name: str) -> np.ndarray:
        """Row i of the tensor `name`, read-only, in the memory map."""
        shard, group, row = self._place(i)
        return self._shard(shard)[self._named(name, shard, group)][row]

    def arrays(self, indices: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
        """Rows of the tensor `name` as a new array `(n, …)`, in the order of `indices`.

        Raises:
            ValueError: they have different shapes.
            IndexError: a row outside the store.
        """
        at = np.asarray(indices, np.int64).reshape(-1)
        if not len(at):
            raise ValueError("a batch of no rows has no shape: give at least one index")
        try:
            return self._table(name).take(at)
        except IndexError:
            outside = next(i for i in at.tolist() if not -len(self) <= i < len(self))
            raise IndexError(f"row {outside} of {len(self)}") from None

    def fields(self, i: int) -> dict[str, Any]:
        """What the index says of row i: "key", where it is known "image" (height and width), "size", "mtime_ns" and
        "sha256" of its file, and whatever else its writer gave."""
        i = self._checked(i)
        known: dict[str, Any] = {"key": self.keys[i]}
        if self.index.image[i].any():
            known["image"] = self.index.image[i].tolist()
        if self.index.stamp[i, 0] >= 0:
            known["size"], known["mtime_ns"] = self.index.stamp[i].tolist()
        if self.index.digest[i].any():
            known["sha256"] = self.index.digest[i].tobytes().hex()
        return known | self.index.fields.get(i, {})

    def in_place_order(self) -> np.ndarray:
        """All rows in the order in which they lie on the disk, the fastest to read all of them."""
        place = self.index.place
        return np.lexsort((place[:, 2], place[:, 1], place[:, 0]))

    def _checked(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return i % len(self)

    def _place(self, i: int) -> tuple[int, int, int]:
        shard, group, row = self.index.place[self._checked(i)].tolist()
        return shard, group, row

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._maps:
            self._maps[number] = map_tensors(shard_file(self.path, number))
        return self._maps[number]

    def _table(self, name: str) -> RowTable:
        if name not in self._tables:
            place = self.index.place
            if not len(place):
                raise IndexError(f"{self.path} holds no rows")
            self._tables[name] = RowTable(place, {
                (shard, group): self._shard(shard)[self._named(name, shard, group)]
                for shard, group in used_groups(place)})
        return self._tables[name]

    def _named(self, name: str, shard: int, group: int) -> str:
        if name not in self.index.groups[shard][group]:
            raise UserError(f"The rows of {self.path} have no {name}: they have "
                            f"{', '.join(self.index.groups[shard][group])}.")
        return f"{name}.{group}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_tables": {}}


class LatentStore(Store, Dataset[Tensor]):
    """Latents on disk, normalised as `Codec.encode(…).mode()` gives them.

        store = LatentStore("latents/")
        store[7]                              # (c, h, w), in the dtype it is stored in
        store.batch([7, 1, 4])                # (3, c, h, w)
        codec.decode(store.latent(7))         # (1, 3, H, W)

    A store of codes gives integer indices `(h, w)` or `(books, h, w)` instead.

    Attributes:
        spec: the codec's `LatentSpec`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.description.kind != "latents":
            raise UserError(f"{self.path} is a store of {self.description.kind}, not of latents: give another folder.")
        self.spec = LatentSpec.from_json(self.description.about["spec"])

    @property
    def mean(self) -> Tensor:
        """float32 `(c,)`: each channel's mean over the stored latents, every content counted once."""
        return self._moment("mean")

    @property
    def std(self) -> Tensor:
        """float32 `(c,)`: each channel's standard deviation."""
        return self._moment("std")

    def __getitem__(self, i: int) -> Tensor:
        return self.batch([i])[0]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Latents `(n, c, h, w)`, or codes. Raises `ValueError` where they are of different sizes."""
        if "codes" in self.description.about["tensors"]:
            return torch.from_numpy(self._codes(indices))
        return torch.from_numpy(self.arrays(indices, "mean"))

    def size(self, i: int) -> Size:
        """Height and width of the image of row i, as it was encoded."""
        height, width = self.index.image[self._checked(i)].tolist()
        return height, width

    def latent(self, indices: int | Sequence[int] | np.ndarray, codec: Codec | None = None) -> Latent:
        """What `Codec.decode` takes, for one row or for several of equal size: a `DiagonalGaussian` where the
        log-variance is stored, a `Point` where it is not, `Codes` of a tokenizer.

        Args:
            codec: of codes, the tokenizer: its `lookup(indices)` gives the normalised vectors `(n, c, h, w)` that
                `indices` name.

        Raises:
            UserError: the store holds codes and `codec` is missing, or has no codebook.
            ValueError: the rows are of different sizes.
        """
        rows = [indices] if isinstance(indices, (int, np.integer)) else list(indices)
        sizes = {self.size(i) for i in rows}
        if len(sizes) != 1:
            raise ValueError(f"one latent object has one size; these rows have {sorted(sizes)}")
        size = sizes.pop()
        if "codes" in self.description.about["tensors"]:
            if not hasattr(codec, "lookup"):
                raise UserError(f"{self.path} holds codes, which only their tokenizer turns into a latent: give it as "
                                "latent(rows, codec).")
            codes = self.batch(rows)
            return Codes(codes, codec.lookup(codes.to(codec.device)), size)  # type: ignore[union-attr]
        mode = self.batch(rows).float()
        if "logvar" not in self.description.about["tensors"]:
            return Point(mode, size)
        logvar = torch.from_numpy(self.arrays(rows, "logvar")).float()
        return DiagonalGaussian(self.spec.denormalise(mode), logvar, self.spec, size)

    def _codes(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        shapes = {self.shapes(int(i))["codes_shape"] for i in indices}
        if len(shapes) != 1:
            raise ValueError(f"codes of the shapes {sorted(shapes)} make no batch: choose rows of one shape")
        shape, size = shapes.pop(), self.spec.codebook_size
        assert size is not None  # or there were no codes to write
        packed = self.arrays(indices, "codes")
        return unpack(packed, math.prod(shape), size).reshape(len(packed), *shape)

    def _moment(self, which: str) -> Tensor:
        if "mean" not in self.index.moments:
            what = "no rows yet" if not len(self) else "codes, which have no mean"
            raise UserError(f"{self.path} holds {what}: there are no channel statistics.")
        return torch.from_numpy(getattr(self.index.moments["mean"], which)).float()
