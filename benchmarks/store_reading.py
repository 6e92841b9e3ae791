"""How fast a store is read at random, beside a plain memory map of the same rows.

    python benchmarks/store_reading.py                  # 20,000 rows of 4×32×32 in float16, in 1 and in 40 shards
    python benchmarks/store_reading.py --store latents/ # a store of your own

Both give torch tensors of the same random batches of 64, in turn, several rounds in one process; the medians are
compared. The files are in the system's cache, as they are in an epoch after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omnilatent.latent import LatentSpec
from omnilatent.store import Description, LatentStore, StoreWriter

BATCH, BATCHES, ROUNDS = 64, 400, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a store of latents of one size; by default random ones are made")
    parser.add_argument("--rows", type=int, default=20_000, help="of the stores that are made")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.store is not None:
            stores = {str(options.store): LatentStore(options.store)}
        else:
            stores = {f"{shards} shards": made(Path(folder, str(shards)), options.rows, shards) for shards in (1, 40)}
        figures = {name: measured(store, Path(folder, "plain.npy")) for name, store in stores.items()}
    for name, figure in figures.items():
        ours, theirs = figure["store_rows_per_second"], figure["memmap_rows_per_second"]
        print(f"{name}: {figure['rows']:,} rows of {figure['row_bytes']:,} bytes; store {ours:,.0f} rows/s, memmap "
              f"{theirs:,.0f} rows/s, ratio {figure['ratio']:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "batch": BATCH, **figures}, indent=2) + "\n")


def made(folder: Path, rows: int, shards: int) -> LatentStore:
    """A store of `rows` random latents."""
    spec = LatentSpec(channels=4, downsampling=8)
    about = {"spec": spec.to_json(), "weights": "random", "tensors": {"mean": "float16"}}
    latents = np.random.default_rng(0).normal(size=(rows, 4, 32, 32)).astype(np.float16)
    with StoreWriter(folder, Description("latents", about), rows_per_shard=-(-rows // shards)) as writer:
        for at in range(0, rows, 100):
            part = latents[at : at + 100]
            writer.add([{"key": f"{at + i:08}", "image": [256, 256]} for i in range(len(part))], {"mean": part})
    return LatentStore(folder)


def measured(store: LatentStore, plain: Path) -> dict[str, float]:
    """Rows a second of both, median over the rounds."""
    first = store[0].numpy()
    whole = np.lib.format.open_memmap(plain, "w+", first.dtype, (len(store), *first.shape))
    for at in range(0, len(store), 1000):
        whole[at : at + 1000] = store.batch(range(at, min(at + 1000, len(store)))).numpy()
    whole.flush()
    mapped = np.load(plain, mmap_mode="r")

    def from_memmap(indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(mapped[indices]))

    rng = np.random.default_rng(1)
    batches = [rng.integers(0, len(store), BATCH) for _ in range(BATCHES)]
    assert all(torch.equal(store.batch(batch), from_memmap(batch)) for batch in batches[:20])
    rates: dict[str, list[float]] = {"store": [], "memmap": []}
    for _ in range(ROUNDS):
        rates["store"].append(rate(store.batch, batches))
        rates["memmap"].append(rate(from_memmap, batches))
    ratio = statistics.median(a / b for a, b in zip(rates["store"], rates["memmap"], strict=True))
    return {"rows": len(store), "row_bytes": first.nbytes, "store_rows_per_second": statistics.median(rates["store"]),
            "memmap_rows_per_second": statistics.median(rates["memmap"]), "ratio": ratio}


def rate(read: Callable[[np.ndarray], Tensor], batches: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for batch in batches:
        read(batch)
    return len(batches) * BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
