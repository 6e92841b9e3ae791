"""A run killed again and again ends bit-equal to one that was left alone, discriminator, EMA and the latent
regularisers' choices included."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

STEPS = 16
KILLS = 20


class ForkServer:
    """Runs `omnilatent` command lines in forked children of one warm process (see forkserver.py)."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("forkserver.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env)
        assert self.process.stdout.readline().strip() == "ready"

    def run(self, argv: list[str], kill_after: float | None = None, fault: tuple[str, int] | None = None) -> int:
        """Returns the wait status: 0 for success, 9 for killed."""
        self.process.stdin.write(json.dumps({"argv": argv, "fault": fault}) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        timer = threading.Timer(kill_after, _kill, [pid]) if kill_after is not None else None
        if timer:
            timer.start()
        status = int(self.process.stdout.readline())
        if timer:
            timer.cancel()
        return status

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(10):
        coarse = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 50), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("no picture")
    return folder


def command(photos: Path, run: Path, workers: int) -> list[str]:
    return ["train", "debug", "--data", str(photos), "--out", str(run), "--steps", str(STEPS), "--save-every", "3",
            "--validate-every", "5", "--workers", str(workers), "--device", "cpu", "--seed", "3",
            "--scale-equivariance", "0.6", "--rotation-equivariance", "0.4", "--spectrum-weight", "0.01"]


@pytest.fixture(scope="module")
def undisturbed(server: ForkServer, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run left alone, and the seconds that it took."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    began = time.monotonic()
    assert server.run(command(photos, run, workers=0)) == 0
    return run, time.monotonic() - began


def assert_equal(a: object, b: object, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{number}]")
    else:
        assert a == b, where


def assert_same_run(run: Path, reference: Path) -> None:
    for part in ("final", "best"):
        assert_equal(*(load_file(r / part / "model.safetensors") for r in (run, reference)), part)
    states = [torch.load(r / "final" / "state.pt", weights_only=True) for r in (run, reference)]
    assert {"model", "ema", "optimizer", "disc", "disc_optimizer"} <= states[0]["task"].keys()
    assert_equal(*states, "state")
    rows = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()] for r in (run, reference)]
    assert rows[0] == rows[1]
    assert (run / "skipped.jsonl").read_text() == (reference / "skipped.jsonl").read_text()
    assert not list(run.glob(".writing-*")) and not list(run.glob(".retired-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_twenty_moments_ends_bit_equal(
    server: ForkServer, photos: Path, undisturbed: tuple[Path, float], tmp_path: Path, workers: int
) -> None:
    reference, seconds = undisturbed
    rng = random.Random(workers)
    run = tmp_path / "run"
    faults = [(name, count) for name in ("weights", "state", "rename", "remove") for count in (1, 2)]
    rng.shuffle(faults)
    killed = inside = 0
    while killed < KILLS:
        argv = ["train", "--resume", str(run)] if (run / "run.json").exists() else command(photos, run, workers)
        fault = faults.pop() if faults and killed % 2 else None  # in turn inside a checkpoint's writes and anywhere
        delay = None if fault else rng.uniform(0.1, 0.7) * seconds
        status = server.run(argv, kill_after=delay, fault=fault)
        if status == 0:  # it came to its end before its moment: begin again for the remaining kills
            assert_same_run(run, reference)
            run = run.with_name(run.name + "+")
        else:
            assert status == signal.SIGKILL
            killed, inside = killed + 1, inside + bool(fault)
    assert inside >= 4
    if (run / "run.json").exists():
        assert server.run(["train", "--resume", str(run)]) == 0
        assert_same_run(run, reference)
        assert len((run / "skipped.jsonl").read_text().splitlines()) == 1


def test_ctrl_c_saves_the_step_in_hand(
    server: ForkServer, photos: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    reference, _ = undisturbed
    run = tmp_path / "run"
    argv = [*command(photos, run, 0), "--save-every", "1000"]
    server.process.stdin.write(json.dumps({"argv": argv, "fault": None}) + "\n")
    server.process.stdin.flush()
    pid = int(server.process.stdout.readline())
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    status = int(server.process.stdout.readline())
    assert os.waitstatus_to_exitcode(status) == 130
    assert len(list(run.glob("step-*"))) == 1
    assert server.run(["train", "--resume", str(run)]) == 0
    assert_equal(*(load_file(r / "final" / "model.safetensors") for r in (run, reference)), "final")
