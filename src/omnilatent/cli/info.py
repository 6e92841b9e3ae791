"""`omnilatent info` lists what there is; `omnilatent info NAME` describes one codec, or one any-to-any model.

- `InfoOptions`, `main`: the command.
- `overview`: recipes, bundled models and codecs without weights; imports no torch.
- `description`: one codec's latent, size, licence, weights and card. `any_to_any`: a model's modalities and the like.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import tyro

from .. import hub
from .names import is_any_to_any
from .parse import parse

if TYPE_CHECKING:
    from ..codec import Codec
    from ..latent import LatentSpec


@dataclass(frozen=True)
class InfoOptions:
    """What there is: recipes and codecs; or one model's latent space or modalities, size, licence and metrics."""

    name: tyro.conf.Positional[str | None] = None
    """A path, a bundled model or a hub id; without it, everything there is."""


def main(argv: list[str]) -> None:
    options = parse(InfoOptions, "info", argv)
    if options.name is None:
        print(overview())
    elif is_any_to_any(options.name):
        print(any_to_any(options.name))
    else:
        print(description(hub.load(options.name)))


def overview() -> str:
    """All names that the commands know."""
    recipes = [_recipe(name) for name in hub.RECIPES]
    bundled = [f"  {name}\n      {_bundled(name)}" for name in hub.bundled_names()]
    weightless = [f"  {name}" for name in hub.WEIGHTLESS]
    return "\n".join([
        "Recipes: omnilatent train RECIPE --data DATA", *recipes, "",
        "Bundled models, which every command takes by name:", *(bundled or ["  none in this installation"]), "",
        "Codecs without weights:", *weightless, "",
        "Everything else by its path (a run, a diffusers folder, a .safetensors file) or its hub id owner/model;",
        "'omnilatent info NAME' describes one.",
    ])


def _recipe(name: str) -> str:
    """A recipe's name, the first line of its docstring and what it expects to reach."""
    module, function = hub.RECIPES[name].split(":")
    paragraphs = (inspect.getdoc(getattr(import_module(module), function)) or "not described").split("\n\n")
    lines = [paragraphs[0], *(line for p in paragraphs[1:] for line in p.splitlines() if line.startswith("Expected"))]
    return "\n".join([f"  {name}", *(f"      {' '.join(line.split())}" for line in lines)])


def _bundled(name: str) -> str:
    config = hub.read_config(hub.BUNDLED / name)
    size = sum(file.stat().st_size for file in (hub.BUNDLED / name).glob("*.safetensors"))
    licence, spec = hub.card_licence(hub.BUNDLED / name), config["spec"]
    what = f"f{spec['downsampling']}, {spec['channels']} channels" if spec is not None else hub.OTHERS[config["kind"]].split(",")[0]
    return f"{what}, {size / 1e6:.1f} MB, licence {licence}"


def any_to_any(name: str) -> str:
    """Everything about an any-to-any model, one fact a line, then its card."""
    from ..omni.description import facts

    label, target = hub.split_label(name)
    about, card = facts(target)
    return table({"name": label or target, **about}, card)


def description(codec: Codec) -> str:
    """Everything about a loaded codec, one fact a line, then its card."""
    spec, origin = codec.spec, codec.provenance
    facts = {
        "name": codec.label,
        "kind": f"{origin.kind} ({type(codec.module).__name__})",
        "latent": f"{spec.kind}, {spec.channels} channels, f{spec.downsampling}",
        "images": f"{spec.image_channels} channels in [0, 1], any size; 256x256 gives {spec.channels}x"
                  + "x".join(map(str, spec.grid((256, 256)))),
        "bits per pixel": f"{spec.bits_per_pixel():g} ("
                          + ("latent in 16 bits)" if spec.codebook_size is None else f"{_books(spec)}{spec.codebook_size} codes)"),
        "normalisation": f"(z - {_numbers(spec.shift)}) * {_numbers(spec.scale)}",
        "parameters": f"{codec.parameter_count():,}",
        "weights": f"sha256 {origin.weights_hash}" if origin.weights_hash != "none" else "none",
        "licence": origin.licence,
        "path": origin.path or "-",
    }
    return table(facts, origin.card)


def table(facts: dict[str, str], readme: str) -> str:
    """One fact a line, then the card."""
    width = max(map(len, facts)) + 2
    text = "\n".join(f"{name + ':':<{width}}{value}" for name, value in facts.items())
    card = card_body(readme)
    return f"{text}\n\n{card}" if card else text


def _books(spec: LatentSpec) -> str:
    return f"{spec.num_codebooks} codebooks of " if spec.num_codebooks > 1 else ""


def card_body(card: str) -> str:
    """A README.md without its front matter."""
    parts = card.split("---\n", 2)
    return (parts[2] if len(parts) == 3 and not parts[0].strip() else card).strip()


def _numbers(values: tuple[float, ...]) -> str:
    """One number as it is, several by the first and their count."""
    return f"{values[0]:g}" if len(values) == 1 else f"[{values[0]:.4g}, … {len(values)} values, one a channel]"
