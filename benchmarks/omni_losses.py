"""The terms of every modality's loss when training begins: none may drown another.

    python benchmarks/omni_losses.py [--data digits] [--codec kl-f8-small]

An untrained model of the recipe `omni` on 16 held-out examples, each modality turned into itself; the largest over the smallest
term is printed last, and more than 3 is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import tyro

from omnilatent.omni.config import PairConfig
from omnilatent.omni.examples import collate, open_examples
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.pairs import Job
from omnilatent.omni.recipes import omni
from omnilatent.omni.tokenizer import ByteTokenizer


@dataclass(frozen=True)
class OmniLosses:
    """Print the terms of an untrained model."""

    data: str = "digits"
    """'digits', or a folder with mnist/ and fsdd/."""
    codec: str = ""
    """NAME of a codec whose latents are the tokens of pictures and videos."""


def first_terms(data: str, codec: str = "") -> dict[str, float]:
    """`modality term` → its value before the first step."""
    torch.manual_seed(0)
    model = OmniLatentModel(replace(omni().model, image_codec=codec, video_codec=codec))
    held_out = open_examples(data, None, 0, omni().model)[1]
    batch = collate([held_out.sample(i) for i in range(16)], ByteTokenizer())
    learning = OmniLearning(model, PairConfig())
    found = {}
    with torch.no_grad():
        for name in model.modalities:
            for flowing in (False, True) if name != "text" else (False,):
                source = model.read({name: batch[name]})
                job = Job((name,), name, flowing)
                terms = learning.terms(source, job, learning.needs(job, batch, torch.Generator().manual_seed(0)))
                found |= {f"{name} {term}": value.item() for term, value in terms.items()}
    return found


def main(options: OmniLosses) -> None:
    found = first_terms(options.data, options.codec)
    print("| term | at the first step |\n| --- | ---: |")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} |")
    spread = max(found.values()) / min(found.values())
    print(f"\nlargest over smallest: {spread:.1f}")
    if spread > 3:
        raise SystemExit(f"the largest term is {spread:.1f} times the smallest; at most 3 is allowed")


if __name__ == "__main__":
    main(tyro.cli(OmniLosses))
