"""What the figures rest on, in words: data, sizes, seed, device, versions, and each codec's weights.

- `conditions_section`: the markup for evaluations that share their conditions, or differ and say so.
- `summary`: one sentence for the top of the page.
- `PREPARATION`: how images are read and cropped; how they are compared stands in the evaluations themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..metrics.results import Evaluation
from .markup import scrolling_table

PREPARATION = (
    "Images are decoded with Pillow, turned as their EXIF orientation says and converted to RGB; at a square size "
    "the short side is resized with antialiasing and the centre is cropped, at their own sizes nothing is resized. "
    "Bits per pixel count the latent as stored: 16 bits a number, or the bits of a code. Where a network's weights "
    "were not there, the cell says so: nothing stands in under a metric's name."
)
_SHOWN_ABOVE = ("data", "n", "size", "seed", "dtype", "device", "versions", "protocol", "weights_hash")


def summary(evaluations: Sequence[Evaluation]) -> str:
    """`4 codecs on 100 images of val.tar at 256×256, float32 on cpu.` from what all evaluations share."""
    shared = _shared(evaluations)
    count = f"{len(evaluations)} codecs" if len(evaluations) > 1 else evaluations[0].label
    n = shared.get("n")
    images = f"{n} image{'' if n == 1 else 's'}" if n is not None else "images"
    parts = [f"{count} on {images}"]
    if shared.get("data") is not None:
        parts.append(f"of {shared['data']}")
    parts.append(_size(shared.get("size", "")))
    machine = " on ".join(str(shared[key]) for key in ("dtype", "device") if shared.get(key))
    return " ".join(part for part in parts if part) + (f", {machine}." if machine else ".")


def conditions_section(evaluations: Sequence[Evaluation], command: str, time: str) -> str:
    """The markup: a list of shared conditions, a table of codecs with their weights' hashes, the protocol."""
    shared = _shared(evaluations)
    lines = [("Command", f"<code>{escape(command)}</code>"), ("Written", escape(time))]
    names = {"data": "Data", "n": "Images", "size": "Size", "seed": "Seed", "dtype": "Precision", "device": "Device"}
    lines += [(name, escape(_size(shared[key]).removeprefix("at ") if key == "size" else str(shared[key])))
              for key, name in names.items() if key in shared]
    versions = shared.get("versions")
    if isinstance(versions, Mapping):
        lines.append(("Versions", escape(", ".join(f"{name} {version}" for name, version in versions.items()))))
    lines += [(key.replace("_", " ").capitalize(), escape(_text(value))) for key, value in shared.items()
              if key not in _SHOWN_ABOVE]
    table = "".join(f'<tr><th scope="row">{name}</th><td class="left wrap">{value}</td></tr>' for name, value in lines)
    protocols = dict.fromkeys(str(e.conditions["protocol"]) for e in evaluations if e.conditions.get("protocol"))
    text = " ".join([*protocols, PREPARATION])
    return (scrolling_table("Conditions", "", table) + _codecs(evaluations, shared)
            + f'<h3 class="apart">Protocol</h3><p>{escape(text)}</p>')


def _codecs(evaluations: Sequence[Evaluation], shared: Mapping[str, Any]) -> str:
    keys = list(dict.fromkeys(key for e in evaluations for key in e.codec))
    own = list(dict.fromkeys(key for e in evaluations for key in e.conditions
                             if key not in shared and key != "protocol" and key not in keys))
    heads = "".join(f'<th scope="col" class="left">{escape(key.replace("_", " "))}</th>'
                    for key in ["codec", *keys, *own])
    lines = "".join(
        f'<tr><th scope="row"><span class="name">{escape(e.label)}</span></th>'
        + "".join(f'<td class="left">{escape(_text(e.codec.get(key, "")))}</td>' for key in keys)
        + "".join(f'<td class="left">{escape(_text(e.conditions.get(key, "")))}</td>' for key in own) + "</tr>"
        for e in evaluations)
    return '<h3 class="apart">Codecs and their weights</h3>' + scrolling_table("Codecs", heads, lines)


def _shared(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The conditions that are equal for all evaluations."""
    first = evaluations[0].conditions
    return {key: value for key, value in first.items()
            if all(key in e.conditions and e.conditions[key] == value for e in evaluations)}


def _size(size: Any) -> str:
    if isinstance(size, int):
        return f"at {size}×{size}"
    return "at their own sizes" if size is None or size == "native" else f"at {size}" if size else ""


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
