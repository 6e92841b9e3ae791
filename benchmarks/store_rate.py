"""From a folder of JPEGs to a store of latents: the rate of every stage, and one GPU beside several.

    python benchmarks/store_rate.py --data DATA --copies 12 --json FILE [--gpus 2] [--name kl-f8]

Makes a folder of JPEGs (each photo of DATA in `--copies` crops, since equal files would be encoded once), then runs
`omnilatent bench NAME --data FOLDER` on it. With `--gpus N` it encodes the folder once by one process and once by N
under torchrun, compares the two stores row by row, and states the speed-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from omnilatent import LatentStore
from omnilatent.data import open_images


def crops_of(index: int, data: str, folder: Path, copies: int) -> None:
    """Crops of one photo, seven eighths of its sides, as JPEGs."""
    pixels = open_images(data).read(index)
    height, width = (7 * side // 8 for side in pixels.shape[:2])
    rng = np.random.default_rng(index)
    for copy in range(copies):
        top, left = rng.integers(0, pixels.shape[0] - height + 1), rng.integers(0, pixels.shape[1] - width + 1)
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        Image.fromarray(crop).save(folder / f"{index:06}-{copy:02}.jpg", quality=90)


def make_folder(data: str, folder: Path, copies: int) -> None:
    folder.mkdir()
    with Pool() as pool:
        pool.map(partial(crops_of, data=data, folder=folder, copies=copies), range(len(open_images(data))), 8)


def run(arguments: list[str], gpus: int = 1) -> None:
    start = [sys.executable, "-m"]
    start += ["omnilatent"] if gpus == 1 else ["torch.distributed.run", "--nproc-per-node", str(gpus), "-m", "omnilatent"]
    print("$ omnilatent", *arguments[:2], f"({gpus} processes)" if gpus > 1 else "", flush=True)
    subprocess.run([*start, *arguments], check=True)


def compare(one: Path, several: Path) -> dict[str, float]:
    """How far apart two stores of the same images are."""
    a, b = LatentStore(one), LatentStore(several)
    places = {key: i for i, key in enumerate(b.keys)}
    if sorted(a.keys) != sorted(b.keys):
        raise SystemExit(f"{one} has {len(a)} rows and {several} {len(b)}, of other files")
    most, equal = 0.0, 0
    for i, key in enumerate(a.keys):
        difference = float((a[i].float() - b[places[key]].float()).abs().max())
        most, equal = max(most, difference), equal + (difference == 0)
    return {"rows": len(a), "bit_equal_rows": equal, "largest_difference": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", default="kl-f8-small")
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "jpegs"
        make_folder(options.data, folder, options.copies)
        files = list(folder.iterdir())
        results["files"], results["bytes_a_file"] = len(files), sum(f.stat().st_size for f in files) / len(files)
        if options.gpus == 1:
            run(["bench", options.name, "--data", str(folder), "--json", f"{place}/bench.json"])
            results["bench"] = json.loads(Path(place, "bench.json").read_text())
        else:
            for gpus, name in ((1, "one"), (options.gpus, "several")):
                run(["encode", options.name, str(folder), "--out", f"{place}/{name}", "--json", f"{place}/{name}.json"],
                    gpus)
                results[name] = json.loads(Path(place, f"{name}.json").read_text())
            results["equal"] = compare(Path(place, "one"), Path(place, "several"))
            rates = [results[name]["new"] / results[name]["seconds"] for name in ("one", "several")]  # type: ignore[index]
            results["speed_up"] = rates[1] / rates[0]
            print(f"{rates[0]:,.0f} → {rates[1]:,.0f} img/s with {options.gpus} GPUs: {rates[1] / rates[0]:.2f} times; "
                  f"{results['equal']}")
    options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
