"""`omnilatent translate NAME INPUT … --to MODALITY`: any-to-any on real files.

- `Translate`: the command's options, and what can be refused without torch.
- `sources`: the files as the model takes them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from .folders import check_writable
from .parse import parse

if TYPE_CHECKING:
    from torch import Tensor

    from ..omni.model import OmniLatentModel

ONLY = {"max_len": ("text",), "temperature": ("text",), "top_p": ("text",), "beams": ("text",), "rate": ("video",),
        **dict.fromkeys(("size", "steps", "guidance"), ("image", "audio", "video"))}  # options of some targets


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
    sound: bool = False
    """take the sound track of a video too"""
    out: Path | None = None
    """the file to write: .png, .wav, .mp4 or .txt; by default named after the first source, in the current folder, and none for
    text, which is printed"""
    size: tuple[int, ...] = ()
    """of what is made: height and width, or frames, or frames, height and width; by default the model's usual one"""
    input_size: tuple[int, int] | None = None
    """height and width that pictures and videos are brought to first; by default the model's usual ones where they are
    larger"""
    as_is: bool = False
    """take pictures and videos at their own size, all frames, and sounds at their own length"""
    steps: int | None = None
    """of the flow, for all but text; 0: what is likeliest on average instead of a drawn example; by default the model's own, and 0
    for what is itself among the sources"""
    guidance: float | None = None
    """of the flow: above 1 it follows the source more than it learned to, 1 as it learned; by default the model's own"""
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

    def check(self) -> list[str]:
        """Refuse what can be refused without torch. Returns the modality of each file."""
        from ..data.media import modality_of

        if not self.files and self.text is None:
            raise UserError("translate takes a source: give a file, or --text \"some words\".")
        usual = {field.name: field.default for field in fields(self)}
        for name, targets in ONLY.items():
            if getattr(self, name) != usual[name] and self.to not in targets:
                raise UserError(f"--{name.replace('_', '-')} is for {', '.join(targets)}: leave it out with --to {self.to}.")
        least = {"steps": 0, "max_len": 1, "size": 1, "input_size": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if min(numbers, default=low) < low:
                raise UserError(f"--{name.replace('_', '-')} {' '.join(map(str, numbers))}: give at least {low}.")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise UserError(f"--guidance {self.guidance:g}: give at least 0.")
        if self.guidance is not None and self.steps == 0:
            raise UserError("--guidance is of the flow, and --steps 0 is the regression: leave one of them out.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: give a number from 0 on.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: give more than 0, at most 1.")
        if self.seed >= 2**63:
            raise UserError(f"--seed {self.seed}: give less than 2^63.")
        if not 0.1 <= self.rate <= 1000:
            raise UserError(f"--rate {self.rate:g}: give 0.1 to 1000 frames a second.")
        if self.as_is and self.input_size is not None:
            raise UserError("--as-is keeps sizes and --input-size changes them: give one of them.")
        kinds = [modality_of(file) for file in self.files]
        if self.sound and "video" not in kinds:
            raise UserError("--sound takes the sound track of a video, and there is none among the sources.")
        every = kinds + ["audio"] * self.sound + ["text"] * (self.text is not None)
        if len(set(every)) < len(every):
            raise UserError(f"the sources are {', '.join(every)}: give at most one of each modality.")
        return kinds


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(Translate, "translate", argv)
    kinds, out = options.check(), target_file(options)
    import torch

    from ..devices import choose_device
    from ..omni.files import mel_of, write_target
    from ..omni.saving import learned_without_source, load

    model = load(options.name, choose_device(options.device))
    device = model.places.linear.weight.device
    if options.to not in model.modalities:
        raise UserError(f"{options.name} makes {', '.join(model.modalities)}, and no {options.to}.")
    if options.to == "audio":
        mel_of(model)
    if options.guidance not in (None, 1) and not learned_without_source(options.name):
        raise UserError(f"--guidance {options.guidance:g}: {options.name} never learned to make anything of no source, which guidance "
                        "leads away from: train one with --unconditional-share 0.1.")
    size = target_size(options, model)
    inputs = {kind: data.to(device) for kind, data in sources(options, kinds, model).items()}
    try:
        with torch.no_grad():
            generator = torch.Generator(device).manual_seed(options.seed)
            if options.to == "text":
                made = model.generate(inputs, max_len=options.max_len, temperature=options.temperature, top_p=options.top_p,
                                      beams=options.beams, generator=generator)
                print(model.tokenizer.decode(made[0].tolist()))
            else:
                made = model.answer(model.read(inputs), options.to, size, generator, options.steps, options.guidance)
    except ValueError as failure:  # a sentence of the model's own
        raise UserError(f"{failure}.") from failure
    if out is not None:
        write_target(made[0], options.to, out, model, Fraction(options.rate).limit_denominator(1000))
        print(out)


def sources(options: Translate, kinds: list[str], model: OmniLatentModel) -> dict[str, Tensor]:
    """Modality → its batch of one. What is not taken as it is is said on the standard error output."""
    from ..omni.files import Fit, read_source, text_source

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    fit = Fit(options.input_size, options.as_is)
    found = {kind: read_source(file, kind, model, fit, say) for kind, file in zip(kinds, options.files, strict=True)}
    if options.sound:
        found["audio"] = read_source(options.files[kinds.index("video")], "audio", model, fit, say)
    if options.text is not None:
        if "text" not in model.modalities:
            raise UserError(f"--text is text, and this model takes {', '.join(model.modalities)}.")
        found["text"] = text_source(options.text, model, "--text")
    return found


def target_file(options: Translate) -> Path | None:
    """The file to write, which must fit and must not be there; None: text that is only printed."""
    from ..data.media import WRITTEN, check_ending

    if options.out is None and options.to == "text":
        return None
    stem = options.files[0].stem if options.files else "text"
    out = options.out or Path(f"{stem}-{options.to}{WRITTEN[options.to][0]}")
    check_ending(out, options.to)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file.")
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} is there already: give another --out, or --overwrite.")
    check_writable(out.parent)
    return out


def target_size(options: Translate, model: OmniLatentModel) -> tuple[int, ...] | None:
    """--size as the target has it: of a video, frames alone or height and width alone leave the others as usual."""
    given = options.size
    if not given:
        return None
    usual = model.modalities[options.to].usual
    if options.to == "video" and len(given) < 3:
        given = (*given, *usual[1:]) if len(given) == 1 else (usual[0], *given)
    if len(given) != len(usual):
        raise UserError(f"--size of {options.to} has {len(usual)} number{'s' * (len(usual) > 1)}; got {len(given)}.")
    if options.to == "video" and (given[1] % 2 or given[2] % 2):
        raise UserError(f"--size {' '.join(map(str, given))}: a video's height and width are even.")
    if options.to == "audio" and given[0] < 2:
        raise UserError("--size 1: a sound has at least 2 frames.")
    return given
