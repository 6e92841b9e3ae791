"""`omnilatent bench NAME` of an any-to-any model: what it is made of and what its parts do, as tables and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from ..errors import UserError
from ..hub import RECIPES
from .evaluate_omni import table
from .folders import check_file
from .names import is_any_to_any
from .parse import parse


@dataclass(frozen=True)
class BenchOmni:
    """Parameter budget, time of the parts, effective ranks, layers, scaling, sizes, alignment, losses and hooks of an any-to-any
    model."""

    name: Annotated[str, tyro.conf.Positional, arg(metavar="NAME")]
    """a run of an omni recipe; or such a recipe, whose model gets random weights"""
    data: str = "digits"
    """held-out examples: 'digits', 'synthetic' (of the model's own sizes), a folder"""
    batch_size: int = 16
    """examples"""
    calls: int = 5
    """timed calls, of which the fastest counts"""
    hidden_dim: int | None = None
    """of a recipe: another width"""
    num_layers: int | None = None
    """of a recipe: other layers"""
    num_heads: int | None = None
    """of a recipe: other heads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run"""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the figures to this file too"""


def is_omni(name: str) -> bool:
    """Whether `bench` is asked for an any-to-any model."""
    return RECIPES.get(name, "").startswith("omnilatent.omni.") or is_any_to_any(name)


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(BenchOmni, "bench", argv)
    if options.batch_size < 2 or options.calls < 1:
        raise UserError(f"--batch-size {options.batch_size} and --calls {options.calls}: take at least 2 examples and 1 call.")
    changes = {name: value for name in ("hidden_dim", "num_layers", "num_heads") if (value := getattr(options, name)) is not None}
    if options.json is not None:
        check_file(options.json, "--json")
    import torch

    from ..devices import choose_device
    from ..omni.diagnostics import ABOUT, diagnose
    from ..omni.examples import collate, open_examples
    from ..omni.model import OmniLatentModel
    from ..omni.saving import load
    from ..omni.tokenizer import ByteTokenizer
    from ..report.record import replace_file

    device = choose_device(options.device)
    if is_any_to_any(options.name):
        if changes:
            raise UserError(f"{options.name} is a model with a width of its own: leave --{next(iter(changes)).replace('_', '-')} out.")
        model = load(options.name, device)
        tokenizer = model.tokenizer
    else:
        module, function = RECIPES[options.name].split(":")
        torch.manual_seed(0)
        try:
            config = replace(getattr(import_module(module), function)().model, **changes)
        except ValueError as failure:  # a sentence of the configuration's own
            raise UserError(f"{failure}.") from failure
        model, tokenizer = OmniLatentModel(config).eval().to(device), ByteTokenizer()
    held_out = open_examples(options.data, None, 0, model.config)[1]
    if options.batch_size > len(held_out):
        raise UserError(f"--batch-size {options.batch_size}: {held_out.name} has {len(held_out)} examples; take no more.")
    batch = collate([held_out.sample(i) for i in range(options.batch_size)], tokenizer)
    data = {name: t.to(device) for name, t in batch.items() if name in model.modalities}
    record: dict[str, Any] = {"name": options.name, "data": held_out.name, "batch_size": options.batch_size,
                              "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    size = f"{model.config.num_layers} layers of {model.config.hidden_dim}"
    print(f"{options.name}, {size}{'' if is_any_to_any(options.name) else ', random weights'}; {options.batch_size} examples of "
          f"{held_out.name}; {record['device']}, torch {torch.__version__}")
    for title, figures in diagnose(model, data, options.calls).items():
        record[title] = figures
        print(f"\n{title}: {ABOUT[title]}\n{table(figures)}")
    if options.json is not None:
        print(f"\n{replace_file(options.json, json.dumps(record, indent=1, ensure_ascii=False) + chr(10))}")
