"""Does what comes out mean what went in? The digits world, every modality to every other, read by independent judges.

- `coherence`: source × target → the share that the judges read as the source's digit, with its null and its Fréchet distance.
- `Cell`: one pair's figures. `recognition`: audio → text on given recordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.digit_world import DigitWorld, Recording, heard
from ..metrics.digit_readers import Reader, read_words
from ..metrics.moments import RunningMoments
from .evaluation import psnr
from .model import OmniLatentModel
from .tokenizer import pad

BATCH = 100


@dataclass(frozen=True)
class Cell:
    """One source (or several, joined by +) and target.

    Attributes:
        accuracy: the share of what came out that the judge reads as the source's digit.
        null: the same against the digit of another example.
        ceiling: the judge's accuracy on real data of the target; 1 for text, which is compared as it is.
        frechet: between the judge's features of what came out and of as many real examples; None for text.
        psnr: of the target itself in dB, where the source is the target; else None.
    """

    accuracy: float
    null: float
    ceiling: float
    frechet: float | None
    psnr: float | None


def held_out(world: DigitWorld, count: int, device: torch.device, encode) -> tuple[dict[str, Tensor], Tensor]:  # noqa: ANN001
    """The first examples of a world: modality → batch, and their digits."""
    samples = [world.sample(i) for i in range(count)]
    data = {name: torch.stack([getattr(s, name) for s in samples]).to(device) for name in ("image", "audio", "video")}
    data["text"] = pad([encode(s.text) for s in samples]).to(device)
    return data, torch.tensor([s.label for s in samples])


@torch.no_grad()
def coherence(
    model: OmniLatentModel, world: DigitWorld, readers: Mapping[str, Reader], count: int, sources: Sequence[Sequence[str]],
    steps: int | None = None,
) -> dict[tuple[str, str], Cell]:
    """Every source of `sources` (one modality, or several that are fused) to every target, on the world's first examples.

    Args:
        readers: target → its judge, for all modalities but text.
        steps: of the flow; by default the model's own.
    """
    device = model.places.linear.weight.device
    data, labels = held_out(world, count, device, model.tokenizer.encode)
    real = {name: _moments(reader, data[name]) for name, reader in readers.items()}
    found = {}
    for names in sources:
        for target in model.modalities:
            read, made = [], []
            for start in range(0, count, BATCH):
                part = {name: data[name][start : start + BATCH] for name in names}
                if target == "text":
                    ids = model.generate(part, max_len=model.config.text_tokens)
                    read.append(read_words([model.tokenizer.decode(row.tolist()) for row in ids]))
                    continue
                generator = torch.Generator(device).manual_seed(start)
                source = model.read(part)
                size = model.patch_part(target).size_of(data[target])
                made.append(model.answer(source, target, size, generator, steps).float().clamp(0, 1))
                read.append(readers[target].read(made[-1]).cpu())
            digits = torch.cat(read)
            accuracy, null = ((digits == wanted).float().mean().item() for wanted in (labels, labels.roll(1)))
            distance, decibels, ceiling = None, None, 1.0
            if target != "text":
                whole, ceiling = torch.cat(made), readers[target].accuracy
                distance = _moments(readers[target], whole).distance(real[target])
                if tuple(names) == (target,):
                    decibels = float(psnr(whole, data[target]).mean())
            found["+".join(names), target] = Cell(accuracy, null, ceiling, distance, decibels)
    return found


def _moments(reader: Reader, data: Tensor) -> RunningMoments:
    moments = RunningMoments(128)
    for part in data.split(BATCH):
        moments.update(reader.features(part))
    return moments


@torch.no_grad()
def recognition(model: OmniLatentModel, recordings: Sequence[Recording]) -> float:
    """The share of recordings whose word is written exactly."""
    device = model.places.linear.weight.device
    mels = torch.stack([heard(recording.wave) for recording in recordings]).to(device)
    wrote = [row for part in mels.split(BATCH) for row in model.generate("audio", part, max_len=model.config.text_tokens)]
    digits = read_words([model.tokenizer.decode(row.tolist()) for row in wrote])
    return (digits == torch.tensor([recording.digit for recording in recordings])).float().mean().item()
