"""The tables of speed, tiles, stores and trials, in Markdown, from the files in benchmarks/results/; render.py puts
them into the pages.

- `speed`: `omnilatent bench`; `stages`: its way from files to a store. `cpu_speed`: benchmarks/cpu_speed.py.
- `tiles`: benchmarks/tiles.py. `two_gpus`: benchmarks/store_rate.py.
- `trials`: benchmarks/trials.py, everything tried; `latents`: what regularisers did to the latent space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REGULARISED = ("32 groups", "8 groups", "8 groups, spectrum", "8 groups, rotation equivariance",
               "8 groups, scale equivariance", "8 groups, 16 channels", "8 groups, 32 channels")


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are text, the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows)) + "\n"


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def speed(name: str) -> str:
    record = results(name)
    rows = [[row["what"], row["how"], str(row["batch_size"]), number(row["images_per_second"], 1),
             number(row["milliseconds"], 2), number(row["peak_bytes"] and row["peak_bytes"] / 2**30, 2)]
            for row in record["rows"] if row["failure"] is None]
    failed = [f"\n{row['what']}, {row['how']}: no figure ({row['failure']}).\n"
              for row in record["rows"] if row["failure"]]
    head = (f"{record['name']}, {record['parameters']:,} parameters, {record['size']}², {record['dtype']}, "
            f"{record['device']}, torch {record['torch']}, median of {record['calls']} calls, {record['date']}.\n\n"
            f"`{record['command']}`\n\n")
    return head + table(["what", "how", "batch", "img/s", "ms", "peak GiB"], rows, 2) + "".join(failed)


def stages(name: str) -> str:
    record = results(name)
    report = record["store"]
    on_device = next(r["images_per_second"] for r in reversed(record["rows"]) if r["what"] == "encode")
    rows = [[stage, number(rate, 0)] for stage, rate in report["rates"].items()]
    rows.append(["**all together**", f"**{report['images_per_second']:,.0f}**"])
    return (f"{report['new']:,} JPEGs, {report['workers']} workers, {record['device']}. {record['note']}\n\n"
            + table(["stage, by itself", "img/s"], rows)
            + f"\n{report['images_per_second'] / on_device:.0%} of the rate with images in GPU memory "
              f"({on_device:,.0f} img/s); the slowest stage is {report['limit']}. This host's workers would feed "
              f"{report['rates']['workers'] / on_device:.1f} such GPUs.\n")


def cpu_speed(name: str) -> str:
    record = results(name)
    rows = [[row["model"], f"{row['parameters']:,}", *(f"{row[f'{what}_ratio']:.2f} ×" for what in ("encode", "decode"))]
            for row in record["rows"]]
    return (f"`{record['command']}`, one picture of {record['size']}², {record['threads']} thread, torch "
            f"{record['torch']}, median of {record['calls']} calls in turn, {record['date']}. Speed as a multiple of "
            "the first row's.\n\n" + table(["model", "parameters", "encode", "decode"], rows))


def two_gpus(name: str) -> str:
    record = results(name)
    rows = [[label, str(run["processes"]), f"{run['new']:,}", number(run["new"] / run["seconds"], 0)]
            for label, run in (("one GPU", record["one"]), ("two GPUs", record["several"]))]
    equal = record["equal"]
    return (f"`{record['command']}` ({record['note']}), {record['one']['device']}, {record['date']}.\n\n"
            + table(["", "processes", "images encoded", "img/s"], rows)
            + f"\n{record['speed_up']:.2f} times as fast; {equal['bit_equal_rows']:,} of {equal['rows']:,} rows are "
              "bit-equal.\n")


def tiles(name: str) -> str:
    record = results(name)
    whole = {(r["model"], r["dtype"], r["side"], r["job"]): r["peak"] for r in record["rows"] if r["method"] == "whole"}
    rows = []
    for r in record["rows"]:
        reference = whole.get((r["model"], r["dtype"], r["side"], r["job"]))
        share = r["peak"] / reference if r["peak"] and reference else None
        rows.append([r["model"], r["dtype"], f"{r['side']}²", r["job"], r["method"], number(r["most"], 3),
                     number(r["mean"], 4), number(r["exact_most"], 3), number(r["peak"] and r["peak"] / 1e9, 2),
                     number(share, 2)])
    heads = ["model", "precision", "size", "job", "way", "largest difference to whole [1/255]", "mean",
             "largest to float32", "peak GB", "of whole"]
    conditions = record["conditions"]
    failed = sorted({f"{r['method']} in {r['dtype']}: {r['note']}" for r in record["rows"] if r["note"]})
    return (f"{conditions['device']}, torch {conditions['torch']}, tiles of {conditions['tile']} pixels, "
            f"{record['date']}. {record['note']}\n\n`{record['command']}`\n\n" + table(heads, rows, 5)
            + "".join(f"\nNo figure for {line}.\n" for line in failed))


def trials(name: str = "trials") -> str:
    rows = [[t["trial"], number(t.get("parameters") and t["parameters"] / 1e6, 2), number(t["val_psnr"], 2),
             number(t.get("val_ssim"), 3), number(t.get("val_spectrum_high"), 3), number(t["kodak_native_psnr"], 2),
             f"`{t['command'].removeprefix('omnilatent train ')}`"] for t in results(name)["trials"]]
    heads = ["trial", "M parameters", "val [dB]", "SSIM", "high-frequency power", "Kodak [dB]", "`omnilatent train …`"]
    text = table(heads, rows)
    lines = text.splitlines()
    lines[1] = "| --- |" + " ---: |" * 5 + " --- |"
    return "\n".join(lines) + "\n"


def latents(name: str = "trials") -> str:
    found = {t["trial"]: t for t in results(name)["trials"]}
    rows = []
    for trial in REGULARISED:
        t, health = found[trial], found[trial]["health"]
        cycle, geometry = health["cycle"], health["equivariance"]
        rows.append([trial, number(t["val_psnr"], 2), number(health["spectrum"]["latent_slope"], 2),
                     *(number(cycle[kind], 4) for kind in ("real", "interpolated", "prior")),
                     number(health["noise_psnr"]["0.5"], 1), f"{geometry['scale']:.1f} of {geometry['scale_reference']:.1f}",
                     f"{geometry['rotation']:.1f} of {geometry['rotation_reference']:.1f}"])
    return table(["trial", "val [dB]", "spectrum slope (image −2.84)", "cycle error: real", "between pictures",
                  "prior draws", "noise of 0.5 σ [dB]", "half size [dB]", "turned by 90° [dB]"], rows)
