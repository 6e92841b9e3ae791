"""What an encoding did, and where its time went.

- `Stages`: seconds by stage, and which stage sets the pace.
- `DeviceClock`: times work on a GPU without waiting for it.
- `EncodeReport`: counts, bytes and times of a run. `added_up`: those of several processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

IN_WORKERS = ("read", "decode", "resize")
ALONE = ("transfer", "encode", "write")  # one process, one device, one thread


class Stages:
    """Seconds that images spent in each stage.

    `read` (with hashing), `decode` and `resize` are summed over the workers; `transfer` (into page-locked memory and
    to the device), `encode` (on the device) and `write` (from the device to the disk) run beside them and beside each
    other. `wait` is how long the main loop had no images.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter(dict.fromkeys((*IN_WORKERS, *ALONE, "wait"), 0.0))

    def add(self, seconds: Mapping[str, float]) -> None:
        for stage, value in seconds.items():
            self.seconds[stage] += value

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def rates(self, images: int, workers: int) -> dict[str, float]:
        """Images a second that each stage could do by itself; `workers` is the three stages of the workers together."""
        together = {"workers": sum(self.seconds[stage] for stage in IN_WORKERS) / max(1, workers)}
        each = {stage: self.seconds[stage] / max(1, workers) for stage in IN_WORKERS}
        alone = {stage: self.seconds[stage] for stage in ALONE}
        return {stage: images / spent for stage, spent in (each | together | alone).items() if spent > 0}

    def limit(self, images: int, workers: int) -> str:
        """The stage that the others wait for: the slowest by itself. Without workers they follow one another, and it
        is the longest."""
        rates = self.rates(images, workers)
        together = rates.pop("workers", None)
        if not rates:
            return "none"
        shared = [stage for stage in IN_WORKERS if stage in rates]
        if workers and together is not None and together <= min([*(rates[s] for s in ALONE if s in rates), together]):
            return min(shared, key=lambda stage: rates[stage])
        rivals = [stage for stage in ALONE if stage in rates] if workers else list(rates)
        return min(rivals or shared, key=lambda stage: rates[stage])


class DeviceClock:
    """Times the parts of one batch's work: on CUDA by events that are read when all is done, else as it happens."""

    def __init__(self, on_cuda: bool, stages: Stages) -> None:
        self._on_cuda, self._stages = on_cuda, stages
        self._marks: list[tuple[str, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        if not self._on_cuda:
            with self._stages.timed(stage):
                yield
            return
        self._mark(stage)
        yield

    def stop(self) -> None:
        """After the last part."""
        if self._on_cuda:
            self._mark("")

    def wait(self) -> None:
        """Until the device has done everything, which the results need."""
        if self._on_cuda:
            self._marks[-1][1].synchronize()
            for (stage, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
                self._stages.add({stage: begin.elapsed_time(end) / 1000})

    def _mark(self, stage: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((stage, event))


@dataclass
class EncodeReport:
    """What a run did. Counts are of files; `seconds` begins with the first read, after the warm-up.

    Attributes:
        new: encoded in this run.
        copies: of contents that the store holds already, or that came twice.
        unchanged: found in the store by path, size and time of change, and not opened.
        skipped, given_up: unreadable; `given_up` were so before, have not changed and were not tried again.
        file_bytes, pixel_bytes, stored_bytes: of the new images as files, as 8-bit pixels, as rows with their index.
        stages: seconds of each stage (see `Stages`).
        rates: images a second that each stage could do alone.
        limit: the stage that sets the pace.
        workers: processes that read and decoded.
        rows: of the whole store, at the end.
        stopped: whether it was asked to stop before it was through.
        compiled: whether there was enough to do to compile the codec.
    """

    new: int = 0
    copies: int = 0
    unchanged: int = 0
    skipped: int = 0
    given_up: int = 0
    seconds: float = 0.0
    file_bytes: int = 0
    pixel_bytes: int = 0
    stored_bytes: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    limit: str = "none"
    workers: int = 0
    rows: int = 0
    stopped: bool = False
    compiled: bool = False

    @property
    def images_per_second(self) -> float:
        return self.new / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def added_up(reports: Sequence[EncodeReport]) -> EncodeReport:
    """The work of several processes that ran beside each other: counts, seconds of the stages and rates are summed;
    the time and what limits are those of the slowest."""
    total = EncodeReport()
    for entry in fields(EncodeReport):
        values = [getattr(report, entry.name) for report in reports]
        if entry.name in ("stages", "rates"):
            names = dict.fromkeys(name for value in values for name in value)
            setattr(total, entry.name, {name: sum(value.get(name, 0.0) for value in values) for name in names})
        elif entry.name in ("seconds", "rows"):
            setattr(total, entry.name, max(values))
        elif entry.name == "limit":
            total.limit = max(reports, key=lambda report: report.seconds).limit
        else:
            setattr(total, entry.name, sum(values))
    total.stopped = any(report.stopped for report in reports)
    total.compiled = any(report.compiled for report in reports)
    return total
