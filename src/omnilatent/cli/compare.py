"""`omnilatent compare A B C --data DATA`: codecs side by side on the same images, as a report and as figures.

- `Compare`: the command's options.
- `Measuring`: the options that `compare` and `evaluate` share, checked before torch is imported.
- `measure`: load every codec, measure each, write the report. `show`: print the tables and where the report lies.
"""

from __future__ import annotations

import gc
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from ..devices import choose_device
from ..metrics.catalogue import choose
from .folders import check_data, check_writable
from .names import check_names, load_codecs
from .parse import parse

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..data import EvaluationImages, ImageSource
    from ..codec import Codec
    from ..metrics.protocol import Picture
    from ..metrics.results import Evaluation


@dataclass(frozen=True)
class Measuring:
    """Options of every measurement."""

    data: Annotated[str, arg(metavar="DATA")]
    """the images: a folder, a .tar or several, 'photos' (embedded) or 'synthetic'"""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """folder for report.html and report.json; by default a new one in reports/"""
    size: Annotated[str, arg(metavar="PIXELS|native")] = "256"
    """side of the centre square in pixels, or 'native' for every image in its own size"""
    limit: Annotated[int | None, arg(metavar="INT")] = None
    """at most this many images, spread evenly over the data"""
    batch_size: int = 8
    """images at a time"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run; auto takes a GPU if there is one, and says so"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the codecs"""
    seed: int = 0
    """of what is random in the latent health"""
    max_pixels: int = 2**28
    """larger images count as unreadable"""
    pictures: int = 8
    """pictures to show, spread evenly over the data"""
    metrics: Annotated[tuple[str, ...] | None, arg(metavar="METRIC …")] = None
    """only these figures, such as psnr ssim rfid, written after the names; by default all"""
    health: bool = True
    """measure the latent health; --no-health leaves it out"""
    speed: bool = True
    """time encoding and decoding; --no-speed leaves it out"""

    @property
    def side(self) -> int | None:
        return None if self.size == "native" else int(self.size)

    def check(self) -> None:
        """Raise a `UserError` for a value that cannot be meant."""
        if self.size != "native" and not (self.size.isdecimal() and int(self.size) > 0):
            raise UserError(f"--size {self.size} is no size: give a number of pixels, such as 256, or 'native'.")
        for name, least in (("limit", 1), ("batch_size", 1), ("max_pixels", 1), ("pictures", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least {least}.")
        choose(self.metrics)
        check_data(self.data)
        check_writable(self.out or Path("reports"))


@dataclass(frozen=True)
class Compare(Measuring):
    """Measure several codecs on the same images under one protocol; write report.html and report.json."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, arg(metavar="NAME")] = field(default=(), kw_only=True)
    """the codecs: paths, bundled models or hub ids, as NAME or LABEL:NAME"""


def main(argv: list[str]) -> None:
    """Run the command. Arguments, codec names and data are checked before torch is imported."""
    options = parse(Compare, "compare", argv)
    if not options.names:
        raise UserError("compare needs codecs to measure: omnilatent compare NAME NAME … --data DATA.")
    evaluations, page = measure(options, options.names, "compare", argv)
    show(evaluations, [page, page.with_name("report.json")])


def measure(
    options: Measuring, names: Sequence[str], command: str, argv: Sequence[str], source: ImageSource | None = None,
    notes: Sequence[str] = (),
) -> tuple[list[Evaluation], Path]:
    """Load all codecs, then measure one after the other, then write the report.

    Args:
        source: the images, where they are not those of `options.data`.
        notes: sentences for the report.

    Returns:
        The evaluations in the order of `names`, and the path of report.html.

    Raises:
        UserError: a wrong option, name or data; or whatever the measurement cannot do.
    """
    options.check()
    check_names(names)
    from ..data import open_images  # needs no torch

    source = source or open_images(options.data, options.max_pixels)
    from rich.console import Console

    console = Console(stderr=True)
    device = choose_device(options.device)
    count = min(len(source), options.limit or len(source))
    console.print(f"{count:,} images of {source.name} on {device_name(device)}, {options.dtype}", highlight=False,
                  markup=False)
    codecs = load_codecs(names, options.dtype)
    evaluations, pictures, skipped = _measure_all(codecs, source, options, device, console)
    if skipped:
        first = f"{skipped[0][0]} {skipped[0][1]}"
        console.print(f"{len(skipped)} unreadable file(s) skipped, listed in skipped.jsonl; the first: {first}",
                      style="yellow", markup=False)
    from ..report.html import write_report

    out = options.out or Path("reports") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    title = " · ".join(e.label for e in evaluations) if len(evaluations) < 5 else f"{len(evaluations)} codecs"
    line = shlex.join(["omnilatent", command, *argv])
    return evaluations, write_report(out, evaluations, pictures, f"{title} on {source.name}", line, notes,
                                     skipped=skipped)


def show(evaluations: Sequence[Evaluation], written: Sequence[Path], published: bool = True) -> None:
    """Print the figures, the table of KL against VQ beside published figures, and the files that were written."""
    from rich.console import Console

    from ..report.tables import benchmark_table, terminal_table

    console = Console()
    console.print(terminal_table(evaluations, width=console.width))
    console.print()
    if published:
        console.print(benchmark_table(evaluations))
        console.print()
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def device_name(device: str) -> str:
    """`cuda (NVIDIA H200)`, `cpu (2 threads)`."""
    import torch

    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({torch.get_num_threads()} threads)" if device == "cpu" else device


def _measure_all(
    codecs: Sequence[Codec], source: ImageSource, options: Measuring, device: str, console: Console
) -> tuple[list[Evaluation], dict[str, list[Picture]], list[tuple[str, str]]]:
    """One codec on the device at a time. Only the kept pictures stay in memory."""
    from ..data import EvaluationImages
    from ..metrics.protocol import evaluate

    evaluations: list[Evaluation] = []
    pictures: dict[str, list[Picture]] = {}
    skipped: dict[str, str] = {}
    with _progress(console) as progress:
        tasks = [progress.add_task(codec.label, total=None, start=False) for codec in codecs]
        for codec, task in zip(codecs, tasks, strict=True):
            images = EvaluationImages(source, options.side, options.limit)
            progress.start_task(task)
            codec.to(device)
            evaluation, pictures[codec.label] = evaluate(
                codec, images, batch_size=options.batch_size, metrics=options.metrics, seed=options.seed,
                keep=options.pictures, health=options.health, speed=options.speed,
                progress=lambda done, total, task=task: progress.update(task, completed=done, total=total))
            evaluations.append(evaluation)
            skipped |= dict(images.skipped)
            codec.to("cpu")
            _free(device)
    return evaluations, pictures, list(skipped.items())


def _progress(console: Console) -> Progress:
    from rich import progress as rich

    return rich.Progress(rich.TextColumn("{task.description}", markup=False), rich.BarColumn(),
                         rich.MofNCompleteColumn(), rich.TimeElapsedColumn(), rich.TextColumn("left"),
                         rich.TimeRemainingColumn(), console=console)


def _free(device: str) -> None:
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
