"""`omnilatent evaluate NAME --mode …` of an any-to-any model: the seed's figures, on real held-out data, and ours."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from .folders import check_file
from .parse import parse

Mode = Literal["reconstruct", "translate", "latent", "file", "all"]
Modality = Literal["text", "audio", "image", "video"]


@dataclass(frozen=True)
class EvaluateOmni:
    """Measure an any-to-any model on held-out examples, or turn one file into another modality (--mode file)."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")] = field(kw_only=True)
    """a run of an omni recipe"""
    mode: Mode = "all"
    """reconstruct: each modality to itself; translate: eight pairs; latent: whether an example's modalities lie together; all of
    these; file: one file, as 'omnilatent translate'"""
    data: str = "digits"
    """held-out examples: 'digits', a folder with MNIST's files or with mnist/ and fsdd/, or pictures with captions"""
    count: int = 128
    """examples"""
    json: Annotated[Path | None, arg(aliases=["--output", "--out"], metavar="FILE")] = None
    """write the figures to this file too; of --mode file: what is made, by default named after the input, and text only printed"""
    input_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """of --mode file: what to translate"""
    source: Modality | None = None
    """of --mode file: its modality, which must be the file's own"""
    target: Modality | None = None
    """of --mode file: what to make"""
    overwrite: bool = False
    """of --mode file: replace a file that is there"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(EvaluateOmni, "evaluate", argv)
    if options.mode == "file":
        from ..data.media import modality_of
        from .translate import main as translate

        if options.input_file is None or options.target is None:
            raise UserError("--mode file takes --input-file FILE and --target text, audio, image or video.")
        found = modality_of(options.input_file)
        if options.source not in (None, found):
            raise UserError(f"--source {options.source}: {options.input_file} is {found}.")
        written = [] if options.json is None else ["--out", str(options.json)]
        translate([options.name, str(options.input_file), "--to", options.target, "--device", options.device, *written,
                   *["--overwrite"] * options.overwrite])
        return
    alone = [name for name in ("input_file", "source", "target", "overwrite") if getattr(options, name)]
    if alone:
        raise UserError(f"--{alone[0].replace('_', '-')} is for --mode file: leave it out with --mode {options.mode}.")
    if options.count < 2:
        raise UserError(f"--count {options.count}: take at least 2 examples, so that there is another one to compare with.")
    if options.json is not None:
        check_file(options.json, "--json")
    from ..devices import choose_device
    from ..omni.evaluation import latents, reconstruction, translation
    from ..omni.examples import collate, open_examples
    from ..omni.saving import load
    from ..report.record import replace_file

    model = load(options.name, choose_device(options.device))
    held_out = open_examples(options.data, None, 0, model.config)[1]
    count = min(options.count, len(held_out))
    batch = collate([held_out.sample(i) for i in range(count)], model.tokenizer)
    data = {name: t.to(model.places.linear.weight.device) for name, t in batch.items() if name in model.modalities}
    measured = {"reconstruct": reconstruction, "translate": translation, "latent": latents}
    record: dict[str, Any] = {"name": options.name, "data": held_out.name, "examples": count, "model": asdict(model.config)}
    for mode, measure in measured.items():
        if options.mode in (mode, "all"):
            record[mode] = measure(model, data)
            print(f"\n{mode}, {count} examples of {held_out.name}\n{table(record[mode])}")
    if options.json is not None:
        print(replace_file(options.json, json.dumps(record, indent=1) + "\n"))


def table(figures: dict[str, dict[str, float]]) -> str:
    """Rows of equal columns together, as text; shares in per cent."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row, values in figures.items():
        groups.setdefault(tuple(values), []).append(row)
    first, blocks = max(map(len, figures), default=0), []
    for columns, rows in groups.items():
        cells = [[column.replace("_", " ") for column in columns]]
        cells += [[_figure(column, figures[row][column]) for column in columns] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        blocks.append("\n".join(f"  {name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(line, widths, strict=True))
                                for name, line in zip(("", *rows), cells, strict=True)))
    return "\n\n".join(blocks)


def _figure(column: str, value: float) -> str:
    if column == "share":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
