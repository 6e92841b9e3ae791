"""What a model learns from: examples with some of the modalities, and their batches.

- `Examples`: the protocol. `DigitExamples`, `CaptionExamples`, `SyntheticExamples`. `open_examples`: by DATA.
- `OmniBatch`, `collate`: one step's examples as tensors by modality. `omni_batches`: the steps, made in worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.captions import Captioned, open_captioned
from ..data.digit_world import MEL, DigitWorld, holds_world, open_world
from ..data.mel import MelSpec
from ..data.structured import SYNTHETIC_LENGTH, structured_image
from ..data.workers import made_in_workers
from ..errors import UserError
from .config import MODALITIES, OmniModelConfig
from .tokenizer import Tokenizer, pad

SKIPPED = "skipped"
Example = Mapping[str, Tensor | str | list[tuple[str, str]]]


class Examples(Protocol):
    """A data set: `sample` is a pure function of the position, which may lie beyond the length."""

    name: str
    mel: MelSpec | None

    def __len__(self) -> int: ...

    def sample(self, position: int) -> Example:
        """Modality → tensor without its batch axis, or a string of text; `SKIPPED` → (file, reason) of unreadable files whose
        place it took."""


@dataclass(frozen=True)
class DigitExamples:
    """The digits world, all four modalities."""

    world: DigitWorld
    mel: MelSpec | None
    modalities: tuple[str, ...] = MODALITIES

    @property
    def name(self) -> str:
        return self.world.name

    def __len__(self) -> int:
        return len(self.world)

    def sample(self, position: int) -> Example:
        sample = self.world.sample(position)
        return {name: getattr(sample, name) for name in self.modalities}


@dataclass(frozen=True)
class CaptionExamples:
    """Pictures and their captions."""

    captioned: Captioned
    most: int
    """Letters of a caption; what is longer is cut."""
    mel: MelSpec | None = None

    @property
    def name(self) -> str:
        return self.captioned.name

    def __len__(self) -> int:
        return len(self.captioned)

    def sample(self, position: int) -> Example:
        image, caption, skipped = self.captioned.sample(position)
        return {"image": image, "text": caption[: self.most], SKIPPED: skipped}


@dataclass(frozen=True)
class SyntheticExamples:
    """Pictures with structure, each named by its picture's number, moving, and humming: nothing that is worth knowing, and
    everything that a pipeline needs. Sizes are the model's."""

    model: OmniModelConfig
    seed: int
    mel: MelSpec | None
    name: str = "synthetic"

    def __len__(self) -> int:
        return SYNTHETIC_LENGTH

    def sample(self, position: int) -> Example:
        model, index = self.model, position % len(self)
        (height, width), (tall, wide) = model.image_size, model.video_size
        picture = torch.from_numpy(structured_image(self.seed, index, max(height, width, tall, wide))).permute(2, 0, 1).float() / 255
        small = picture[:, :tall, :wide]
        video = torch.stack([small.roll(2 * frame, 2) for frame in range(model.video_frames)], 1)
        band = torch.arange(model.mel_bands)[:, None] - index % model.mel_bands
        audio = torch.exp(-(band / 3.0) ** 2).expand(-1, model.mel_frames).contiguous()
        every = {"image": picture[:, :height, :width], "video": video, "audio": audio, "text": f"picture {index}"}
        return {name: every[name] for name in model.modalities}


def open_examples(data: str, val: str | None, seed: int, model: OmniModelConfig) -> tuple[Examples, Examples]:
    """(training, held out) examples by DATA, of the modalities that a model knows: 'digits' or a folder with MNIST's files;
    'synthetic'; pictures with captions (data/captions.py).

    Raises:
        UserError: DATA is of no kind that an omni recipe learns from.
    """
    if data == "synthetic":
        return SyntheticExamples(model, seed, None), SyntheticExamples(model, seed + 1, None)
    if holds_world(data):
        training, test = open_world(data, seed)
        test = test if val is None else open_world(val, seed)[1]
        return DigitExamples(training, MEL, model.modalities), DigitExamples(test, MEL, model.modalities)
    if model.image_size[0] != model.image_size[1]:
        raise UserError(f"pictures with captions are learned as squares; the recipe's image size is {model.image_size}.")
    captioned = open_captioned(data, val, model.image_size[0], seed)
    first, second = (CaptionExamples(part, model.text_tokens) for part in captioned)
    return first, second


@dataclass(frozen=True)
class OmniBatch:
    """One step's examples on one rank: modality → tensor; `positions` `(b,)` in the whole run; (file, reason) of what was
    passed over."""

    data: dict[str, Tensor]
    positions: Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int) -> OmniBatch:
        return OmniBatch({name: t[start:stop] for name, t in self.data.items()}, self.positions[start:stop])

    def to(self, device: torch.device) -> OmniBatch:
        return replace(self, data={name: t.to(device, non_blocking=True) for name, t in self.data.items()})

    def pin_memory(self) -> OmniBatch:
        return replace(self, data={name: t.pin_memory() for name, t in self.data.items()})


def collate(examples: Sequence[Example], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Examples with the same modalities → modality → batch; text padded with 0.

    Raises:
        UserError: the examples do not all have the same modalities, or sizes.
    """
    names = set(examples[0])
    for example in examples:
        if set(example) != names:
            raise UserError(f"the examples of a batch have the same modalities; got {sorted(names)} and {sorted(example)}.")
    return {name: pad([tokenizer.encode(str(e[name])) for e in examples]) if name == "text"
            else torch.stack([torch.as_tensor(e[name]) for e in examples]) for name in examples[0] if name != SKIPPED}


def omni_batches(
    examples: Examples, tokenizer: Tokenizer, batch_size: int, start: int, stop: int, rank: int = 0, world: int = 1,
    workers: int = 0,
) -> Iterator[OmniBatch]:
    """Batches of the steps [start, stop): step s has the positions s·G … s·G + G − 1 with G = batch_size · world."""
    for batch in made_in_workers(_Steps(examples, tokenizer, batch_size, rank, world), range(start, stop), workers):
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Steps(Dataset[OmniBatch | UserError]):
    def __init__(self, examples: Examples, tokenizer: Tokenizer, batch_size: int, rank: int, world: int) -> None:
        self.examples, self.tokenizer, self.batch_size, self.rank, self.world = examples, tokenizer, batch_size, rank, world

    def __getitem__(self, step: int) -> OmniBatch | UserError:
        first = (step * self.world + self.rank) * self.batch_size
        positions = range(first, first + self.batch_size)
        try:
            examples = [self.examples.sample(position) for position in positions]
            data = collate(examples, self.tokenizer)
        except UserError as mistake:
            return mistake
        return OmniBatch(data, torch.tensor(positions), [passed for e in examples for passed in e.get(SKIPPED, [])])
