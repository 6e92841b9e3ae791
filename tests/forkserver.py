"""A process that has imported everything and forks a child for each command line it reads, so that a test can
start, kill and resume dozens of real runs without paying for imports each time.

Each request is a JSON line {"argv": [...], "fault": null or [name, count]}. The answer is the child's pid, and
after its end its exit status. A fault kills the child with SIGKILL in the middle of the `count`-th call of
`name`: "weights" or "state" (half of the file is written), "rename" (just before it), "remove" (just after it).
"""

import json
import os
import signal
import sys
from pathlib import Path

import lightning_fabric  # noqa: F401
import safetensors.torch
import torch
import torchmetrics.functional.image  # noqa: F401
from diffusers import AutoencoderKL  # noqa: F401
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import omnilatent.autoencoders.task  # noqa: F401
import omnilatent.training.loop  # noqa: F401
from omnilatent.cli.main import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name: str, count: int) -> None:
    """Replace the function behind `name` by one that dies at its `count`-th call."""
    calls = 0
    owner, attribute = {"weights": (safetensors.torch, "save_file"), "state": (torch, "save"),
                        "rename": (Path, "rename"), "remove": (Path, "rename")}[name]
    real = getattr(owner, attribute)

    def deadly(*args, **more):
        nonlocal calls
        calls += 1
        if calls == count and name == "rename":
            die()
        result = real(*args, **more)
        if calls == count:
            if name in ("weights", "state"):
                path = Path(args[1])
                os.truncate(path, path.stat().st_size // 2)
            die()
        return result

    setattr(owner, attribute, deadly)


def serve() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if request["fault"]:
                arm(*request["fault"])
            code = main(request["argv"])
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


serve()
