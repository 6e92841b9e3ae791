"""`omnilatent encode NAME DATA --out STORE`: images → a store of latents.

- `Encode`: the command's options, checked before torch is imported.
- `main`: one process; under torchrun one of several, which share the images.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from ..devices import choose_device, has_bfloat16
from ..hub import load
from .folders import check_data, check_writable
from .names import check_names
from .parse import parse

if TYPE_CHECKING:
    import torch

    from ..codec import Codec
    from ..store import EncodeConfig, EncodeReport
    from .ranks import Ranks


@dataclass(frozen=True)
class Encode:
    """Encode images into a store of latents. Repeat the command to go on, or when there are more images."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")]
    """a path, a bundled model or a hub id"""
    data: Annotated[str, tyro.conf.Positional, arg(metavar="DATA")]
    """the images: a folder, a .tar or several, 'photos' (embedded) or 'synthetic'"""
    out: Annotated[Path, arg(metavar="STORE")]
    """the store's folder, new or begun before"""
    size: Annotated[str, arg(metavar="PIXELS|native")] = "256"
    """side of the centre square in pixels, or 'native' for every image in its own size"""
    logvar: bool = False
    """keep the posterior's log-variance beside its mean"""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """images at a time; by default 64, on a CPU 8"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the codec; auto is the store's, of a new store bfloat16 on a GPU that has it, else float32"""
    store_dtype: Literal["float16", "float32"] = "float16"
    """precision of what is stored"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run; auto takes a GPU if there is one, and says so"""
    workers: int = -1
    """processes that read and decode; -1: as many as the cores allow; 0: none"""
    shard: Annotated[str, arg(metavar="I/N")] = "0/1"
    """encode only part I (from 0) of N, on machines that know nothing of each other"""
    moved: bool = False
    """DATA is what the store was made of, at a new place: files that changed since replace their rows"""
    max_pixels: int = 2**28
    """larger images count as unreadable"""
    rows_per_shard: int = 32_768
    """rows of a shard's file at most"""
    compile: bool = True
    """compile the codec on a CUDA GPU, for images of one size, if there are 30,000 or more to encode"""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the counts, bytes and seconds of every stage to this file"""

    def part(self) -> tuple[int, int]:
        """--shard as two numbers."""
        part, slash, parts = self.shard.partition("/")
        if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
            raise UserError(f"--shard {self.shard} is no part: give 0/2 for the first of two, 1/2 for the second.")
        return int(part), int(parts)

    def check(self) -> None:
        """Look at values, names and places."""
        from ..store.description import refuse_strange_folder

        if self.size != "native" and not (self.size.isdecimal() and int(self.size) > 0):
            raise UserError(f"--size {self.size} is no size: give a number of pixels, such as 256, or 'native'.")
        for name, least in (("batch_size", 1), ("workers", -1), ("max_pixels", 1), ("rows_per_shard", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least {least}.")
        self.part()
        check_names([self.name])
        check_data(self.data)
        check_writable(self.out)
        refuse_strange_folder(self.out)
        if self.json is not None:
            if self.json.is_dir():
                raise UserError(f"--json {self.json} is a folder: give a file, such as {self.json / 'encode.json'}.")
            check_writable(self.json.parent, "--json")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: 130, after Ctrl-C or SIGTERM; what is kept has been told.
    """
    options = parse(Encode, "encode", argv)
    options.check()
    from ..data import open_images
    from ..data.signals import stop_on_signal
    from ..data.sources import has_video
    from ..store import Encoding
    from ..store.stages import added_up
    from .ranks import Ranks, joined

    ranks = Ranks.of_environment()
    with joined(ranks) as others:
        device = ranks.device(choose_device(options.device))
        source = open_images(options.data, options.max_pixels)
        if has_video(source):
            raise UserError(f"{options.data} holds a video, whose frames are no files by which a store would know them "
                            "again: save its frames as pictures and give their folder.")
        codec = load(options.name, device, _dtype(options, device))
        config = _config(options, device, ranks)
        encoding = Encoding(codec, source, options.out, config)
        leads = ranks.rank == 0
        if leads:
            print(f"encoding {source.name} ({len(source):,} images) with {codec.label} on {_where(codec)}, "
                  f"{config.workers} worker{'s' * (config.workers != 1)}"
                  + f", {ranks.world} processes" * (ranks.world > 1), flush=True)
        with stop_on_signal() as stop, others.watched(stop), _progress(leads) as (begin, advance):
            report = encoding.run(stop, begin, advance, summarise=ranks.world == 1)
        if report.stopped:
            others.refuse_failed()
            _stop(options, argv, report)
        reports = others.gather(report)
        if leads:
            _finish(options, added_up(reports), codec, config, ranks)


def _finish(options: Encode, report: EncodeReport, codec: Codec, config: EncodeConfig, ranks: Ranks) -> None:
    """Say what came of it, and write --json."""
    from ..store.files import replace_text
    from ..store.index import summarise

    if ranks.world > 1:
        report.rows = len(summarise(options.out))
    unreadable = report.skipped + report.given_up
    if unreadable and not report.rows:
        raise UserError(f"No image of {options.data} can be read ({unreadable} tried): {options.out / 'skipped.jsonl'} "
                        "says why.")
    print("\n".join(_told(options.out, report)))
    if options.json is not None:
        origin = codec.provenance
        record = {"command": "encode", "data": options.data, "codec": origin.name, "weights_hash": origin.weights_hash,
                  **_conditions(codec, config, ranks), **report.to_json()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps(record, indent=2) + "\n")


def _told(store: Path, report: EncodeReport) -> Iterator[str]:
    """The lines at the end."""
    parts = [f"{report.new:,} new", f"{report.copies:,} copies" if report.copies else "",
             f"{report.unchanged:,} unchanged" if report.unchanged else ""]
    yield f"{store}: {report.rows:,} rows ({', '.join(part for part in parts if part)})"
    unreadable = report.skipped + report.given_up
    if unreadable:
        yield f"{unreadable:,} unreadable image{'s' * (unreadable > 1)} skipped, listed in {store / 'skipped.jsonl'}"
    if report.new:
        of_files, of_pixels = (count / report.stored_bytes for count in (report.file_bytes, report.pixel_bytes))
        files = f"{of_files:.1f} times smaller than the files, " if report.file_bytes else ""
        yield (f"{report.images_per_second:,.1f} img/s; {report.stored_bytes / 1e6:,.1f} MB written, {24 / of_pixels:.3f} bits "
               f"a pixel, {files}{of_pixels:.1f} times smaller than their 8-bit pixels")
        rates = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in report.rates.items())
        yield f"limited by {report.limit} (img/s of each stage alone: {rates})"


def _stop(options: Encode, argv: list[str], report: EncodeReport) -> None:
    """Say what is kept and end with 130."""
    again = shlex.join(["omnilatent", "encode", *argv])
    print(f"\nomnilatent: stopped; {report.new:,} new rows are kept in {options.out}; go on with: {again}",
          file=sys.stderr)
    raise SystemExit(130)


def _dtype(options: Encode, device: str) -> torch.dtype:
    """--dtype; "auto" goes on with what a begun store holds."""
    import torch

    from ..store import is_store, read_description

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    if is_store(options.out):
        return getattr(torch, str(read_description(options.out).about.get("dtype")), torch.float32)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def _config(options: Encode, device: str, ranks: Ranks) -> EncodeConfig:
    from ..store import EncodeConfig
    from ..store.config import usual_load

    part, parts = ranks.part(*options.part())
    batch_size, workers = usual_load(device)
    return EncodeConfig(
        size=None if options.size == "native" else int(options.size),
        batch_size=options.batch_size or batch_size, logvar=options.logvar, store_dtype=options.store_dtype,
        workers=workers if options.workers < 0 else options.workers, compile=options.compile,
        rows_per_shard=options.rows_per_shard, max_pixels=options.max_pixels, moved=options.moved,
        part=part, parts=parts,
    )


def _where(codec: Codec) -> str:
    import torch

    name = f" ({torch.cuda.get_device_name(codec.device)})" if codec.device.type == "cuda" else ""
    return f"{codec.device}{name}, {str(codec.dtype).removeprefix('torch.')}"


def _conditions(codec: Codec, config: EncodeConfig, ranks: Ranks) -> dict[str, Any]:
    """What the figures rest on."""
    import torch

    from .. import __version__

    return {"device": _where(codec), "processes": ranks.world, "config": asdict(config),
            "versions": {"omnilatent": __version__, "torch": torch.__version__}}


@contextmanager
def _progress(visible: bool) -> Iterator[tuple[Any, Any]]:
    """A bar with images a second and time left: yields what to call with the total, and with each further count."""
    from rich import progress as rich

    bar = rich.Progress(
        rich.TextColumn("encoding"), rich.BarColumn(), rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[pace]}"), rich.TimeElapsedColumn(), rich.TextColumn("left"),
        rich.TimeRemainingColumn(), disable=not visible,
    )
    row = bar.add_task("encoding", total=None, pace="")

    def begin(total: int) -> None:
        bar.update(row, total=total)
        if total:
            bar.start()

    def advance(count: int) -> None:
        bar.advance(row, count)
        speed = bar.tasks[0].speed
        bar.update(row, pace=f"{speed:,.0f} img/s" if speed else "")

    try:
        yield begin, advance
    finally:
        bar.stop()
