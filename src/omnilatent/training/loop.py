"""The one loop. It steps a `Task`, logs, validates, saves, and can be killed at any instant.

- `launch_fabric`: device, precision and processes from a `RunConfig`; torchrun's variables are honoured.
- `train`: the loop itself.
"""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import library
from ..hub import choose_device
from .checkpoint import load_state, prune, save_checkpoint
from .config import RunConfig
from .finite import check_finite
from .logs import RunLog, progress_bar
from .memory import step_within_memory
from .task import Logged, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch_fabric(config: RunConfig) -> Fabric:
    """A launched Fabric: the device asked for, bf16 where the GPU has it, DDP over the processes of torchrun."""
    import os

    device = choose_device(config.device)
    precision: Any = "32-true"
    if config.amp and device == "cuda":
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
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
        resume: a checkpoint folder to go on from.
        quiet: no progress bar.

    Returns:
        The figures of the last validation.

    Raises:
        UserError: a loss is not finite, memory or the disk is full; the sentence names what was kept and what helps.
        KeyboardInterrupt: after Ctrl-C, once the step in hand is finished and saved.
    """
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(config.seed)
    task.setup(fabric)
    start, best, figures = 0, -math.inf, {}
    state = load_state(resume, fabric.device) if resume is not None else None
    if state is not None:
        task.load_state(state["task"])
        start, best, figures = state["step"], state["best"], state["figures"]
    main = fabric.is_global_zero
    healthy = torch.zeros((), device=fabric.device)  # turns NaN or infinite with the first such loss

    def save(folder: Path, step: int) -> None:
        learned = task.state()
        check_finite(healthy, step, run, learned)
        state = {"task": learned, "step": step, "best": best, "figures": figures, "random": _random_state(fabric)}
        if main:
            save_checkpoint(folder, task, state, figures, step)
            prune(run, config.keep)
        fabric.barrier()

    logging = RunLog(run, start) if main else nullcontext()
    with logging as log, progress_bar(main and not quiet) as bar, _stop_after_this_step() as stop:
        row = bar.add_task(run.name, total=config.steps, completed=start, numbers="")
        if state is not None:  # this late, since libraries draw random numbers while they start
            _load_random_state(state["random"], fabric)
        batches = task.batches(start, config.steps)
        for position in range(start, config.steps):
            logged = step_within_memory(task, next(batches), position, config, fabric.world_size)
            healthy = healthy + 0.0 * torch.as_tensor(logged["loss"], device=fabric.device).detach()
            step, last = position + 1, position + 1 == config.steps
            bar.update(row, completed=step)
            if step % config.log_every == 0 or last:
                check_finite(healthy, step, run)
                numbers = _averaged(logged, fabric)
                bar.update(row, numbers=" ".join(f"{k} {v:.4g}" for k, v in list(numbers.items())[:3]))
                if log:
                    log.write(step, numbers, "train")
            if step % config.validate_every == 0 or last:
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
                save(run / "final", step)
                break
            stopping = _agreed(stop, step, config, fabric)
            if step % config.save_every == 0 or stopping:
                save(run / f"step-{step}", step)
            if stopping:
                raise KeyboardInterrupt
    return figures


def _agreed(stop: list[bool], step: int, config: RunConfig, fabric: Fabric) -> bool:
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


@contextmanager
def _stop_after_this_step() -> Iterator[list[bool]]:
    """Yield a list that becomes non-empty with the first Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""
    stop: list[bool] = []

    def ask(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: leave the signals alone
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _random_state(fabric: Fabric) -> dict[str, Any]:
    """The global generators and the loss scaler; tasks draw from generators keyed by position instead."""
    version, keys, index, has_gauss, gauss = np.random.get_state()
    kind, words, normal = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(), "python": [kind, list(words), normal],
        "numpy": [version, torch.from_numpy(keys.astype(np.int64)), int(index), int(has_gauss), float(gauss)],
    }
    if fabric.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(fabric.device)
    scaler = getattr(fabric._precision, "scaler", None)
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    return state


def _load_random_state(state: dict[str, Any], fabric: Fabric) -> None:
    torch.set_rng_state(state["torch"].cpu())
    kind, words, normal = state["python"]
    random.setstate((kind, tuple(words), normal))
    version, keys, index, has_gauss, gauss = state["numpy"]
    np.random.set_state((version, keys.cpu().numpy().astype(np.uint32), index, has_gauss, gauss))
    if "cuda" in state and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), fabric.device)
    scaler = getattr(fabric._precision, "scaler", None)
    if scaler is not None and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
