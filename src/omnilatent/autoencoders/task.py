"""One training step of an image autoencoder or tokenizer: reconstruction, perceptual, latent and adversarial terms together.

The generator's step takes the pixels' gradients from objective.py and sends one combined gradient back through the
model; the discriminator takes its own step after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.evaluation import EvaluationImages
from ..data.overlap import repeated
from ..data.protocols import ImageSource
from ..data.sources import open_images
from ..data.splits import split
from ..data.training import Batch, TrainingImages, batches
from ..data.workers import own_cores
from ..errors import UserError
from ..hub import load, read_config, write_model
from ..codec import Provenance
from ..latent import LatentSpec
from ..losses.adversarial import PatchDiscriminator, hinge_loss
from ..losses.perceptual import perceptual_loss
from ..metrics.protocol import evaluate
from ..quantizers import Quantizer
from ..training.config import from_json
from ..training.ema import EMA
from ..training.muon import Muon
from ..training.schedule import warmup_cosine
from ..training.task import Logged
from .architecture import Architecture, TrainedCodec
from .card import model_card
from .config import AutoencoderTraining, KLConfig, TinyConfig
from .kl import KL
from .objective import Objective
from .regularisers import LatentTransform, choose_transform
from .tiny import TINY
from .vqgan import TOKENIZER
from .vqgan_config import MODELS, VQGANConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ARCHITECTURES: dict[type, Architecture] = {KLConfig: KL, TinyConfig: TINY, **dict.fromkeys(MODELS.values(), TOKENIZER)}
WATCHED = ("psnr", "ssim", "codes_used", "active_ratio", "entropy_bits", "perplexity")  # what validations measure
MOST_WORKERS = 16  # that decode, where --workers leaves it to us
NORMALISATION_IMAGES = 32  # crops that the latent's mean and standard deviation are measured on


class AutoencoderTask:
    """A `Task` (see training.task) that trains `config.model` on crops of images.

    Args:
        data: the training images, or where they are (see `data.open_images`).
        val: the validation images; None holds out a share of `data`.
        skipped: called with (file, reason) for each image that cannot be read.
        init: the NAME whose weights to start from; its architecture replaces the recipe's.
        freeze: "encoder" or "decoder", the half that does not learn, or None.
        resumed: the checkpoint folder that the run will go on from.
    """

    monitor = "psnr"

    def __init__(self, config: AutoencoderTraining, data: str | ImageSource, val: str | ImageSource | None,
                 skipped: Callable[[str, str], None], init: str | None = None,
                 freeze: str | None = None, resumed: Path | None = None, command: str = "") -> None:
        self.architecture = ARCHITECTURES[type(config.model)]
        self.spec: LatentSpec | None = None
        self.initial: dict[str, Tensor] | None = None
        if resumed is not None:  # it holds everything; what --init named may have changed or gone since
            saved = read_config(resumed)
            config = replace(config, model=from_json(type(config.model), saved["model"]))
            self.spec = LatentSpec.from_json(saved["spec"]) if freeze == "encoder" else None
        elif init is not None:
            vae, spec = self._source(init, config.recipe)
            config = replace(config, model=self.architecture.config_of(vae, config.model))
            self.initial = vae.state_dict()
            if freeze == "encoder":  # the latents stay the source's, so their normalisation does too
                self.spec = replace(self._raw_spec(config), shift=spec.shift, scale=spec.scale)
        config.check_grid()  # again: the model may be another one by now
        if config.loss.spectrum_weight and freeze == "encoder":
            raise UserError("--spectrum-weight changes the encoder, which --freeze encoder keeps: leave one of them "
                            "out.")
        size = config.crops.size
        source, held_out = (open_images(d, config.crops.max_pixels) if isinstance(d, str) else d for d in (data, val))
        if held_out is None:
            source, held_out = split(source, config.crops.held_out)
        self.repeated = repeated(held_out, source)
        self.config, self.init, self.freeze, self.command, self.skipped = config, init, freeze, command, skipped
        self.images = TrainingImages(source, size, config.run.seed, config.crops.flip, config.crops.min_scale)
        self.validation = EvaluationImages(held_out, size, config.crops.validation_images)
        self.perceptual = perceptual_loss(config.loss.perceptual) if config.loss.perceptual_weight else None
        self.adversarial = config.loss.adversarial_weight > 0
        self._picture: Tensor | None = None

    def _source(self, init: str, recipe: str) -> tuple[nn.Module, LatentSpec]:
        """The model that --init names, and its latent's normalisation."""
        codec = load(init, dtype=torch.float32)
        wanted, found = self.architecture.module_class, type(codec.module).__name__
        if found != wanted:
            fitting = [a.recipe(codec.module) for a in ARCHITECTURES.values() if a.module_class == found]
            remedy = f"train it with the recipe {fitting[0]}" if fitting else "choose another --init"
            raise UserError(f"--init {init} holds a model of the class {found}, but the recipe {recipe} trains "
                            f"one of the class {wanted}: {remedy}.")
        return codec.module, codec.spec

    def __str__(self) -> str:
        codes = f"{self.config.model.description}, " if isinstance(self.config.model, VQGANConfig) else ""
        return f"{codes}{len(self.images.source)} images ({self.images.source.name}), {self._held_out(len(self.validation))}"

    def _held_out(self, n: int) -> str:
        """The validation images in words, with the truth about those that are trained on too."""
        seen = f", {self.repeated} OF THEM ALSO TRAINED ON" if self.repeated else ""
        return f"{n} held-out images ({self.validation.source.name}{seen})"

    # -- building ----------------------------------------------------------------------------------------------

    def setup(self, fabric: Fabric) -> None:
        self.fabric, config = fabric, self.config
        if config.run.batch_size % (fabric.world_size * config.run.accumulate):
            raise UserError(
                f"--batch-size {config.run.batch_size} does not split evenly over {fabric.world_size} processes and "
                f"--accumulate {config.run.accumulate}: take a multiple of {fabric.world_size * config.run.accumulate}."
            )
        model = self.architecture.module(self.architecture.build_vae(config.model, None), config.checkpointing)
        if self.initial is not None:
            model.vae.load_state_dict(self.initial)
        for part in self.architecture.halves[self.freeze] if self.freeze else ():
            if getattr(model.vae, part) is not None:  # some KL models have no quant convolutions
                getattr(model.vae, part).requires_grad_(False).eval()  # eval: a codebook that follows its vectors stays
        fast = config.run.compile and fabric.device.type == "cuda"
        if fast:  # four sizes of latent, with and without features and gradients, are more than torch's 8
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
        if fabric.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        learned = [p for p in model.parameters() if p.requires_grad]
        self.bare = model.to(fabric.device)
        self.ema = EMA(self.bare, config.optimizer.ema_decay)
        if fast:
            model.before_compile()
        # Shapes are few and known (see regularisers.py); one graph for all of them would be slower.
        compiled = torch.compile(model, dynamic=False) if fast else model
        self.model, self.optimizer = fabric.setup(compiled, self._optimizer(learned))
        self.bare_disc: PatchDiscriminator | None = None
        if self.adversarial:
            self.bare_disc = PatchDiscriminator(config.loss.disc_width, config.loss.disc_layers).to(fabric.device)
            adam = self._adam(list(self.bare_disc.parameters()))
            self.disc, self.disc_optimizer = fabric.setup(self.bare_disc, adam)
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(fabric.device)
        self.objective = Objective(config.loss, fabric, self.bare, self.perceptual, self.bare_disc)

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        o = self.config.optimizer
        if o.optimizer == "muon":
            return Muon(parameters, o.lr, o.betas, weight_decay=o.weight_decay)
        return self._adam(parameters)

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        o = self.config.optimizer
        return torch.optim.AdamW(parameters, o.lr, o.betas, weight_decay=o.weight_decay)

    # -- one step ----------------------------------------------------------------------------------------------

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        run, world = self.config.run, self.fabric.world_size
        workers = min(MOST_WORKERS, own_cores()) if run.workers < 0 else run.workers
        return batches(self.images, run.batch_size // world, start, stop, self.fabric.global_rank, world, workers,
                       pin=self.fabric.device.type == "cuda")

    def halve(self, batch: Batch) -> Batch | None:
        return batch.halved(self.config.run.accumulate)

    def step(self, batch: Batch, position: int) -> Logged:
        for file, reason in batch.skipped:
            self.skipped(file, reason)
        config = self.config
        strength = self._adversarial_strength(position)
        self._set_lr(self.optimizer, position, 0, config.optimizer.lr)
        scheduled = self.bare.schedule(position / config.run.steps)
        images = batch.images.to(self.fabric.device, non_blocking=True).float() / 127.5 - 1
        parts = images.chunk(config.run.accumulate)
        positions = batch.positions.split([len(part) for part in parts])
        noises = [self._noise(p.tolist()) if config.model.variational else None for p in positions]
        goals, transform = self._transformed(parts, position)
        inputs = list(zip(parts, noises, goals, strict=True))
        weight = self._whole_batch_weight(inputs, transform) if strength and len(parts) > 1 else None
        logged: dict[str, Tensor] = {}
        fakes = []
        for number, part in enumerate(inputs):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts) - 1):
                numbers, fake = self._generator_part(*part, transform, strength, weight, 1 / len(parts))
            for name, value in numbers.items():
                logged[name] = logged.get(name, 0) + value / len(parts)
            fakes.append(fake)
        if config.optimizer.clip:
            logged["gradient_norm"] = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=config.optimizer.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(position)
        if strength:
            logged["disc_loss"] = self._discriminator_step(goals, fakes, position)
        return {**logged, **scheduled}

    def _adversarial_strength(self, position: int) -> float:
        """0 before the discriminator starts, then up to 1 along its ramp."""
        loss, since = self.config.loss, position - self.config.loss.disc_start_step
        return 0.0 if since < 0 or not self.adversarial else min(1.0, (since + 1) / max(1, loss.disc_ramp))

    def _transformed(self, parts: Sequence[Tensor], step: int) -> tuple[Sequence[Tensor], LatentTransform | None]:
        """What this step's reconstructions are compared with, and what happens to their latents: τ of both."""
        config, f = self.config, self.config.model.downsampling
        whole = config.crops.size // f
        chosen = choose_transform(config.loss, config.run.seed, step, whole)
        if chosen is None:
            return parts, None
        return [chosen.images(part, f) for part in parts], chosen.latents(self.fabric.device)

    def _whole_batch_weight(
        self, inputs: Sequence[tuple[Tensor, Tensor | None, Tensor]], transform: LatentTransform | None
    ) -> Tensor:
        """The adversarial weight of a batch in several parts, by a forward pass over all of them beforehand: a
        weight for each part would make the gradients depend on the split."""
        both = []
        learning = [module for module in self.bare.modules() if isinstance(module, Quantizer) and module.training]
        for quantizer in learning:
            quantizer.training = False  # this pass teaches a codebook nothing
        for images, noise, goal in inputs:
            with torch.no_grad():
                out = self.model(images, noise, transform, True)
            both.append(self.objective.last_layer(out, self.objective.pull(out.images, goal, adversarial=True)))
        for quantizer in learning:
            quantizer.training = True
        return self.objective.weight(torch.stack(both).mean(0))

    def _generator_part(
        self, images: Tensor, noise: Tensor | None, goal: Tensor, transform: LatentTransform | None, strength: float,
        weight: Tensor | None, share: float,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward of one part of the batch, which is `share` of this process's batch."""
        out = self.model(images, noise, transform, strength > 0 and weight is None)
        pull = self.objective.pull(out.images, goal, strength > 0)
        numbers, gradient = dict(pull.numbers), pull.reconstruction
        if pull.adversarial is not None:
            weight = self.objective.weight(self.objective.last_layer(out, pull)) if weight is None else weight
            gradient = gradient + strength * weight * pull.adversarial
            numbers["adaptive_weight"] = weight
        surrogate = (out.images.float() * gradient).sum()  # its gradient is the combined one
        for term, seen in self.objective.latent_terms(out, images, self.config.model.variational):
            numbers |= {"loss": numbers["loss"] + term.detach(), **seen}
            surrogate = surrogate + term
        self.fabric.backward(surrogate * share)
        return numbers, pull.images

    def _discriminator_step(self, reals: Sequence[Tensor], fakes: list[Tensor], position: int) -> Tensor:
        o = self.config.optimizer
        self._set_lr(self.disc_optimizer, position, self.config.loss.disc_start_step, o.disc_lr or o.lr)
        total = torch.zeros((), device=self.fabric.device)
        whole = sum(map(len, reals))
        for number, (real, fake) in enumerate(zip(reals, fakes, strict=True)):
            with self.fabric.no_backward_sync(self.disc, enabled=number < len(reals) - 1):
                logits = self.disc(torch.cat([real, fake]))
                loss = hinge_loss(*logits.chunk(2)) * (len(real) / whole)
                self.fabric.backward(loss)
            total += loss.detach()
        if self.config.optimizer.clip:
            self.fabric.clip_gradients(self.disc, self.disc_optimizer, max_norm=self.config.optimizer.clip,
                                       error_if_nonfinite=False)
        self.disc_optimizer.step()
        self.disc_optimizer.zero_grad()
        return total

    def _set_lr(self, optimizer: Any, position: int, start: int, peak: float) -> None:
        o = self.config.optimizer
        share = warmup_cosine(position - start, max(1, self.config.run.steps - start), o.warmup, o.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = peak * share

    def _noise(self, positions: list[int]) -> Tensor:
        """N(0, I) noise of the posterior, drawn image by image from (seed, position): equal on any number of ranks."""
        side = self.config.crops.size // self.config.model.downsampling
        generator = torch.Generator(self.fabric.device)
        noise = torch.empty(len(positions), self.config.model.latent_channels, side, side, device=self.fabric.device)
        for row, place in zip(noise, positions, strict=True):
            generator.manual_seed((self.config.run.seed * 0x9E3779B97F4A7C15 + place) % 2**63)
            row.normal_(generator=generator)
        return noise

    # -- measuring and saving ----------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        codec = self._codec(self._raw_spec())
        rows = min(8, self.config.run.batch_size)
        measured, pictures = evaluate(codec, self.validation, batch_size=rows, metrics=WATCHED, keep=4, health=False,
                                      speed=False)
        for file, reason in self.validation.skipped:
            self.skipped(file, reason)
        pairs = [torch.from_numpy(a).permute(2, 0, 1) / 255 for p in pictures for a in (p.original, p.reconstruction)]
        top, bottom = torch.cat(pairs[0::2], 2), torch.cat(pairs[1::2], 2)
        self._picture = torch.cat([top, bottom], 1)
        return {name: f.value for name, f in measured.figures.items() if f.value is not None}

    def samples(self) -> Tensor | None:
        """Held-out images above, their reconstructions by the averaged weights below."""
        return self._picture

    def state(self) -> dict[str, Any]:
        state = {"model": self.bare.state_dict(), "ema": self.ema.state_dict(),
                 "optimizer": self.optimizer.state_dict()}
        if self.adversarial:
            state |= {"disc": self.bare_disc.state_dict(), "disc_optimizer": self.disc_optimizer.state_dict()}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversarial:
            self.bare_disc.load_state_dict(state["disc"])
            self.disc_optimizer.load_state_dict(state["disc_optimizer"])

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        spec = self.spec or self._measured_spec()
        config = {k: v for k, v in asdict(self.config).items() if k != "model"}
        training = {**config, "init": self.init, "freeze": self.freeze, "step": step}
        write_model(folder, self.architecture.kind, asdict(self.config.model), spec, self.ema.average.vae.state_dict(),
                    self._card(figures, step), training=training)

    def _codec(self, spec: LatentSpec) -> TrainedCodec:
        provenance = Provenance(name=self.config.recipe, kind=self.architecture.kind)
        return self.architecture.codec(self.ema.average.vae, spec, provenance)

    def _raw_spec(self, config: AutoencoderTraining | None = None) -> LatentSpec:
        return self.architecture.spec((config or self.config).model)

    @torch.no_grad()
    def _measured_spec(self) -> LatentSpec:
        """The spec whose shift and scale give the latents of the first training crops mean 0 and deviation 1."""
        crops = [self.images.sample(position).image for position in range(NORMALISATION_IMAGES)]
        codec = self._codec(self._raw_spec())
        parts = [torch.stack(crops[i : i + 8]).float() / 255 for i in range(0, len(crops), 8)]
        z = torch.cat([codec.encode(part).mode() for part in parts])
        return replace(self._raw_spec(), shift=(float(z.mean()),), scale=(1 / max(float(z.std()), 1e-6),))

    def _card(self, figures: dict[str, float], step: int) -> str:
        start = f" from {self.init}" if self.init else ""
        start += f" with its {self.freeze} kept" if self.freeze else ""
        trained = (f"{step} steps{start} on {len(self.images.source)} images ({self.images.source.name}), "
                   f"crops of {self.config.crops.size}².")
        n = len(self.validation) - len(self.validation.skipped)
        measured = self._held_out(n)
        parameters = self._codec(self._raw_spec()).parameter_count()
        return model_card(self.config, parameters, trained, measured, figures, self.command)
