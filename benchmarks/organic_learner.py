"""One layer learned from losses alone, against its rivals at equal evaluations and equal seconds.

    python benchmarks/organic_learner.py [tanh 512-4 512-192 2048-32] [--seconds 8] [--most 90]

Synthetic pairs: inputs with standard deviations falling as 1/i along turned axes, targets linear in them plus noise,
N = 20 d rows; and a tanh layer on targets made by one. All on one thread; seconds are CPU seconds of the process, so
that waiting for other work on the machine does not count, and neither does looking at how far a method has come. An
evaluation is the loss of one whole layer on all rows, or on a minibatch where a method takes those.

Equal evaluations are those of our directions, 2 d + 3. Equal seconds are those of our sweeps. A rival goes on until it
has spent both, and `--seconds`, but no longer than `--most` (for linear layers; a pass of Adam over the rows of
2048 → 32 takes so long that it does not get to as many evaluations, which the table shows as –).

Rivals are flattered. They get the whitened inputs and the targets' moments for nothing, so that their loss is a
quadratic form of k·d multiplications instead of a pass over the rows (the same number), and for evosax's what
compiling took is left out. On whitened inputs the loss they see is a sphere in k·d dimensions.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omnilatent.organic.config import LearnerConfig
from omnilatent.organic.directions import Directions
from omnilatent.organic.learner import open_search
from omnilatent.organic.neurons import squared_errors
from omnilatent.organic.probes import Sweeps
from omnilatent.organic.retina import principal_axes
from omnilatent.organic.search import Search

POPULATION = 64
Steps = Iterator[tuple[int, float | Callable[[], float]]]  # evaluations spent so far, loss or what tells it


@dataclass
class Problem:
    """Pairs, and the least-squares loss of linear neurons on them."""

    name: str
    inputs: Tensor  # (N, d)
    targets: Tensor  # (N, k)
    optimum: float = 0.0
    optimum_seconds: float = 0.0
    white: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, r)

    @property
    def probes(self) -> int:
        """Evaluations of one sweep of single directions."""
        return 2 * self.inputs.shape[1] + 3


def make(d: int, k: int, rows: int, tanh: bool = False, seed: int = 0) -> Problem:
    draw, turns = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    turn = torch.from_numpy(np.linalg.qr(turns.standard_normal((d, d)))[0]).float()
    inputs = torch.randn(rows, d, generator=draw) / torch.arange(1, d + 1) @ turn
    sums = inputs @ torch.randn(d, k, generator=draw)
    sums /= sums.std(0)
    noise = torch.randn(rows, k, generator=draw)
    targets = torch.tanh(1.5 * sums + 0.3 * noise) + 0.1 * noise.flip(0) if tanh else sums + 0.5 * noise
    problem = Problem(f"{'tanh ' if tanh else ''}{d} → {k}", inputs, targets)
    begin = time.process_time()
    x = np.c_[inputs.double().numpy(), np.ones(rows)]
    y = targets.double().numpy()
    weight = np.linalg.solve(x.T @ x + 1e-9 * np.eye(d + 1), x.T @ y)
    problem.optimum = float(np.square(y - x @ weight).mean())
    problem.optimum_seconds = time.process_time() - begin
    axes = principal_axes(inputs)
    problem.white = (inputs - axes.mean.float()) @ axes.whitening().float()
    return problem


def searching(search: Search, problem: Problem, steps: int = 10**9) -> Steps:
    """Steps of a search of ours; the loss is that of what it would hand out, on all rows."""
    for _ in range(steps):
        search.step()
        yield search.evaluations, search.train_loss
    yield search.evaluations, float(squared_errors(search.neurons(), problem.inputs, problem.targets).mean())


class Moments:
    """The mean loss of linear layers `(p, k, r)` on whitened inputs, exactly, from the targets' moments."""

    def __init__(self, problem: Problem) -> None:
        targets = problem.targets - problem.targets.mean(0)  # the bias for nothing, too
        self.cross = targets.T @ problem.white / len(targets)  # (k, r)
        self.plain = float(targets.double().square().mean())
        self.shape = tuple(self.cross.shape)

    def losses(self, weights: Tensor) -> Tensor:
        """`(p, k, r)` → `(p, k)`, less the targets' own power."""
        return (weights * (weights - 2 * self.cross)).sum(2)

    def loss(self, weight: Tensor) -> float:
        return self.plain + float(self.losses(weight[None]).mean())


def eggroll(problem: Problem, per_neuron: bool, sigma: float = 0.02, rate: float = 0.004) -> Steps:
    """Rank-1 perturbations in mirrored pairs, Adam on the estimate (arXiv 2511.16652, Algorithm 1).

    `per_neuron` is our addition: every row of the weight takes its own loss as fitness.
    """
    moments, draw = Moments(problem), torch.Generator().manual_seed(0)
    k, r = moments.shape
    mean, first, second = torch.zeros(3, k, r)
    for step in range(1, 10**9):
        a, b = (torch.randn(POPULATION // 2, n, generator=draw) for n in (k, r))
        change = sigma * a[:, :, None] * b[:, None, :]
        difference = moments.losses(mean + change) - moments.losses(mean - change)  # (p/2, k)
        if not per_neuron:
            difference = difference.mean(1, keepdim=True).expand(-1, k)
        fitness = difference / difference.std(0).clamp(min=1e-12)
        estimate = (fitness * a).T @ b / len(b)  # (k, r)
        first, second = 0.9 * first + 0.1 * estimate, 0.99 * second + 0.01 * estimate.square()
        scaled = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        mean = mean - rate / (1 + step / 300) * scaled
        yield step * POPULATION, moments.loss(mean)


def evosax(problem: Problem, name: str) -> Steps:
    """Whole layers as genomes, default settings but for the first step 0.02 and Adam's rate 0.002 (0.02 diverges)."""
    import jax
    import optax
    from evosax import algorithms

    moments = Moments(problem)
    cross, shape = jax.numpy.asarray(moments.cross.numpy()), moments.shape
    start = jax.numpy.zeros(shape)
    more = {"Open_ES": {"optimizer": optax.adam(0.002), "std_schedule": optax.constant_schedule(0.02)},
            "PGPE": {"optimizer": optax.adam(0.002)}, "Sep_CMA_ES": {}}[name]
    strategy = getattr(algorithms, name)(population_size=POPULATION, solution=start, **more)
    params = strategy.default_params
    if hasattr(params, "std_init"):
        params = params.replace(std_init=0.02)
    key = jax.random.key(0)

    @jax.jit
    def generation(key, state):
        key, one, two = jax.random.split(key, 3)
        population, state = strategy.ask(one, state, params)
        fitness = (population * (population - 2 * cross)).sum(2).mean(1)
        state, _ = strategy.tell(two, population, fitness, state, params)
        mean = strategy.get_mean(state)
        return key, state, (mean * (mean - 2 * cross)).sum(1).mean()

    state = strategy.init(key, start, params)
    for step in range(1, 4):  # compiled here, twice where the types of the first state are weak
        key, state, loss = generation(key, state)
    yield 0, moments.plain + float(loss)
    for step in range(4, 10**9):
        key, state, loss = generation(key, state)
        yield step * POPULATION, moments.plain + float(loss)


def adam(problem: Problem, inputs: Tensor, activation: str, rate: float, search: Search | None = None) -> Steps:
    """Gradients on all rows; a step counts as two evaluations, forward and backward."""
    k = problem.targets.shape[1]
    weight, bias = torch.zeros(k, inputs.shape[1], requires_grad=True), torch.zeros(k, requires_grad=True)
    spare = torch.zeros(1, requires_grad=True)
    spare.grad = torch.zeros(1)
    torch.optim.Adam([spare]).step()  # the first step of a process imports a compiler
    optimizer = torch.optim.Adam([weight, bias], lr=rate)
    yield 0, 0.0
    for step in range(1, 10**9):
        made = inputs @ weight.T + bias
        if activation == "tanh":
            made = torch.tanh(made) * search.scale.scale + search.scale.shift
        loss = (made - problem.targets).square().mean(0).sum()  # each neuron's own, as ours
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield 2 * step, loss.item() / k


def run(label: str, problem: Problem, begin: Callable[[], Steps], seconds: float = 1e9, evaluations: int = 0,
        most: float = 1e9) -> dict:
    """The course of one method: evaluations, CPU seconds, and the loss over the least-squares optimum less 1.

    It goes on until it has spent `seconds` and `evaluations`, or `most` seconds; one that ends by itself is `done`.
    """
    course, clock = [], time.process_time()
    steps = begin()
    done = True
    for spent, loss in steps:
        if spent == 0:  # what came before was compiling
            clock = time.process_time()
            continue
        took = time.process_time() - clock
        course.append((spent, took, (loss() if callable(loss) else loss) / problem.optimum - 1))
        clock = time.process_time() - took
        if took >= most or (took >= seconds and spent >= evaluations):
            done = False
            break
    last = course[-1]
    print(f"  {label}: excess {last[2]:.2e}, {last[0]} evaluations, {last[1]:.2f} s", flush=True)
    return {"problem": problem.name, "method": label, "evaluations": last[0], "cpu_seconds": last[1],
            "excess": last[2], "done": done, "course": thin(course)}


def thin(course: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """Points of a course about 10 % of evaluations apart, and the last."""
    kept: list[tuple[int, float, float]] = []
    for point in course:
        if not kept or point[0] > 1.1 * kept[-1][0]:
            kept.append(point)
    return kept + ([course[-1]] if kept[-1] != course[-1] else [])


def until(row: dict, column: int, limit: float) -> str:
    """The excess at the last point within a limit of evaluations (0) or seconds (1); – where a method was stopped
    before it, or looked at for the first time after it."""
    within = [point for point in row["course"] if point[column] <= limit]
    return f"{within[-1][2]:.1e}" if within and (row["done"] or row["course"][-1][column] >= limit) else "–"


def linear_rows(problem: Problem, seconds: float, most: float) -> list[dict]:
    x, y, d = problem.inputs, problem.targets, problem.inputs.shape[1]
    rows = [run("sweeps (ours)", problem, lambda: searching(Sweeps(x, y), problem, 2))]
    rows.append(run("directions, whitened (ours)", problem, lambda: searching(Directions(x, y), problem, 1)))
    if d <= 512:
        rows.append(run("directions, conjugate (ours)", problem,
                        lambda: searching(Directions(x, y, whiten=False), problem, 1)))
    budget = {"seconds": max(seconds, rows[0]["cpu_seconds"]), "evaluations": problem.probes, "most": most}
    base = LearnerConfig(activation="linear", batch_size=min(len(x), 8 * d), seed=0)
    settings = {"stream of minibatches (ours)": {"search": "stream"},
                "(1+1) mutation, whitened (ours)": {"search": "mutation", "mutation": 0.3, "batch_size": len(x)},
                "classic +0.01/−0.005": {"rule": "classic", "batch_size": 1024},
                "classic +0.1/−0.05": {"rule": "classic", "batch_size": 1024, "trust_up": 0.1, "trust_down": 0.05}}
    for label, changed in settings.items():
        search = open_search(x, y, replace(base, **changed))
        if label.startswith("(1+1)"):
            search.batches = lambda position: (x, y)
        rows.append(run(label, problem, lambda s=search: watched(s, problem), **budget))
    for name, label in (("Open_ES", "OpenAI-ES"), ("PGPE", "PGPE"), ("Sep_CMA_ES", "sep-CMA-ES")):
        if importlib.util.find_spec("evosax") is None:
            print(f"  {label}: left out, since evosax is not installed (pip install evosax).")
        else:
            rows.append(run(f"{label} (evosax)", problem, lambda n=name: evosax(problem, n), **budget))
    rows.append(run("EGGROLL rank 1", problem, lambda: eggroll(problem, False), **budget))
    rows.append(run("EGGROLL rank 1, fitness per neuron", problem, lambda: eggroll(problem, True), **budget))
    rows.append(run("Adam, raw inputs", problem, lambda: adam(problem, x, "linear", 0.03), **budget))
    rows.append(run("Adam, whitened inputs", problem, lambda: adam(problem, problem.white, "linear", 0.03), **budget))
    rows.append({"problem": problem.name, "method": "normal equations solved (floor)", "evaluations": 0,
                 "cpu_seconds": problem.optimum_seconds, "excess": 0.0, "done": True,
                 "course": [(0, problem.optimum_seconds, 0.0)]})
    return rows


def watched(search: Search, problem: Problem) -> Steps:
    """A search on minibatches, its loss taken on all rows now and then; looking counts neither as an evaluation nor
    as time."""
    looked = 0.0
    while True:
        search.step()
        if search.evaluations > 1.05 * looked:
            looked = search.evaluations
            yield looked, lambda: float(squared_errors(search.neurons(), problem.inputs, problem.targets).mean())


def tanh_rows(problem: Problem, seconds: float) -> list[dict]:
    """Excess here is over linear least squares, so it is negative."""
    x, y = problem.inputs, problem.targets
    scale = Sweeps(x, y, "tanh", headroom=1.3)
    rows = [run("sweeps (ours)", problem, lambda: searching(Sweeps(x, y, "tanh", headroom=1.3), problem, 12)),
            run("directions, whitened (ours)", problem,
                lambda: searching(Directions(x, y, "tanh", headroom=1.3), problem, 3))]
    for label, inputs, rate in (("raw", x, 0.03), ("whitened", problem.white, 0.01), ("whitened", problem.white, 0.03)):
        rows.append(run(f"Adam {rate}, {label} inputs", problem,
                        lambda i=inputs, r=rate: adam(problem, i, "tanh", r, scale), seconds))
    return rows


def table(rows: list[dict], problems: list[Problem]) -> str:
    lines = []
    for problem in problems:
        own = [row for row in rows if row["problem"] == problem.name]
        limit = own[0]["cpu_seconds"]
        lines += [f"\n**{problem.name}**, N = {len(problem.inputs)}, least squares {problem.optimum:.5f}\n",
                  f"| method | excess at the end | evaluations | CPU s | excess at {problem.probes} evaluations | "
                  f"excess at {limit:.2f} s |", "|---|---|---|---|---|---|"]
        for row in own:
            lines.append(f"| {row['method']} | {row['excess']:.2e} | {row['evaluations']} | {row['cpu_seconds']:.2f} | "
                         f"{until(row, 0, problem.probes)} | {until(row, 1, limit)} |")
    return "\n".join(lines)


def write(path: Path, rows: list[dict]) -> None:
    """Write the rows; those of other problems that the file holds stay."""
    names = {row["problem"] for row in rows}
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    record = {"seed": 0, "dtype": "float32", "threads": 1, "torch": torch.__version__, "numpy": np.__version__,
              "machine": platform.machine(), "seconds": "CPU seconds of the process",
              "rows": [row for row in before if row["problem"] not in names] + rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


PROBLEMS = {"tanh": (193, 32, 16384), "512-4": (512, 4, 10240), "512-192": (512, 192, 10240),
            "2048-32": (2048, 32, 40960), "small": (64, 4, 1280)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", choices=[*PROBLEMS, []], default=[], help="default: all but small")
    parser.add_argument("--seconds", type=float, default=8.0, help="each rival gets at least; tanh: 2.5 times as much")
    parser.add_argument("--most", type=float, default=90.0, help="and at most, to get to as many evaluations")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "organic_learner.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.problems or list(PROBLEMS)[:-1]:
        d, k, rows = PROBLEMS[name]
        problem = make(d, k, rows, tanh=name == "tanh")
        print(problem.name, flush=True)
        if name == "tanh":
            made = tanh_rows(problem, 2.5 * options.seconds)
        else:
            made = linear_rows(problem, options.seconds, options.most)
        write(options.json, made)
        print(table(made, [problem]), flush=True)


if __name__ == "__main__":
    main()
