"""`omnilatent evaluate NAME --data DATA`: one codec under the protocol; the same report as `compare`, for one.

- `Evaluate`: the command's options, those of `compare` and `--json` (also `--output`). An any-to-any model has its own
  (evaluate_omni.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from .compare import Measuring, measure, show
from .folders import check_file
from .names import is_any_to_any
from .parse import parse


@dataclass(frozen=True)
class Evaluate(Measuring):
    """Measure one codec on images under the protocol; write report.html and report.json. An any-to-any model has options of its
    own: omnilatent evaluate RUN --help."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")] = field(kw_only=True)
    """a path, a bundled model or a hub id, as NAME or LABEL:NAME"""
    json: Annotated[Path | None, arg(aliases=["--output"], metavar="FILE")] = field(default=None, kw_only=True)
    """write the figures to this file too, as JSON"""


def main(argv: list[str]) -> None:
    """Run the command."""
    if any(arg.partition("=")[0] == "--mode" or is_any_to_any(arg) for arg in argv):
        from .evaluate_omni import main as evaluate_omni

        evaluate_omni(argv)
        return
    options = parse(Evaluate, "evaluate", argv)
    if options.json is not None:
        check_file(options.json, "--json")
    evaluations, page = measure(options, [options.name], "evaluate", argv)
    written = [page, page.with_name("report.json")]
    if options.json is not None:
        from ..report.record import replace_file

        record = page.with_name("report.json").read_text(encoding="utf-8")
        written.append(replace_file(options.json, record))
    show(evaluations, written)
