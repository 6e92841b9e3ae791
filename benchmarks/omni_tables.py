"""The tables of the any-to-any model in Markdown; render.py puts them into docs/benchmarks.md.

- `speed`, `memory`: benchmarks/omni_speed.py, beside the peer's figures and the seed's claims.
- `digits`: benchmarks/omni_digits.py, what comes out against what went in. `cells_table`: that of one model, one way.

Where a file is not there yet, its place says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import number, table, times

RESULTS = Path(__file__).parent / "results"
# The nearest project's own code on one NVIDIA H200, fp16 autocast, not compiled, same inputs, batch 16: ms a training step
PEER_MS = {False: {"image→image": 56, "image→text": 52, "text→image": 58, "video→audio": 58, "audio→video": 55},
           True: {"image→image": 72, "image→text": 85, "text→image": 76, "video→audio": 78, "audio→video": 85}}
PEER_GENERATE_MS, PEER_PARAMETERS = 540, 127.8e6  # 64 tokens of text, batch 1
TRIED = "Not measured yet: `{}` writes `benchmarks/results/{}`, from which this table is made.\n"


def found(name: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """A result's JSON, or None where it is not there."""
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def speed(record: dict[str, Any] | None) -> str:
    """Training steps by pair, and text token by token."""
    if record is None:
        return TRIED.format("python benchmarks/omni_speed.py", "omni_speed.json")
    rows = []
    for row in record["rows"]:
        peer = PEER_MS[row["checkpointing"]].get(row["pair"])
        rows.append([f"train {row['pair']}", "on" if row["checkpointing"] else "off", number(row["tokens"], 0), number(row["ms"], 1),
                     number(row["k_tokens"], 0), number(peer, 0), times(peer, row["ms"])])
    ms = record["generate_ms"]
    rows.append(["write 64 tokens, batch 1, not compiled", "–", "64", number(ms, 1), number(64 / ms, 2),
                 number(PEER_GENERATE_MS, 0), times(PEER_GENERATE_MS, ms)])
    way = "flow matching" if record.get("flowing") else "regression"
    return (f"{record['parameters'] / 1e6:.1f} M parameters, batch {record['batch_size']}, {way}, bf16, compiled, {record['device']}, "
            f"torch {record['torch']}. The peer: {PEER_PARAMETERS / 1e6:.1f} M parameters, fp16, not compiled, NVIDIA H200, the same "
            "inputs; tokens are counted as ours.\n\n`python benchmarks/omni_speed.py`\n\n"
            + table(["what", "checkpointing", "tokens an example", "ms", "k tokens/s", "the peer [ms]", "times as fast"], rows, 2))


def memory(record: dict[str, Any] | None) -> str:
    """The seed's table of a training step's memory, and ours: what the parameters take by their number, and the measured peak."""
    if record is None or "memory" not in record:
        return TRIED.format("python benchmarks/omni_speed.py", "omni_speed.json")
    count, peak = record["parameters"], record["memory"]
    four = 4 * count / 1e9
    rest = peak["peak_allocated_gb"] - 4 * four
    rows = [["parameters", "0.28 (fp16)", f"{four:.2f} (fp32)"],
            ["gradients", "0.28 (fp16)", f"{four:.2f} (fp32)"],
            ["optimiser", "1.1 (fp32)", f"{2 * four:.2f} (fp32)"],
            ["master weights", "0.56 (fp32)", "– (the parameters are in fp32)"],
            ["activations and the rest, checkpointed", "1 to 2", f"{rest:.2f} (peak less the rows above)"],
            ["**together**", "**3.7 to 4.7**", f"**{peak['peak_allocated_gb']:.2f}** allocated, "
                                               f"{peak['peak_reserved_gb']:.2f} reserved"]]
    return (f"GB of training steps at 768 × 12, batch 4, checkpointing on, {record['device']}. The seed counts ~140 M parameters, whose "
            f"rows add up to 3.2 to 4.2; its own code has {PEER_PARAMETERS / 1e6:.1f} M, ours {count / 1e6:.1f} M. The process was "
            f"allowed {peak['cap_gb']:.0f} GB. Of ours the sum is measured, without the moving average of a run's weights ({four:.2f} GB "
            "more); the rows above it follow from the number of parameters.\n\n" + table(["", "the seed says", "here"], rows))


def digits(runs: dict[str, Any] | None) -> str:
    """Of every run: source × target, by regression and by flow, then several sources at once."""
    if not runs:
        return TRIED.format("python benchmarks/omni_digits.py --data ../shared/data", "omni_digits.json")
    return "`python benchmarks/omni_digits.py --data ../shared/data`\n\n" + "\n".join(_run(label, run) for label, run in runs.items())


def _run(label: str, run: dict[str, Any]) -> str:
    took = f", {run['seconds'] / 60:,.0f} minutes" if run.get("seconds") else ""
    steps = f"{run['steps']:,} steps" if run.get("steps") else "the recipe's steps"
    judges = ", ".join(f"{name} {_percent(accuracy)}" for name, accuracy in run["judges"].items())
    means = ", ".join(f"{name} {number(decibels, 1)} dB" for name, decibels in run["class_mean_psnr"].items())
    text = (f"**{label}**: {run['parameters'] / 1e6:.1f} M parameters, {steps}{took}, guidance {run['guidance']:g}, {run['device']}, torch {run['torch']}; "
            f"{run['count']:,} held-out examples, {'spoken' if run.get('recordings') is not None else 'dialled'}. The judges read "
            f"rightly, of real ones held out: {judges}. The class's mean in place of a copy: {means}.\n")
    for way, cells in run["ways"].items():
        text += f"\nBy {way}:\n\n{cells_table(cells)}"
    if run.get("recordings") is not None:
        text += f"\nAudio → text, every test recording once: {_percent(run['recordings'])}"
        text += f"{_unheard(run['speakers'], run['speakers_steps'])}.\n" if "speakers" in run else ".\n"
    return text


def cells_table(cells: dict[str, dict[str, Any]]) -> str:
    """Sources down, targets across."""
    targets = list(dict.fromkeys(key.partition("→")[2] for key in cells))
    sources = sorted(dict.fromkeys(key.partition("→")[0] for key in cells), key=lambda source: source.count("+"))
    rows = [[source.replace("+", " + "), *(_cell(cells.get(f"{source}→{target}")) for target in targets)] for source in sources]
    return table(["source", *(f"→ {target}" for target in targets)], rows)


def _unheard(speakers: dict[str, float], steps: int) -> str:
    each = ", ".join(f"{name} {_percent(share)}" for name, share in speakers.items())
    mean = _percent(sum(speakers.values()) / len(speakers))
    return (f". All recordings of a speaker of whom training heard none (`--without all --steps {steps}`: a model for each, of audio and "
            f"text alone): {each}; mean {mean}")


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    text = f"{100 * cell['accuracy']:.1f} of {100 * cell['ceiling']:.1f} ({100 * cell['null']:.1f})"
    text += f", FD {cell['frechet']:.2f}" if cell.get("frechet") is not None else ""
    return text + (f", {cell['psnr']:.1f} dB" if cell.get("psnr") is not None else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
