"""The way from a teacher and photos to a checkpoint, for each kind of latent.

- `clone`: learn what a `CloneConfig` names. `Cloned`: what is to be saved.
- `write`: into a folder that `hub.load` opens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codec import Codec
from ..data import ImageSource, TrainingImages
from ..hub import new_folder, write_model
from ..latent import LatentSpec
from . import dropin, native_learning, pooled, pooled_learning
from .clone_config import CloneConfig
from .dropin_learning import DecoderConfig, EncoderConfig, learn_decoder_from, learn_encoder_from
from .grid_learning import GridConfig
from .native import NativeConfig
from .teaching import Progress, quiet, teach


@dataclass(frozen=True)
class Cloned:
    """A model as `hub.write_model` takes it, and a sentence of what it reached on held-out photos."""

    kind: str
    model: dict[str, Any]
    spec: LatentSpec
    tensors: dict[str, Tensor]
    reached: str


def clone(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: CloneConfig, progress: Progress = quiet,
) -> Cloned:
    """Learn without gradients.

    Args:
        photos: to learn from; of a long video a subset, since they are held in memory as 8-bit pixels.
        held_out: other photos; they choose ridges and rounds, and say when to stop.

    Raises:
        UserError: the data or the teacher do not fit the configuration.
    """
    ways = {"pooled": _pooled, "grid": _grid, "native": _native}
    return ways[config.latent](teacher, photos, held_out, config, progress)


def write(folder: Path, cloned: Cloned, config: CloneConfig, card: str) -> None:
    """A checkpoint folder, whole or not there at all; weights in fp16."""
    half = {name: tensor.half().contiguous() for name, tensor in cloned.tensors.items()}
    with new_folder(folder) as new:
        write_model(new, cloned.kind, cloned.model, cloned.spec, half, card, training=asdict(config))


def _pooled(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: CloneConfig, progress: Progress
) -> Cloned:
    settings = pooled_learning.PooledConfig(
        outputs=min(4, teacher.spec.channels), neurons=config.neurons, candidates=max(config.candidates, config.neurons),
        crops=config.crops)
    encoder, report = pooled_learning.learn(teacher, photos, held_out, settings, progress, config.seed)
    return Cloned(pooled.KIND, pooled.checkpoint_of(encoder, teacher.provenance), pooled.spec_of(encoder),
                  dict(encoder.state_dict()), f"{report.held_out} (of the mean alone: {report.mean_null})")


def _grid(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: CloneConfig, progress: Progress
) -> Cloned:
    lessons = teach(teacher, photos, config.size, config.crops, progress, config.seed)
    exam = teach(teacher, held_out, config.size, 1, progress, config.seed)
    grid = GridConfig(layers=config.layers, neurons=config.neurons, candidates=max(config.candidates, config.neurons),
                      sites=config.sites)
    encoder = decoder = None
    reached = []
    if config.part != "decoder":
        encoder, report = learn_encoder_from(teacher, lessons, exam, EncoderConfig(grid=grid, size=config.size), progress,
                                             config.seed)
        reached.append(f"encoder R² {report.r2:.3f}")
    if config.part != "encoder":
        wide = replace(grid, reach=3)  # a decoder has no retina to see further with
        decoder, report = learn_decoder_from(teacher, lessons, exam, DecoderConfig(wide, config.size), progress,
                                             config.seed)
        reached.append(f"decoder {-10 * math.log10(report.losses[-1]):.2f} dB over all pixels")
    module = dropin.Dropin(encoder, decoder)
    spec = LatentSpec(module.channels, teacher.spec.downsampling, "point")
    return Cloned(dropin.KIND, dropin.checkpoint_of(module, teacher), spec, dict(module.state_dict()),
                  ", ".join(reached))


def _native(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: CloneConfig, progress: Progress
) -> Cloned:
    crops = [_crops(source, config.size, count, config.seed, progress) for source, count in
             ((photos, config.crops * len(photos)), (held_out, len(held_out)))]
    held = len(crops[1])
    learning = native_learning.NativeLearning(sites=config.sites, held_out=held, seed=config.seed)
    model = native_learning.learn(torch.cat(crops), NativeConfig(config.channels, hidden=config.neurons), learning, progress)
    reached = native_learning.held_out_psnr(model, crops[1])
    return Cloned("ovae", asdict(model.config), native_learning.measured_spec(model, crops[0][:128]),
                  dict(model.state_dict()), f"PSNR {reached:.2f} dB on {held} held-out crops")


def _crops(source: ImageSource, size: int, count: int, seed: int, progress: Progress) -> Tensor:
    """uint8 `(count, 3, size, size)`; other pictures stand for those that cannot be read, which is said."""
    images = TrainingImages(source, size, seed)
    samples = [images.sample(position) for position in range(count)]
    unreadable = dict(row for sample in samples for row in sample.skipped)
    if unreadable:
        key, reason = next(iter(unreadable.items()))
        progress(f"{len(unreadable)} unreadable images replaced by others; the first: {key} {reason}")
    return torch.stack([sample.image for sample in samples])
