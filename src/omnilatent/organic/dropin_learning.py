"""How drop-ins learn: from a teacher's latents of photos, and from its decoder's answers to small changes.

- `EncoderConfig`, `learn_encoder`: pictures → the teacher's latents.
- `DecoderConfig`, `learn_decoder`: the teacher's latents → the photos themselves.
- `learn_encoder_from`, `learn_decoder_from`: the same with the teacher's latents at hand.
- `decoder_responses`: how much each latent direction moves the decoded picture.

Not every channel counts alike: TAEF2's decoder answers to two of its 32 channels with thirty times the squared change
of most others. So an encoder's neurons are chosen for the errors that the decoder shows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import Codec
from ..data import ImageSource
from ..errors import UserError
from .dropin import DropinDecoder, DropinEncoder
from .fovea import Fovea, fit_fovea
from .grid_learning import GridConfig, Lesson, learn_stack
from .retina import principal_axes
from .teaching import Lessons, Progress, quiet, teach

_NUDGE = 0.3  # of a latent channel, standard deviation


@dataclass(frozen=True)
class EncoderConfig:
    """A drop-in encoder: its retina, its layers, and the views of each photo that the teacher encodes."""

    fovea: Fovea = field(default_factory=Fovea)
    grid: GridConfig = field(default_factory=GridConfig)
    size: int = 256
    crops: int = 1


@dataclass(frozen=True)
class DecoderConfig:
    """A drop-in decoder: its layers, and the views of each photo that the teacher encodes."""

    grid: GridConfig = field(default_factory=lambda: GridConfig(reach=3, neurons=384))
    size: int = 256
    crops: int = 1


def debug_encoder() -> EncoderConfig:
    """Two layers of a few neurons on 64² pictures, in seconds on one core; for tests."""
    fovea = Fovea(scales=(1, 4), sides=(8, 8), components=(16, 8), thumbnail=2)
    return EncoderConfig(fovea, GridConfig(layers=2, neurons=16, candidates=48, sites=3000, judged=1500), size=64)


def debug_decoder() -> DecoderConfig:
    """Two layers of a few neurons on 64² pictures, in seconds on one core; for tests."""
    grid = GridConfig(layers=2, neurons=16, candidates=48, sites=3000, judged=1500, reach=3, context=8)
    return DecoderConfig(grid, size=64)


@dataclass(frozen=True)
class DropinReport:
    """`losses` are held-out mean squared errors, in latent units squared for an encoder and in pixel values squared
    for a decoder: of the mean (the null), then after each layer that was kept."""

    losses: tuple[float, ...]
    pictures: int
    seconds: float

    @property
    def r2(self) -> float:
        """Held-out share of the variance that is explained."""
        return 1 - self.losses[-1] / self.losses[0]


def learn_encoder(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: EncoderConfig = EncoderConfig(),
    progress: Progress = quiet, seed: int = 0,
) -> tuple[DropinEncoder, DropinReport]:
    """Clone a teacher's encoder.

    Args:
        photos: to learn from.
        held_out: other photos, which choose ridges and the number of layers.
        progress: is called with a line of text now and then.

    Raises:
        UserError: no photo can be read, or the teacher's downsampling is not the fovea's cell.
    """
    lessons = teach(teacher, photos, config.size, config.crops, progress, seed)
    exam = teach(teacher, held_out, config.size, 1, progress, seed)
    return learn_encoder_from(teacher, lessons, exam, config, progress, seed)


@torch.no_grad()
def learn_encoder_from(
    teacher: Codec, lessons: Lessons, exam: Lessons, config: EncoderConfig = EncoderConfig(),
    progress: Progress = quiet, seed: int = 0,
) -> tuple[DropinEncoder, DropinReport]:
    """`learn_encoder` with the teacher's latents at hand; its decoder is still asked, where it has one."""
    begin, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    if teacher.spec.downsampling != config.fovea.cell:
        raise UserError(f"Dimension mismatch: {teacher.label} has one latent pixel for {teacher.spec.downsampling}² "
                        f"pixels, and the retina {config.fovea.identity()} one for {config.fovea.cell}².")
    responses = decoder_responses(teacher, lessons, generator) if teacher.spec.decodes else None
    code = fit_fovea(lessons.pictures, config.fovea, generator)

    def lesson(part: Lessons) -> Lesson:
        return Lesson(len(part), lambda s: code(part.pictures[s].float() / 255), lambda s: part.latents[s].float())

    stack, losses = learn_stack(lesson(lessons), lesson(exam), config.grid, generator, responses, progress)
    return DropinEncoder(code, stack), DropinReport(tuple(losses), len(lessons), time.perf_counter() - begin)


def learn_decoder(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: DecoderConfig = DecoderConfig(),
    progress: Progress = quiet, seed: int = 0,
) -> tuple[DropinDecoder, DropinReport]:
    """Learn to decode a teacher's latents into the photos that they came from. Arguments as for `learn_encoder`.

    Raises:
        UserError: no photo can be read.
    """
    lessons = teach(teacher, photos, config.size, config.crops, progress, seed)
    exam = teach(teacher, held_out, config.size, 1, progress, seed)
    return learn_decoder_from(teacher, lessons, exam, config, progress, seed)


@torch.no_grad()
def learn_decoder_from(
    teacher: Codec, lessons: Lessons, exam: Lessons, config: DecoderConfig = DecoderConfig(),
    progress: Progress = quiet, seed: int = 0,
) -> tuple[DropinDecoder, DropinReport]:
    """`learn_decoder` with the teacher's latents at hand."""
    begin, generator, cell = time.perf_counter(), torch.Generator().manual_seed(seed), teacher.spec.downsampling
    some = torch.randperm(len(lessons), generator=generator)[:64]
    cells = torch.cat([_cells(part.float() / 255, cell).movedim(1, 3).flatten(0, 2)
                       for part in lessons.pictures[some].split(16)])
    axes = principal_axes(cells, floor=0.0)
    basis, centre = (axes.axes * axes.spread[:, None]).float(), axes.mean.float()
    # Coordinates are inner products with the axes of the standardised pixels, so errors in them are nearly errors in
    # pixels: the spreads of a cell's pixels are all about alike.
    inward = (axes.axes / axes.spread[:, None]).float()
    scale = float(axes.spread.mean())
    basis, inward = basis / scale, inward * scale

    def lesson(part: Lessons) -> Lesson:
        def goal(s: slice) -> Tensor:
            pixels = _cells(part.pictures[s].float() / 255, cell) - centre[:, None, None]
            return torch.einsum("bphw,pk->bkhw", pixels, inward)

        return Lesson(len(part), lambda s: part.latents[s].float(), goal)

    stack, losses = learn_stack(lesson(lessons), lesson(exam), config.grid, generator, None, progress)
    decoder = DropinDecoder(stack, basis, centre, cell, teacher.spec.channels)
    return decoder, DropinReport(tuple(losses), len(lessons), time.perf_counter() - begin)


def _cells(pictures: Tensor, cell: int) -> Tensor:
    """`(b, 3, h, w)` → `(b, 3·cell², h/cell, w/cell)`."""
    return F.pixel_unshuffle(pictures, cell)


@torch.no_grad()
def decoder_responses(teacher: Codec, lessons: Lessons, generator: torch.Generator, pictures: int = 4) -> Tensor:
    """`(c, 4c)`: its rows' inner products are about those of the changes that the channels make in a decoded picture.

    Forward evaluations only: c + 1 decodings of a few crops of 12×12 latent pixels, noise on one channel at a time;
    then a random projection (Johnson & Lindenstrauss 1984).
    """
    side = min(12, *lessons.latents.shape[-2:])
    step = max(1, len(lessons) // pictures)
    z = lessons.latents[: step * pictures : step, :, :side, :side].float()
    noise = torch.randn(len(z), side, side, generator=generator) * _NUDGE
    still, rows = teacher.decode(z), []
    for channel in range(z.shape[1]):
        moved = z.clone()
        moved[:, channel] += noise
        rows.append((teacher.decode(moved) - still).cpu().flatten())
    changes = torch.stack(rows)
    changes /= changes.square().sum(1).mean().sqrt().clamp(min=1e-12)
    count = 4 * len(changes)
    return changes @ torch.randn(changes.shape[1], count, generator=generator) / count**0.5
