"""Our quantizers beside vector-quantize-pytorch's: forward and backward of one batch, time and peak memory.

    python benchmarks/quantizer_speed.py [--vectors 16384] [--dim 8] [--codes 16384] [--large 262144] [--no-library]

On a GPU first checks that the kernels give the numbers of the tiles on the CPU to 1e-4, then prints medians of
CUDA-event timings after warm-up and peak GiB beyond what the batch and the quantizer hold. `--tune` tries other tile
sizes of the four LGQ kernels and the search. Writes results/quantizer_speed.json. On a CPU a small run, by the clock,
which writes nothing.
"""

from __future__ import annotations

import importlib.metadata
import itertools
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
    """LGQ's temperature in the parity check; timings are at its start."""


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


def parity(options: QuantizerSpeed, device: torch.device) -> dict[str, float]:
    """Relative differences between the device and float64 tiles on the CPU, on a batch of odd sizes."""
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for n, k, d in ((1000, 999, options.dim), (513, 4097, options.dim), (130, 300, 40), (70, 130, 128)):
        vectors, codes = (torch.randn(m, d, generator=generator) * (8 / d) ** 0.5 for m in (n, k))
        for tau in (1.0, options.tau, 0.1):
            soft, gradients = soft_gradients(vectors.to(device), codes.to(device), tau)
            true, true_gradients = soft_gradients(vectors.double(), codes.double(), tau)
            pairs = dict(zip(SoftAssignment._fields[:4], zip(soft[:4], true[:4], strict=True), strict=True))
            pairs |= dict(zip(("∂vectors", "∂codes"), zip(gradients, true_gradients, strict=True), strict=True))
            for name, (ours, exact) in pairs.items():
                worst[name] = max(worst.get(name, 0.0), difference(ours, exact))
        found = nearest_codes(vectors.to(device), codes.to(device)).cpu()
        least = (vectors - codes[true.indices]).square().sum(1)
        for name, indices in (("nearest", found), ("soft", soft.indices.cpu())):
            extra = ((vectors - codes[indices]).square().sum(1) - least).max().item()
            worst[f"{name}: extra distance"] = max(worst.get(f"{name}: extra distance", 0.0), extra)
    return worst


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


def ours(kind: str, codes: int, options: QuantizerSpeed, device: torch.device) -> Callable[[], None]:
    sizes = {"levels": LEVELS} if kind == "fsq" and codes == 16384 else {"codebook_size": codes}
    model = build_quantizer(kind, options.dim, **sizes).to(device).train()
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
    """Milliseconds of the kernels alone, several calls at a time, for each one's tile sizes, all others at their defaults."""
    from omnilatent.quantizers import triton_search, triton_soft
    from omnilatent.quantizers.triton_search import Launch

    z, c = (torch.randn(m, options.dim, device=device) for m in (options.vectors, options.codes))
    norms, tau, rows, codes = c.square().sum(1), torch.tensor(1.0, device=device), z[:, 0].contiguous(), c[:, 0].contiguous()
    average, low, log_sum, *_ = triton_soft.forward(z, c, norms, tau)
    calls = {"SEARCH": lambda: triton_search.nearest(z, c, c[0], None), "FORWARD": lambda: triton_soft.forward(z, c, norms, tau),
             "VECTORS": lambda: triton_soft.backward(z, c, norms, low, log_sum, average, tau, z, rows, rows, codes, rows)}
    calls |= {"USAGE": calls["FORWARD"], "CODES": calls["VECTORS"]}
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        module = triton_search if name == "SEARCH" else triton_soft
        default = getattr(module, name)
        for tile in itertools.product((32, 64, 128), (32, 64, 128), (2, 4, 8)):
            setattr(module, name, Launch(*tile))
            try:
                ms = timed(lambda call=call: [call() for _ in range(8)], device, 3)["ms"] / 8
            except Exception as failure:  # out of registers or shared memory
                print(name, tile, type(failure).__name__)
                continue
            found.setdefault(name, {})["{}×{}, {} warps".format(*tile)] = round(ms, 4)
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
    worst = parity(options, device)
    print(f"parity on {name}:", {k: float(f"{v:.2g}") for k, v in worst.items()})
    rows: list[dict[str, Any]] = []
    cases = [("omnilatent", kind, options.codes) for kind in ("lgq", "vq", "simvq", "fsq")]
    cases += [("vector-quantize-pytorch", kind, options.codes) for kind in ("vq", "simvq", "fsq")] if options.library else []
    cases += [("omnilatent", kind, options.large) for kind in ("lgq", "vq", "simvq", "fsq")] if options.large else []
    for source, kind, codes in cases:
        step = ours(kind, codes, options, device) if source == "omnilatent" else theirs(kind, options, device)
        rows.append({"from": source, "quantizer": kind, "codes": codes} | timed(step, device, options.calls))
        figures = "  ".join(f"{key} {rows[-1][key]:8.3f}" for key in ("ms", "peak_gib") if key in rows[-1])
        print(f"{source:24} {kind:6} K {codes:7}  {figures}", flush=True)
    if device.type == "cuda":
        result = {"device": name, "options": asdict(options), "versions": versions(), "parity": worst, "rows": rows}
        if options.tune:
            result["tiles"] = tune(options, device)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        (RESULTS / "quantizer_speed.json").write_text(text, encoding="utf-8")
    if max(worst.values()) > 1e-4:
        raise SystemExit(f"the kernels differ from the tiles by {max(worst.values()):.2g}; at most 1e-4 is allowed")


if __name__ == "__main__":
    main(tyro.cli(QuantizerSpeed))
