"""Real encodings, killed at any instant, several at once: the store ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnilatent.store import LatentStore
from omnilatent.store.shards import index_file, shard_numbers

KILLS = 24
IMAGES = 21


class Server:
    """Runs `omnilatent` command lines in forked children of one warm process (see store_server.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).with_name("store_server.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout.readline().strip() == "ready"

    def start(self, argv: list[str], fault: tuple[str, int] | None = None, **env: str) -> int:
        """Returns the pid; what the newest child says is in the file `said`."""
        self.said = self.folder / f"said-{time.monotonic_ns()}"
        return self._ask({"argv": argv, "fault": fault, "env": env, "said": str(self.said)})

    def wait(self, pid: int) -> int:
        return os.waitstatus_to_exitcode(self._ask({"wait": pid}))

    def run(self, argv: list[str], kill_after: float | None = None, fault: tuple[str, int] | None = None) -> int:
        pid = self.start(argv, fault)
        timer = threading.Timer(kill_after or 0, _kill, [pid])
        if kill_after is not None:
            timer.start()
        code = self.wait(pid)
        timer.cancel()
        return code

    def _ask(self, request: dict) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("said"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(IMAGES):
        pixels = np.random.default_rng(i % (IMAGES - 2)).integers(0, 255, (20, 24, 3), dtype=np.uint8)  # two copies
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "broken.png").write_text("no picture")
    return folder


def command(photos: Path, store: Path, *more: str) -> list[str]:
    return ["encode", "tiny", str(photos), "--out", str(store), "--size", "16", "--batch-size", "3",
            "--rows-per-shard", "3", "--workers", "0", "--logvar", *more]


@pytest.fixture(scope="module")
def undisturbed(server: Server, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(store, seconds) of an encoding that was left alone."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    start = time.monotonic()
    assert server.run(command(photos, store)) == 0, server.said.read_text()
    return store, time.monotonic() - start


def rows_of(store: Path) -> dict[str, tuple]:
    latents = LatentStore(store)
    return {latents.keys[i]: (latents.fields(i), latents.array(i, "mean").tobytes(),
                              latents.array(i, "logvar").tobytes()) for i in range(len(latents))}


def assert_same(store: Path, reference: Path) -> None:
    assert rows_of(store) == rows_of(reference)
    committed = [json.loads(line)["key"] for number in shard_numbers(store)
                 for line in index_file(store, number).read_text().splitlines()[1:]]
    assert sorted(committed) == sorted(set(committed)) and len(committed) == IMAGES + 1  # none twice; one is broken
    assert LatentStore(store).index.contents == IMAGES - 2
    assert (store / "skipped.jsonl").read_text() == (reference / "skipped.jsonl").read_text()
    summaries = [json.loads((s / "store.json").read_text())["summary"] for s in (store, reference)]
    assert [summary["rows"] for summary in summaries] == [IMAGES, IMAGES]


def test_killed_at_many_moments_ends_bit_equal(
    server: Server, photos: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = undisturbed
    rng = random.Random(0)
    faults = [*(("sync", n) for n in range(1, 12)), *(("rename", n) for n in range(1, 6)),
              *(("renamed", n) for n in range(1, 6)), ("claim", 1), ("claim", 2)]
    rng.shuffle(faults)
    store = tmp_path / "store"
    killed = inside = 0
    while killed < KILLS:
        fault = faults.pop() if faults and killed % 4 else None  # mostly inside the writes, else anywhere
        delay = None if fault else rng.uniform(0.2, 0.9) * seconds
        workers = ["--workers", "1"] if killed % 5 == 0 else []
        code = server.run([*command(photos, store), *workers], delay, fault)
        if code == 0:  # it came to its end before its moment: begin another store for the remaining kills
            assert_same(store, reference)
            store = store.with_name(store.name + "+")
        else:
            assert code == -signal.SIGKILL, server.said.read_text()
            killed, inside = killed + 1, inside + bool(fault)
            if (store / "store.json").exists():  # a reader sees what is committed, whole
                known = rows_of(reference)
                assert all(known[key] == row for key, row in rows_of(store).items())
    assert inside >= KILLS // 2
    assert server.run(command(photos, store)) == 0, server.said.read_text()
    assert_same(store, reference)


def test_two_at_once_are_one(
    server: Server, photos: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    reference, _ = undisturbed
    pids = [server.start(command(photos, tmp_path / "store", "--shard", f"{part}/2")) for part in range(2)]
    assert [server.wait(pid) for pid in pids] == [0, 0]
    rows = rows_of(tmp_path / "store")
    assert rows == rows_of(reference)


def two_ranks(server: Server, *argvs: list[str]) -> tuple[list[int], list[str]]:
    """Exit codes and words of two processes that believe that torchrun started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, pids = [], []
    for rank, argv in enumerate(argvs):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pids.append(server.start(argv, **env))
        said.append(server.said)
    return [server.wait(pid) for pid in pids], [path.read_text() for path in said]


def test_two_processes_of_torchrun_are_one(
    server: Server, photos: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    reference, _ = undisturbed
    argv = command(photos, tmp_path / "store", "--json", str(tmp_path / "e.json"))
    codes, said = two_ranks(server, argv, argv)
    assert codes == [0, 0], said
    assert rows_of(tmp_path / "store") == rows_of(reference)
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["processes"], figures["rows"], figures["skipped"]) == (2, IMAGES, 1)
    assert figures["new"] + figures["copies"] == IMAGES
    assert f"{IMAGES} rows" in said[0] and "rows" not in said[1]  # rank 0 reports


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_other(server: Server, photos: Path, tmp_path: Path, failing: int) -> None:
    store, few = tmp_path / "store", tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "00.png", few)
    assert server.run(command(few, store)) == 0
    argvs = [command(photos, store), command(photos, store)]
    argvs[failing] += ["--dtype", "bfloat16"]
    codes, said = two_ranks(server, *argvs)
    assert codes[failing] == 2 and "rows with dtype float32, and this run would add rows with dtype" in said[failing]
    if failing == 1:  # the first waits for it; the second may have been through before
        assert codes[0] == 2 and "Another process failed, so this one stopped too (rank 1 failed: " in said[0], said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_batch_in_hand_and_says_how_to_go_on(
    server: Server, photos: Path, tmp_path: Path, number: int
) -> None:
    store = tmp_path / "store"
    argv = [*command(photos, store)[:-7], "--logvar", "--rows-per-shard", "1", "--batch-size", "1", "--workers", "1"]
    pid = server.start(argv)
    while not shard_numbers(store):
        time.sleep(0.002)
    os.kill(pid, number)
    assert server.wait(pid) == 130, server.said.read_text()
    said = server.said.read_text()
    kept = len(LatentStore(store))
    assert 1 <= kept < IMAGES and f"stopped; {kept} new rows are kept in {store}; go on with: omnilatent encode" in said
    assert server.run(argv) == 0 and len(LatentStore(store)) == IMAGES
