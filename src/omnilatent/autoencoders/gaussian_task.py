"""One training step of the Gaussian autoencoder: squared error, and a rate of its own for the Gaussians' geometry.

- `GaussianTask`: a `Task` (training/task.py).
- `parameter_groups`: what learns at which rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec import Provenance
from ..data.digits import Digits
from ..data.evaluation import EvaluationImages
from ..data.overlap import repeated
from ..data.protocols import ImageSource
from ..data.sources import open_images
from ..data.splits import split
from ..data.training import Batch, TrainingImages, batches
from ..errors import UserError
from ..hub import load, read_config, write_model
from ..latent import LatentSpec
from ..metrics.protocol import evaluate
from ..nn.gaussian_conv import GEOMETRY, GaussianConv2d
from ..training.checkpoint import stated_step
from ..training.config import from_json
from ..training.ema import EMA
from ..training.schedule import warmup_cosine
from ..training.task import Logged
from .gaussian import KIND, GaussianAutoencoder, GaussianCodec
from .gaussian_card import gaussian_card
from .gaussian_config import SIDE, GaussianConfig, GaussianTraining
from .gaussian_pictures import filter_sheet, reconstruction_sheet, save_picture, sigma_figures

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SHOWN = 10  # pictures of a sample
NORMALISATION_IMAGES = 512  # that the latent's mean and standard deviation are measured on
_GREY = (0.299, 0.587, 0.114)  # Rec. 601


class GaussianTask:
    """Trains `config.model` on pictures, grey, their short side made 28, a square of them.

    Args:
        data: the training images, or where they are (see `data.open_images`).
        val: the validation images; None takes the test images that the data brings, else holds out a share.
        skipped: called with (file, reason) for each image that cannot be read.
        init: the NAME of a Gaussian autoencoder whose weights to start from; its architecture replaces the recipe's.
        freeze: "encoder" or "decoder", the half that does not learn, or None.
        resumed: the checkpoint folder that the run will go on from.
    """

    monitor = "psnr"

    def __init__(self, config: GaussianTraining, data: str | ImageSource, val: str | ImageSource | None,
                 skipped: Callable[[str, str], None], init: str | None = None, freeze: str | None = None,
                 resumed: Path | None = None, command: str = "") -> None:
        self.initial: dict[str, Tensor] | None = None
        if resumed is not None:
            config = replace(config, model=from_json(GaussianConfig, read_config(resumed)["model"]))
        elif init is not None:
            codec = load(init)
            if not isinstance(codec, GaussianCodec):
                raise UserError(f"--init {init} holds a {type(codec.module).__name__}, but the recipe {config.recipe} "
                                "trains a GaussianAutoencoder: choose a run of that recipe.")
            config, self.initial = replace(config, model=codec.module.config), codec.module.state_dict()
        source, held_out = (open_images(d, config.max_pixels) if isinstance(d, str) else d for d in (data, val))
        if held_out is None and isinstance(source, Digits) and source.test is not None:
            held_out = source.test
        elif held_out is None:
            source, held_out = split(source, config.held_out)
        self.repeated = repeated(held_out, source)
        # The loop reads how long to train from the task, since only the data says how many steps an epoch has.
        self.config = replace(config, run=replace(config.run, steps=config.steps(len(source))))
        if resumed is not None and stated_step(resumed) > self.config.run.steps:
            raise UserError(f"{resumed} is at step {stated_step(resumed)} already, and --epochs {config.epochs} of "
                            f"{len(source)} images are {self.config.run.steps} steps: give more epochs.")
        self.init, self.freeze, self.command, self.skipped = init, freeze, command, skipped
        # Whole pictures, made smaller where they are larger, as validation sees them; 28 pixels stay as they are.
        self.images = TrainingImages(source, SIDE, config.run.seed, flip=False, min_scale=0.999)
        self.validation = EvaluationImages(held_out, SIDE)
        self._picture: Tensor | None = None

    def __str__(self) -> str:
        return (f"{len(self.images.source)} images ({self.images.source.name}), {self.config.run.steps} steps, "
                f"{self._held_out(len(self.validation))}")

    def _held_out(self, n: int) -> str:
        seen = f", {self.repeated} OF THEM ALSO TRAINED ON" if self.repeated else ""
        return f"{n} held-out images ({self.validation.source.name}{seen})"

    # -- building ----------------------------------------------------------------------------------------------

    def setup(self, fabric: Fabric) -> None:
        self.fabric, run, o = fabric, self.config.run, self.config.optimizer
        if run.batch_size % (fabric.world_size * run.accumulate):
            raise UserError(f"--batch-size {run.batch_size} does not split evenly over {fabric.world_size} processes "
                            f"and --accumulate {run.accumulate}: take a multiple of "
                            f"{fabric.world_size * run.accumulate}.")
        if o.optimizer != "adamw":
            raise UserError(f"--optimizer {o.optimizer}: the Gaussians' parameters are no matrices; take adamw.")
        model = GaussianAutoencoder.of(self.config.model)
        if self.initial is not None:
            model.load_state_dict(self.initial)
        if self.freeze:
            getattr(model, self.freeze).requires_grad_(False)
        self.bare = model.to(fabric.device)
        self.ema = EMA(self.bare, o.ema_decay)
        groups = parameter_groups(self.bare, self.config.geometry_lr)
        self.model, self.optimizer = fabric.setup(
            self.bare, torch.optim.AdamW(groups, o.lr, o.betas, weight_decay=o.weight_decay))

    # -- one step ----------------------------------------------------------------------------------------------

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        run, world = self.config.run, self.fabric.world_size
        workers = max(0, run.workers)  # small pictures need no processes unless they are asked for
        return batches(self.images, run.batch_size // world, start, stop, self.fabric.global_rank, world, workers,
                       pin=self.fabric.device.type == "cuda")

    def halve(self, batch: Batch) -> Batch | None:
        return batch.halved(self.config.run.accumulate)

    def step(self, batch: Batch, position: int) -> Logged:
        for file, reason in batch.skipped:
            self.skipped(file, reason)
        o, run = self.config.optimizer, self.config.run
        share = warmup_cosine(position, run.steps, o.warmup, o.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * group["multiple"] * share
        images = self._grey(batch.images.to(self.fabric.device, non_blocking=True).float() / 255)
        total = torch.zeros((), device=self.fabric.device)
        for number, part in enumerate(images.chunk(run.accumulate)):
            with self.fabric.no_backward_sync(self.model, enabled=number < run.accumulate - 1):
                loss = F.mse_loss(self.model(part)[0].float(), part) / run.accumulate
                self.fabric.backward(loss)
            total += loss.detach()
        logged: Logged = {"loss": total}
        if o.clip:
            logged["gradient_norm"] = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=o.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(position)
        return logged

    def _grey(self, images: Tensor) -> Tensor:
        """RGB `(b, 3, h, w)` in [0, 1] → `(b, in_channels, h, w)`."""
        return images if self.config.model.in_channels == 3 else torch.einsum(
            "bchw,c->bhw", images, images.new_tensor(_GREY))[:, None]

    # -- measuring and saving ----------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """`mse` of the reconstruction in [0, 1], not rounded, the mean over all pixels; `psnr` by the protocol; the
        widths of the first layer's Gaussians."""
        codec = self._codec(self._raw_spec())
        total, count = 0.0, 0
        for _, images in self.validation.batches(256):
            grey = self._grey(images.to(self.fabric.device))
            total += float((codec.module(grey)[0] - grey).square().mean((1, 2, 3)).double().sum())
            count += len(grey)
        for file, reason in self.validation.skipped:
            self.skipped(file, reason)
        measured, pictures = evaluate(codec, self.validation, batch_size=256, metrics=("psnr",), keep=SHOWN,
                                      health=False, speed=False)
        self._picture = reconstruction_sheet([p.original for p in pictures], [p.reconstruction for p in pictures])
        return {"psnr": measured.figures["psnr"].value, "mse": total / count, **sigma_figures(codec.module.encoder[0])}

    def samples(self) -> Tensor | None:
        """Held-out images above, their reconstructions by the averaged weights below."""
        return self._picture

    def state(self) -> dict[str, Any]:
        return {"model": self.bare.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        """The model, and two pictures: samples.png and filters.png."""
        average = self.ema.average
        training = {k: v for k, v in asdict(self.config).items() if k != "model"}
        training |= {"init": self.init, "freeze": self.freeze, "step": step}
        parameters = sum(p.numel() for p in average.parameters())
        trained = f"{step} steps on {len(self.images.source)} images ({self.images.source.name})"
        measured = self._held_out(len(self.validation) - len(self.validation.skipped))
        card = gaussian_card(self.config, parameters, trained, measured, figures, self.command)
        write_model(folder, KIND, asdict(self.config.model), self._measured_spec(), average.state_dict(), card,
                    training=training)
        save_picture(filter_sheet(average.encoder[0]), folder / "filters.png")
        if self._picture is not None:
            save_picture(self._picture, folder / "samples.png")

    def _codec(self, spec: LatentSpec) -> GaussianCodec:
        return GaussianCodec(self.ema.average, spec, Provenance(name=self.config.recipe, kind=KIND))

    def _raw_spec(self) -> LatentSpec:
        return LatentSpec(self.config.model.latent_dim, SIDE, "point", self.config.model.in_channels)

    @torch.no_grad()
    def _measured_spec(self) -> LatentSpec:
        """The spec whose shift and scale give the latents of the first training images mean 0 and deviation 1."""
        rows = range(min(NORMALISATION_IMAGES, len(self.images.source)))
        images = torch.stack([self.images.sample(position).image for position in rows]).float() / 255
        z = self.ema.average.encode(self._grey(images.to(self.fabric.device)))
        return replace(self._raw_spec(), shift=(float(z.mean()),), scale=(1 / max(float(z.std()), 1e-6),))


def parameter_groups(model: nn.Module, geometry: float) -> list[dict[str, Any]]:
    """Parameters that learn, for an optimiser: the Gaussians' centres, widths and angles at `geometry` times the rate.

    They are measured in pixels, logarithms and radians, where 0.1 is a small change; the other weights lie around
    0.05, and Adam moves every number by about the learning rate."""
    layers = [layer for layer in model.modules() if isinstance(layer, GaussianConv2d)]
    own = {id(getattr(layer, name)) for layer in layers for name in GEOMETRY}
    parts: dict[float, list[nn.Parameter]] = {1.0: [], geometry: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parts[geometry if id(parameter) in own else 1.0].append(parameter)
    return [{"params": part, "multiple": multiple} for multiple, part in parts.items() if part]
