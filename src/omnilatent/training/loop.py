"""The one loop. It steps a `Task`, logs, validates, saves, and can be killed at any instant.

- `launch_fabric`: device, precision and processes from a `RunConfig`; torchrun's variables are honoured.
- `train`: the loop itself.
- `Stopped`: how it ends when it was asked to stop and has saved.
"""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.signals import stop_on_signal
from ..errors import library
from ..devices import choose_device, has_bfloat16
from .checkpoint import load_state, prune, remove_beyond, save_checkpoint
from .config import RunConfig
from .finite import check_finite
from .logs import RunLog, headline, progress_bar
from .memory import step_within_memory
from .task import Logged, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved the step in hand as `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


def launch_fabric(config: RunConfig) -> Fabric:
    """A launched Fabric: the device asked for, bf16 where the GPU has it, DDP over the processes of torchrun."""
    import os

    device = choose_device(config.device)
    precision: Any = "32-true"
    if config.amp and device == "cuda":
        precision = "bf16-mixed" if has_bfloat16(device) else "16-mixed"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    fabric = library("lightning_fabric").Fabric(
        accelerator=device, devices=local, num_nodes=world // local, precision=precision,
        strategy="ddp" if world > 1 else "auto",
    )
    fabric.launch()
    return fabric


def train(
    task: Task, config: RunConfig, run: Path, fabric: Fabric, resume: Path | None = None, quiet: bool = False
) -> dict[str, float]:
    """Train `task` for `config.steps` steps into the folder `run`.

    Args:
        resume: a checkpoint folder to go on from; what the run holds beyond its step is removed.
        quiet: no progress bar, no line about what was removed.

    Returns:
        The figures of the last validation.

    Raises:
        UserError: a loss is not finite, memory or the disk is full; the sentence names what was kept and what helps.
        Stopped: after Ctrl-C or SIGTERM, once the step in hand is finished and saved.
        KeyboardInterrupt: after a second Ctrl-C, at once.
    """
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(config.seed)
    task.setup(fabric)
    before: dict[str, Any] = {"step": 0, "best": -math.inf, "figures": {}}
    if resume is not None:
        before = load_state(resume)
        task.load_state(before.pop("task"))  # popped, so that no second copy of the weights stays in memory
    main, start, figures = fabric.is_global_zero, before["step"], before["figures"]
    if main and resume is not None and start < config.steps:
        removed = remove_beyond(run, start)
        if removed and not quiet:
            print(f"going on from step {start}; removed what lay beyond it: {', '.join(removed)}", flush=True)
    best = before["best"] if (run / "best").exists() else -math.inf  # a figure without its weights is worth nothing
    healthy = torch.zeros((), device=fabric.device)  # turns NaN or infinite with the first such loss

    def save(folder: Path, step: int, measured: bool) -> None:
        learned = task.state()
        check_finite(healthy, step, run, learned)
        state = {"task": learned, "step": step, "best": best, "figures": figures, "random": _random_state(fabric),
                 "scaler": _scaler_state(fabric)}
        if main:
            save_checkpoint(folder, task, state, figures if measured else {}, step)
            prune(run, config.keep)
        fabric.barrier()

    logging = RunLog(run, start) if main else nullcontext()
    with logging as log, progress_bar(main and not quiet) as bar, stop_on_signal() as stop:
        row = bar.add_task("", total=config.steps, completed=start, numbers="")
        if resume is not None:  # this late, since libraries draw random numbers while they start
            _load_random_state(before["random"], fabric)
            _load_scaler_state(before["scaler"], fabric)
        batches = task.batches(start, config.steps)
        for position in range(start, config.steps):
            logged = step_within_memory(task, next(batches), position, config, fabric.world_size)
            healthy = healthy + 0.0 * torch.as_tensor(logged["loss"], device=fabric.device).detach()
            step, last = position + 1, position + 1 == config.steps
            bar.update(row, completed=step)
            if step % config.log_every == 0 or last:
                check_finite(healthy, step, run)
                numbers = _averaged(logged, fabric)
                bar.update(row, numbers=headline(numbers))
                if log:
                    log.write(step, numbers, "train")
            measured = step % config.validate_every == 0 or last
            if measured:
                check_finite(healthy, step, run, task.state())
                figures = task.validate()
                picture = task.samples()
                if log:
                    log.write(step, figures, "validation")
                    if picture is not None:
                        log.picture(step, picture)
                if figures[task.monitor] > best:
                    best = figures[task.monitor]
                    if main:
                        save_checkpoint(run / "best", task, None, figures, step)
            if last:
                save(run / "final", step, measured)
                break
            stopping = _agreed(stop, step, config, fabric)
            if step % config.save_every == 0 or stopping:
                save(run / f"step-{step}", step, measured)
            if stopping:
                raise Stopped(run / f"step-{step}")
    return figures


def _agreed(stop: list[int], step: int, config: RunConfig, fabric: Fabric) -> bool:
    """Whether to stop now; several processes ask each other at the steps that log, so that all save the same step."""
    if fabric.world_size == 1:
        return bool(stop)
    if step % config.log_every:
        return False
    return bool(fabric.all_reduce(torch.tensor(float(bool(stop)), device=fabric.device), reduce_op="sum") > 0)


def _averaged(logged: Logged, fabric: Fabric) -> dict[str, float]:
    """The numbers as plain floats, averaged over the processes."""
    numbers = [torch.as_tensor(v, dtype=torch.float32, device=fabric.device).detach() for v in logged.values()]
    return dict(zip(logged, fabric.all_reduce(torch.stack(numbers), reduce_op="mean").tolist(), strict=True))


def _random_state(fabric: Fabric) -> dict[str, Any]:
    """The global generators; tasks draw from generators keyed by position instead."""
    version, keys, index, has_gauss, gauss = np.random.get_state()
    kind, words, normal = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(), "python": [kind, list(words), normal],
        "numpy": [version, torch.from_numpy(keys.astype(np.int64)), int(index), int(has_gauss), float(gauss)],
    }
    if fabric.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(fabric.device)
    return state


def _load_random_state(state: dict[str, Any], fabric: Fabric) -> None:
    torch.set_rng_state(state["torch"])
    kind, words, normal = state["python"]
    random.setstate((kind, tuple(words), normal))
    version, keys, index, has_gauss, gauss = state["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), index, has_gauss, gauss))
    if "cuda" in state and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], fabric.device)


def _scaler_state(fabric: Fabric) -> dict[str, Any] | None:
    """The loss scaler's, which only fp16 has."""
    scaler = getattr(fabric._precision, "scaler", None)
    return None if scaler is None else scaler.state_dict()


def _load_scaler_state(state: dict[str, Any] | None, fabric: Fabric) -> None:
    scaler = getattr(fabric._precision, "scaler", None)
    if scaler is not None and state is not None:
        scaler.load_state_dict(state)
