"""`omnilatent clone NAME --data DATA`: a tiny gradient-free codec that learns from a big one.

- `Clone`: the command's options.
- `clone_run`: lessons, learning and the finished checkpoint, for this command and the demo.

A run's folder holds `run.json`, `lessons/` and `held-out/` (stores of pictures and the teacher's latents), the loop's
checkpoints, `final/` and `report/`. `--resume RUN` goes on wherever it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from ..organic.clone_config import CloneConfig
from ..training.config import RunConfig, check_least, from_json
from .folders import check_data, check_writable
from .names import check_names
from .parse import parse
from .rank_zero import as_rank_zero

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ..codec import Codec
    from ..data import ImageSource


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
    lessons: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """where the teacher's lessons are kept, to be used by several clones; by default in the run's folder"""
    clone: tyro.conf.OmitArgPrefixes[CloneConfig] = field(default_factory=CloneConfig)
    most: int = 2_000
    """photos, or frames of a video, to learn from at most, spread evenly over --data"""
    shown: int = 24
    """held-out photos that teacher and clone are compared on, at most"""
    max_pixels: int = 2**28
    """larger pictures count as unreadable"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where teacher and clone work"""

    def __post_init__(self) -> None:
        check_least(self, 1, "most", "shown", "max_pixels")


def main(argv: list[str]) -> None:
    """Run the command."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--resume=") else [arg])]
    if "--resume" in argv:
        options, run, command = _resumed(argv)
    else:
        options = parse(Clone, "clone", argv)
        run = options.out or Path("runs") / f"clone-{time.strftime('%Y%m%d-%H%M%S')}"
        command = shlex.join(["omnilatent", "clone", *argv])
        if (run / "run.json").exists():
            raise UserError(f"{run} holds a clone already: go on with --resume {run}, or choose another --out.")
    check_names([options.name])
    check_data(options.data)
    if options.val is not None:
        check_data(options.val)
    check_writable(run)
    from ..data.overlap import repeated
    from ..devices import choose_float64_device
    from ..hub import load
    from ..organic.cloning import check_teacher
    from ..training.loop import launch_fabric

    fabric = launch_fabric(RunConfig(device=choose_float64_device(options.device), amp=False))
    run = as_rank_zero(fabric, lambda: run)  # each process has its own clock, which names the folder
    teacher = load(options.name, str(fabric.device))
    check_teacher(teacher, options.clone)
    photos, held_out = _parts(options)
    twice = repeated(held_out, photos) if options.val is not None else 0
    held_name = held_out.name + (f", {twice} OF THEM ALSO LEARNED FROM" if twice else "")
    begins = "--resume" not in argv
    if fabric.is_global_zero and begins:
        run.mkdir(parents=True, exist_ok=True)
        saved = {"options": dataclasses.asdict(options), "command": command}
        (run / "run.json").write_text(json.dumps(saved, indent=2, default=str) + "\n", encoding="utf-8")
    if fabric.is_global_zero:
        how = "with gradients" if options.clone.gradients else "without gradients"
        print(f"cloning {teacher.label} ({options.clone.latent}, {how}) from {len(photos):,} photos of {photos.name}, "
              f"{len(held_out):,} held out ({held_name}), on {fabric.device}, into {run}", flush=True)
    try:
        figures = clone_run(teacher, photos, held_out, options.clone, run, fabric, options.lessons,
                            lambda reached: _card(reached, teacher, photos, f"{len(held_out):,} photos, {held_name}",
                                                  options, command))
    except KeyboardInterrupt:
        if fabric.is_global_zero:
            print(f"\nomnilatent: stopped; go on with: omnilatent clone --resume {run}", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError:
        # Where nothing was saved the mended command may be given once more; a run that was gone on with stays one.
        if fabric.is_global_zero and begins and not any(run.glob("*/state.pt")):
            (run / "run.json").unlink(missing_ok=True)
        raise
    if not fabric.is_global_zero:
        return
    print("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    student = load(str(run / "final"))
    student.label = f"{options.clone.latent} clone"
    if options.clone.part == "both" and not student.spec.decodes:
        print("no decoder was kept: four numbers say no more of held-out pictures than their mean does", flush=True)
    _report(teacher.to("cpu"), student, held_out, options, run)
    print(f"{run / 'final'}: use it by this path, or by {run}")


def clone_run(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: CloneConfig, run: Path, fabric: Fabric,
    lessons: Path | None = None, card: Any = lambda figures: "", quiet: bool = False,
) -> dict[str, float]:
    """Write the lessons that are missing, learn, and leave the clone in `run`/final.

    Returns:
        The figures on held-out lessons.

    Raises:
        UserError: the data or the teacher do not fit the configuration.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; what was done is kept.
    """
    from ..organic.clone_task import run_config, task_of
    from ..organic.cloning import way_of
    from ..organic.lessons import LessonStore
    from ..organic.peers import Peers
    from ..training.checkpoint import resume_point
    from ..training.loop import train

    base = lessons or run
    stores = base / "lessons", base / "held-out"
    needed = None if config.latent == "native" else teacher
    for folder, source, views, what in ((stores[0], photos, config.views, "lessons"), (stores[1], held_out, 1, "held out")):
        _teach(folder, needed, source, views, what, config, fabric, quiet)
    fabric.barrier()
    held = LessonStore(stores[1], held_out, 1)
    train_store = LessonStore(stores[0], photos, config.views)
    if not len(train_store) or not len(held):
        raise UserError(f"None of the {len(photos)} images of {photos.name} can be read: give others.")
    step = max(1, len(train_store) // 64)
    some = train_store.read(range(0, len(train_store), step), fabric.device)
    way = way_of(teacher, config, fabric.device, some)
    task = task_of(way, train_store, held, config, Peers(fabric), card)
    settings = run_config(task, RunConfig(seed=config.seed, device=fabric.device.type))
    checkpoint = as_rank_zero(fabric, lambda: resume_point(run) if (run / "run.json").exists() else None)
    figures = train(task, settings, run, fabric, checkpoint, quiet)
    if fabric.is_global_zero and not (run / "final" / "config.json").exists():
        for checkpoint in run.glob("*/state.pt"):  # there is nothing in it to go on with
            shutil.rmtree(checkpoint.parent)
        raise UserError(f"The first layer does no better on held-out pictures than their mean: {len(train_store):,} views of "
                        f"{len(photos):,} photos are too few to learn from, or have nothing in common with the "
                        f"{len(held_out):,} held out; give more.")
    return figures


def _teach(folder: Path, teacher: Codec | None, photos: ImageSource, views: int, what: str, config: CloneConfig,
           fabric: Fabric, quiet: bool) -> None:
    """Write a store of lessons, with a bar; the processes share them."""
    from ..data.signals import stop_on_signal
    from ..organic.lessons import write_lessons
    from ..training.logs import progress_bar

    with progress_bar(fabric.is_global_zero and not quiet) as bar, stop_on_signal() as stop:
        row = bar.add_task(what, total=None, numbers="")
        unreadable = write_lessons(folder, teacher, photos, config.side, views, config.seed,
                                   lambda done, total: bar.update(row, completed=done, total=total), stop,
                                   fabric.global_rank, fabric.world_size)
        if stop:
            raise KeyboardInterrupt
    if unreadable and not quiet:
        print(f"{len(unreadable)} views of unreadable images left out; the first: {unreadable[0]}", flush=True)


def _resumed(argv: list[str]) -> tuple[Clone, Path, str]:
    """The options of the run that `--resume` names."""
    at = argv.index("--resume")
    if at + 1 == len(argv) or len(argv) != 2:
        raise UserError("--resume takes a clone's folder and nothing else: omnilatent clone --resume runs/NAME.")
    run = Path(argv[at + 1])
    try:
        saved = json.loads((run / "run.json").read_text(encoding="utf-8"))
        options = from_json(Clone, {**saved["options"], "clone": None})
        return dataclasses.replace(options, clone=from_json(CloneConfig, saved["options"]["clone"])), run, saved["command"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise UserError(f"--resume {run}: there is no clone's run.json that this version knows "
                        f"({type(failure).__name__}): give the folder of a clone.") from failure


def _parts(options: Clone) -> tuple[ImageSource, ImageSource]:
    from ..data import open_images, split, subset
    from ..data.sources import has_video

    source = open_images(options.data, options.max_pixels)
    if options.val is None:
        least = 1 if has_video(source) else max(1, min(8, len(source) // 4))
        photos, held_out = split(source, minimum=least)
    else:
        photos, held_out = source, open_images(options.val, options.max_pixels)
    counts = min(options.most, len(photos)), min(200, max(8, options.most // 4), len(held_out))
    evenly = [subset(s, (i * len(s) // n for i in range(n)), s.name)
              for s, n in zip((photos, held_out), counts, strict=True)]
    return evenly[0], evenly[1]


def _report(teacher: Codec, student: Codec, held_out: ImageSource, options: Clone, run: Path) -> None:
    """The seed's plots and pictures, and the lines that say what they show."""
    from ..data import EvaluationImages
    from ..report.likeness import draw, likeness

    found, pictures = likeness(teacher, student, EvaluationImages(held_out, options.clone.side, options.shown),
                               options.clone.latent != "native")
    files = draw(found, pictures, run / "report")
    print("\n".join(found.lines()))
    print(f"{run / 'report'}: {', '.join(file.name for file in files)}")


def _card(
    figures: dict[str, float], teacher: Codec, photos: ImageSource, held_out: str, options: Clone, command: str
) -> str:
    reached = ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) or "not measured"
    how = "Trained with gradients" if options.clone.gradients else "Learned without gradients"
    return (f"---\nlibrary_name: omnilatent\n---\n# {options.clone.latent} clone of {teacher.label}\n\n"
            f"{how}, stored as fp16, from {options.clone.views} views of {len(photos):,} photos ({photos.name}). Held out "
            f"({held_out}; they also decided what was kept): {reached}.\n\n"
            f"Teacher: {teacher.provenance.name}, weights {teacher.provenance.weights_hash}, licence "
            f"{teacher.provenance.licence}.\n\nLicence: not stated. It is yours to state, within what the photos and the "
            f"teacher allow.\n\nCommand: `{command}`\n")
