"""The terms of every modality's loss when training begins: none may drown another.

    python benchmarks/omni_losses.py [--data digits] [--codec kl-f8-small]
    python benchmarks/omni_losses.py --photos ../shared/data/coco-captions-mini/all.tar       of omni-coco, 768 × 12 at 224²

An untrained model on 16 held-out examples, each modality turned into itself; the largest over the smallest term is printed last. Of
the recipe `omni`, by whose terms the constants were chosen, more than 3 is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import tyro

from omnilatent.omni.config import OmniModelConfig, PairConfig
from omnilatent.omni.examples import collate, open_examples
from omnilatent.omni.learning import OmniLearning
from omnilatent.omni.model import OmniLatentModel
from omnilatent.omni.pairs import Job
from omnilatent.omni.recipes import omni, omni_coco
from omnilatent.omni.tokenizer import ByteTokenizer


@dataclass(frozen=True)
class OmniLosses:
    """Print the terms of an untrained model."""

    data: str = "digits"
    """'digits', or a folder with mnist/ and fsdd/."""
    codec: str = ""
    """NAME of a codec whose latents are the tokens of pictures and videos."""
    photos: str = ""
    """Photos and captions, for the recipe omni-coco in place of omni."""


def first_terms(data: str, codec: str = "", config: OmniModelConfig = omni().model) -> dict[str, float]:
    """`modality term` → its value before the first step."""
    torch.manual_seed(0)
    codecs = {f"{name}_codec": codec for name in ("image", "video") if name in config.modalities}
    model = OmniLatentModel(replace(config, gradient_checkpointing=False, **codecs))
    held_out = open_examples(data, None, 0, config)[1]
    batch = collate([held_out.sample(i % len(held_out)) for i in range(16)], ByteTokenizer())
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
    found = first_terms(options.photos, options.codec, omni_coco().model) if options.photos else first_terms(options.data, options.codec)
    print("| term | at the first step |\n| --- | ---: |")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} |")
    spread = max(found.values()) / min(found.values())
    print(f"\nlargest over smallest: {spread:.1f}")
    if spread > 3 and not options.photos:
        raise SystemExit(f"the largest term is {spread:.1f} times the smallest; at most 3 is allowed")


if __name__ == "__main__":
    main(tyro.cli(OmniLosses))
