"""`omnilatent train RECIPE --data DATA` learns a latent space; `omnilatent train --resume RUN` goes on with a run.

- `TrainOptions`: the options of every recipe beside its own configuration.
- `start`, `resume`: check what can be checked without torch, then `train_run`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import tyro

from ..errors import UserError
from ..hub import RECIPES, WEIGHTLESS, read_json, split_label
from ..training.config import from_json
from .folders import check_data, check_writable
from .names import check_names
from .parse import parse
from .rank_zero import as_rank_zero

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Config = TypeVar("Config")


@dataclass(frozen=True)
class TrainOptions(Generic[Config]):
    """Learn a latent space from your own data."""

    config: Config
    data: str = tyro.MISSING
    """Training images: a folder, a .tar or several, MNIST's idx files or 'mnist', or the embedded 'photos', 'digits' or
    'synthetic'."""
    val: str | None = None
    """Validation images; by default a share of --data is held out."""
    out: Path | None = None
    """The run's folder; by default runs/RECIPE-TIME."""
    init: str | None = None
    """NAME of an autoencoder of the recipe's kind whose weights to start from; its architecture replaces the
    recipe's."""
    freeze: Literal["encoder", "decoder"] | None = None
    """The half that keeps the weights of --init."""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in {"-h", "--help"}:
        print(usage())
        return
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--resume=") else [arg])]
    if "--resume" not in argv:
        start(argv[0], argv[1:])
        return
    at = argv.index("--resume")
    if at + 1 == len(argv) or not argv[at + 1]:
        raise UserError("--resume takes a run's folder: omnilatent train --resume runs/NAME.")
    positional = [] if argv[0].startswith("--") else argv[:1]  # a recipe before --resume, which is the run's own
    resume(Path(argv[at + 1]), [*argv[len(positional) : at], *argv[at + 2 :]], *positional)


def usage() -> str:
    return (
        "usage: omnilatent train RECIPE --data DATA [options]\n       omnilatent train --resume RUN [options]\n\n"
        f"recipes: {', '.join(RECIPES)}\n'omnilatent info' describes them; 'omnilatent train RECIPE --help' shows "
        "every option with its default."
    )


def start(recipe: str, argv: list[str]) -> None:
    """A new run of `recipe`."""
    if recipe.startswith("-"):
        known = ", ".join(RECIPES)
        raise UserError(f"train begins with a recipe: omnilatent train RECIPE --data DATA; there are {known}.")
    if recipe not in RECIPES:
        raise UserError(f"There is no recipe {recipe!r}; there are {', '.join(RECIPES)}.")
    config = _recipe_config(recipe)
    usual = TrainOptions(config, data=getattr(config, "USUAL_DATA", tyro.MISSING))
    options = parse(TrainOptions[type(config)], f"train {recipe}", argv, usual)
    if options.freeze and not options.init:
        raise UserError("--freeze keeps the weights of --init, and no --init was given.")
    run = options.out or Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (run / "run.json").exists():
        raise UserError(f"{run} holds a run already: go on with --resume {run}, or choose another --out.")
    _check(options, run)
    if options.init and split_label(options.init)[1] in WEIGHTLESS:
        raise UserError(f"--init {options.init} has no weights to start from: choose another model.")
    check_names([options.init] if options.init else [], any_kind=True)
    check_names(getattr(options.config, "codecs", ()))
    is_new = not run.exists()
    try:
        train_run(options, run, None, shlex.join(["omnilatent", "train", recipe, *argv]))
    except UserError:
        from ..training.checkpoint import forget_start

        forget_start(run, is_new)
        raise


def resume(path: Path, argv: list[str], recipe: str | None = None) -> None:
    """Go on with the run that `path` is or lies in; `argv` may change how it runs, not what it learns."""
    run = next((p for p in (path, path.parent) if (p / "run.json").exists()), None)
    if run is None:
        raise UserError(f"--resume {path}: there is no run; give the folder that holds its run.json.")
    before, command = _saved(run / "run.json")
    if recipe not in (None, before.config.recipe):
        raise UserError(f"{run} is a run of {before.config.recipe}, not of {recipe}: leave the recipe out.")
    options = parse(TrainOptions[type(before.config)], f"train --resume {path}", argv, before)
    if _what_it_learns(options) != _what_it_learns(before):
        raise UserError(f"--resume {path} goes on with the model, loss, data, batch and seed that the run began with: "
                        f"start a new run with --init {path} to change them.")
    if options.out != before.out:
        raise UserError(f"--resume {path} goes on in the run's own folder: leave --out out, or copy the folder.")
    _check(options, run)
    train_run(options, run, path, command)


def _saved(file: Path) -> tuple[TrainOptions[Any], str]:
    """The options and the command of a run's run.json."""
    saved = read_json(file)
    if "trainer" in saved:
        raise UserError(f"{file.parent} is a run of Trainer: go on with it in Python, by train(resume={str(file.parent)!r}).")
    try:
        config = from_json(type(_recipe_config(saved["options"]["config"]["recipe"])), saved["options"]["config"])
        before = from_json(TrainOptions, {**saved["options"], "config": None})
        return dataclasses.replace(before, config=config), str(saved["command"])
    except (KeyError, TypeError, ValueError) as failure:
        reason = f"{type(failure).__name__}: {failure}"
        raise UserError(f"{file} describes no run that this version knows ({reason}): restore it, or upgrade "
                        "omnilatent.") from failure


def _check(options: TrainOptions[Any], run: Path) -> None:
    """Refuse what can be refused without importing torch."""
    images, parts = options.config.run.batch_size, options.config.run.accumulate
    if images % parts:
        raise UserError(f"--batch-size {images} does not split into --accumulate {parts} equal parts: take a multiple "
                        f"of {parts}.")
    options.config.check(options.init)
    check_writable(run)
    check_data(options.data)
    if options.val is not None:
        check_data(options.val)


def train_run(options: TrainOptions[Any], run: Path, resumed: Path | None, command: str) -> None:
    """Train into the folder `run` and say where the result lies and what it reached.

    Args:
        resumed: the run or the checkpoint to go on from, as it was named.

    Raises:
        SystemExit: 130, after Ctrl-C; what was saved has been told.
    """
    from ..data.skipped import SkippedLog
    from ..report.record import replace_file
    from ..training.checkpoint import resume_point, stated_step
    from ..training.loop import launch_fabric, train

    config = options.config
    module, task_class = config.task.split(":")
    fabric = launch_fabric(config.run)
    # Each process has its own clock, which names the folder, and would tidy the run up under the others' eyes.
    run, checkpoint = as_rank_zero(fabric, lambda: (run, resume_point(resumed) if resumed else None))
    if checkpoint is not None and stated_step(checkpoint) > config.run.steps:
        raise UserError(f"{checkpoint} is at step {stated_step(checkpoint)} already, beyond --steps {config.run.steps}: "
                        "give more steps.")
    rank = f"-rank{fabric.global_rank}" if fabric.global_rank else ""
    skipped = SkippedLog(run / f"skipped{rank}.jsonl")
    try:
        task = getattr(import_module(module), task_class)(
            config, options.data, options.val, skipped.add, options.init, options.freeze, checkpoint, command)
        if fabric.is_global_zero:
            saved = {"options": dataclasses.asdict(options), "command": command}
            replace_file(run / "run.json", json.dumps(saved, indent=2, default=str) + "\n")
            learned, *more = str(task).splitlines()
            print(f"training {config.recipe} on {fabric.device}, {learned}, into {run}", *more, sep="\n", flush=True)
        figures = train(task, task.config.run, run, fabric, checkpoint)
    except KeyboardInterrupt as interrupt:
        if not (run / "run.json").exists():  # there is no run yet to go on with
            raise
        if fabric.is_global_zero:
            print(f"\nomnilatent: {_what_is_kept(run, interrupt)}", file=sys.stderr)
        raise SystemExit(130) from None
    if fabric.is_global_zero:
        reached = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        what = "1 unreadable image" if skipped.count == 1 else f"{skipped.count} unreadable images"
        left_out = f"; {what} skipped, listed in {skipped.path}" if skipped.count else ""
        print(f"{run / 'final'}: {reached}{left_out}")


def _what_is_kept(run: Path, interrupt: KeyboardInterrupt) -> str:
    """What to tell of a run that Ctrl-C or SIGTERM ended."""
    from ..training.checkpoint import furthest
    from ..training.loop import Stopped

    if isinstance(interrupt, Stopped):
        return f"stopped and saved; go on with: omnilatent train --resume {run}"
    last = furthest(run)
    kept = f"the last checkpoint, {last}, is kept; go on" if last else "nothing was saved yet; begin again"
    return f"stopped at once; {kept} with: omnilatent train --resume {run}"


def _recipe_config(recipe: str) -> Any:
    module, function = RECIPES[recipe].split(":")
    return getattr(import_module(module), function)()


def _what_it_learns(options: TrainOptions[Any]) -> TrainOptions[Any]:
    """The options without those that a resumed run may change."""
    run = options.config.run  # a position is step · batch size, so both of these decide what is drawn at which step
    free = {name: value for name, value in (("checkpointing", False), ("epochs", 1)) if hasattr(options.config, name)}
    neutral = dataclasses.replace(
        options.config, run=dataclasses.replace(type(run)(), seed=run.seed, batch_size=run.batch_size), **free)
    return dataclasses.replace(options, config=neutral, out=None)
