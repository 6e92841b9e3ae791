"""One hidden layer without gradients beside one trained with them: 512 neurons on 160 numbers of a fovea → TAEF2's latent.

    python benchmarks/organic_hidden.py --lessons runs/taef2 [--device cuda]

LESSONS is a folder of lessons that `omnilatent clone ../shared/data/taef2 --lessons` has filled. R² on held-out photos of:
a linear map; random tanh neurons; neurons from data pairs, chosen; the same tuned by nudges; and an MLP of the same size,
trained by Adam. All have a linear skip connection. Writes results/organic_hidden.json.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from omnilatent.organic.fovea import Fovea, FoveaFit
from omnilatent.organic.grid_learning import GridConfig, LayerSearch
from omnilatent.organic.learning import Gathered, Pace
from omnilatent.organic.lessons import LessonStore
from omnilatent.organic.pairs import Affine
from omnilatent.organic.retina import principal_axes
from omnilatent.organic.search import generator
from omnilatent.organic.tuning import Rows, read_out

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Ways to 512 hidden neurons."""

    lessons: Path
    """holds lessons/ and held-out/"""
    out: Path = ROOT / "benchmarks" / "results" / "organic_hidden.json"
    device: str = "cpu"
    neurons: int = 512
    inputs: int = 160
    candidates: int = 3_072
    sweeps: int = 200
    steps: int = 6_000
    sites: int = 500_000
    seed: int = 0


def rows_of(options: Options) -> Rows:
    """Fitted and held-out rows: the fovea's leading principal components, whitened, and the latent."""
    device = torch.device(options.device)
    stores = {held: LessonStore(options.lessons / name) for held, name in ((False, "lessons"), (True, "held-out"))}
    fit = FoveaFit(Fovea(), device)
    some = stores[False].read(range(0, len(stores[False]), max(1, len(stores[False]) // 200)), device)
    fit.add(some.images, generator("windows", options.seed), 0.5)
    code = fit.code()
    gathered = Gathered(Pace(len(stores[False]), len(stores[True]), options.sites, options.seed))
    for held, store in stores.items():
        for start in range(0, len(store), 16):
            lessons = store.read(slice(start, start + 16), device)
            gathered.take(code(lessons.images).flatten(2), lessons.taught.flatten(2), held, start)
    rows = gathered.rows()
    axes = principal_axes(rows.x)
    white = axes.whitening()[:, : options.inputs].float()
    return Rows((rows.x - axes.mean.float()) @ white, rows.y, (rows.held_x - axes.mean.float()) @ white, rows.held_y)


def adam(rows: Rows, options: Options) -> float:
    """Held-out loss of an MLP with a skip connection, batches of 4,096 rows, cosine decay."""
    torch.manual_seed(options.seed)
    d, k = rows.x.shape[1], rows.y.shape[1]
    hidden, out, skip = nn.Linear(d, options.neurons), nn.Linear(options.neurons, k), nn.Linear(d, k)
    parts = nn.ModuleList([hidden, out, skip]).to(rows.x.device)
    optimizer = torch.optim.Adam(parts.parameters(), lr=2e-3)

    def said(x: Tensor) -> Tensor:
        return out(torch.tanh(hidden(x))) + skip(x)

    with torch.enable_grad():
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / options.steps))
            chosen = torch.randint(len(rows.x), (4_096,), device=rows.x.device)
            loss = (said(rows.x[chosen]) - rows.y[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((said(rows.held_x) - rows.held_y).square().mean())


@torch.no_grad()
def main(options: Options) -> None:
    torch.set_float32_matmul_precision("highest")
    rows, config = rows_of(options), GridConfig(neurons=options.neurons, candidates=options.candidates)
    variance = float((rows.held_y - rows.y.mean(0)).square().mean())
    found: dict[str, dict[str, float]] = {}

    def note(label: str, loss: float, begin: float) -> None:
        found[label] = {"r2": round(1 - loss / variance, 4), "seconds": round(time.perf_counter() - begin, 1)}
        print(f"{label}: R² {found[label]['r2']:.4f} in {found[label]['seconds']:.1f} s", flush=True)

    begin = time.perf_counter()
    note("linear", read_out(rows, None, config.ridges)[1], begin)
    draw = torch.Generator().manual_seed(options.seed)
    d = rows.x.shape[1]
    random = Affine((torch.randn(options.neurons, d, generator=draw) / d**0.5).to(rows.x.device),
                    torch.randn(options.neurons, generator=draw).to(rows.x.device))
    begin = time.perf_counter()
    note("random tanh neurons", read_out(rows, random, config.ridges)[1], begin)
    begin = time.perf_counter()
    search = LayerSearch(rows, config, options.seed)
    note("from data pairs, chosen", search.held_loss, begin)
    for sweep in range(options.sweeps):
        search.step()
        if sweep + 1 in (25, 50, 100, 200, 400):
            note(f"tuned by {sweep + 1} sweeps", search.held_loss, begin)
    begin = time.perf_counter()
    note("Adam", adam(rows, options), begin)
    record = {"options": {name: str(value) for name, value in vars(options).items() if name not in ("lessons", "out")},
              "rows": [len(rows.x), len(rows.held_x)], "torch": torch.__version__, "found": found}
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
