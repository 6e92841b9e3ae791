"""A folder of images → a store of latents, with every stage running beside the others.

- `Encoding`: the pipeline. `Encoding(codec, source, folder, config).run()`.

Worker processes read, hash, decode and resize. The main thread gathers batches, moves them to the device and starts
the encoder. A thread waits for its results, one batch behind, and writes them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.protocols import ImageSource
from ..data.workers import made_in_workers
from ..errors import UserError
from ..codec import Codec
from .config import WORTH_COMPILING, EncodeConfig, describe
from .index import Index, is_summarised
from .index import summarise as summarise_folder
from .planning import Content, Contents, plan, root_of
from .reading import WAITING, Batcher, File, Handful, ImageBatch, PixelSize, Reading, pixels_of_a_handful
from .results import ResultThread, packed, rows_of, to_host
from .stages import DeviceClock, EncodeReport, Stages
from .writer import StoreWriter


class _New(NamedTuple):
    """A file on its way through the codec."""

    file: File
    content: Content


class Encoding:
    """Encodes what a store does not hold yet.

    Args:
        codec: on its device, in its dtype; if it is compiled already it stays so.
        source: the images.
        folder: the store, new or begun with the same codec and preprocessing.

    Raises:
        UserError: the codec cannot do what `config` asks for.
    """

    def __init__(self, codec: Codec, source: ImageSource, folder: Path, config: EncodeConfig) -> None:
        self.codec, self.source, self.folder, self.config = codec, source, folder, config
        self.description = describe(codec, config)
        self.stages, self.report = Stages(), EncodeReport()
        self._on_cuda = codec.device.type == "cuda"

    def run(
        self, stop: Sequence[int] = (), begin: Callable[[int], None] | None = None,
        progress: Callable[[int], None] | None = None, summarise: bool = True,
    ) -> EncodeReport:
        """Encode. Whatever ends it, what was encoded until then is committed.

        Args:
            stop: non-empty as soon as no further batch should be started.
            begin: told the number of images to read.
            progress: told of images that are through.
            summarise: bring the summary in `store.json` up to date at the end.

        Raises:
            UserError: the store holds rows that do not go together with these, the disk is full, a result is not
                finite, or a worker was ended.
        """
        config, report = self.config, self.report
        writer = StoreWriter(self.folder, self.description, self.source.name, rows_per_shard=config.rows_per_shard,
                             root=root_of(self.source), moved=config.moved)
        with writer:
            index = writer.read_index()
            work = plan(self.source, index, config.reader, config.part, config.parts, config.moved)
            report.unchanged, report.given_up, report.rows = work.unchanged, work.given_up, len(index)
            if begin is not None:
                begin(len(work.indices))
            if len(work.indices):
                if config.compile and config.size is not None and len(work.indices) >= WORTH_COMPILING:
                    self.codec.compile()
                    report.compiled = True
                with torch.cuda.device(self.codec.device) if self._on_cuda else nullcontext():
                    self._warm_up()
                    start = time.perf_counter()
                    with ResultThread(writer, progress) as results:
                        self._encode(work.indices, index, results, stop)
                with self.stages.timed("write"):
                    writer.commit()
                report.seconds = time.perf_counter() - start
            if summarise and not is_summarised(self.folder):
                report.rows = len(summarise_folder(self.folder))
        self._tell(writer)
        return report

    def _encode(self, indices: np.ndarray, index: Index, results: ResultThread, stop: Sequence[int]) -> None:
        config, fixed = self.config, self.config.size is not None
        contents = Contents(index)
        most = config.batch_size * (1 if fixed else 8)
        batcher: Batcher[_New] = Batcher(config.batch_size, fixed, most, WAITING, self._on_cuda)
        with closing(self._handfuls(indices, contents, stop)) as handfuls:
            for handful in handfuls:
                self.stages.add(handful.seconds)
                for pixels, items in self._sort(handful, contents, index, results):
                    for batch in self._gathered(batcher.add(pixels, items)):
                        self._start(batch, results)
        for batch in self._gathered(batcher.rest()):
            if not stop:
                self._start(batch, results)
        self.report.stopped = bool(stop)

    def _handfuls(self, indices: np.ndarray, contents: Contents, stop: Sequence[int]) -> Generator[Handful, None, None]:
        """Files read in workers, until all are or `stop` says so. What did not fit into its handful is read in another
        round, with as many files a handful as fitted on average."""
        config = self.config
        count = config.batch_size
        if config.size is not None:
            count = max(1, min(count, pixels_of_a_handful(config.workers) // config.size**2))
        while len(indices) and not stop:
            workers = min(config.workers, -(-len(indices) // count))
            self.report.workers = max(self.report.workers, workers)
            pixels = pixels_of_a_handful(workers)
            reading = Reading(self.source, indices, count, config.size, contents.known, pixels)
            left: list[int] = []
            with closing(made_in_workers(reading, range(len(reading)), workers)) as handfuls:
                while not stop:
                    with self.stages.timed("wait"):
                        handful = next(handfuls, None)
                    if handful is None:
                        break
                    if isinstance(handful, UserError):
                        raise handful
                    left += handful.left
                    yield handful
            count = max(1, (len(indices) - len(left)) // len(reading))
            indices = np.array(left, np.int64)

    def _sort(
        self, handful: Handful, contents: Contents, index: Index, results: ResultThread
    ) -> Iterator[tuple[Tensor, list[_New]]]:
        """Copies and unreadable files go to the writer; the others' pixels `(n, h, w, 3)` and what they are come out,
        size by size."""
        fresh: dict[PixelSize, tuple[list[int], list[_New]]] = {}
        passed: Counter[PixelSize] = Counter()
        copies: list[tuple[dict[str, Any], Content]] = []
        skipped: list[dict[str, Any]] = []
        for file in handful.files:
            if file.skipped is not None or file.digest is None:
                self.report.skipped += 1
                skipped += self._skipped(file, index)
                continue
            content = contents.find(file.digest)
            if content is None:
                assert file.size is not None  # or its content were known
                rows, items = fresh.setdefault(file.size, ([], []))
                rows.append(passed[file.size])
                items.append(_New(file, contents.begin(file.digest, file.size)))
            else:
                copies.append((self._row(file, content), content))
            if file.size is not None:
                passed[file.size] += 1

        def write(writer: StoreWriter) -> int:
            for row, content in copies:
                writer.refer(row, content.place)
            for row in skipped:
                writer.skip(row)
            return sum(file.skipped is not None for file in handful.files) + len(copies)

        results.put(write)
        for size, (rows, items) in fresh.items():
            pixels = handful.pixels[size]
            yield pixels if len(rows) == len(pixels) else pixels[rows], items

    def _skipped(self, file: File, index: Index) -> list[dict[str, Any]]:
        """The row of an unreadable file; none where it says what the store says already."""
        key = self.source.key(file.index)
        before = index.skipped.get(key)
        reader = None if file.digest is None else self.config.reader  # what could not be opened is always tried again
        if before is not None and (before.reason, before.reader) == (file.skipped, reader):
            if (before.size, before.mtime_ns) == file.stamp:
                return []
        row = {"key": key, "size": file.stamp[0], "mtime_ns": file.stamp[1], "skipped": file.skipped}
        return [row if reader is None else {**row, "reader": reader}]

    def _row(self, file: File, content: Content) -> dict[str, Any]:
        assert file.digest is not None
        return {"key": self.source.key(file.index), "size": file.stamp[0], "mtime_ns": file.stamp[1],
                "sha256": file.digest.hex(), "image": list(content.size)}

    def _gathered(self, batches: Iterator[ImageBatch[_New]]) -> Iterator[ImageBatch[_New]]:
        """The batches, the time of gathering them counted as transfer."""
        while True:
            with self.stages.timed("transfer"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _start(self, batch: ImageBatch[_New], results: ResultThread) -> None:
        """Encode a batch, on a GPU without waiting for it, and hand the result on."""
        clock = DeviceClock(self._on_cuda, self.stages)
        with clock.timed("transfer"):
            images = batch.pixels.to(self.codec.device, non_blocking=True).permute(0, 3, 1, 2)
        with clock.timed("encode"):
            tensors, shapes = self._rows_of(images, len(batch.items))
        with clock.timed("write"):
            on_host = {name: to_host(tensor) for name, tensor in tensors.items()}
        clock.stop()
        new, spec = batch.items, self.codec.spec
        for item in new:
            height, width = item.content.size
            self.report.file_bytes += max(0, item.file.stamp[0])
            self.report.pixel_bytes += 3 * height * width

        def write(writer: StoreWriter) -> int:
            clock.wait()
            with self.stages.timed("write"):
                rows = [self._row(item.file, item.content) for item in new]
                writer.add(rows, packed(on_host, spec), [item.content.place for item in new], shapes)
            return len(new)

        results.put(write)

    def _rows_of(self, images: Tensor, count: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        before = self.codec.dtype
        latent = self.codec.encode(images)
        if self.codec.dtype != before:  # it moved on by itself, and the store would hold both
            raise UserError(f"{self.codec.label} overflows in float16: encode with --dtype bfloat16 or float32, into a "
                            f"new store if {self.folder} holds rows already.")
        return rows_of(latent, count, self.config.logvar, getattr(torch, self.config.store_dtype))

    def _warm_up(self) -> None:
        """On a GPU, choose kernels and compile before the clock starts; images of their own sizes cannot have that."""
        if self._on_cuda and self.config.size is not None:
            side = self.config.size
            black = torch.zeros(self.config.batch_size, side, side, 3, dtype=torch.uint8, device=self.codec.device)
            self._rows_of(black.permute(0, 3, 1, 2), len(black))  # in the layout that batches have
            torch.cuda.synchronize(self.codec.device)

    def _tell(self, writer: StoreWriter) -> None:
        report = self.report
        report.new, report.copies, report.stored_bytes = writer.new, writer.referred, writer.bytes
        read = report.new + report.copies + report.skipped
        report.stages = dict(self.stages.seconds)
        report.rates = self.stages.rates(read, report.workers)
        report.limit = self.stages.limit(read, report.workers)
