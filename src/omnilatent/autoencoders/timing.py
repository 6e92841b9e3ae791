"""How fast an image autoencoder encodes, decodes and trains on this machine, ours beside diffusers' own, in one run.

- `Row`: one measurement: images a second, milliseconds a call, peak memory.
- `codec_rows`: 8-bit images on the device → normalised latent, and latent → images.
- `training_rows`: training steps, with the reconstruction and KL terms alone and with all.
- `untrained`: a recipe's architecture with random weights, since speed does not depend on them.

A row that fails, for want of memory for example, says so and the others go on.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.structured import StructuredImages
from ..data.training import Batch
from ..errors import UserError, is_out_of_memory
from ..hub import RECIPES
from ..codec import Codec, Provenance
from ..latent import LatentSpec
from ..losses.lpips import LPIPS, NETWORKS
from ..losses.perceptual import perceptual_loss
from ..training.loop import launch_fabric
from .config import AutoencoderTraining, KLTraining
from .task import ARCHITECTURES, AutoencoderTask

WARM_UP, CALLS = 5, 50


@dataclass(frozen=True)
class Row:
    """One measurement; `failure` says why there are no figures. `peak_bytes` is None where it is not known (CPU)."""

    what: str
    how: str
    batch_size: int
    images_per_second: float | None = None
    milliseconds: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None


def untrained(recipe: str, device: str, dtype: torch.dtype) -> Codec:
    """The codec that `recipe` would train, its weights fresh from their initialisation.

    Raises:
        UserError: the recipe trains no image autoencoder.
    """
    config = recipe_of(recipe)
    architecture = ARCHITECTURES[type(config.model)]
    spec = LatentSpec(config.model.latent_channels, config.model.downsampling,
                      "gaussian" if config.model.variational else "point", scale=(0.18215,))
    torch.manual_seed(0)
    codec = architecture.codec(architecture.build_vae(config.model, spec), spec, Provenance(recipe, architecture.kind))
    return codec.to(device, dtype)


def recipe_of(name: str) -> AutoencoderTraining:
    """The configuration of a recipe of this family.

    Raises:
        UserError: the recipe is another family's.
    """
    module, function = RECIPES[name].split(":")
    config = getattr(import_module(module), function)()
    if not isinstance(config, AutoencoderTraining):
        raise UserError(f"{name} trains no image autoencoder: give one of these recipes, such as kl-f8.")
    return config


def codec_rows(codec: Codec, size: int, batch_size: int, calls: int = CALLS) -> Iterator[Row]:
    """Time `codec` as it is and, on a CUDA GPU, compiled; for a model of diffusers' classes also diffusers' own
    forward in the same precision, and on a GPU in its best setting (channels-last, compiled).

    Args:
        codec: on its device, in its dtype.
        size: side of the square images in pixels.
        batch_size: images a call.
        calls: timed calls, of which the median counts, after a warm-up.
    """
    device = codec.device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, codec.spec.image_channels, size, size), dtype=torch.uint8,
                           generator=generator).to(device)
    grid = codec.spec.grid((size, size))
    latent = torch.randn(batch_size, codec.spec.channels, *grid, generator=generator).to(device, codec.dtype)
    for how, encode, decode in _ways(codec):
        for what, call, data in (("encode", encode, images), ("decode", decode, latent)):
            yield _timed(what, how, batch_size, lambda call=call, data=data: call(data), device, calls)


def _ways(codec: Codec) -> Iterator[tuple[str, Callable[[Tensor], Any], Callable[[Tensor], Any]]]:
    """(name, encode, decode), slowest first; the last one leaves the codec compiled."""
    cuda = codec.device.type == "cuda"
    if hasattr(codec.module, "encode") and hasattr(codec.module, "decode"):
        encode, decode = _diffusers(codec)
        yield "diffusers", encode, decode
        if cuda:
            nn.Module.to(codec.module, memory_format=torch.channels_last)
            last = torch.channels_last
            encode, decode = (torch.compile(half, dynamic=False) for half in _diffusers(codec, last))
            yield "diffusers, channels-last, compiled", encode, decode
            nn.Module.to(codec.module, memory_format=torch.contiguous_format)
    yield "omnilatent", lambda x: codec.encode(x).mode(), codec.decode
    if cuda:
        codec.compile()
        yield "omnilatent, compiled", lambda x: codec.encode(x).mode(), codec.decode


def _diffusers(
    codec: Codec, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """diffusers' own encode and decode of the codec's module, between the same values as the codec's."""
    module, spec, dtype = codec.module, codec.spec, codec.dtype

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        out = module.encode((images.to(dtype) / 127.5 - 1).contiguous(memory_format=layout))
        return spec.normalise(out.latent_dist.mode() if hasattr(out, "latent_dist") else out[0])

    @torch.no_grad()
    def decode(latent: Tensor) -> Tensor:
        raw = spec.denormalise(latent).to(dtype, memory_format=layout)
        return (module.decode(raw).sample / 2 + 0.5).float().clamp(0, 1)

    return encode, decode


def training_rows(recipe: str, batch_size: int, size: int, device: str, calls: int = CALLS) -> Iterator[Row]:
    """Time training steps of `recipe` on a batch in memory: mixed precision, compiled on a GPU, gradients, optimiser
    and average of the weights included. First diffusers' own forward in an eager loop, then our step with the
    reconstruction and KL terms, then with the recipe's perceptual term (the Laplacian pyramid where it has none) and
    the discriminator too. LPIPS is timed with random weights, which its speed does not depend on."""
    config = recipe_of(recipe)
    run = replace(config.run, batch_size=batch_size, workers=0, device=device)
    plain = replace(config.loss, perceptual="none", adversarial_weight=0.0)
    term = "laplacian" if config.loss.perceptual == "none" else config.loss.perceptual
    full = replace(config.loss, perceptual=term, adversarial_weight=0.5, disc_start_step=0)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.arange(batch_size))
    if isinstance(config, KLTraining):
        yield _steps("train: reconstruction + KL", "diffusers, eager", batch_size, device, calls,
                     lambda: _diffusers_step(config, images, device))
    for what, loss in (("train: reconstruction + KL", plain), (f"train: + {term} + PatchGAN", full)):
        task_config = replace(config, loss=loss, run=run, crops=replace(config.crops, size=size))
        how = "omnilatent, compiled" if device == "cuda" else "omnilatent"
        yield _steps(what, how, batch_size, device, calls, lambda c=task_config: _task_step(c, batch))


def _steps(what: str, how: str, batch_size: int, device: str, calls: int, make: Callable[[], Callable[[], Any]]) -> Row:
    """Build a step, time it, and let go of what it holds."""
    try:
        return _timed(what, how, batch_size, make(), torch.device(device), calls)
    except Exception as failure:
        return _failed(what, how, batch_size, failure)
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def _diffusers_step(config: KLTraining, images: Tensor, device: str) -> Callable[[], None]:
    model = ARCHITECTURES[type(config.model)].build_vae(config.model, None).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    wide = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step() -> None:
        x = images.to(device).float() / 127.5 - 1
        with wide:
            posterior = model.encode(x).latent_dist
            out = model.decode(posterior.sample()).sample
        loss = (out.float() - x).abs().mean() + config.loss.kl_weight * posterior.kl().mean() / x[0].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _task_step(config: AutoencoderTraining, batch: Batch) -> Callable[[], None]:
    source = StructuredImages()
    no_network = replace(config, loss=replace(config.loss, perceptual="none"))
    task = AutoencoderTask(no_network, source, source, skipped=lambda file, reason: None)
    task.perceptual = random_lpips() if config.loss.perceptual == "lpips" else perceptual_loss(config.loss.perceptual)
    task.setup(launch_fabric(config.run))
    if torch.cuda.is_available():
        batch = batch.pin_memory()
    position = iter(range(10**9))

    def step() -> None:
        task.step(batch, next(position))

    return step


def random_lpips() -> LPIPS:
    """LPIPS with a backbone of random weights: of no use but to be timed."""
    backbone = NETWORKS["vgg"].build().state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.pth"
        torch.save({f"features.{key}": tensor for key, tensor in backbone.items()}, file)
        return LPIPS("vgg", file)


def _timed(what: str, how: str, batch_size: int, call: Callable[[], Any], device: torch.device, calls: int) -> Row:
    """Median of `calls` calls after a warm-up."""
    cuda = device.type == "cuda"
    try:
        for _ in range(WARM_UP if cuda else 1):
            call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except Exception as failure:
        return _failed(what, how, batch_size, failure)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Row(what, how, batch_size, batch_size / median, 1000 * median, peak)


def _failed(what: str, how: str, batch_size: int, failure: Exception) -> Row:
    """A row that says why, for what a model or a machine cannot do; the user's mistakes are raised."""
    if isinstance(failure, UserError):
        raise failure
    reason = "out of memory" if is_out_of_memory(failure) else f"{type(failure).__name__}: {failure}"
    return Row(what, how, batch_size, failure=" ".join(reason.split())[:160])
