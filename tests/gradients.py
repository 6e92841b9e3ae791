"""Gradients of the first step of the debug recipes, by one process and by two over gloo.

Usage: gradients.py FOLDER. Writes one.pt, rank0.pt and rank1.pt: {"model": …, "disc": …, "logged": …}; the same with
the latent regularisers on as regularised-….pt, and of a tokenizer whose codes do not start at each process's own
vectors as tokenizer-….pt. The processes are forks of this one, so imports are paid once; they find
each other as torchrun's children do.
"""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from omnilatent.autoencoders.config import AutoencoderTraining
from omnilatent.autoencoders.recipes import debug
from omnilatent.autoencoders.recipes_vqgan import debug_lgq
from omnilatent.autoencoders.task import AutoencoderTask
from omnilatent.autoencoders.vqgan_config import VQGANTraining
from omnilatent.quantizers.config import LGQConfig
from omnilatent.training.loop import launch_fabric


REGULARISED = {"scale_equivariance": 1.0, "rotation_equivariance": 1.0, "spectrum_weight": 0.1}


def tokenizer() -> VQGANTraining:
    config = debug_lgq()
    return replace(config, model=replace(config.model, quantizer=LGQConfig(data_init=False, dead_codes="keep")))


def first_step(recipe: Callable[[], AutoencoderTraining], accumulate: int = 1, **loss: float) -> dict:
    config = recipe()
    config = replace(config, loss=replace(config.loss, disc_start_step=0, **loss),
                     optimizer=replace(config.optimizer, clip=0.0),
                     run=replace(config.run, batch_size=8, accumulate=accumulate, device="cpu", workers=0))
    fabric = launch_fabric(config.run)
    task = AutoencoderTask(config, "synthetic", "photos", lambda file, reason: None)
    torch.manual_seed(config.run.seed)
    task.setup(fabric)
    saved = {}
    for name, module, optimizer in [("model", task.bare, task.optimizer), ("disc", task.bare_disc, task.disc_optimizer)]:
        optimizer.step = lambda name=name, module=module: saved.update(
            {name: {k: p.grad.clone() for k, p in module.named_parameters()}})
    batch = next(task.batches(0, 1))
    logged = task.step(batch, 0)
    return saved | {"logged": {k: float(v) for k, v in logged.items()}, "positions": batch.positions}


def child(path: Path, variables: dict[str, str], recipe: Callable[[], AutoencoderTraining], accumulate: int = 1,
          **loss: float) -> int:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.environ.update(variables)
        torch.save(first_step(recipe, accumulate, **loss), path)
        os._exit(0)
    return pid


def children(folder: Path, recipe: Callable[[], AutoencoderTraining], prefix: str = "", **loss: float) -> int:
    """One process, one that accumulates, and two; the worst of their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "False", "GROUP_RANK": "0",
           "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    pids = [child(folder / f"{prefix}one.pt", {}, recipe, **loss),
            child(folder / f"{prefix}accumulated.pt", {}, recipe, accumulate=2, **loss)]
    pids += [child(folder / f"{prefix}rank{r}.pt", {**two, "RANK": str(r), "LOCAL_RANK": str(r)}, recipe, **loss)
             for r in range(2)]
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)


if __name__ == "__main__":
    into = Path(sys.argv[1])
    sys.exit(max(children(into, debug), children(into, debug, "regularised-", **REGULARISED),
                 children(into, tokenizer, "tokenizer-")))
