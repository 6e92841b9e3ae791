"""`omnilatent bench NAME`: images a second and memory on this machine, ours beside diffusers', in one run.

- `Bench`: the command's options. An any-to-any model has its own (bench_omni.py).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from ..devices import choose_device, has_bfloat16
from ..hub import RECIPES, bundled_names
from .bench_omni import is_omni
from .bench_omni import main as bench_omni
from .folders import check_data, check_file
from .names import check_names
from .parse import parse

if TYPE_CHECKING:
    from ..autoencoders.timing import Row
    from ..codec import Codec
    from ..store import EncodeReport


@dataclass(frozen=True)
class Bench:
    """Time encoding and decoding, with --train training steps, with --data the way from files to a store."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")]
    """a path, a bundled model or a hub id; or a recipe, whose architecture gets random weights"""
    data: Annotated[str | None, arg(metavar="DATA")] = None
    """images to encode into a temporary store, timed stage by stage"""
    train: bool = False
    """time training steps too; NAME is a recipe"""
    size: int = 256
    """side of the images in pixels"""
    batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """images a call; by default 64, on a CPU 4"""
    train_batch_size: Annotated[int | None, arg(metavar="INT")] = None
    """images a training step; by default 16, on a CPU 4"""
    calls: int = 50
    """timed calls, of which the median counts"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto: bfloat16 on a GPU that has it, else float32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes a GPU if there is one"""
    workers: int = -1
    """processes that read and decode; -1: as many as the cores allow"""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the figures to this file too"""

    @property
    def is_recipe(self) -> bool:
        """Whether NAME means a recipe: with --train always, else where it names no model."""
        unnamed = self.name not in bundled_names() and not Path(self.name).exists()
        return self.name in RECIPES and (self.train or unnamed)

    def check(self) -> None:
        """Look at values, names and places, without torch."""
        for name in ("size", "batch_size", "train_batch_size", "calls"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least 1.")
        if self.train and self.name not in RECIPES:
            raise UserError(f"--train times a recipe's steps, and {self.name} is none: there are {', '.join(RECIPES)}.")
        if not self.is_recipe:
            check_names([self.name])
        if self.data is not None:
            check_data(self.data)
        if self.json is not None:
            check_file(self.json, "--json")


def main(argv: list[str]) -> None:
    """Run the command."""
    if any(is_omni(word) for word in argv):
        bench_omni(argv)
        return
    options = parse(Bench, "bench", argv)
    options.check()
    import torch
    from rich.console import Console

    from ..autoencoders.timing import codec_rows, training_rows
    from ..report.record import replace_file

    device = choose_device(options.device)
    cuda = device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True  # for diffusers' rows too
    codec = _codec(options, device)
    batch = options.batch_size or (64 if cuda else 4)
    console = Console()
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(codec.dtype).removeprefix("torch.")
    console.print(f"{codec.label}, {codec.parameter_count():,} parameters, {options.size}×{options.size}, {dtype}, "
                  f"{where}, torch {torch.__version__}, median of {options.calls} calls", highlight=False, soft_wrap=True)
    rows: list[Row] = []
    for row in codec_rows(codec, options.size, batch, options.calls):
        rows.append(_shown(row, console))
    if options.train:
        train_batch = options.train_batch_size or (16 if cuda else 4)
        for row in training_rows(options.name, train_batch, options.size, device, options.calls):
            rows.append(_shown(row, console))
    record: dict[str, Any] = {
        "name": codec.label, "weights": codec.provenance.weights_hash, "parameters": codec.parameter_count(),
        "size": options.size, "dtype": dtype, "device": where, "torch": torch.__version__, "calls": options.calls,
        "rows": [asdict(row) for row in rows]}
    if options.data is not None:
        on_device = next((r.images_per_second for r in reversed(rows) if r.what == "encode"), None)
        report = _store(codec, options, device)
        record["store"] = report.to_json()
        console.print(_stages(report, on_device), highlight=False)
    if options.json is not None:
        replace_file(options.json, json.dumps(record, indent=2) + "\n")


def _codec(options: Bench, device: str) -> Codec:
    import torch

    from ..autoencoders.timing import untrained
    from ..hub import load

    auto = torch.bfloat16 if has_bfloat16(device) else torch.float32
    dtype = auto if options.dtype == "auto" else getattr(torch, options.dtype)
    return untrained(options.name, device, dtype) if options.is_recipe else load(options.name, device, dtype)


def _shown(row: Row, console: Any) -> Row:
    if row.failure is not None:
        figures = row.failure
    else:
        figures = f"{row.images_per_second:10,.1f} img/s {row.milliseconds:10,.2f} ms"
        figures += f" {row.peak_bytes / 2**30:8.2f} GiB" if row.peak_bytes else ""
    console.print(f"{row.what:30} {row.how:36} batch {row.batch_size:<4} {figures}", highlight=False, markup=False,
                  soft_wrap=True)
    return row


def _store(codec: Codec, options: Bench, device: str) -> EncodeReport:
    """Encode DATA into a temporary store, as `encode` does; on a GPU the codec is compiled by now."""
    from ..data import open_images
    from ..store import EncodeConfig, Encoding
    from ..store.config import usual_load

    batch_size, workers = usual_load(device)
    with tempfile.TemporaryDirectory() as folder:
        config = EncodeConfig(options.size, options.batch_size or batch_size,
                              workers=workers if options.workers < 0 else options.workers)
        return Encoding(codec, open_images(options.data), Path(folder) / "store", config).run()


def _stages(report: EncodeReport, on_device: float | None) -> str:
    """The rates of the stages, the one that limits, and what share of the codec's own rate the whole reaches."""
    lines = [f"from files to a store: {report.new:,} images, {report.images_per_second:,.1f} img/s; "
             f"{report.workers} workers"]
    lines += [f"  {stage:10} {rate:12,.1f} img/s" for stage, rate in report.rates.items()]
    lines.append(f"  limited by: {report.limit}")
    if on_device:
        share = report.images_per_second / on_device
        lines.append(f"  {share:.0%} of the rate with images already on the device ({on_device:,.1f} img/s)")
        if "workers" in report.rates:
            fed = report.rates["workers"] / on_device
            lines.append(f"  this host's {report.workers} workers could feed {fed:.1f} such devices")
    return "\n".join(lines)
