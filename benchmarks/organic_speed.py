"""The benchmark that settles the seed's claim: every encoder in one run, on one thread, from an 8-bit picture on.

    python benchmarks/organic_speed.py [--dropin LABEL:FOLDER ...] [--data ../shared/data]
    python benchmarks/organic_speed.py --device cuda

The claim: 18.3 times as fast as the SD-VAE's encoder on a CPU, and 400 times smaller. Here its encoder (diffusers'
`AutoencoderKL` with Stable Diffusion's configuration, in this package's order of arithmetic and in diffusers' own;
ratios are to the faster), TAEF2, diffusers' `AutoencoderTiny` in TAESD's sizes (with the weights of tiny-f8),
kl-f8-small, the pooled, drop-in and native O-VAEs, and means of 8×8 blocks (the null: what reading the picture costs).
The SD-VAE has random weights: time does not depend on them, and it gets no PSNR.

A call is what a user calls, `codec.encode` of a uint8 `(1, 3, 256, 256)` in host memory: checks, conversion, resizing
and padding are in it. "Bare" is the network alone, on floats, in `torch.inference_mode`. Calls take turns in rounds, so
that whatever else the machine does meets all of them; the first is a warm-up. One thread: medians of processor time,
which is what the wall clock shows on an idle machine. Several threads, and CUDA: the wall clock, CUDA synchronised
after every call. PSNR is that of val.tar at 256² and of the Kodak photos in their own size, in 8 bits. Writes
results/organic_speed.json, CPU and CUDA under a key of their own. About 25 minutes on one core, most of it PSNR and the
SD-VAE's batches; a minute or two on a GPU, where `--no-quality` leaves out what the CPU has measured.
"""

from __future__ import annotations

import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tables
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import omnilatent
from omnilatent.autoencoders.config import KLConfig
from omnilatent.autoencoders.diffusers_codecs import DiffusersCodec
from omnilatent.autoencoders.kl import build_vae
from omnilatent.codec import Codec, Provenance
from omnilatent.data import EvaluationImages, open_images
from omnilatent.errors import UserError
from omnilatent.hub import split_label
from omnilatent.latent import DiagonalGaussian, Latent, LatentSpec, Point
from omnilatent.metrics.pixel import psnr

ROOT = Path(__file__).parents[1]
SIZE = 256
REFERENCES = ("SD-VAE", "SD-VAE, diffusers' own order")
ROUNDS, MOST_CALLS, FEWEST_CALLS = 5, 300, 3
SLOW = 10.0  # seconds from which on the first call counts, since what it sets up is little beside it


@dataclass(frozen=True)
class Options:
    """Every encoder in one run, on one thread, from an 8-bit picture on."""

    dropin: tuple[str, ...] = ()
    """Checkpoint folders of drop-ins, or of anything else that omnilatent.load opens; LABEL:FOLDER names a row."""
    data: Path = ROOT.parent / "shared" / "data"
    """Holds imagenet-1k-sample/, kodak/ and taef2/."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seconds: float = 6.0
    """Of timed calls for each codec and figure; a slow codec gets its three calls all the same."""
    batches: tuple[int, ...] = ()
    """Pictures a call in the table of batches; by default 1, 8, 32, and 256 on CUDA."""
    threads: tuple[int, ...] = (2,)
    """Further numbers of threads, on a CPU."""
    quality: bool = True
    """Measure PSNR."""
    limit: int | None = None
    """Most photos of each set."""
    out: Path = ROOT / "benchmarks" / "results" / "organic_speed.json"


# -- the codecs --------------------------------------------------------------------------------------------------------


class DiffusersOrder(DiffusersCodec):
    """An AutoencoderKL by diffusers' own `encode` and `decode`."""

    def _encode(self, images: Tensor) -> Latent:
        posterior = self.module.encode(images * 2 - 1).latent_dist
        return DiagonalGaussian(posterior.mean, posterior.logvar, self.spec)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module.decode(raw).sample / 2 + 0.5


class BlockMeans(Codec):
    """The null: means of 8×8 blocks, decoded by bilinear enlargement."""

    def __init__(self) -> None:
        module = nn.Module()
        module.register_parameter("place", nn.Parameter(torch.empty(0)))  # holds the device and the dtype
        super().__init__(module, LatentSpec(3, 8, "point"), Provenance("block means", "null"))

    def _encode(self, images: Tensor) -> Latent:
        return Point(images.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5)))

    def _decode(self, raw: Tensor) -> Tensor:
        return nn.functional.interpolate(raw, scale_factor=8, mode="bilinear")


@functools.cache
def sd_vae() -> Any:
    return build_vae(KLConfig())


def codecs(options: Options) -> dict[str, Codec]:
    """Row → codec, in the order of the table; what is not there is said and left out."""
    random = Provenance("SD-VAE", "diffusers")
    openers: dict[str, Callable[[], Codec]] = {
        REFERENCES[0]: lambda: DiffusersCodec(sd_vae(), random),
        REFERENCES[1]: lambda: DiffusersOrder(sd_vae(), random),
        "TAEF2": lambda: omnilatent.load(options.data / "taef2"),
        "AutoencoderTiny, TAESD's sizes": lambda: omnilatent.load(ROOT / "benchmarks" / "weights" / "tiny-f8"),
        "kl-f8-small": lambda: omnilatent.load("kl-f8-small"),
        **{f"O-VAE drop-in, {row_name(name)}": lambda name=name: omnilatent.load(name) for name in options.dropin},
        "O-VAE pooled, ovae": lambda: omnilatent.load("ovae"),
        **{f"O-VAE native, ovae-f8c{n}": lambda n=n: omnilatent.load(f"ovae-f8c{n}") for n in (4, 16, 32)},
        "means of 8×8 blocks (null)": BlockMeans,
    }
    found: dict[str, Codec] = {}
    for row, open_it in openers.items():
        try:
            found[row] = open_it().to(options.device, getattr(torch, options.dtype))
        except UserError as reason:
            say(f"{row} is left out: {reason}")
    return found


def row_name(name: str) -> str:
    """LABEL of LABEL:FOLDER, else the folder's own name."""
    label, target = split_label(name)
    path = Path(target)
    return label or (path.parent.name if path.name in ("final", "best") else path.name)


# -- their weights -----------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Notes every tensor that an operation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, torch.Size]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in flat([*args, *(kwargs or {}).values()]):
            self.seen.add((value.data_ptr(), value.shape))
        return function(*args, **(kwargs or {}))


def flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)


def weights_of(codec: Codec) -> dict[str, Any]:
    """What `encode` reads, counted, as fp32 and as stored in bytes (None: not stored, or not under these names), and
    whether a half is the work of a drop-in's teacher. Both halves run once, watched, on a small picture."""
    own = dict(codec.module.named_parameters()) | dict(codec.module.named_buffers())
    teacher = getattr(codec, "teacher", None)
    theirs = {} if teacher is None else dict(teacher.module.named_parameters()) | dict(teacher.module.named_buffers())
    with Reads() as encoding:
        latent = codec.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    read = {name: t for name, t in (own | theirs).items() if (t.data_ptr(), t.shape) in encoding.seen}
    found = {"encoder_numbers": sum(t.numel() for t in read.values()), "stored_bytes": stored(codec, list(read)),
             "teacher_encodes": bool(read) and not own.keys() & read.keys(), "teacher_decodes": False}
    if codec.spec.decodes and teacher is not None:
        with Reads() as decoding:
            codec.decode(latent)
        found["teacher_decodes"] = not any((t.data_ptr(), t.shape) in decoding.seen for t in own.values())
    return found


def stored(codec: Codec, names: list[str]) -> int | None:
    """Bytes of these tensors in the codec's .safetensors; all of them where the codec only encodes."""
    if codec.provenance.path is None:
        return None
    sizes: dict[str, int] = {}
    for file in sorted(Path(codec.provenance.path).glob("*.safetensors")):
        half = file.stem.rpartition("_")[2]  # TAEF2 has a file for each half
        prefix = f"{half}." if half in ("encoder", "decoder") else ""
        sizes |= {prefix + key: t.numel() * t.element_size() for key, t in load_file(file).items()}
    if not codec.spec.decodes:
        return sum(sizes.values())
    return sum(sizes[name] for name in names) if names and all(name in sizes for name in names) else None


# -- time --------------------------------------------------------------------------------------------------------------

Calls = dict[str, Callable[[], object]]  # row → what is timed


def medians(calls: Calls, options: Options, wall: bool) -> dict[str, dict[str, float] | None]:
    """Row → median and quartiles in milliseconds a call and the number of calls; None where memory ran out."""
    spent: dict[str, list[float]] = {}
    planned: dict[str, int] = {}
    for row, call in calls.items():
        try:
            first = timed(call, options.device, wall)
            cost = first if first > 0.5 else min(timed(call, options.device, wall) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            say(f"{row} does not fit into this device's memory.")
            continue
        spent[row] = [first] if first > SLOW else []
        fewest = FEWEST_CALLS if cost < SLOW else 1
        planned[row] = max(fewest, min(MOST_CALLS, int(options.seconds / cost))) - len(spent[row])
    for turn in range(ROUNDS):
        for row, count in planned.items():
            for _ in range(count * (turn + 1) // ROUNDS - count * turn // ROUNDS):
                spent[row].append(timed(calls[row], options.device, wall))
    return {row: summary(spent[row]) if row in spent else None for row in calls}


def timed(call: Callable[[], object], device: str, wall: bool) -> float:
    """Seconds of processor time or, with `wall`, of the clock until the device is done."""
    clock = time.perf_counter if wall else time.process_time
    begin = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return max(clock() - begin, 1e-9)


def summary(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"ms": round(1e3 * middle, 4), "quartiles_ms": [round(1e3 * low, 4), round(1e3 * high, 4)],
            "calls": len(seconds)}


def per_picture(figures: dict[str, Any], count: int) -> dict[str, Any]:
    return figures | {"ms": round(figures["ms"] / count, 4),
                      "quartiles_ms": [round(edge / count, 4) for edge in figures["quartiles_ms"]]}


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def bare(codec: Codec) -> Callable[[], object]:
    """The network alone, on floats of its own type where it lies."""
    images = (pictures(1).float() / 255).to(codec.device, codec.dtype)

    def call() -> object:
        with torch.inference_mode():
            return codec._encode(images)

    return call


def encoding(codec: Codec, images: Tensor) -> Callable[[], object]:
    return lambda: codec.encode(images)


def decoding(codec: Codec) -> Callable[[], object]:
    latent = codec.encode(pictures(1))
    return lambda: codec.decode(latent)


# -- quality -----------------------------------------------------------------------------------------------------------


def photos(options: Options) -> dict[str, list[Tensor]]:
    """Set → its photos, uint8 `(1, 3, h, w)`."""
    sets: dict[str, list[Tensor]] = {}
    for label, place, size in (("val", "imagenet-1k-sample/val.tar", SIZE), ("kodak", "kodak", None)):
        if not (options.data / place).exists():
            say(f"PSNR on {label} is left out: {options.data / place} is not there; --data names the folder that holds "
                "it.")
            continue
        images = EvaluationImages(open_images(str(options.data / place)), size, options.limit)
        sets[label] = [(image[None] * 255).round().byte() for _, image in images]
    return sets


def quality(codec: Codec, sets: dict[str, list[Tensor]]) -> dict[str, float]:
    """Set → mean PSNR in dB."""
    return {label: round(statistics.mean(psnr(photo.float() / 255, codec.reconstruct(photo).cpu()).item()
                                         for photo in images), 3) for label, images in sets.items()}


# -- the run -----------------------------------------------------------------------------------------------------------


def main(options: Options) -> None:
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine's PyTorch finds no CUDA GPU.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = codecs(options)
    rows = {row: {"kind": codec.provenance.kind, "weights": codec.provenance.weights_hash, **weights_of(codec),
                  "latent": list(codec.encode(pictures(1)).mode().shape[1:])} for row, codec in found.items()}
    time_all(rows, found, options, wall=cuda)
    sets = photos(options) if options.quality else {}
    for row, codec in found.items():
        if sets and codec.spec.decodes and (codec.provenance.weights_hash != "none" or isinstance(codec, BlockMeans)):
            rows[row]["psnr"] = quality(codec, sets)
            say(f"{row}: {rows[row]['psnr']} dB")
    record = {"command": command(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
              "device": name_of(options), "dtype": options.dtype, "size": SIZE, "seconds": options.seconds,
              "threads": None if cuda else [str(threads) for threads in options.threads],
              "photos": {label: len(images) for label, images in sets.items()}, "rows": rows}
    key = options.device if options.dtype == "float32" else f"{options.device}-{options.dtype}"
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    options.out.write_text(json.dumps(before | {key: record}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n" + tables.organic_speed({key: record}))


def time_all(rows: dict[str, dict[str, Any]], found: dict[str, Codec], options: Options, wall: bool) -> None:
    """Into `rows`: one picture, batches, and one picture on more threads."""
    for what, figures in one_picture(found, options, wall).items():
        for row, value in figures.items():
            rows[row][what] = value
    for size in options.batches or (1, 8, 32, *([256] if wall else [])):
        say(f"batches of {size}")
        calls = {row: encoding(codec, pictures(size)) for row, codec in found.items() if row != REFERENCES[1]}
        for row, figures in medians(calls, options, wall).items():
            rows[row].setdefault("batches", {})[str(size)] = figures and per_picture(figures, size)
    for threads in () if wall else options.threads:
        say(f"{threads} threads")
        torch.set_num_threads(threads)
        for what, figures in one_picture(found, options, wall=True, halves_only=True).items():
            for row, value in figures.items():
                rows[row].setdefault("threads", {}).setdefault(str(threads), {})[what] = value
    torch.set_num_threads(1)


def one_picture(found: dict[str, Codec], options: Options, wall: bool, halves_only: bool = False) -> dict[str, Any]:
    """Figure → row → its time: encode, decode where there is a decoder, and the bare network."""
    kinds: dict[str, Calls] = {
        "encode": {row: encoding(codec, pictures(1)) for row, codec in found.items()},
        "decode": {row: decoding(codec) for row, codec in found.items() if codec.spec.decodes},
    }
    if not halves_only:
        kinds["bare"] = {row: bare(codec) for row, codec in found.items()}
        if wall:
            kinds["on_device"] = {row: encoding(codec, pictures(1).to(codec.device)) for row, codec in found.items()}
    figures = {}
    for what, calls in kinds.items():
        say(f"one picture, {what}")
        figures[what] = medians(calls, options, wall)
    return figures


def command() -> str:
    """As typed, without places of this machine."""
    words = [word.replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../") for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/organic_speed.py", *words])


def name_of(options: Options) -> str:
    """Of the GPU, else of the processor where the system tells it."""
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "a CPU")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main(tyro.cli(Options))
    except UserError as mistake:
        raise SystemExit(f"organic_speed.py: {mistake}") from None
