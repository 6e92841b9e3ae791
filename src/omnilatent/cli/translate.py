"""`omnilatent translate NAME INPUT … --to MODALITY`: any-to-any on real files.

- `Translate`: the command's options.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from .folders import check_writable
from .parse import parse


@dataclass(frozen=True)
class Translate:
    """Turn a picture, a sound, a video or a text into another of these; several files are taken together as one source."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")]
    """an any-to-any model: a run of an omni recipe"""
    to: Literal["audio", "image", "text", "video"]
    """what to make"""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, arg(metavar="FILE")] = ()
    """the source, at most one file of each modality"""
    text: str | None = None
    """a text as the source, instead of a file or beside it"""
    out: Path | None = None
    """the file to write: .png, .wav, .mp4 or .txt; by default named after the first source, in the current folder"""
    size: tuple[int, ...] = ()
    """of what is made: height and width, or frames, or frames, height and width; by default the model's usual one"""
    as_is: bool = False
    """take pictures and videos at their own size, which otherwise is brought down to the model's usual one"""
    steps: int | None = None
    """of the flow; 0: what is likeliest on average instead of a drawn example"""
    seed: int = 0
    """of what is drawn"""
    max_len: int | None = None
    """of a text, in tokens"""
    temperature: float = 0.0
    """of a text; 0 takes the likeliest token every time"""
    top_p: float = 1.0
    """of a text: draw only from the likeliest tokens that together have this probability"""
    beams: int = 1
    """of a text: width of the beam search"""
    rate: float = 8.0
    """of a video, frames a second"""
    overwrite: bool = False
    """replace a file that is there"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(Translate, "translate", argv)
    if not options.files and options.text is None:
        raise UserError("translate takes a source: give a file, or --text \"some words\".")
    out = _out(options)
    from fractions import Fraction

    import torch

    from ..devices import choose_device
    from ..omni.files import modality_of, read_source, text_source, write_target
    from ..omni.saving import load

    kinds = [modality_of(file) for file in options.files] + (["text"] if options.text is not None else [])
    if len(set(kinds)) < len(kinds):
        raise UserError(f"the sources are {', '.join(kinds)}: give at most one of each modality.")
    model = load(options.name, choose_device(options.device))
    device = model.places.linear.weight.device
    if options.to not in model.modalities:
        raise UserError(f"{options.name} makes {', '.join(model.modalities)}, and no {options.to}.")
    inputs = {kind: read_source(file, kind, model, options.as_is) for kind, file in zip(kinds, options.files)}
    if options.text is not None:
        inputs["text"] = text_source(options.text, model, "--text")
    inputs = {kind: data.to(device) for kind, data in inputs.items()}
    try:
        with torch.no_grad():
            generator = torch.Generator(device).manual_seed(options.seed)
            if options.to == "text":
                made = model.generate(inputs, max_len=options.max_len, temperature=options.temperature, top_p=options.top_p,
                                      beams=options.beams, generator=generator)
                print(model.tokenizer.decode(made[0].tolist()))
            else:
                made = model.answer(model.read(inputs), options.to, _size(options, model), generator, options.steps)
    except ValueError as failure:  # a sentence of the model's own
        raise UserError(f"{failure}.") from failure
    if options.to != "text" or options.out is not None:
        write_target(made[0], options.to, out, model, Fraction(options.rate).limit_denominator(1000))
        print(out)


def _out(options: Translate) -> Path:
    """The file to write, which must fit and must not be there."""
    endings = {"image": {".png", ".jpg", ".jpeg", ".webp"}, "audio": {".wav"}, "video": {".mp4", ".mkv", ".mov"}, "text": {".txt"}}
    usual = {"image": ".png", "audio": ".wav", "video": ".mp4", "text": ".txt"}[options.to]
    stem = options.files[0].stem if options.files else "text"
    out = options.out or Path(f"{stem}-{options.to}{usual}")
    if out.suffix.lower() not in endings[options.to]:
        raise UserError(f"--out {out}: {options.to} is written as {usual}; give a file with that ending.")
    if out.exists() and not options.overwrite and (options.to != "text" or options.out is not None):
        raise UserError(f"{out} is there already: give another --out, or --overwrite.")
    check_writable(out.parent)
    return out


def _size(options: Translate, model) -> tuple[int, ...] | None:  # noqa: ANN001
    """--size as the target has it: of a video, frames alone or height and width alone leave the others as usual."""
    usual, given = model.modalities[options.to].usual, options.size
    if not given:
        return None
    if min(given) < 1:
        raise UserError(f"--size {' '.join(map(str, given))}: give numbers of at least 1.")
    if len(given) == len(usual):
        return given
    if options.to == "video" and len(given) == 1:
        return (*given, *usual[1:])
    if options.to == "video" and len(given) == 2:
        return (usual[0], *given)
    raise UserError(f"--size of {options.to} has {len(usual)} number{'s' * (len(usual) > 1)}; got {len(given)}.")
