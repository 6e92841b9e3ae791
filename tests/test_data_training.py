"""A training sample is a pure function of (source, seed, position), whoever makes it."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnilatent.data import TrainingImages, batches, open_images
from omnilatent.data.keyed import EpochOrder, below, draws, unit
from omnilatent.data.structured import StructuredImages
from omnilatent.errors import UserError

SOURCE = StructuredImages(length=23, size=48)
IMAGES = TrainingImages(SOURCE, size=32, seed=3)


# ---- order ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**9))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = EpochOrder(n, seed, epoch)
    assert sorted(order[i] for i in range(n)) == list(range(n))


def test_orders_are_random() -> None:
    """Every item at every place about equally often: chi-squared with 15 degrees of freedom below 44 (p = 1e-4)."""
    counts = np.zeros((16, 16))
    for epoch in range(800):
        order = EpochOrder(16, 0, epoch)
        counts[range(16), [order[i] for i in range(16)]] += 1
    assert ((counts - 50) ** 2 / 50).sum(axis=1).max() < 44
    swaps = sum(EpochOrder(2, 0, epoch)[0] for epoch in range(1000))
    assert 430 < swaps < 570


def test_an_item_of_a_large_order_takes_no_table() -> None:
    order = EpochOrder(10**12, 0, 0)
    assert len({order[i] for i in range(1000)}) == 1000 and max(order[i] for i in range(100)) < 10**12
    with pytest.raises(IndexError):
        order[10**12]


def test_draws_stay_the_same_for_ever() -> None:
    """The stored runs depend on these; a change here is a change of every run's data."""
    assert draws("crop", 0, 1, count=2) == [12645677395656698814, 4537471661350680396]
    assert [EpochOrder(10, 0, 0)[i] for i in range(10)] == [7, 1, 5, 9, 2, 3, 0, 4, 6, 8]
    assert unit(2**64 - 1) < 1 and below(2**64 - 1, 7) == 6


def test_every_image_once_an_epoch() -> None:
    for epoch in range(2):
        seen = Counter(IMAGES.sample(epoch * 23 + place).key for place in range(23))
        assert set(seen.values()) == {1} and len(seen) == 23
    assert [IMAGES.sample(i).key for i in range(23)] != [IMAGES.sample(23 + i).key for i in range(23)]


# ---- samples ----------------------------------------------------------------------------------------------------


class OneImage:
    """A source of one picture whose pixels tell their place: red is the row, green the column."""

    name = "one"

    def __init__(self, height: int, width: int) -> None:
        self.pixels = np.zeros((height, width, 3), np.uint8)
        self.pixels[..., 0], self.pixels[..., 1] = np.arange(height)[:, None], np.arange(width)

    def __len__(self) -> int:
        return 1

    def key(self, i: int) -> str:
        return "one.png"

    def read(self, i: int) -> np.ndarray:
        return self.pixels


def test_a_sample_is_a_function_of_seed_and_position() -> None:
    first, again = IMAGES.sample(7), TrainingImages(SOURCE, size=32, seed=3).sample(7)
    assert first.key == again.key and torch.equal(first.image, again.image)
    assert first.image.dtype == torch.uint8 and first.image.shape == (3, 32, 32) and first.skipped == []
    others = [TrainingImages(SOURCE, size=32, seed=4).sample(7), IMAGES.sample(7 + 23 * 5)]
    assert not any(torch.equal(first.image, other.image) for other in others)


def test_crops_are_the_images_own_pixels_from_everywhere() -> None:
    images = TrainingImages(OneImage(40, 60), size=32)
    corners, mirrored = set(), 0
    for position in range(600):
        rows, columns, _ = images.sample(position).image.numpy().astype(int)
        step = columns[0, 1] - columns[0, 0]
        assert abs(step) == 1 and (np.diff(rows, axis=0) == 1).all() and (np.diff(columns, axis=1) == step).all()
        mirrored += step == -1
        corners.add((rows[0, 0], columns.min()))
    assert {top for top, _ in corners} == set(range(9)) and {left for _, left in corners} == set(range(29))
    assert 240 < mirrored < 360


def test_without_flip_nothing_is_mirrored() -> None:
    images = TrainingImages(OneImage(40, 60), size=32, flip=False)
    assert all(np.diff(images.sample(i).image[1, 0].numpy().astype(int)).min() == 1 for i in range(40))


@pytest.mark.parametrize("height, width", [(1, 1), (10, 40), (1, 5000), (31, 33)])
def test_smaller_images_are_enlarged(height: int, width: int) -> None:
    image = TrainingImages(OneImage(height, min(width, 256)), size=32).sample(0).image
    assert image.shape == (3, 32, 32)
    rows = image[0].float()
    assert rows.max() - rows.min() >= 0.9 * (height - 1) - 1  # the whole short side is in the crop


def test_min_scale_varies_the_size_of_the_crop() -> None:
    images = TrainingImages(OneImage(200, 250), size=16, min_scale=0.25)
    spans = [float(np.ptp(images.sample(i).image[0].numpy().astype(int))) for i in range(300)]
    assert min(spans) >= 0.25 * 200 * 0.85 and max(spans) <= 200  # a 16-pixel crop spans 15/16 of its side
    assert np.percentile(spans, 10) < 80 < 140 < np.percentile(spans, 90)


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match="The training size is 0: give at least 1 pixel."):
        TrainingImages(SOURCE, size=0)
    with pytest.raises(UserError, match="The smallest crop scale is 0: give a number above 0, at most 1."):
        TrainingImages(SOURCE, size=8, min_scale=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        next(batches(IMAGES, 1, 0, 1, rank=2, world=2))


# ---- unreadable files -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    for i in range(6):
        Image.fromarray(SOURCE.read(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("not an image")
    (tmp_path / "4.png").write_bytes(b"")
    return tmp_path


def test_an_unreadable_file_is_passed_over_and_reported(damaged: Path) -> None:
    images = TrainingImages(open_images(damaged), size=32)
    samples = [images.sample(position) for position in range(6)]
    assert {key for sample in samples for key, _ in sample.skipped} == {"2.png", "4.png"}
    assert {sample.key for sample in samples} == {"0.png", "1.png", "3.png", "5.png"}
    assert all(torch.equal(images.sample(i).image, samples[i].image) for i in range(6))
    batch = next(batches(images, 6, 0, 1))
    assert batch.skipped == [row for sample in samples for row in sample.skipped]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_one_sentence_from_workers_too(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    images = TrainingImages(open_images(tmp_path), size=32)
    with pytest.raises(UserError) as caught:
        next(batches(images, 2, 0, 3, workers=workers))
    assert str(caught.value) == (f"None of the 1 images of {tmp_path.name} can be read; the first: "
                                 "a.png is empty (0 bytes): delete it or copy it again.")


# ---- batches ----------------------------------------------------------------------------------------------------


def test_workers_change_nothing(damaged: Path) -> None:
    images = TrainingImages(open_images(damaged), size=32)
    before = torch.get_rng_state()
    alone, helped = [list(batches(images, 3, 2, 7, workers=workers)) for workers in (0, 2)]
    assert torch.equal(before, torch.get_rng_state())  # the run's own random numbers are left alone
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped):
        assert torch.equal(one.images, other.images) and torch.equal(one.positions, other.positions)
        assert one.skipped == other.skipped
    assert alone[0].positions.tolist() == [6, 7, 8] and alone[0].images.shape == (3, 3, 32, 32)
    assert alone[0].positions.dtype == torch.int64 and alone[0].images.dtype == torch.uint8


def test_starting_later_gives_the_same_batches() -> None:
    whole, rest = list(batches(IMAGES, 4, 0, 6)), list(batches(IMAGES, 4, 3, 6))
    assert all(torch.equal(one.images, other.images) for one, other in zip(whole[3:], rest, strict=True))


def test_two_ranks_together_are_one() -> None:
    whole = list(batches(IMAGES, 4, 0, 3))
    parts = [list(batches(IMAGES, 2, 0, 3, rank=rank, world=2)) for rank in range(2)]
    for step in range(3):
        halves = [parts[rank][step] for rank in range(2)]
        assert torch.equal(torch.cat([half.images for half in halves]), whole[step].images)
        assert torch.equal(torch.cat([half.positions for half in halves]), whole[step].positions)


PROGRAM = """
import multiprocessing, sys, time
from omnilatent.data import TrainingImages, batches
from omnilatent.data.structured import StructuredImages
steps = batches(TrainingImages(StructuredImages(size=32), 32), 2, 0, 10**6, workers=2)
try:
    next(steps)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    for batch in steps:
        time.sleep(0.05)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_program() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody collects does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ignores_interrupts(pid: int, mask: str) -> bool:
    """Whether SIGINT is in a mask of the process: SigBlk, blocked, or SigIgn, ignored."""
    status = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status[mask], 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_and_sigkill_leave_no_worker_and_no_worker_traceback() -> None:
    interrupted, killed = start_program(), start_program()
    try:
        orphans = [int(pid) for pid in killed.stdout.readline().split()]
        its_workers = [int(pid) for pid in interrupted.stdout.readline().split()]
        assert len(its_workers) == len(orphans) == 2
        # PyTorch catches an interrupt in the loop of a worker, but not while one starts: hence from its birth on.
        assert all(ignores_interrupts(pid, "SigBlk") for pid in its_workers)
        for pid in orphans:
            os.kill(pid, signal.SIGTERM)  # a scheduler's, to the whole group: the main process is to finish its step
        time.sleep(0.3)
        assert all(map(alive, orphans))
        killed.kill()
        os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        _, errors = interrupted.communicate(timeout=20)
        assert (errors, interrupted.returncode) == ("", 130)
        killed.communicate(timeout=20)
        deadline = time.monotonic() + 10
        while any(map(alive, its_workers + orphans)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, its_workers + orphans))
    finally:
        for program in (interrupted, killed):
            program.kill()
            program.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_worker_that_is_killed_is_one_sentence() -> None:
    class Deadly(OneImage):
        def read(self, i: int) -> np.ndarray:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    with pytest.raises(UserError, match="A data worker was ended from outside, .* use fewer --workers"):
        next(batches(TrainingImages(Deadly(40, 40), 32), 1, 0, 1, workers=1))
