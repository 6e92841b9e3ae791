"""Our quantizers beside vector-quantize-pytorch's: forward and backward of one batch, time and peak memory.

    python benchmarks/quantizer_speed.py [--vectors 16384] [--dim 8] [--codes 16384] [--large 262144] [--no-library]

On a GPU first checks that the kernels give the numbers of the tiles in float64 to 1e-4, then prints medians of
CUDA-event timings after warm-up, peak GiB beyond what the batch and the quantizer hold, and of ours the milliseconds that
the device works (`device_ms`, replayed as a CUDA graph): hosts differ by 40 % in how fast they launch. `--tune` tries other
tile sizes of the four LGQ kernels and the search. Writes results/quantizer_speed.json. On a CPU a small run, by the
clock, which writes nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import omnilatent
from omnilatent.quantizers import build_quantizer
from omnilatent.quantizers.search import nearest_codes
from omnilatent.quantizers.soft import SoftAssignment, soft_assignment

RESULTS = Path(__file__).parent / "results"
LEVELS = (8, 8, 8, 6, 5)
TILES = ((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3),
         (128, 32, 4, 3))
SEARCH_TILES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8))


@dataclass(frozen=True)
class QuantizerSpeed:
    """Time the quantizers on one batch."""

    vectors: int = 16384
    """Vectors of the batch; 1,024 on a CPU."""
    dim: int = 8
    """Their width."""
    codes: int = 16384
    """Codes K; 1,024 on a CPU."""
    large: int = 2**18
    """The large K, for which only time and memory of ours are measured; 0: none. 16,384 on a CPU."""
    calls: int = 20
    """Timed calls, of which the median counts."""
    library: bool = True
    """Also time vector-quantize-pytorch."""
    tune: bool = False
    """Also time other tile sizes of the kernels."""
    tau: float = 0.5
    """One of LGQ's three temperatures in the parity check; timings are at its start."""


def difference(a: Tensor, b: Tensor) -> float:
    """max |a − b| over max |b|."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max()).item()


def soft_gradients(vectors: Tensor, codes: Tensor, tau: float) -> tuple[SoftAssignment, tuple[Tensor, ...]]:
    """The soft assignment and its gradients for a fixed mixture of its outputs."""
    vectors, codes = vectors.clone().requires_grad_(), codes.clone().requires_grad_()
    soft = soft_assignment(vectors, codes, tau)
    generator = torch.Generator().manual_seed(1)
    outputs = [t for t in soft if t.is_floating_point()]
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    return soft, torch.autograd.grad(outputs, (vectors, codes), weights)


def parity(options: QuantizerSpeed, device: torch.device) -> dict[str, dict[str, float]]:
    """Of each size n × k × d, relative differences between the device and tiles in float64: on the CPU on batches of odd
    sizes, at full size on the GPU, where those tiles are the same code."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1000, 999, options.dim), (513, 4097, options.dim), (90, 80, 3), (300, 200, 16), (130, 300, 40), (70, 130, 128)]
    if device.type == "cuda":
        sizes.append((options.vectors, options.codes, options.dim))
    found = {}
    for n, k, d in sizes:
        exact = device if n * k > 2**24 else torch.device("cpu")
        vectors, codes = (torch.randn(m, d, generator=generator) * (8 / d) ** 0.5 for m in (n, k))
        worst = found[f"{n} × {k} × {d}"] = {}
        for tau in (1.0, options.tau, 0.1):
            soft, gradients = soft_gradients(vectors.to(device), codes.to(device), tau)
            true, true_gradients = soft_gradients(vectors.double().to(exact), codes.double().to(exact), tau)
            pairs = dict(zip(SoftAssignment._fields[:4], zip(soft[:4], true[:4], strict=True), strict=True))
            pairs |= dict(zip(("∂vectors", "∂codes"), zip(gradients, true_gradients, strict=True), strict=True))
            for name, (ours, precise) in pairs.items():
                worst[name] = max(worst.get(name, 0.0), difference(ours, precise))
        nearest = nearest_codes(vectors.to(device), codes.to(device)).cpu()
        least = (vectors - codes[true.indices.cpu()]).square().sum(1)
        for name, indices in (("nearest", nearest), ("soft", soft.indices.cpu())):
            worst[f"{name}: extra distance"] = ((vectors - codes[indices]).square().sum(1) - least).max().item()
    return found


def timed(step: Callable[[], Any], device: torch.device, calls: int) -> dict[str, float]:
    """Median milliseconds and, on a GPU, peak GiB of one call beyond what was held before it."""
    for _ in range(3):
        step()
    if device.type != "cuda":
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return {"ms": 1e3 * statistics.median(seconds)}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": statistics.median(times), "peak_gib": (torch.cuda.max_memory_allocated() - held) / 2**30}


def replayed(step: Callable[[], Any], calls: int) -> float:
    """Median milliseconds of one call as a captured CUDA graph, in which nothing waits for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return timed(graph.replay, torch.device("cuda"), calls)["ms"]


def ours(kind: str, codes: int, options: QuantizerSpeed, device: torch.device, **more: Any) -> Callable[[], None]:
    sizes = {"levels": LEVELS} if kind == "fsq" and codes == 16384 else {"codebook_size": codes}
    model = build_quantizer(kind, options.dim, **sizes, **more).to(device).train()
    vectors = torch.randn(1, options.vectors, options.dim, device=device, requires_grad=True)

    def step() -> None:
        result = model(vectors)
        (result.quantized.square().mean() + sum(result.losses.values())).backward()
        model.zero_grad(set_to_none=True)
        vectors.grad = None

    return step


def theirs(kind: str, options: QuantizerSpeed, device: torch.device) -> Callable[[], None]:
    import vector_quantize_pytorch as library

    model = {"vq": lambda: library.VectorQuantize(options.dim, options.codes),
             "simvq": lambda: library.SimVQ(options.dim, options.codes),
             "fsq": lambda: library.FSQ(list(LEVELS), dim=options.dim)}[kind]().to(device).train()
    vectors = torch.randn(1, options.vectors, options.dim, device=device, requires_grad=True)

    def step() -> None:
        quantized, *rest = model(vectors)
        loss = quantized.square().mean() + (rest[1].sum() if len(rest) > 1 else 0)
        loss.backward()
        model.zero_grad(set_to_none=True)
        vectors.grad = None

    return step


def tune(options: QuantizerSpeed, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel alone, several calls at a time, for tile sizes (held × streamed, or rows × codes)."""
    from omnilatent.quantizers import triton_pack, triton_search, triton_soft

    z, c, g = (torch.randn(m, options.dim, device=device) for m in (options.vectors, options.codes, options.vectors))
    e, q, u = (torch.randn(m, device=device) for m in (options.vectors, options.vectors, options.codes))
    tau, centre = torch.tensor(1.0, device=device), c.mean(0)
    (average, _, peak, usage, _), (packed, log_sum) = triton_soft.forward(z, c, centre, tau, None)
    g_half, offset = triton_soft.known(average, centre, peak, usage, g, q, u)
    level = triton_soft.of_vectors(z, centre, tau, average, packed, log_sum, g_half, offset, e, q, u)[1]
    calls = {"SEARCH": lambda: triton_search.nearest(z, c, centre, None),
             "FORWARD": lambda: triton_soft.assign(z, c, centre, tau, packed),
             "USAGE": lambda: triton_soft.used(len(z), c, packed, log_sum),
             "VECTORS": lambda: triton_soft.of_vectors(z, centre, tau, average, packed, log_sum, g_half, offset, e, q, u),
             "CODES": lambda: triton_soft.of_codes(z, tau, packed, log_sum, g_half, level, q, u)}
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        module, kind = (triton_search, triton_search.Launch) if name == "SEARCH" else (triton_soft, triton_pack.Tile)
        default = getattr(module, name)
        for tile in SEARCH_TILES if name == "SEARCH" else TILES:
            setattr(module, name, kind(*tile))
            try:
                ms = timed(lambda call=call: [call() for _ in range(8)], device, 3)["ms"] / 8
            except Exception as failure:  # out of registers or shared memory
                print(name, tile, type(failure).__name__)
                continue
            found.setdefault(name, {})[" × ".join(map(str, tile))] = round(ms, 4)
        setattr(module, name, default)
        print(name, default, dict(sorted(found[name].items(), key=lambda item: item[1])[:6]), flush=True)
    return found


def versions() -> dict[str, str]:
    found = {"omnilatent": omnilatent.__version__, "torch": torch.__version__}
    for package in ("triton", "vector-quantize-pytorch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(options: QuantizerSpeed) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        options = QuantizerSpeed(**(asdict(options) | {"vectors": 1024, "codes": 1024, "large": min(options.large, 16384), "calls": 5}))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu, 1 thread"
    differences = parity(options, device)
    for size, found in differences.items():
        print(f"parity on {name}, {size}:", {k: float(f"{v:.2g}") for k, v in found.items()}, flush=True)
    worst = {kind: max(found[kind] for found in differences.values()) for kind in next(iter(differences.values()))}
    rows: list[dict[str, Any]] = []
    cases = [("omnilatent", kind, options.codes) for kind in ("lgq", "vq", "simvq", "fsq")]
    cases += [("vector-quantize-pytorch", kind, options.codes) for kind in ("vq", "simvq", "fsq")] if options.library else []
    cases += [("omnilatent", kind, options.large) for kind in ("lgq", "vq", "simvq", "fsq")] if options.large else []
    for source, kind, codes in cases:
        step = ours(kind, codes, options, device) if source == "omnilatent" else theirs(kind, options, device)
        rows.append({"from": source, "quantizer": kind, "codes": codes} | timed(step, device, options.calls))
        if source == "omnilatent" and device.type == "cuda":  # a graph cannot hold the renewal of codes
            again = ours(kind, codes, options, device, **({"renew_every": 10**9} if kind in ("lgq", "vq") else {}))
            rows[-1]["device_ms"] = replayed(again, options.calls)
        figures = "  ".join(f"{key} {rows[-1][key]:8.3f}" for key in ("ms", "device_ms", "peak_gib") if key in rows[-1])
        print(f"{source:24} {kind:6} K {codes:7}  {figures}", flush=True)
    if device.type == "cuda":
        result = {"device": name, "options": asdict(options), "versions": versions(), "parity": worst,
                  "parity_of_sizes": differences, "rows": rows}
        if options.tune:
            result["tiles"] = tune(options, device)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        (RESULTS / "quantizer_speed.json").write_text(text, encoding="utf-8")
    if max(worst.values()) > 1e-4:
        raise SystemExit(f"the kernels differ from the tiles by {max(worst.values()):.2g}; at most 1e-4 is allowed")


if __name__ == "__main__":
    main(tyro.cli(QuantizerSpeed))
