"""The tables of speed, tiles, stores and trials, in Markdown, from the files in benchmarks/results/; render.py puts
them into the pages.

- `speed`: `omnilatent bench`; `stages`: its way from files to a store. `cpu_speed`: benchmarks/cpu_speed.py.
- `quantizers`: benchmarks/quantizer_speed.py. `tiles`: benchmarks/tiles.py. `two_gpus`: benchmarks/store_rate.py.
- `organic_speed`: benchmarks/organic_speed.py. `organic_downstream`: benchmarks/organic_downstream.py.
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


def quantizers(name: str) -> str:
    record = results(name)
    alone = any("device_ms" in row for row in record["rows"])
    rows = [[row["quantizer"], row["from"], f"{row['codes']:,}", number(row["ms"], 2),
             *([number(row.get("device_ms"), 2)] if alone else []), number(row["peak_gib"], 3)] for row in record["rows"]]
    heads = ["quantizer", "from", "codes", "ms", *(["as a CUDA graph [ms]"] if alone else []), "peak GiB"]
    versions = ", ".join(f"{library} {version}" for library, version in record["versions"].items())
    return (f"{record['device']}, {versions}, {record['options']['vectors']:,} vectors of {record['options']['dim']} numbers, forward "
            f"and backward, median of {record['options']['calls']} calls. Largest relative difference from float64: "
            f"{max(record['parity'].values()):.1e}.\n\n`python benchmarks/quantizer_speed.py`\n\n"
            + table(heads, rows, 2))


def omni_peer(record: dict[str, Any]) -> str:
    """Ours beside the peer in its own setting."""
    peer, made = record["peer"], record["image to image, dB, by steps of the flow (0: regression)"]
    rows = [["ours", f"{record['named']:.1%}", number(made["0"], 1), number(made["8"], 1), f"{record['parameters']:,}",
             number(record["CPU seconds a step"], 3)],
            ["the peer", f"{peer['named']:.1%}", number(peer["psnr"], 1), "–", f"{peer['parameters']:,}",
             number(peer["seconds a step"], 3)],
            ["null: the mean picture", "10 %", number(record["mean image, dB"], 1), "–", "–", "–"],
            ["null: the class's mean picture", "–", number(record["class mean, dB"], 1), "–", "–", "–"]]
    return (f"`python benchmarks/omni_peer.py`, {record['steps']:,} steps of 32 by {record['optimizer'].capitalize()}, seed "
            f"{record['seed']}, torch {record['torch']}, 200 test pictures.\n\n"
            + table(["", "named rightly", "image → image [dB], regression", "by flow, 8 steps", "parameters", "CPU s a step"], rows))


def organic_speed(runs: dict[str, Any]) -> str:
    """Of every run, on a CPU or a GPU: one picture; batches; more threads."""
    return "\n".join(_one_picture(run) + _batches(run) + _threads(run) for run in runs.values())


def _one_picture(run: dict[str, Any]) -> str:
    rows, cuda = run["rows"], run["threads"] is None
    reference = _fastest({name: row.get("encode") for name, row in rows.items()})
    numbers = next((row["encoder_numbers"] for name, row in rows.items() if name.startswith("SD-VAE")), None)
    heads = ["encoder", "latent", "encode [ms]", "bare network [ms]", *(["from GPU memory [ms]"] if cuda else []),
             "times as fast as the SD-VAE's", "encoder as stored [MB]", "in fp32 [MB]", "times smaller", "decode [ms]",
             "val [dB]", "Kodak [dB]"]
    body = [[
        name, "×".join(map(str, [*row["latent"][1:], row["latent"][0]])), _ms(row.get("encode")), _ms(row.get("bare")),
        *([_ms(row.get("on_device"))] if cuda else []), times(reference, row.get("encode") and row["encode"]["ms"]),
        number(row["stored_bytes"] and row["stored_bytes"] / 1e6, 3), number(row["encoder_numbers"] * 4 / 1e6, 3),
        times(numbers, row["encoder_numbers"]), _ms(row.get("decode")) + ("¹" if row["teacher_decodes"] else ""),
        *(number(row.get("psnr", {}).get(label), 2) for label in ("val", "kodak"))] for name, row in rows.items()]
    photos = ", ".join(f"{count} {'val photos at 256²' if label == 'val' else 'Kodak photos in their own size'}"
                       for label, count in run["photos"].items())
    notes = ["The SD-VAE has random weights, which its speed does not depend on."] if numbers else []
    notes += ["¹ by its teacher's decoder."] if any(row["teacher_decodes"] for row in rows.values()) else []
    notes += [f"{name}: its teacher encodes." for name, row in rows.items() if row["teacher_encodes"]]
    return (f"{run['device']}, {run['dtype']}, torch {run['torch']}, {_clock(run)}, a uint8 picture of {run['size']}² "
            f"in host memory, medians of calls in turn, {run['date']}.{f' PSNR on {photos}.' if photos else ''}\n\n"
            f"`{run['command']}`\n\n" + table(heads, body, 2) + "".join(f"\n{note}\n" for note in notes))


def _batches(run: dict[str, Any]) -> str:
    found = {name: row["batches"] for name, row in run["rows"].items() if "batches" in row}
    sizes = list(next(iter(found.values()), {}))
    reference = {size: _fastest({name: batches[size] for name, batches in found.items()}) for size in sizes}
    body = [[name, *(_against(reference[size], batches[size]) for size in sizes)] for name, batches in found.items()]
    return (f"\nEncoding batches, milliseconds a picture, {_clock(run)}; in brackets times as fast as the SD-VAE's:\n\n"
            + table(["encoder", *(f"batch {size}" for size in sizes)], body)) if sizes else ""


def _threads(run: dict[str, Any]) -> str:
    text = ""
    for threads in run["threads"] or ():
        found = {name: row["threads"][threads] for name, row in run["rows"].items()}
        halves = ("encode", "decode")
        reference = {half: _fastest({name: row.get(half) for name, row in found.items()}) for half in halves}
        body = [[name, *(_against(reference[half], row.get(half)) for half in halves)] for name, row in found.items()]
        text += f"\n{threads} threads, wall clock, one picture; in brackets times as fast as the SD-VAE's:\n\n"
        text += table(["encoder", "encode [ms]", "decode [ms]"], body)
    return text


def _fastest(timed: dict[str, dict[str, Any] | None]) -> float | None:
    """Milliseconds of the faster of the SD-VAE's rows."""
    return min((t["ms"] for name, t in timed.items() if name.startswith("SD-VAE") and t), default=None)


def _clock(run: dict[str, Any]) -> str:
    return "wall clock" if run["threads"] is None else "processor time on one thread"


def _ms(timed: dict[str, Any] | None) -> str:
    return number(timed and timed["ms"], 2)


def _against(reference: float | None, timed: dict[str, Any] | None) -> str:
    """Milliseconds, and in brackets how many times as fast as the reference."""
    return _ms(timed) + (f" ({times(reference, timed['ms'])})" if reference and timed else "")


def times(reference: float | None, own: float | None) -> str:
    """How many times as much the reference is: two digits that count."""
    if not reference or not own:
        return "–"
    ratio = reference / own
    return f"{ratio:,.0f} ×" if ratio >= 9.95 else f"{ratio:.1f} ×" if ratio >= 0.95 else f"{ratio:.2f} ×"


def organic_downstream(record: dict[str, Any]) -> str:
    """Norms and small changes, then heads, a table for each set of pictures."""
    def pair(found: dict[str, float], digits: int) -> str:
        return f"{found['mean']:.{digits}f} ± {found['sd']:.{digits}f}"

    changes = {"shift": "shift by 1 px", "jpeg": "JPEG 75", "noise": "noise of 1 %",
               "another photo": "another photo (null)"}
    text = f"`{record['command']}`, torch {record['torch']}, {record['date']}.\n"
    if record["steadiness"]:
        text += f"\n{record['photos']} val photos of 256²: relative L2 change of the latent, in brackets cosine.\n\n"
        text += table(["latent", "numbers", "norm", *changes.values()], [
            [label, f"{found['numbers']:,}", pair(found["norm"], 1),
             *(f"{found[name]['l2']:.3f} ({found[name]['cosine']:.3f})" for name in changes)]
            for label, found in record["steadiness"].items()])
    for name, found in record["sets"].items():
        scores = "accuracy" if name == "digits" else "accuracy (turns), R² (colour, edges)"
        text += (f"\nHeads on {name} of {found['side']}²: {scores}; {found['learned_from']:,} to learn from, "
                 f"{found['asked']:,} asked; {record['steps']} steps of Adam, {record['seeds']} seeds, mean ± standard "
                 "deviation.\n\n")
        tasks = list(found["chance"])
        rows = [[label, f"{row['numbers']:,}", *(pair(row[task], 3) for task in tasks)]
                for label, row in found["rows"].items()]
        rows.append(["chance, or the mean (null)", "", *(number(found["chance"][task], 3) for task in tasks)])
        text += table(["head on", "numbers", *tasks], rows)
    return text


def organic_pooled(record: dict[str, Any]) -> str:
    """Four numbers a picture: clones, twin and nulls of both teachers."""
    rows = []
    for teacher in ("taef2", "kl-f8-small"):
        found = record[teacher]
        for label, row in found.items():
            if "l2" in row or "decoder_psnr_64" in row:
                faster = times(found["teacher"]["encode_ms"], row.get("encode_ms"))
                rows.append([teacher, label, *(number(row.get(name), 3) for name in ("r2", "cosine", "l2")),
                             number(row.get("encode_ms"), 2), faster, number(row.get("decoder_psnr_64"), 2)])
    heads = ["teacher", "", "R²", "cosine", "L2", "encode [ms]", "times as fast as the teacher", "decoder at 64² [dB]"]
    return table(heads, rows, 2)


def organic_grid(record: dict[str, Any]) -> str:
    """Drop-ins: clones after every layer, twin and nulls of both teachers."""
    rows = []
    for teacher in ("taef2", "kl-f8-small"):
        found = record[teacher]
        rows.append([teacher, "the teacher itself", "", number(found["teacher"]["psnr"], 2), number(found["teacher"]["psnr"], 2),
                     "", number(found["teacher"]["encode_ms"], 1), number(found["teacher"]["decode_ms"], 1), ""])
        for label, row in found.items():
            if ("encoder_psnr" in row or "decoder_psnr" in row) and not label.startswith("scale"):
                rows.append([teacher, label, *(number(row.get(name), 3 if name == "r2" else 2) for name in
                                               ("r2", "encoder_psnr", "decoder_psnr", "both_psnr")),
                             number(row.get("encode_ms"), 1), number(row.get("decode_ms"), 1),
                             number(row.get("bytes") and row["bytes"] / 1e6, 2)])
    heads = ["teacher", "", "R² of latents", "organic encoder, teacher's decoder [dB]",
             "teacher's encoder, organic decoder [dB]", "both organic [dB]", "encode [ms]", "decode [ms]", "both [MB]"]
    return table(heads, rows, 2)


def organic_scale(record: dict[str, Any]) -> str:
    """Against the number of photos."""
    rows = [[count, number(record["native, by photos"].get(count, {}).get("psnr"), 2),
             *(number(record["taef2"].get(f"scale-taef2-{count}", {}).get(name), digits)
               for name, digits in (("r2", 3), ("encoder_psnr", 2)))] for count in ("30", "100", "300", "753")]
    return table(["photos", "native, 16 channels [dB]", "TAEF2 encoder, R²", "TAEF2 encoder [dB]"], rows)


def organic_native(record: dict[str, Any]) -> str:
    """Native O-VAEs, nulls, twins and TAEF2."""
    rows = [[label, number(row.get("parameters") and row["parameters"] / 1e6, 2),
             *(number(row[images][name], 3 if name == "ssim" else 2) for images in ("Kodak, own size", "val, 256²")
               for name in ("psnr", "ssim")), number(row["Kodak, own size"]["high_frequency_power"], 2),
             number(row["encode_ms"], 1), number(row["decode_ms"], 1)] for label, row in record["codecs"].items()]
    heads = ["", "M parameters", "Kodak [dB]", "SSIM", "val [dB]", "SSIM", "high-frequency power", "encode [ms]", "decode [ms]"]
    return table(heads, rows)


def organic_learner(record: dict[str, Any]) -> str:
    """One linear layer: every method's excess at its end, evaluations and seconds."""
    problems = ("512 → 4", "512 → 192", "2048 → 32")
    rows: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        if row["problem"] in problems:
            rows.setdefault(row["method"], {})[row["problem"]] = row
    lines = []
    for method, found in rows.items():
        cells = [method]
        for problem in problems:
            row = found.get(problem)
            excess = row and ("0" if abs(row["excess"]) < 5e-7 else f"{row['excess']:.2g}" if row["excess"] >= 1e-3 else
                              f"{row['excess']:.0e}")
            cells.append(f"{excess} ({row['evaluations']:,}; {row['cpu_seconds']:.1f} s)" if row else "–")
        lines.append(cells)
    return table(["excess (evaluations; CPU seconds)", *problems], lines)


def organic_hidden(record: dict[str, Any]) -> str:
    """Ways to 512 hidden neurons."""
    return table(["512 tanh neurons", "R² held out", "seconds on an H200"],
                 [[label, number(row["r2"], 3), number(row["seconds"], 1)] for label, row in record["found"].items()])


def organic_hybrid(record: dict[str, Any]) -> str:
    """Organic layers with a part of the teacher."""
    return table(["", "PSNR [dB]", "encode [ms]", "decode [ms]"],
                 [[label, number(row["psnr"], 2), number(row["encode_ms"], 1), number(row["decode_ms"], 1)]
                  for label, row in record["rows"].items()])


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
