"""A process that has imported everything and forks a child for each command line it reads, so that a test can start,
kill and repeat dozens of real encodings, several at a time, without paying for imports each time.

Requests are JSON lines: {"argv": [...], "env": {...}, "fault": null or [name, count]} starts a child and is answered
with its pid; {"wait": pid} is answered with its exit status. A fault kills the child with SIGKILL at the `count`-th
call of `name`: "sync" (half of the file that is to be flushed is there), "rename" (just before it), "renamed" (just
after it), "claim" (just after a shard's number was claimed).
"""

import json
import os
import signal
import sys

import rich.progress  # noqa: F401
import torch
import torch.distributed
from store_codecs import REGISTERED

import omnilatent.cli.encode  # noqa: F401
import omnilatent.cli.ranks  # noqa: F401
import omnilatent.data.sources  # noqa: F401
import omnilatent.store.encoding  # noqa: F401
from omnilatent import hub
from omnilatent.cli.main import main
from omnilatent.store import shards


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name: str, count: int) -> None:
    """Replace the function behind `name` by one that dies at its `count`-th call."""
    calls = 0
    owner, attribute = {"sync": (os, "fsync"), "rename": (os, "replace"), "renamed": (os, "replace"),
                        "claim": (shards, "_claim")}[name]
    real = getattr(owner, attribute)

    def deadly(*args, **more):
        nonlocal calls
        calls += 1
        if calls == count and name == "sync":
            try:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            except OSError:  # a folder
                pass
        if calls == count and name != "renamed" and name != "claim":
            die()
        result = real(*args, **more)
        if calls == count:
            die()
        return result

    setattr(owner, attribute, deadly)


def serve() -> None:
    for table, rows in REGISTERED.items():
        getattr(hub, table).update(rows)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitpid(request["wait"], 0)[1], flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            os.environ.update(request["env"])
            said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(said, 1)
            os.dup2(said, 2)
            if request["fault"]:
                arm(*request["fault"])
            code = main(request["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)


serve()
