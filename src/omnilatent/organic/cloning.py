"""What a clone is for each kind of latent: what learns it, what stands beside it, how it is measured and saved.

- `way_of`: the `Way` that a `CloneConfig` names: `Pooled`, `Grid` or `Native`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec import Codec
from ..errors import UserError
from ..hub import write_model
from ..latent import LatentSpec
from . import dropin, native, pooled
from .clone_config import CloneConfig
from .dropin_learning import DecoderLearning, EncoderLearning, decoder_responses
from .fovea import Fovea, FoveaFit
from .grid_learning import GridConfig
from .grids import GridDecoder, GridLayer, GridStack
from .learning import Learning, Pace
from .lessons import Lessons
from .native_learning import NativeLearning, measured_spec
from .peers import Peers
from .pooled_learning import PooledConfig, PooledDecoderLearning, PooledLearning, agreement, small_pictures
from .search import generator


class Way(ABC):
    """One kind of latent.

    Args:
        some: a few lessons, the same in every process, from which the teacher's answers are asked.
    """

    spared: tuple[str, ...] = ()
    """Parts without which a model is one, too, where they do no better on held-out lessons than the mean."""

    def __init__(self, teacher: Codec, config: CloneConfig, device: torch.device, some: Lessons) -> None:
        self.teacher, self.config, self.device, self.some = teacher, config, device, some
        self.grid = GridConfig(layers=config.layers, neurons=config.neurons,
                               candidates=max(config.candidates, config.neurons), context=config.context)

    @abstractmethod
    def parts(self, pace: Pace, peers: Peers) -> dict[str, Learning]:
        """What is learned, by name, in the same rounds."""

    @abstractmethod
    def assembled(self, parts: dict[str, nn.Module]) -> nn.Module:
        """The model from its learned parts."""

    @abstractmethod
    def student(self) -> nn.Module:
        """The same model, of the most layers that it may have, with random weights."""

    @abstractmethod
    def loss(self, model: nn.Module, lessons: Lessons) -> Tensor:
        """What gradients are taken of."""

    @abstractmethod
    def figures(self, model: nn.Module, held_out: Iterable[Lessons]) -> dict[str, float]:
        """On held-out lessons; "explained" is the share of the targets' variance."""

    @abstractmethod
    def saved(self, model: nn.Module) -> tuple[str, dict[str, Any], LatentSpec]:
        """Kind, configuration and latent, as `hub.write_model` takes them."""

    def write(self, folder: Path, model: nn.Module, card: str, training: dict[str, Any]) -> None:
        """A checkpoint in an existing folder, weights in fp16."""
        kind, config, spec = self.saved(model)
        tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} of the clone does not fit into fp16: the photos are too much alike for it; give "
                                "others, or fewer --channels.")
        write_model(folder, kind, config, spec, tensors, card, training={**asdict(self.config), **training})


def check_teacher(teacher: Codec, config: CloneConfig) -> None:
    """Raise a sentence where the teacher has no such latent, before it teaches anything."""
    spec = teacher.spec
    if config.latent == "native":
        return
    if spec.image_channels != 3:
        raise UserError(f"{teacher.label} works on pictures of {spec.image_channels} channels, and an organic retina sees "
                        "three: choose another teacher, or --latent native.")
    if config.latent == "grid" and spec.downsampling != Fovea.cell:
        raise UserError(f"Dimension mismatch: {teacher.label} has one latent pixel for {spec.downsampling}² pixels, and "
                        f"the retina {Fovea().identity()} one for {Fovea.cell}²: take --latent pooled or native.")
    if config.latent == "pooled" and config.side // spec.downsampling % 2:
        raise UserError(f"{teacher.label} gives {config.side // spec.downsampling} latent pixels a side of {config.side} "
                        "pixels, and a pooled clone learns from halves of it, too: choose another teacher.")


def way_of(teacher: Codec, config: CloneConfig, device: torch.device, some: Lessons) -> Way:
    """The way that `config.latent` names."""
    kinds = {"pooled": Pooled, "grid": Grid, "native": Native}
    return kinds[config.latent](teacher, config, device, some)


class Pooled(Way):
    """Four numbers a picture, and with `part` both a decoder of them."""

    spared = ("decoder",)

    def __init__(self, teacher: Codec, config: CloneConfig, device: torch.device, some: Lessons) -> None:
        super().__init__(teacher, config, device, some)
        self.outputs = min(4, teacher.spec.channels)
        self.settings = PooledConfig(self.outputs, 2 * config.neurons, max(config.candidates, config.neurons))
        self.decodes = config.part == "both"

    def parts(self, pace: Pace, peers: Peers) -> dict[str, Learning]:
        found: dict[str, Learning] = {"encoder": PooledLearning(self.settings, pace, peers, self.device)}
        if self.decodes:
            grid = replace(self.grid, layers=1, neurons=min(32, self.config.neurons))
            found["decoder"] = PooledDecoderLearning(self.outputs, grid, pace, peers, self.device)
        return found

    def assembled(self, parts: dict[str, nn.Module]) -> pooled.Pooled:
        return pooled.Pooled(parts["encoder"], parts.get("decoder"))

    def student(self) -> pooled.Pooled:
        retina = self.settings.retina
        each = max(1, self.settings.neurons // len(retina.scales))
        decoder = GridLayer(self.outputs, min(32, self.config.neurons), 3 * pooled.PICTURE**2) if self.decodes else None
        return _random(pooled.Pooled(pooled.PooledEncoder(retina, [each] * len(retina.scales), self.outputs), decoder))

    def loss(self, model: pooled.Pooled, lessons: Lessons) -> Tensor:
        wanted = lessons.pooled(self.outputs)
        loss = F.mse_loss(model.encoder(lessons.pictures), wanted.flatten(1))
        if model.decoder is not None:
            loss = loss + F.mse_loss(model.decoder(wanted.flatten(2)), small_pictures(lessons).flatten(2))
        return loss

    def figures(self, model: pooled.Pooled, held_out: Iterable[Lessons]) -> dict[str, float]:
        found, wanted, errors = [], [], []
        for lessons in held_out:
            goal = lessons.pooled(self.outputs)
            found.append(model.encoder(lessons.pictures))
            wanted.append(goal.flatten(1))
            if model.decoder is not None:
                said = model.decoder(goal.flatten(2)).clamp(0, 1)
                errors.append((said - small_pictures(lessons).flatten(2)).square().flatten(1).mean(1))
        same = agreement(torch.cat(found), torch.cat(wanted))
        figures = {"explained": same.r2, "cosine": same.cosine, "l2": same.l2}
        if errors:
            figures["psnr_64"] = float((-10 * torch.cat(errors).log10()).mean())
        return figures

    def saved(self, model: pooled.Pooled) -> tuple[str, dict[str, Any], LatentSpec]:
        return pooled.KIND, pooled.checkpoint_of(model, self.teacher.provenance), pooled.spec_of(model)


class Grid(Way):
    """The teacher's own latent; encoder, decoder, or both."""

    def __init__(self, teacher: Codec, config: CloneConfig, device: torch.device, some: Lessons) -> None:
        super().__init__(teacher, config, device, some)
        self.fovea, self.channels, self.cell = Fovea(), teacher.spec.channels, teacher.spec.downsampling
        self.encodes, self.decodes = config.part != "decoder", config.part != "encoder"

    def parts(self, pace: Pace, peers: Peers) -> dict[str, Learning]:
        found: dict[str, Learning] = {}
        if self.encodes:
            weighing = None
            if self.teacher.spec.decodes:
                weighing = decoder_responses(self.teacher, self.some, generator("responses", pace.seed)).to(self.device)
                weighing = peers.gather(weighing)[0]  # each asks a decoder of its own
            found["encoder"] = EncoderLearning(self.fovea, self.grid, pace, peers, self.device, weighing)
        if self.decodes:
            grid = replace(self.grid, reach=3)  # a decoder has no retina to see further with
            found["decoder"] = DecoderLearning(lambda lessons: lessons.taught, self.channels, self.cell, grid, pace, peers,
                                               self.device)
        return found

    def assembled(self, parts: dict[str, nn.Module]) -> dropin.Dropin:
        return dropin.Dropin(parts.get("encoder"), parts.get("decoder"))

    def student(self) -> dropin.Dropin:
        encoder = decoder = None
        layers, neurons, cell = self.config.layers, self.config.neurons, self.cell
        if self.encodes:
            fit = FoveaFit(self.fovea, self.device)
            fit.add(self.some.images, generator("windows", self.config.seed), 1.0)
            code = fit.code()  # the retina begins as it does without gradients, and is trained too
            sizes = [(neurons, self.channels)] * layers
            stack = _random(GridStack(code.fovea.outputs, sizes, 1, self.grid.context).to(self.device))
            encoder = dropin.DropinEncoder(code, stack)
        if self.decodes:
            sizes = [(neurons, 3 * cell**2)] * layers
            decoder = _random(GridDecoder(GridStack(self.channels, sizes, 3, self.grid.context, adds=True), cell))
        return dropin.Dropin(encoder, decoder)

    def loss(self, model: dropin.Dropin, lessons: Lessons) -> Tensor:
        loss = torch.zeros((), device=lessons.pictures.device)
        if model.encoder is not None:
            loss = loss + F.mse_loss(model.encoder(lessons.images), lessons.taught)
        if model.decoder is not None:
            loss = loss + F.mse_loss(model.decoder(lessons.taught), lessons.images)
        return loss

    def figures(self, model: dropin.Dropin, held_out: Iterable[Lessons]) -> dict[str, float]:
        latents, pictures = _Explained(), _Explained()
        for lessons in held_out:
            if model.encoder is not None:
                latents.add(model.encoder(lessons.images), lessons.taught)
            if model.decoder is not None:
                pictures.add(model.decoder(lessons.taught), lessons.images)
        found = [part.share for part in (latents, pictures) if part.count]
        figures = {"explained": sum(found) / len(found)}
        if latents.count:
            figures["r2"] = latents.share
        if pictures.count:
            figures["psnr"] = pictures.psnr
        return figures

    def saved(self, model: dropin.Dropin) -> tuple[str, dict[str, Any], LatentSpec]:
        spec = LatentSpec(model.channels, self.cell, "point")
        return dropin.KIND, dropin.checkpoint_of(model, self.teacher), spec


class Native(Way):
    """A latent of its own. The teacher has no part in it."""

    def parts(self, pace: Pace, peers: Peers) -> dict[str, Learning]:
        return {"model": NativeLearning(self._config([]), self.grid, self.config.turns, pace, peers, self.device)}

    def _config(self, sizes: list[tuple[int, int]]) -> native.NativeConfig:
        config = self.config
        return native.NativeConfig(config.channels, config.reach, config.reach, config.context, sizes)

    def assembled(self, parts: dict[str, nn.Module]) -> native.NativeAutoencoder:
        return parts["model"]

    def student(self) -> native.NativeAutoencoder:
        sizes = [(self.config.neurons, native.PIXELS)] * self.config.layers
        return _random(native.NativeAutoencoder(self._config(sizes)))

    def loss(self, model: native.NativeAutoencoder, lessons: Lessons) -> Tensor:
        return F.mse_loss(model(lessons.images), lessons.images)

    def figures(self, model: native.NativeAutoencoder, held_out: Iterable[Lessons]) -> dict[str, float]:
        pictures = _Explained()
        for lessons in held_out:
            pictures.add(model(lessons.images), lessons.images)
        return {"explained": pictures.share, "psnr": pictures.psnr}

    def saved(self, model: native.NativeAutoencoder) -> tuple[str, dict[str, Any], LatentSpec]:
        spec = measured_spec(model.config.channels, torch.cat([model.encode(part.images) for part in _split(self.some)]))
        return native.KIND, {**asdict(model.config), "sizes": [list(pair) for pair in model.config.sizes]}, spec


class _Explained:
    """Share of variance about each channel's mean, and for pictures the mean PSNR, over batches `(b, c, h, w)`."""

    def __init__(self) -> None:
        self.count, self.error, self.decibels = 0, 0.0, []
        self.sum, self.squares = 0.0, 0.0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        error = (found - wanted).square()
        self.count += wanted.shape[0] * wanted.shape[-2] * wanted.shape[-1]
        self.error += float(error.sum())
        self.sum = self.sum + wanted.double().sum((0, 2, 3))
        self.squares = self.squares + wanted.double().square().sum((0, 2, 3))
        rounded = (found.clamp(0, 1) * 255).round() / 255 - wanted
        self.decibels += (-10 * rounded.square().flatten(1).mean(1).clamp(min=1e-10).log10()).tolist()

    @property
    def share(self) -> float:
        return float(1 - self.error / (self.squares - self.sum.square() / self.count).sum())

    @property
    def psnr(self) -> float:
        return sum(self.decibels) / len(self.decibels)


def _split(lessons: Lessons, size: int = 8) -> list[Lessons]:
    return [Lessons(pictures, None) for pictures in lessons.pictures.split(size)]


def _random(model: nn.Module) -> nn.Module:
    """The model with random weights: the matrices' rows of about length 1, readouts of a tenth of that. What a later layer
    adds to the guess before it begins at nothing."""
    draw = torch.Generator().manual_seed(0)
    later = {f"{name}.layers.{i}." for name, part in model.named_modules() if isinstance(part, GridStack) and part.adds
             for i in range(1, len(part.layers))}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and len(parameter):
            reads_out = name.endswith(("out", "skip", "readout_weight"))
            scale = (0.0 if name.rpartition(".")[0] + "." in later else 0.1) if reads_out else 1.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * scale / math.sqrt(parameter[0].numel()))
    return model
