"""What a model learns from: examples with some of the modalities, and their batches.

- `Examples`: the protocol. `DigitExamples`, `CaptionExamples`, `SyntheticExamples`. `open_examples`: by DATA.
- `OmniBatch`, `collate`, `collate_multimodal`: one step's examples as tensors by modality.
- `omni_batches`: the steps, made in worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.captions import Captioned, open_captioned
from ..data.digit_world import MEL, SIDE, DigitWorld, holds_world, open_world, refuse_recordings_alone
from ..data.mel import MelSpec
from ..data.structured import SYNTHETIC_LENGTH, structured_image
from ..data.workers import made_in_workers
from ..errors import UserError
from .config import MODALITIES, OmniModelConfig
from .pairs import Job, Plan
from .text import PAD
from .tokenizer import Tokenizer

SKIPPED = "skipped"
Example = Mapping[str, Tensor | str | list[tuple[str, str]]]


class Examples(Protocol):
    """A data set: `sample` is a pure function of the position, which may lie beyond the length."""

    name: str
    mel: MelSpec | None

    def __len__(self) -> int: ...

    def sample(self, position: int, names: Iterable[str] | None = None) -> Example:
        """Modality → tensor without its batch axis, or a string of text; `SKIPPED` → (file, reason) of unreadable files whose
        place it took.

        Args:
            names: the modalities that are wanted; by default all. Others may be left out.
        """

    def samples(self, positions: Iterable[int], names: Sequence[str]) -> list[Example]:
        """Several at once, which may be made faster."""
        return [self.sample(position, names) for position in positions]


@dataclass(frozen=True)
class DigitExamples(Examples):
    """The digits world, all four modalities."""

    world: DigitWorld
    mel: MelSpec | None
    modalities: tuple[str, ...] = MODALITIES

    @property
    def name(self) -> str:
        return self.world.name

    def __len__(self) -> int:
        return len(self.world)

    def sample(self, position: int, names: Iterable[str] | None = None) -> Example:
        sample = self.world.sample(position)
        return {name: getattr(sample, name) for name in names or self.modalities}

    def samples(self, positions: Iterable[int], names: Sequence[str]) -> list[Example]:
        """With one transform for all their sounds."""
        drawn = [self.world.sample(position) for position in positions]
        made = [{name: getattr(sample, name) for name in names if name != "audio"} for sample in drawn]
        if "audio" in names:
            heard = MEL.to_mel(torch.stack([sample.wave for sample in drawn]))
            made = [{**example, "audio": mel} for example, mel in zip(made, heard, strict=True)]
        return made


@dataclass(frozen=True)
class CaptionExamples(Examples):
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

    def sample(self, position: int, names: Iterable[str] | None = None) -> Example:
        image, caption, skipped = self.captioned.sample(position)
        return {"image": image, "text": caption[: self.most], SKIPPED: skipped}


@dataclass(frozen=True)
class SyntheticExamples(Examples):
    """Pictures with structure, each named by its picture's number, moving, and humming: nothing that is worth knowing, and
    everything that a pipeline needs. Sizes are the model's."""

    model: OmniModelConfig
    seed: int
    mel: MelSpec | None
    name: str = "synthetic"

    def __len__(self) -> int:
        return SYNTHETIC_LENGTH

    def sample(self, position: int, names: Iterable[str] | None = None) -> Example:
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
        for name, size in (("image", model.image_size), ("video", model.video_size)):
            if name in model.modalities and size != (SIDE, SIDE):
                raise UserError(f"{data}: the digits world's {name}s are {SIDE}×{SIDE}, and the model's are {size[1]}×{size[0]}: give "
                                f"other --data, or a model of these (trained with --{name}-size {SIDE} {SIDE}).")
        if "audio" in model.modalities and model.mel_bands != MEL.bands:
            raise UserError(f"{data}: the digits world's sounds have {MEL.bands} mel bands, and the model's {model.mel_bands}: give "
                            f"other --data, or a model of these (trained with --mel-bands {MEL.bands}).")
        training, test = open_world(data, seed)
        test = test if val is None else open_world(val, seed)[1]
        return DigitExamples(training, MEL, model.modalities), DigitExamples(test, MEL, model.modalities)
    refuse_recordings_alone(data)
    if model.image_size[0] != model.image_size[1]:
        raise UserError(f"pictures with captions are learned as squares; the recipe's image size is {model.image_size}.")
    captioned = open_captioned(data, val, model.image_size[0], seed)
    first, second = (CaptionExamples(part, model.text_tokens) for part in captioned)
    return first, second


@dataclass(frozen=True)
class OmniBatch:
    """One step's examples on one rank: each job with the modalities that it needs, of equally many examples; (file, reason) of
    what was passed over."""

    parts: list[tuple[Job, dict[str, Tensor]]]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def map(self, change: Callable[[Tensor], Tensor]) -> OmniBatch:
        """With every tensor changed, by what keeps the channels and what lies behind them."""
        return replace(self, parts=[(job, {name: _once(change, t) for name, t in data.items()}) for job, data in self.parts])

    def pin_memory(self) -> OmniBatch:
        """In page-locked memory, from which copies to a GPU run beside the computation."""
        return self.map(Tensor.pin_memory)

    def halved(self) -> OmniBatch | None:
        """With half of each job's examples; None where one is left."""
        count = len(next(iter(self.parts[0][1].values())))
        return self.map(lambda t: t[: count // 2]) if count > 1 else None


def collate_multimodal(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples → modality → batch; texts, `(n,)` int64, are padded with 0 to the longest.

    Raises:
        UserError: the examples have not all the same modalities, or shapes.
    """
    return _collated(examples, torch.stack)


def _collated(examples: Sequence[Mapping[str, Tensor]], stack: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for example in examples:
        if set(example) != set(examples[0]):
            raise UserError(f"the examples of a batch have the same modalities; got {', '.join(examples[0]) or 'none'} and "
                            f"{', '.join(example) or 'none'}.")
    for name in examples[0]:
        parts = [example[name] for example in examples]
        if name == "text":
            longest = max(1, *map(len, parts))
            parts = [torch.nn.functional.pad(ids, (0, longest - len(ids)), value=PAD) for ids in parts]
        shapes = list(dict.fromkeys(tuple(part.shape) for part in parts))
        if len(shapes) > 1:
            raise UserError(f"{name} of a batch has one shape; got {shapes[0]} and {shapes[1]}: crop or pad the examples, or give "
                            "batches of one size.")
        batch[name] = stack(parts)
    return batch


def _stacked_once(parts: list[Tensor]) -> Tensor:
    """As torch.stack, for reading only: channels that are all views of one, as a grey picture's are, stay so, and are sent once."""
    first = parts[0]
    if first.ndim > 1 and first.shape[0] > 1 and all(part.stride(0) == 0 for part in parts):
        return torch.stack([part[:1] for part in parts]).expand(-1, *first.shape)
    return torch.stack(parts)


def _once(change: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A batch changed; channels that are all views of one are changed once, and are such views again."""
    if batch.ndim > 2 and batch.shape[1] > 1 and batch.stride(1) == 0:
        changed = change(batch[:, :1])
        return changed.expand(len(changed), *batch.shape[1:])
    return change(batch)


def collate(
    examples: Sequence[Example], tokenizer: Tokenizer, stack: Callable[[list[Tensor]], Tensor] = torch.stack
) -> dict[str, Tensor]:
    """`collate_multimodal` of examples whose texts are strings, which a tokenizer makes ids of."""
    def tensors(example: Example) -> dict[str, Tensor]:
        return {name: torch.tensor(tokenizer.encode(str(data)), dtype=torch.int64) if name == "text" else torch.as_tensor(data)
                for name, data in example.items() if name != SKIPPED}

    return _collated([tensors(example) for example in examples], stack)


def omni_batches(
    examples: Examples, tokenizer: Tokenizer, plan: Plan, batch_size: int, start: int, stop: int, rank: int = 0, world: int = 1,
    workers: int = 0, pin: bool = False,
) -> Iterator[OmniBatch]:
    """Batches of the steps [start, stop): step s has the positions s·G … s·G + G − 1 with G = batch_size · world; `pin`: in
    page-locked memory."""
    for batch in made_in_workers(_Steps(examples, tokenizer, plan, batch_size, rank, world), range(start, stop), workers, pin):
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Steps(Dataset[OmniBatch | UserError]):
    def __init__(self, examples: Examples, tokenizer: Tokenizer, plan: Plan, batch_size: int, rank: int, world: int) -> None:
        self.examples, self.tokenizer, self.plan = examples, tokenizer, plan
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __getitem__(self, step: int) -> OmniBatch | UserError:
        first = (step * self.world + self.rank) * self.batch_size
        jobs = self.plan.jobs(step, self.batch_size)
        size, parts, skipped = self.batch_size // len(jobs), [], []
        try:
            for number, job in enumerate(jobs):
                start = first + number * size
                made = self.examples.samples(range(start, start + size), job.names)
                skipped += [passed for example in made for passed in example.get(SKIPPED, [])]
                data = collate(made, self.tokenizer, _stacked_once)
                parts.append((job, {name: in_steps(data[name]) if name == "text" else data[name] for name in job.names}))
        except UserError as mistake:
            return mistake
        return OmniBatch(parts, skipped)


def in_steps(ids: Tensor, step: int = 8) -> Tensor:
    """Texts padded to a multiple of a few tokens, so that batches come in few shapes and their steps are recorded."""
    return torch.nn.functional.pad(ids, (0, -ids.shape[1] % step))
