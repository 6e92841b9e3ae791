"""Images tile by tile beside the whole image and beside diffusers' `enable_tiling`: difference, memory, time.

    python benchmarks/tiles.py [--device cuda] [--side 2048] [--huge 8192] [--out tiles.json]

The picture is a mosaic of scikit-image's and scikit-learn's embedded photos. Each row is one way of decoding the same
latent, or of encoding and decoding. Differences are to the whole image in the same precision, in steps of 1/255, and
to the whole image in float32, since bfloat16 alone rounds by more than tiles do; float32 runs without TF32.

On a GPU: `kl-f8-small` and the full kl-f8 (diffusers' initialisation, its outputs scaled to those of a trained one: no
trained weights are at hand, and the arithmetic is the same), in float32 and bfloat16, the latter also at --huge, tiled
only; memory is what PyTorch allocated at most, weights included. On a CPU: `kl-f8-small` alone, each row a process of
its own; memory is the peak of its resident set above what it held before. A row that fails says so, and the others go
on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnilatent
from omnilatent.autoencoders.kl import KLCodec, build_vae
from omnilatent.autoencoders.recipes import kl_f8
from omnilatent.data import EvaluationImages, demo_photos
from omnilatent.errors import is_out_of_memory
from omnilatent.codec import Provenance
from omnilatent.latent import LatentSpec
from omnilatent.metrics.precision import as_stated

TILE = 512  # pixels, ours and diffusers'
METHODS = ("whole", "tiled", "enable_tiling")
JOBS = ("decode", "encode → decode")


@dataclass
class Row:
    """One line of the table. `most`, `mean`: |difference| to the whole image in 1/255, and `exact_…` to the whole
    image in float32, which says how much of it is rounding; `peak` in bytes."""

    model: str
    dtype: str
    side: int
    job: str
    method: str
    most: float | None = None
    mean: float | None = None
    exact_most: float | None = None
    exact_mean: float | None = None
    peak: int | None = None
    seconds: float | None = None
    note: str = ""


def mosaic(side: int) -> Tensor:
    """uint8 `(1, 3, side, side)`: the embedded photos side by side, each at its own scale."""
    cell = min(512, side)
    images = EvaluationImages(demo_photos(), size=cell)
    cells = [image for _, batch in images.batches(4) for image in batch]
    across = -(-side // cell)
    rows = [torch.cat([cells[(r * across + c) % len(cells)] for c in range(across)], 2) for r in range(across)]
    return (torch.cat(rows, 1)[None, :, :side, :side] * 255).round().to(torch.uint8)


def open_model(name: str, device: str, dtype: torch.dtype) -> omnilatent.Codec:
    if name != "kl-f8":
        return omnilatent.load(name, device, dtype)
    torch.manual_seed(0)
    vae = build_vae(kl_f8().model)
    codec = KLCodec(vae, LatentSpec(4, 8), Provenance("kl-f8", "kl")).to(device)
    photo = mosaic(256)
    with torch.no_grad():  # a latent of deviation 1, a picture of deviation 1/4 around grey
        mean = codec.encode(photo).mode()
        vae.quant_conv.weight.div_(mean.std())
        vae.quant_conv.bias.sub_(mean.mean((0, 2, 3)).repeat(2)).div_(mean.std())
        raw = vae.decode(codec.encode(photo).mode()).sample
        vae.decoder.conv_out.weight.div_(2 * raw.std())
        vae.decoder.conv_out.bias.zero_()
    return codec.to(dtype=dtype)


def prepare(codec: omnilatent.Codec, method: str) -> None:
    """Let the codec run by one of `METHODS`."""
    codec.tile = TILE if method == "tiled" else None
    vae: Any = codec.module
    vae.disable_tiling()
    if method == "enable_tiling":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // codec.spec.downsampling


def run(codec: omnilatent.Codec, images: Tensor, latent: Tensor, job: str, method: str) -> Tensor:
    """The picture, in float32. diffusers' own tiles are in its `encode` and `decode`, not in its halves."""
    if method != "enable_tiling":
        return codec.decode(latent) if job == "decode" else codec.reconstruct(images)
    vae: Any = codec.module
    with torch.no_grad():
        if job != "decode":
            pixels = images.to(codec.device).to(codec.dtype) / 255 * 2 - 1
            latent = codec.spec.normalise(vae.encode(pixels).latent_dist.mean)
        raw = codec.spec.denormalise(latent.to(codec.device)).to(codec.dtype)
        return (vae.decode(raw).sample / 2 + 0.5).float().clamp(0, 1)


def measured(codec: omnilatent.Codec, images: Tensor, latent: Tensor, row: Row, device: str) -> Tensor | None:
    """Run a row and note its time and memory."""
    cuda = device.startswith("cuda")
    prepare(codec, row.method)
    try:
        with as_stated(codec.dtype):
            if cuda:
                run(codec, images[..., :256, :256], latent[..., :32, :32], row.job, row.method)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            else:
                reset_peak()
            before, start = 0 if cuda else status_bytes("VmRSS"), time.perf_counter()
            picture = run(codec, images, latent, row.job, row.method)
            if cuda:
                torch.cuda.synchronize()
        row.seconds = time.perf_counter() - start
        row.peak = torch.cuda.max_memory_allocated() if cuda else status_bytes("VmHWM") - before
        if not picture.isfinite().all():
            row.note = "not finite"
        return picture.cpu()
    except Exception as failure:  # a row that says so; the others go on
        row.note = "out of memory" if is_out_of_memory(failure) else f"{type(failure).__name__}: {failure}"[:200]
        return None
    finally:
        if cuda:
            torch.cuda.empty_cache()


def status_bytes(key: str) -> int:
    """An entry of this process's memory status: VmRSS, in memory now, or VmHWM, the most since `reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def difference(picture: Tensor | None, reference: Tensor | None) -> tuple[float, float] | tuple[None, None]:
    """Largest and mean |difference| in 1/255."""
    if picture is None or reference is None:
        return None, None
    found = (picture - reference).abs() * 255
    return float(found.max()), float(found.mean())


def latent_of(codec: omnilatent.Codec, images: Tensor) -> Tensor:
    """The latent that every way decodes; tiled, so that it can be had at any size."""
    codec.tile = TILE
    with as_stated(codec.dtype):
        return codec.encode(images).mode()


def on_gpu(device: str, side: int, huge: int) -> Iterator[Row]:
    images = mosaic(side)
    for name in ("kl-f8", "kl-f8-small"):
        latent = latent_of(open_model(name, device, torch.float32), images)  # the same in every precision
        exact: dict[str, Tensor | None] = {}
        for dtype in (torch.float32, torch.bfloat16):
            codec = open_model(name, device, dtype)
            stated = str(dtype).removeprefix("torch.")
            for job in JOBS:
                whole = None
                for method in METHODS:
                    row = Row(name, stated, side, job, method)
                    picture = measured(codec, images, latent, row, device)
                    if method == "whole":
                        whole = picture
                        exact.setdefault(job, picture)
                    row.most, row.mean = difference(picture, whole)
                    row.exact_most, row.exact_mean = difference(picture, exact[job])
                    yield row
            if huge and dtype == torch.bfloat16:
                row = Row(name, stated, huge, JOBS[1], "tiled")
                measured(codec, mosaic(huge), torch.zeros(1, 4, 32, 32), row, device)
                yield row
            del codec
            torch.cuda.empty_cache()


def on_cpu(side: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            for method in METHODS:
                row = Row("kl-f8-small", "float32", side, job, method)
                case = [sys.executable, __file__, "--side", str(side), "--case", job, method, folder]
                done = subprocess.run(case, capture_output=True, text=True, check=False)
                if done.returncode:
                    error = done.stderr.strip()
                    row.note = f"ended with {done.returncode}: {error.splitlines()[-1] if error else 'no message'}"
                else:
                    row = Row(**json.loads(done.stdout.splitlines()[-1]))
                yield row


def one_case(side: int, job: str, method: str, folder: Path) -> None:
    """One row in a process of its own. The pictures to compare with lie in `folder`, and so does the latent."""
    codec = open_model("kl-f8-small", "cpu", torch.float32)
    images = mosaic(side)
    kept = folder / "latent.pt"
    if not kept.exists():
        # In another process: what encoding takes would be in this one's peak.
        script = ("import sys, torch; sys.path.insert(0, sys.argv[1]); import tiles; "
                  "codec = tiles.open_model('kl-f8-small', 'cpu', torch.float32); "
                  "torch.save(tiles.latent_of(codec, tiles.mosaic(int(sys.argv[2]))), sys.argv[3])")
        subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(side), str(kept)], check=True)
    row = Row("kl-f8-small", "float32", side, job, method)
    picture = measured(codec, images, torch.load(kept, weights_only=True), row, "cpu")
    reference = folder / f"{job[:6]}.pt"
    if method == "whole" and picture is not None:
        torch.save(picture, reference)
    whole = torch.load(reference, weights_only=True) if reference.exists() else None
    row.most, row.mean = row.exact_most, row.exact_mean = difference(picture, whole)
    print(json.dumps(asdict(row)))


def table(rows: list[Row]) -> str:
    """Differences as largest / mean, to the whole image in this precision and in float32."""
    heads = ("model", "precision", "size", "job", "way", "∣Δ∣ to whole, 1/255", "to float32", "peak GB", "of whole",
             "s", "note")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * 5 + " ---: |" * 5 + " --- |"]
    whole = {(r.model, r.dtype, r.side, r.job): r.peak for r in rows if r.method == "whole"}
    for r in rows:
        reference = whole.get((r.model, r.dtype, r.side, r.job))
        cells = (
            r.model, r.dtype, f"{r.side}²", r.job, r.method, _pair(r.most, r.mean), _pair(r.exact_most, r.exact_mean),
            "–" if r.peak is None else f"{r.peak / 1e9:.2f}",
            f"{r.peak / reference:.3f}" if r.peak and reference else "–",
            "–" if r.seconds is None else f"{r.seconds:.2f}", r.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(most: float | None, mean: float | None) -> str:
    return "–" if most is None or mean is None else f"{most:.4f} / {mean:.5f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--huge", type=int, default=8192, help="side of the largest picture, on a GPU; 0: none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=3, metavar=("JOB", "METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        job, method, folder = options.case
        one_case(options.side, job, method, Path(folder))
        return 0
    rows: list[Row] = []
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    conditions = {"device": device, "torch": torch.__version__, "omnilatent": omnilatent.__version__, "tile": TILE}
    for row in on_gpu(options.device, options.side, options.huge) if options.device != "cpu" else on_cpu(options.side):
        print(json.dumps(asdict(row), ensure_ascii=False), flush=True)
        rows.append(row)
        if options.out:  # after every row: a run that is cut short leaves what it has
            text = json.dumps({"conditions": conditions, "rows": [asdict(row) for row in rows]}, indent=1)
            options.out.write_text(text, encoding="utf-8")
    print(f"\n{device}, torch {torch.__version__}, tile {TILE}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
