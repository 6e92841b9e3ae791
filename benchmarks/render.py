"""Write the tables of README.md and docs/benchmarks.md from the reports in benchmarks/results/.

    python benchmarks/render.py                                  rewrite the marked blocks of both pages
    python benchmarks/render.py --add val reports/…/report.json  keep a report as results/val.json first

- `BLOCKS`: page → block → what stands between `<!-- block -->` and `<!-- /block -->`.
- `rendered`: a page with its blocks filled in; the tests compare it with the page as it is.
- `add`: a report into results/, with places on the measuring machine replaced by places in the project.

A page is never edited between the marks by hand: the next rendering would undo it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compare_tokenizers
import omni_tables
import tables
from omnilatent.errors import UserError
from omnilatent.hub import read_json
from omnilatent.metrics.catalogue import METRICS
from omnilatent.metrics.results import Evaluation
from omnilatent.report.conditions import summary
from omnilatent.report.published import PUBLISHED, PUBLISHED_NOTE
from omnilatent.report.record import read_report, replace_file
from omnilatent.report.tables import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BRIEF = ("psnr", "ssim", "lpips_vgg", "rfid", "bits_per_pixel", "decode_ips", "parameters")  # README's columns
# A place on the measuring machine → the same place as the project's pages name it. The first that fits counts.
PLACES = (
    (re.compile(r"(?:[\w./-]*/)?(?:shared/data|\.devdata)/"), "../shared/data/"),
    (re.compile(r"[\w./-]*/(src/omnilatent|benchmarks)/"), r"\1/"),
    (re.compile(r"/(?:root|home/[\w.-]+|Users/[\w.-]+)/"), "~/"),
)


def results_table(name: str, columns: Sequence[str] | None = None) -> str:
    """What was measured, the command, and the table of results/NAME.json.

    Args:
        columns: metric keys; those among them that nobody has are named in one sentence. By default everything, with
            the reasons for what is missing.

    Raises:
        UserError: the file is missing or is no report.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise UserError(f"benchmarks/results/{name}.json is missing: measure, then 'python benchmarks/render.py --add "
                        f"{name} REPORT/report.json'.")
    evaluations = read_report(path)
    record = read_json(path)
    versions = evaluations[0].conditions["versions"]
    tools = ", ".join(f"{library} {versions[library]}" for library in ("omnilatent", "torch") if library in versions)
    absent = [key for key in columns or () if not any(_has(evaluation, key) for evaluation in evaluations)]
    names = ", ".join(METRICS[key].name for key in absent)
    sentence = f"\nNot measured: {names}; [docs/benchmarks.md](docs/benchmarks.md) says why.\n" if absent else ""
    shown = None if columns is None else [key for key in columns if key not in absent]
    return (f"{summary(evaluations)} {tools}, {record['time'][:10]}.\n\n`{record['command']}`\n\n"
            f"{markdown_table(evaluations, record['nulls'], shown)}{sentence}")


def _has(evaluation: Evaluation, key: str) -> bool:
    return key in evaluation.figures and evaluation.figures[key].value is not None


def published_table() -> str:
    """The quoted figures with their sources."""
    def number(value: float | None, digits: int) -> str:
        return "—" if value is None else f"{value:.{digits}f}"

    lines = ["| codec | type | f | latent | rFID ↓ | PSNR ↑ [dB] | SSIM ↑ | LPIPS ↓ | source |",
             "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- |"]
    lines += [f"| {row.label} | {row.type} | {row.downsampling} | {row.shape} | {number(row.rfid, 2)} | "
              f"{number(row.psnr, 2)} | {number(row.ssim, 2)} | {number(row.lpips, 3)} | {row.source} |"
              for row in PUBLISHED]
    return "\n".join(lines) + f"\n\n{PUBLISHED_NOTE}\n"


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "results": lambda: "\n".join([results_table("val", BRIEF), results_table("kodak", BRIEF)]),
    },
    "docs/benchmarks.md": {
        "val": lambda: results_table("val"),
        "kodak": lambda: results_table("kodak"),
        "published": published_table,
        "speed": lambda: tables.speed("bench_kl_f8"),
        "cpu-speed": lambda: tables.cpu_speed("cpu_speed"),
        "stages": lambda: tables.stages("bench_kl_f8"),
        "two-gpus": lambda: tables.two_gpus("store_two_gpus"),
        "tiles": lambda: tables.tiles("tiles"),
        "omni-peer": lambda: tables.omni_peer(tables.results("omni_peer")),
        "omni-digits": lambda: omni_tables.digits(omni_tables.found("omni_digits")),
        "omni-speed": lambda: omni_tables.speed(omni_tables.found("omni_speed")),
        "omni-memory": lambda: omni_tables.memory(omni_tables.found("omni_speed")),
        "quantizers": lambda: tables.quantizers("quantizer_speed"),
    },
    "docs/organic.md": {
        "speed": lambda: tables.organic_speed(tables.results("organic_speed")),
        "pooled": lambda: tables.organic_pooled(tables.results("organic_clones")),
        "grid": lambda: tables.organic_grid(tables.results("organic_clones")),
        "hybrid": lambda: tables.organic_hybrid(tables.results("organic_hybrid")),
        "native": lambda: tables.organic_native(tables.results("organic_native")),
        "scale": lambda: tables.organic_scale(tables.results("organic_clones")),
        "learner": lambda: tables.organic_learner(tables.results("organic_learner")),
        "hidden": lambda: tables.organic_hidden(tables.results("organic_hidden")),
        "downstream": lambda: tables.organic_downstream(tables.results("organic_downstream")),
    },
    "docs/experiments.md": {
        "tokenizers": lambda: compare_tokenizers.tables(tables.results("tokenizers")),
        "trials": tables.trials,
        "latents": tables.latents,
    },
}


def rendered(page: str) -> str:
    """The text of a page, its marked blocks as they should be.

    Raises:
        UserError: a block's marks are not there, or its figures are not.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    for block, made in BLOCKS[page].items():
        marked = re.compile(rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)", re.S)
        if len(marked.findall(text)) != 1:
            raise UserError(f"{page} has not one block <!-- {block} --> … <!-- /{block} -->: put the marks back.")
        filled = made()
        text = marked.sub(lambda match: f"{match[1]}{filled}{match[2]}", text)
    return text


def add(name: str, report: Path) -> Path:
    """Keep a `report.json` as results/NAME.json. Returns its path."""
    read_report(report)  # refuses what is none
    record = _placed(read_json(report))
    record["command"] = re.sub(r" --out(?: |=)\S+", "", record["command"])
    text = json.dumps(record, indent=1, ensure_ascii=False)
    return replace_file(RESULTS / f"{name}.json", text + "\n")


def _placed(value: Any) -> Any:
    """A nested value with every path in it as the project's pages name it."""
    if isinstance(value, dict):
        return {key: _placed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item) for item in value]
    if isinstance(value, str):
        for place, name in PLACES:
            value = place.sub(name, value)
    return value


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--add", nargs=2, metavar=("NAME", "REPORT"), help="keep this report.json as NAME first")
    chosen = arguments.parse_args()
    try:
        if chosen.add:
            print(f"kept as {add(chosen.add[0], Path(chosen.add[1])).relative_to(ROOT)}")
        for page in BLOCKS:
            replace_file(ROOT / page, rendered(page))
            print(f"rendered {page}")
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
