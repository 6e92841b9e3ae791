"""Neurons learned without gradients: oracles by closed form, made before the forbidding mode is entered.

Run as a program with a folder, this file is what the test of two real processes starts.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from omnilatent.errors import UserError
from omnilatent.organic import probes
from omnilatent.organic.config import LearnerConfig
from omnilatent.organic.directions import Directions
from omnilatent.organic.layer_task import LayerTask
from omnilatent.organic.learner import fit, fit_headrooms, open_stream
from omnilatent.organic.neurons import Neurons, scale_targets, squared_errors
from omnilatent.organic.peers import Peers
from omnilatent.organic.probes import fit_linear
from omnilatent.organic.retina import Moments, area_retina, cosine_retina, fit_principal, principal_axes
from omnilatent.organic.search import Batches, Minibatched, minibatches
from omnilatent.organic.stack import Stack, StackConfig, grow
from omnilatent.training.checkpoint import furthest
from omnilatent.training.config import RunConfig
from omnilatent.training.loop import launch_fabric, train

SOURCE = Path(probes.__file__).parent
FORBIDDEN = {"solve", "lstsq", "inv", "pinv", "solve_ex", "inv_ex", "solve_triangular", "cholesky", "cholesky_ex",
             "lu_solve", "tensorsolve", "tensorinv", "ldl_solve", "lu_factor"}
TORCH_FORBIDDEN = {"cholesky_solve", "cholesky_inverse", "triangular_solve", "lu_solve", "inverse", "pinverse", "lstsq"}
PAIRS = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and linear solvers raise; eigenvectors raise outside the retina's file."""
    def refuse(name: str):
        def refused(*_: object, **__: object) -> None:
            raise AssertionError(f"{name} was called")
        return refused

    for place, names in ((torch.linalg, FORBIDDEN), (np.linalg, FORBIDDEN), (torch, TORCH_FORBIDDEN),
                         (Tensor, TORCH_FORBIDDEN | {"backward"}), (torch.autograd, {"backward", "grad"})):
        for name in names:
            if hasattr(place, name):
                monkeypatch.setattr(place, name, refuse(name))


def pairs(rows: int = 2000, d: int = 40, k: int = 3, noise: float = 0.5, seed: int = 0) -> PAIRS:
    """Inputs with a decaying spectrum and a mean, and noisy linear targets."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]).float()
    inputs = torch.randn(rows, d, generator=draw) / torch.arange(1, d + 1) @ turn + 0.3
    targets = inputs @ (turn[: k] + turn[-k:] * 5).T
    targets = (targets - targets.mean(0)) / targets.std(0) + noise * torch.randn(rows, k, generator=draw)
    return inputs, targets


def optimum(inputs: Tensor, targets: Tensor) -> float:
    """The least-squares loss, by numpy."""
    x, y = np.c_[inputs.double().numpy(), np.ones(len(inputs))], targets.double().numpy()
    weight = np.linalg.lstsq(x, y, rcond=None)[0] if x.shape[1] < 100 else np.linalg.solve(x.T @ x, x.T @ y)
    return float(np.square(y - x @ weight).mean())


def test_the_forbidding_mode_forbids(forbidden: None) -> None:
    for call in (lambda: torch.linalg.lstsq(torch.eye(2), torch.eye(2)), lambda: np.linalg.pinv(np.eye(2)),
                 lambda: torch.ones(1, requires_grad=True).sum().backward(), lambda: torch.inverse(torch.eye(2))):
        with pytest.raises(AssertionError, match="was called"):
            call()


def test_a_linear_layer_ends_at_least_squares(request: pytest.FixtureRequest) -> None:
    inputs, targets = pairs()
    best = optimum(inputs, targets)
    request.getfixturevalue("forbidden")
    assert fit_linear(inputs, targets)[1].train_loss / best - 1 < 1e-4
    assert fit_linear(inputs, targets, sweeps=2)[1].train_loss / best - 1 < 1e-6
    for whiten in (True, False):
        search = Directions(inputs, targets, whiten=whiten)
        search.step()
        assert search.evaluations == 2 * inputs.shape[1] + 3  # 2 r + 1, and two for the bias
        assert abs(float(squared_errors(search.neurons(), inputs, targets).mean()) / best - 1) < 1e-5


def test_512_to_192_within_one_per_cent_in_seconds(request: pytest.FixtureRequest) -> None:
    inputs, targets = pairs(rows=2500, d=512, k=192)
    best = optimum(inputs, targets)
    request.getfixturevalue("forbidden")
    begin = time.process_time()
    _, report = fit_linear(inputs, targets)
    assert report.train_loss / best - 1 < 0.01
    assert time.process_time() - begin < 10  # about 1 on an idle core


def test_memory_mapped_rows_are_read_like_any(tmp_path: Path) -> None:
    inputs, targets = pairs(rows=700)
    (tmp_path / "rows.bin").write_bytes(inputs.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "rows.bin"), size=inputs.numel()).view_as(inputs)
    ours, theirs = fit_linear(mapped, targets)[0], fit_linear(inputs, targets)[0]
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_collinear_and_constant_inputs_do_no_harm() -> None:
    inputs, targets = pairs()
    more = torch.cat([inputs, inputs[:, :3], torch.full((len(inputs), 2), 7.0)], 1)
    neurons, report = fit_linear(more, targets, sweeps=2)
    assert report.train_loss / optimum(inputs, targets) - 1 < 1e-3
    assert neurons.weight[:, -2:].abs().max() == 0


def test_ridge_is_ridge() -> None:
    inputs, targets = pairs()
    z = ((inputs - inputs.mean(0)) / inputs.std(0, correction=0)).double()
    y = (targets - targets.mean(0)).double()
    n, d = z.shape
    weight = np.linalg.solve((z.T @ z / n).numpy() + 0.3 * np.eye(d), (z.T @ y / n).numpy())  # (d, k)
    neurons, _ = fit_linear(inputs, targets, ridge=0.3, sweeps=2)
    ours = neurons.weight.double() * inputs.std(0, correction=0)
    assert torch.allclose(ours, torch.from_numpy(weight.T), atol=1e-5)


def test_probes_see_real_losses() -> None:
    """The response along a direction is the difference of two losses of the layer, for tanh up to δ²."""
    inputs, targets = pairs()
    for activation in ("linear", "tanh"):
        search = probes.Sweeps(inputs, targets, activation, headroom=1.5)
        draw = torch.Generator().manual_seed(1)
        search.weight += 0.1 * torch.randn(search.weight.shape, generator=draw)
        direction = torch.randn(search.weight.shape[1], generator=draw)
        sums = search.sums_of(inputs, search.weight, search.bias)
        fall, _, _ = search.responses(inputs, sums, search.goals)
        ahead, behind = (search.losses(search.sums_of(inputs, search.weight + h * direction, search.bias), search.goals)
                         for h in (0.01, -0.01))
        assert torch.allclose((behind - ahead) / 0.04, (fall @ direction).double(), rtol=5e-3, atol=1e-4)


def test_tanh_is_not_worse_than_adam() -> None:
    inputs, targets = pairs(rows=2000, k=4)
    targets = torch.tanh(2 * targets)
    neurons, report = fit_linear(inputs, targets, activation="tanh", sweeps=10, headroom=1.5)
    weight, bias = torch.zeros(4, 40, requires_grad=True), torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=0.03)
    for _ in range(400):
        made = torch.tanh(inputs @ weight.T + bias) * neurons.scale + neurons.shift
        loss = (made - targets).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert report.train_loss <= loss.item() * 1.0001
    assert report.train_loss < 0.95 * fit_linear(inputs, targets)[1].train_loss
    search = Directions(inputs, targets, "tanh", headroom=1.5)
    for _ in range(4):
        search.step()
    assert search.train_loss <= loss.item() * 1.002


def test_every_step_lowers_every_neuron_or_is_not_taken() -> None:
    inputs, targets = pairs()
    search = probes.Sweeps(inputs, torch.tanh(2 * targets), "tanh", headroom=1.2)
    before = search.losses(search.sums_of(inputs, search.weight, search.bias), search.goals)
    for _ in range(8):
        trust = search.trust
        search.step()
        after = search.losses(search.sums_of(inputs, search.weight, search.bias), search.goals)
        assert bool((after <= before * (1 + 1e-6)).all())
        assert bool(((search.trust > trust) | (after >= before * (1 - 1e-6))).all())
        before = after


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.05), (0.01, 0.005)])
def test_the_classic_rule_does_not_learn(up: float, down: float) -> None:
    inputs, targets = pairs()
    nothing, best = float(targets.var(0, correction=0).mean()), optimum(inputs, targets)
    config = LearnerConfig(rule="classic", activation="linear", steps=200, batch_size=256, population=40, trust_up=up,
                           trust_down=down, validate_every=200)
    _, report = fit(inputs, targets, config, (inputs, targets))
    assert report.evaluations == 8_000
    assert report.held_out_loss > nothing - 0.3 * (nothing - best)  # the best of forty draws, not learning
    _, neuron = fit(inputs, targets, replace(config, rule="neuron", steps=2), (inputs, targets))
    assert neuron.train_loss < best * 1.01 and neuron.evaluations < 50


def test_classic_trust_follows_the_rule_of_the_seed() -> None:
    inputs, targets = pairs()
    config = LearnerConfig(rule="classic", activation="linear", steps=40, batch_size=64, population=8, patience=0)
    _, report = fit(inputs, targets, config)
    ups = (np.array(report.trust) - 0.5 + 39 * 0.005) / 0.015  # 39 comparisons, each +0.01 or −0.005
    assert np.allclose(ups, ups.round()) and ((ups > 0) & (ups < 39)).all()
    _, still = fit(inputs, targets, replace(config, epsilon=1e9))
    assert set(still.trust) == {0.5}


def test_a_stream_ends_near_least_squares_of_data_it_never_held() -> None:
    def batch(position: int) -> PAIRS:
        inputs, targets = pairs(rows=1000, seed=0)
        draw = torch.Generator().manual_seed(position)
        return inputs + 0.05 * torch.randn(inputs.shape, generator=draw), targets

    everything = [batch(i) for i in range(64)]
    inputs, targets = (torch.cat(part) for part in zip(*everything, strict=True))
    best, excess = optimum(inputs, targets), {}
    search = open_stream(batch, LearnerConfig(search="stream", activation="linear"))
    for step in range(1, 65):
        search.step()
        excess[step] = float(squared_errors(search.neurons(), inputs, targets).mean()) / best - 1
    assert excess[64] < 0.001
    assert max(excess[step] for step in (32, 33, 34)) < 1.1 * excess[31]  # nor is it worse after a doubling
    assert search.evaluations == 64 * 4


def test_moments_in_parts_are_those_of_the_whole() -> None:
    inputs, _ = pairs(rows=3000)
    moments = Moments(inputs.shape[1])
    for part in inputs.split(700):
        moments.add(part)
    whole, parts = principal_axes(inputs), moments.axes()
    assert torch.allclose(whole.mean, parts.mean, atol=1e-5)
    assert torch.allclose(whole.variances, parts.variances, rtol=1e-4)
    white = (inputs - parts.mean.float()) @ parts.whitening().float()
    assert torch.allclose(white.mT @ white / len(white), torch.eye(white.shape[1]), atol=2e-3)


def test_mutation_learns_on_a_fixed_batch() -> None:
    inputs, targets = pairs(rows=1000, d=12)
    config = LearnerConfig(search="mutation", activation="linear", mutation=0.2, population=40)
    search = open_stream(lambda _: (inputs, targets), config)
    for _ in range(31):
        search.step()
    assert float(squared_errors(search.neurons(), inputs, targets).mean()) / optimum(inputs, targets) - 1 < 0.05
    assert search.evaluations == 31 * 41


# ---------------------------------------------------------------------------------------------------------------
# A run: the one loop, resuming, freezing


RULES = {"stream": LearnerConfig(search="stream"), "mutation": LearnerConfig(search="mutation", population=5),
         "classic": LearnerConfig(rule="classic", population=5, mutate_below=0.6)}
RUN = RunConfig(steps=9, save_every=4, validate_every=2, log_every=3, keep=9, device="cpu")


def learn(folder: Path, config: LearnerConfig, run: RunConfig = RUN) -> tuple[LayerTask, dict[str, float]]:
    """A run on minibatches of 100 of 500 rows, going on with what the folder holds."""
    inputs, targets = pairs(rows=600, d=8)
    task = LayerTask(minibatches(inputs[:500], targets[:500], 100, 0), config, (inputs[500:], targets[500:]))
    return task, train(task, run, folder, launch_fabric(run), resume=furthest(folder), quiet=True)


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("rule", RULES)
def test_resumed_is_uninterrupted(rule: str, tmp_path: Path) -> None:
    config = replace(RULES[rule], patience=0)
    whole, figures = learn(tmp_path / "whole", config)
    shutil.copytree(tmp_path / "whole" / "step-4", tmp_path / "again" / "step-4")
    again, resumed = learn(tmp_path / "again", config)
    assert figures == resumed
    states = [torch.load(tmp_path / run / "final" / "state.pt", weights_only=True) for run in ("whole", "again")]
    assert_equal(states[0]["task"], states[1]["task"])
    assert_equal(*(Neurons.load(tmp_path / run / "final" / "model.safetensors").state_dict()
                   for run in ("whole", "again")))
    rows = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("whole", "again")]
    assert [row for row in rows[0] if row["step"] > 4] == rows[1]
    assert_equal(whole.search.state(), again.search.state())


def test_a_run_freezes_by_held_out_loss_and_hands_out_the_best(tmp_path: Path) -> None:
    inputs, targets = pairs(rows=60, d=30, noise=2.0)
    held, read = pairs(rows=500, d=30, noise=2.0), []

    def batch(position: int) -> PAIRS:
        read.append(position)
        return inputs, targets  # always the same few rows: the better they are fitted, the worse for others

    config = LearnerConfig(search="stream", activation="linear", patience=3)
    run = replace(RUN, steps=60, validate_every=1, save_every=1, keep=60)
    figures = train(task := LayerTask(batch, config, held), run, tmp_path, launch_fabric(run), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    r2 = [row["r2"] for row in rows if row["part"] == "validation"]
    stopped = len(read) - 1  # one look at the first minibatch, for its scale
    assert stopped < 30 and r2.index(max(r2)) == stopped - 4 and figures["frozen"] == 1
    assert figures["best_r2"] == max(r2) > figures["r2"] and len(r2) == 60
    for folder in ("best", "final"):
        neurons = Neurons.load(tmp_path / folder / "model.safetensors")
        loss = float(squared_errors(neurons, *held).mean())
        assert 1 - loss / float(held[1].var(0, correction=0).mean()) == pytest.approx(max(r2), abs=1e-6)
        said = json.loads((tmp_path / folder / "config.json").read_text())
        assert said["training"]["best_step"] == stopped - 3 and said["learner"]["search"] == "stream"
        assert said["training"]["step"] == (60 if folder == "final" else stopped - 3)
    assert float(task.search.trust.mean()) > 0.5  # it rises while the held-out loss does
    again = LayerTask(batch, config, held)
    read.clear()
    resumed = train(again, run, tmp_path / "again", launch_fabric(run), tmp_path / f"step-{stopped - 1}", quiet=True)
    assert read == [0, stopped - 1] and resumed == figures  # one step more, and it is frozen


def test_a_run_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    inputs, targets = pairs(rows=50)
    fabric = launch_fabric(RUN)
    with pytest.raises(UserError, match="--search stream"):
        train(LayerTask(lambda _: (inputs, targets), LearnerConfig(), (inputs, targets)), RUN, tmp_path, fabric)
    with pytest.raises(UserError, match=r"held-out inputs .*\(50, 3\).*\(N, 40\)"):
        train(LayerTask(lambda _: (inputs, targets), RULES["stream"], (targets, targets)), RUN, tmp_path, fabric)
    with pytest.raises(UserError, match="do not vary"):
        LayerTask(lambda _: (inputs, targets), RULES["stream"], (inputs, targets * 0))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------
# Processes


class Threads(Peers):
    """Peers that are threads of this process."""

    def __init__(self, rank: int, count: int, table: list, meet: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.count, self.table, self.meet = rank, count, table, meet

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.table[self.rank] = tensor
        self.meet.wait(30)
        shown = [part.clone() for part in self.table]
        self.meet.wait(30)
        assert len({(part.shape, part.dtype) for part in shown}) == 1
        return shown

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).sum(0)

    def rows(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.gather(tensor))


def together(count: int, work: Callable[[Peers], object]) -> list:
    """What each of `count` peers returns."""
    table, meet, done = [None] * count, threading.Barrier(count), [None] * count

    def run(rank: int) -> None:
        try:
            done[rank] = work(Threads(rank, count, table, meet))
        except BaseException as failure:
            done[rank] = failure
            meet.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in done:
        if isinstance(failure, BaseException) and not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return done


def several(batches: Batches, count: int) -> Batches:
    """`count` minibatches as one."""
    return lambda position: tuple(torch.cat(part) for part in zip(
        *(batches(position * count + rank) for rank in range(count)), strict=True))


def searched(batches: Batches, config: LearnerConfig, steps: int, peers: Peers | None = None) -> Minibatched:
    search = open_stream(batches, config, peers or Peers())
    for _ in range(steps):
        search.step()
    return search


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_rows_spread_over_processes_are_the_rows_of_one(activation: str) -> None:
    batches = minibatches(*pairs(rows=2000, d=12), 100, 0)
    config = replace(RULES["stream"], activation=activation, headroom=1.5)
    one = searched(several(batches, 3), config, 12)
    many = together(3, lambda peers: searched(batches, config, 12, peers))
    for search in many:
        assert_equal(search.state(), many[0].state())
        assert torch.allclose(search.neurons().weight, one.neurons().weight, rtol=1e-3, atol=1e-4)
        assert search.train_loss == pytest.approx(one.train_loss, rel=1e-4)
        assert (search.evaluations, search.position) == (one.evaluations, one.position)
    assert not torch.allclose(searched(batches, config, 12).neurons().weight, one.neurons().weight, atol=1e-2)


def test_classic_genomes_spread_over_processes_are_those_of_one() -> None:
    batches = minibatches(*pairs(rows=2000, d=12), 50, 0)
    one = searched(several(batches, 3), RULES["classic"], 6)
    for search in together(3, lambda peers: searched(batches, RULES["classic"], 6, peers)):
        assert torch.equal(search.trust, one.trust) and torch.equal(search.weights, one.weights)
        assert torch.allclose(search.losses_before, one.losses_before) and search.evaluations == 30


def test_a_population_spread_over_processes_takes_each_neurons_best_island() -> None:
    batches = minibatches(*pairs(rows=2000, d=12), 200, 0)
    config = LearnerConfig(search="mutation", activation="linear", mutation=0.2, population=11)
    seen: dict[int, list[Tensor]] = {}

    def work(peers: Peers) -> Minibatched:
        search = searched(batches, config, 3, peers)
        evolve = search._evolve

        def watched(*given: Tensor) -> tuple[Tensor, ...]:
            found = evolve(*given)
            seen.setdefault(peers.rank, []).extend([found[0], (found[2] != 0).any(1).nonzero().flatten()])
            return found

        search._evolve = watched
        inputs, targets = several(batches, 3)(3)
        before = search.losses(search.sums_of(inputs, search.weight, search.bias), search.goals_of(targets))
        search.step()
        after = search.losses(search.sums_of(inputs, search.weight, search.bias), search.goals_of(targets))
        assert bool((after <= before * (1 + 1e-6)).all())
        return search, after

    done = together(3, work)
    best = torch.stack([seen[rank][0] for rank in range(3)]).amin(0)
    for search, after in done:
        assert_equal(search.state(), done[0][0].state())
        assert torch.allclose(after, best, rtol=1e-5)
        assert search.evaluations == 4 * (3 + 11)
    tried = [set(seen[rank][1].tolist()) for rank in range(3)]  # each island has children of its own
    assert tried[0] <= set(range(3)) and tried[1] <= set(range(3, 7)) and tried[2] <= set(range(7, 11))


def test_minibatches_of_several_sizes_are_refused() -> None:
    inputs, targets = pairs(rows=20)
    with pytest.raises(UserError, match=r"have \[10, 11\] rows"):
        together(2, lambda peers: open_stream(lambda i: (inputs[: 10 + i], targets[: 10 + i]), RULES["stream"], peers))


def test_two_real_processes_learn_one_layer(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal(*states)
    assert states[0]["sum"].tolist() == [3, 30] and states[0]["gathered"].tolist() == [[1, 10], [2, 20]]
    inputs, targets = pairs(rows=600, d=8)
    one = LayerTask(several(minibatches(inputs[:500], targets[:500], 100, 0), 2), RULES["stream"],
                    (inputs[500:], targets[500:]))
    figures = train(one, RUN, tmp_path / "one", launch_fabric(RUN), quiet=True)
    assert states[0]["figures"]["r2"] == pytest.approx(figures["r2"], rel=1e-4)
    final = Neurons.load(tmp_path / "run" / "final" / "model.safetensors")
    assert torch.allclose(final.weight, one.chosen.best.weight, rtol=1e-3, atol=1e-4)
    assert furthest(tmp_path / "run") == tmp_path / "run" / "final" and (tmp_path / "run" / "log.jsonl").exists()


def one_of_two(folder: Path, rank: int, port: int) -> int:
    """A child that is one of two processes, as torchrun starts them."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.environ.update({
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0"})
        peers, mine = Peers(launch_fabric(RUN)), torch.tensor([rank + 1, 10 * rank + 10])
        found = {"sum": peers.sum(mine), "gathered": torch.stack(peers.gather(mine))}
        task, figures = learn(folder / "run", RULES["stream"])
        torch.save({**found, "figures": figures, "state": task.state()}, folder / f"rank{rank}.pt")
        os._exit(0)
    return pid


# ---------------------------------------------------------------------------------------------------------------
# Held-out loss, ranges, files, stacks


def test_held_out_loss_freezes_and_chooses() -> None:
    inputs, targets = pairs(rows=80, d=30, noise=2.0)
    held = pairs(rows=500, d=30, noise=2.0)
    config = LearnerConfig(search="directions", whiten=False, steps=50, patience=2)
    neurons, report = fit(inputs, torch.tanh(targets), config, (held[0], torch.tanh(held[1])))
    losses = [loss for _, _, loss in report.history]
    assert len(losses) < 50 and report.held_out_loss == min(losses)
    assert losses.index(min(losses)) == len(losses) - 3
    assert report.held_out_loss == float(squared_errors(neurons, held[0], torch.tanh(held[1])).mean())


def test_each_neuron_takes_the_range_that_held_out_rows_like() -> None:
    inputs, targets = pairs(rows=1500, k=2, noise=0.05)
    targets = torch.stack([torch.tanh(3 * targets[:, 0]), targets[:, 1]], 1)  # one saturates, one is linear
    fitted, held = (inputs[:1000], targets[:1000]), (inputs[1000:], targets[1000:])
    config = LearnerConfig(steps=6)
    neurons, report = fit_headrooms(*fitted, config, held, headrooms=(1.2, 3.0, 6.0))
    ratios = neurons.scale / fitted[1].std(0, correction=0)
    assert ratios.tolist() == pytest.approx([1.2, 6.0], rel=1e-3)
    single = [fit(*fitted, replace(config, headroom=h), held)[1].held_out_loss for h in (1.2, 3.0, 6.0)]
    assert report.held_out_loss < min(single)
    assert report.evaluations > 3 * 6


def test_neurons_are_saved_with_their_scale(tmp_path: Path) -> None:
    inputs, targets = pairs()
    neurons, report = fit_linear(inputs, targets * 100 + 7, activation="tanh", headroom=2.0)
    neurons.save(tmp_path / "neurons.safetensors")
    loaded = Neurons.load(tmp_path / "neurons.safetensors")
    assert torch.equal(loaded(inputs), neurons(inputs)) and loaded.activation == "tanh"
    assert torch.allclose(loaded.shift, (targets * 100 + 7).mean(0), rtol=1e-4)
    beyond = ((targets - targets.mean(0)).abs() > 2 * targets.std(0, correction=0)).float().mean()
    assert report.clipped_share == pytest.approx(float(beyond), abs=1e-3)
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="other.safetensors"):
        Neurons.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="absent"):
        Neurons.load(tmp_path / "absent.safetensors")


def test_a_stack_keeps_only_what_lowers_the_held_out_loss(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(3000, 4, generator=draw)
    targets = 1000 * torch.stack([torch.sin(2 * inputs[:, 0]) * inputs[:, 1], inputs[:, 2].square()], 1)
    data = inputs[:2000], targets[:2000]
    held = inputs[2000:], targets[2000:]
    request.getfixturevalue("forbidden")
    stack, report = grow(*data, StackConfig(layers=2, width=40), held_out=held)
    losses = [loss for _, _, loss in report.history]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.5 * losses[0]
    assert report.held_out_loss == pytest.approx(losses[-1], rel=1e-2)  # the readout is fitted anew
    assert sum(layer.outputs for layer in stack.hidden) == len(losses) - 1
    stack.save(tmp_path / "stack.safetensors")
    assert torch.equal(Stack.load(tmp_path / "stack.safetensors")(inputs), stack(inputs))


def test_a_stack_on_noise_grows_nothing_much() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(400, 5, generator=draw), torch.randn(400, 2, generator=draw)
    held = torch.randn(4000, 5, generator=draw), torch.randn(4000, 2, generator=draw)
    stack, report = grow(inputs, targets, StackConfig(width=100), held_out=held)
    assert sum(layer.outputs for layer in stack.hidden) < 10
    assert report.held_out_loss > 0.97 * float(held[1].square().mean())


def test_retinas(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("forbidden")
    inputs, _ = pairs()
    white = fit_principal(inputs, 10, range=[0, 1])
    assert torch.allclose(torch.cov(white(inputs).T, correction=0), torch.eye(10), atol=1e-3)
    assert white.identity == {"kind": "principal", "whitened": True, "range": [0, 1]}
    images = torch.rand(2, 3, 8, 8)
    area = area_retina(3, 8, 2)(images.flatten(1)).unflatten(1, (3, 2, 2))
    assert torch.allclose(area, images.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5)), atol=1e-6)
    cosine = cosine_retina(1, 8, 8)
    assert torch.allclose(cosine.projection.T @ cosine.projection, torch.eye(64), atol=1e-5)
    assert torch.allclose(cosine(torch.ones(1, 64))[0, 0], torch.tensor(8.0))


def test_the_retina_takes_no_targets_and_eigenvectors_stay_in_it() -> None:
    for file in SOURCE.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tree.body = [part for part in tree.body if getattr(part, "name", "") != "GradientTask"]  # the rival
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & (FORBIDDEN | TORCH_FORBIDDEN | {"backward", "requires_grad"}), file
        eigen = names & {"eigh", "eig", "svd", "svdvals", "eigvalsh", "svd_lowrank", "pca_lowrank"}
        assert not eigen or file.name == "retina.py", (file, eigen)
        if file.name in ("retina.py", "fovea.py"):
            arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
            assert not arguments & {"targets", "target", "goals", "y", "labels", "latents", "lessons", "teacher"}


def test_bad_shapes_give_one_sentence_with_both() -> None:
    inputs, targets = pairs(rows=10)
    both = r"Dimension mismatch: .*\(10, 40\).*\(9, 3\)"
    for call in (lambda: fit_linear(inputs, targets[:9]), lambda: fit(inputs, targets[:9]),
                 lambda: grow(inputs, targets[:9], held_out=(inputs, targets)),
                 lambda: minibatches(inputs, targets[:9], 4, 0)):
        with pytest.raises(UserError, match=both):
            call()
    with pytest.raises(UserError, match=r"Dimension mismatch: .*\(…, 40\).*\(10, 3\)"):
        fit_linear(inputs, targets)[0](targets)
    with pytest.raises(UserError, match=r"Dimension mismatch: the held-out inputs .*\(10, 3\).*\(N, 40\)"):
        fit(inputs, targets, held_out=(targets, targets))
    with pytest.raises(UserError, match=r"Dimension mismatch: .*\(3, 40\).*bias.*\(2,\)"):
        Neurons(torch.zeros(3, 40), torch.zeros(2))
    with pytest.raises(UserError, match="not finite"):
        fit_linear(inputs, targets * torch.nan)
    with pytest.raises(ValueError, match="--headroom"):
        LearnerConfig(headroom=0)
    assert scale_targets(targets, "linear").clipped_share == 0


if __name__ == "__main__":
    import lightning_fabric  # noqa: F401  # before the children are forked, so that it is paid for once
    import torch.utils.tensorboard  # noqa: F401

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    children = [one_of_two(Path(sys.argv[1]), rank, free) for rank in range(2)]
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))
