"""The one way in: `omnilatent COMMAND …`. Each command is a file beside this one with `main(argv)`.

Nothing here imports torch, so help and argument errors answer at once.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from .. import __version__
from ..errors import UserError, is_disk_full, is_out_of_memory

COMMANDS = {
    "demo": "the main job on embedded photos, or on yours with --data: fine-tune, reconstruct, compare, report",
    "train": "learn a latent space: omnilatent train RECIPE --data DATA",
    "clone": "a tiny gradient-free codec that learns from a big one: omnilatent clone NAME --data DATA",
    "compare": "several codecs side by side on the same images: report (HTML) and figures (JSON)",
    "evaluate": "the same for one codec",
    "translate": "any modality into any other, on real files: omnilatent translate NAME FILE --to text",
    "encode": "images → a store of latents, at scale: omnilatent encode NAME DATA --out STORE",
    "decode": "a store of latents → pictures",
    "info": "recipes and codecs there are; one codec's spec, licence and metrics",
    "export": "write a codec, or a store of latents, in another library's format",
    "push": "upload a codec to the hub",
    "bench": "speed and memory on this machine: encoding, decoding, training steps, from files to a store",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"omnilatent {__version__}: learn, measure, compare and use latent spaces\n\n"
        f"usage: omnilatent COMMAND …\n\n{rows}\n\n"
        "'omnilatent COMMAND --help' shows a command's options. NAME is a path, a bundled model or a hub id;\n"
        "DATA is a folder, a .tar or several, a video, 'photos' (embedded) or 'synthetic'."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit code: 0, 2 for the user's mistakes, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0
    if argv[0] in {"-V", "--version"}:
        print(__version__)
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        print(f"omnilatent: there is no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a file name that is not UTF-8, or a terminal that is not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        import_module(f".{command}", __package__).main(rest)
        sys.stdout.flush()
    except UserError as mistake:
        print(f"omnilatent: {mistake}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nomnilatent: stopped by Ctrl-C; what was saved before is untouched.", file=sys.stderr)
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2 if end.code else 0
    except (OSError, RuntimeError, MemoryError) as failure:
        sentence = machine_failure(failure)
        if sentence is None:
            raise
        print(f"omnilatent: {sentence}", file=sys.stderr)
        return 2
    return 0


def machine_failure(failure: Exception) -> str | None:
    """What to tell of a failure of the disk or the memory that nothing nearer to it has explained; else None."""
    if is_out_of_memory(failure):
        return "Out of memory: use a smaller --batch-size, smaller images or a smaller model."
    if is_disk_full(failure):
        return ("The disk is full or a quota is reached: free space and repeat the command; what was saved before is "
                "untouched.")
    if isinstance(failure, OSError) and failure.filename is not None:
        file = os.fsdecode(failure.filename)
        return f"{file} cannot be read or written ({failure.strerror}): check the path and your rights."
    return None
