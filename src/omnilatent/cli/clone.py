"""`omnilatent clone NAME --data DATA`: a tiny gradient-free codec that learns from a big one.

- `Clone`: the command's options.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import arg

from ..devices import choose_device
from ..errors import UserError
from ..organic.clone_config import CloneConfig
from ..training.config import check_least
from .folders import check_data, check_writable
from .names import check_names
from .parse import parse

if TYPE_CHECKING:
    from ..codec import Codec
    from ..data import ImageSource
    from ..organic.cloning import Cloned


@dataclass(frozen=True)
class Clone:
    """Learn a tiny codec from a teacher without gradients, and compare the two on photos held out."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")]
    """the teacher: a path, a bundled model or a hub id"""
    data: Annotated[str, arg(metavar="DATA")]
    """photos to learn from: a folder, a .tar or several, a video, 'photos' (embedded) or 'synthetic'"""
    val: Annotated[str | None, arg(metavar="DATA")] = None
    """held-out photos; by default a tenth of --data, of a video its end"""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """the run's folder; by default runs/clone-TIME"""
    clone: tyro.conf.OmitArgPrefixes[CloneConfig] = field(default_factory=CloneConfig)
    most: int = 2_000
    """photos to learn from at most, spread evenly over --data; they are held in memory"""
    shown: int = 24
    """held-out photos that teacher and clone are compared on, at most"""
    max_pixels: int = 2**28
    """larger pictures count as unreadable"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the teacher runs; the clone learns on the CPU"""

    def __post_init__(self) -> None:
        check_least(self, 1, "most", "shown", "max_pixels")


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(Clone, "clone", argv)
    check_names([options.name])
    check_data(options.data)
    if options.val is not None:
        check_data(options.val)
    run = options.out or Path("runs") / f"clone-{time.strftime('%Y%m%d-%H%M%S')}"
    if (run / "final").exists():
        raise UserError(f"{run} holds a clone already: choose another --out.")
    check_writable(run)
    from ..hub import load
    from ..organic.cloning import clone, write

    teacher = load(options.name, choose_device(options.device))
    photos, held_out = _parts(options)
    begin = time.monotonic()
    print(f"cloning {teacher.label} ({options.clone.latent}) from {len(photos):,} photos of {photos.name}, "
          f"{len(held_out):,} held out", flush=True)
    found = clone(teacher, photos, held_out, options.clone, lambda line: print(_stamp(begin, line), flush=True))
    print(_stamp(begin, f"held out: {found.reached}"), flush=True)
    command = shlex.join(["omnilatent", "clone", *argv])
    write(run / "final", found, options.clone, _card(found, teacher, photos, held_out, options, command))
    student = load(str(run / "final"))
    student.label = f"{options.clone.latent} clone"
    _report(teacher, student, held_out, options, run)
    print(f"{run / 'final'}: use it by this path, or by {run}")


def _parts(options: Clone) -> tuple[ImageSource, ImageSource]:
    from ..data import open_images, split, subset
    from ..data.sources import has_video

    source = open_images(options.data, options.max_pixels)
    if options.val is None:
        least = 1 if has_video(source) else max(1, min(8, len(source) // 4))
        photos, held_out = split(source, minimum=least)
    else:
        photos, held_out = source, open_images(options.val, options.max_pixels)
    evenly = [subset(s, (i * len(s) // n for i in range(n)), s.name)
              for s, n in ((photos, min(options.most, len(photos))), (held_out, min(200, max(8, options.most // 4), len(held_out))))]
    return evenly[0], evenly[1]


def _stamp(begin: float, line: str) -> str:
    return f"{time.monotonic() - begin:6.0f} s  {line}"


def _report(teacher: Codec, student: Codec, held_out: ImageSource, options: Clone, run: Path) -> None:
    """The seed's plots and pictures, and the lines that say what they show."""
    from ..data import EvaluationImages
    from ..report.likeness import draw, likeness

    found, pictures = likeness(teacher, student, EvaluationImages(held_out, options.clone.size, options.shown),
                                options.clone.latent != "native")
    files = draw(found, pictures, run / "report")
    print("\n".join(found.lines()))
    print(f"{run / 'report'}: {', '.join(file.name for file in files)}")


def _card(
    found: Cloned, teacher: Codec, photos: ImageSource, held_out: ImageSource, options: Clone, command: str
) -> str:
    size = sum(tensor.numel() for tensor in found.tensors.values())
    return (f"---\nlibrary_name: omnilatent\n---\n# {options.clone.latent} clone of {teacher.label}\n\n"
            f"Learned without gradients: {size:,} numbers, stored as fp16, from {len(photos):,} photos "
            f"({photos.name}). Held out ({len(held_out):,} photos, {held_out.name}): {found.reached}.\n\n"
            f"Teacher: {teacher.provenance.name}, weights {teacher.provenance.weights_hash}, licence "
            f"{teacher.provenance.licence}.\n\nLicence: not stated. It is yours to state, within what the photos and the "
            f"teacher allow.\n\nCommand: `{command}`\n")
