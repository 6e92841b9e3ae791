"""What the trainable image autoencoders have in common. The continuous ones are diffusers' classes, so weights go both ways.

- `Architecture`: one row a kind: how it is built, trained, used, recognised in --init, and frozen by half.
- `Autoencoder`, `Reconstruction`: the module that trains, images in [-1, 1], and what its forward gives.
- `TrainedCodec`: the codec for use, images in [0, 1], which `to_diffusers` copies to a plain diffusers model.
- `open_trained`: a checkpoint folder into its codec.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError, library
from ..hub import provenance_of, read_config, read_tensors
from ..codec import Codec, Provenance
from ..latent import LatentSpec
from .config import KLConfig, TinyConfig
from .loading import fill
from .regularisers import LatentTransform

# Entries of a diffusers configuration that change no layer: the latent's normalisation, and hints for pipelines.
NO_LAYER = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_magnitude", "latent_shift",
            "sample_size", "force_upcast"}


class Reconstruction(NamedTuple):
    """What a training forward gives: `images` `(b, 3, h, w)` in about [-1, 1], the posterior's `mean` and
    `logvar` `(b, c, h/f, w/f)` (without a posterior the latent and None), and on request `features`, the input of the
    decoder's last convolution; a quantizer's named, weighted `losses`.

    Fabric copies what a forward returns to fp32 under mixed precision. The features are as large as an image of 128
    channels (kl-f8, 16 of 256²: 0.5 GB, beside the 0.25 GB in bf16 that the backward pass keeps anyway), so they are
    returned only while the discriminator's adaptive weight asks for them."""

    images: Tensor
    mean: Tensor
    logvar: Tensor | None
    features: Tensor | None
    losses: dict[str, Tensor] | None = None


class Autoencoder(nn.Module, ABC):
    """The trained module. `forward` is the whole of it, so that compilation, autocast and DDP see every layer.

    Attributes:
        vae: the model, of diffusers or ours, whose weights are what is saved.
        output_gain: images = `output_gain` · last convolution + a constant.
    """

    output_gain = 1.0

    def __init__(self, vae: Any, checkpointing: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.checkpointing = checkpointing

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution."""

    @abstractmethod
    def forward(self, images: Tensor, noise: Tensor | None, transform: LatentTransform | None = None,
                features: bool = False) -> Reconstruction:
        """Images `(b, 3, h, w)` in [-1, 1]; `noise` `(b, c, h/f, w/f)` of the posterior, None for its mean;
        `transform`, what happens to the latent before it is decoded; whether to return the `features`."""

    def schedule(self, progress: float) -> dict[str, float]:
        """Set what changes along a run by the share of it that is done, 0 … 1, and return it by name, for the log. Here:
        nothing."""
        return {}

    def before_compile(self) -> None:
        """Take out what the compiler shall leave alone. Here: nothing."""

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)`, its activations computed anew in the backward pass where memory is to be saved."""
        if self.checkpointing and self.training:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


class TrainedCodec(Codec):
    """One of our autoencoders for use.

    Attributes:
        no_shift: what the diffusers class writes for a latent that is not shifted.
    """

    no_shift: float | None = None

    def to_diffusers(self) -> nn.Module:
        """The same weights as a plain diffusers model, its scaling and shift factor set to our normalisation.

        It is a copy: what is done to it does not change this codec.

        Raises:
            UserError: the latent is normalised a channel, which the diffusers class cannot state.
        """
        if len(self.spec.scale) > 1 or len(self.spec.shift) > 1:
            raise UserError(
                f"{self.label} is normalised a channel, which diffusers' {type(self.module).__name__} cannot state."
            )
        shift = self.spec.shift[0] or self.no_shift
        model = copy.deepcopy(self.module)
        model.register_to_config(scaling_factor=self.spec.scale[0], shift_factor=shift)
        return model


@dataclass(frozen=True)
class Architecture:
    """One kind of trainable autoencoder.

    Attributes:
        kind: of its checkpoints, a key of `hub.OPENERS`.
        module_class: the name of the class that `build_vae` builds.
        recipe: model → the name of a recipe that trains such a one, for messages.
        config: its saved fields → its frozen configuration.
        build_vae: (configuration, spec or None) → model, freshly initialised.
        config_of: (model, the recipe's configuration) → its configuration; what is no matter of layers comes from the
            recipe.
        spec: configuration → its latent, not yet normalised.
        module: (model, checkpointing) → the module that trains.
        codec: (model, spec, provenance) → the codec.
        halves: "encoder" and "decoder" → the model's parts that each consists of.
    """

    kind: str
    module_class: str
    recipe: Callable[[nn.Module], str]
    config: Callable[..., Any]
    build_vae: Callable[[Any, LatentSpec | None], Any]
    config_of: Callable[[Any, Any], Any]
    spec: Callable[[Any], LatentSpec]
    module: Callable[[Any, bool], Autoencoder]
    codec: Callable[[Any, LatentSpec, Provenance], TrainedCodec]
    halves: dict[str, tuple[str, ...]]


def check_same_layers(vae: Any, rebuilt: Any) -> None:
    """Refuse a model that has something which our configuration cannot say, such as another activation.

    Args:
        vae: the diffusers model to start from.
        rebuilt: what our configuration of it builds.
    """
    for key, ours in rebuilt.config.items():
        if key.startswith("_") or key in NO_LAYER:
            continue
        theirs = vae.config.get(key)
        if json.dumps(theirs) != json.dumps(ours):  # a tuple is a list once it was on disk
            raise UserError(f"--init: this {type(vae).__name__} has {key} {theirs}, and we train only {ours}: choose "
                            "another model to start from.")


def continuous_spec(config: KLConfig | TinyConfig) -> LatentSpec:
    """The latent of an autoencoder without codes, not yet normalised."""
    return LatentSpec(config.latent_channels, config.downsampling, "gaussian" if config.variational else "point")


def open_trained(architecture: Architecture, path: Path, name: str) -> Codec:
    """Open a checkpoint folder of ours.

    Raises:
        UserError: its configuration describes no such model, or the weights are missing, damaged or another model's.
    """
    saved = read_config(path)
    try:
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in saved["model"].items()}
        config, spec = architecture.config(**fields), LatentSpec.from_json(saved["spec"])
    except (KeyError, TypeError, ValueError) as failure:
        raise UserError(f"{path / 'config.json'} does not describe a model of the kind {architecture.kind} "
                        f"({failure}): restore it from its source.") from failure
    weights = path / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} is missing: the checkpoint is incomplete; take another step-N/ of its run.")
    library("diffusers").AutoencoderKL  # imported here: no module's constants belong on meta  # noqa: B018
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # a quantizer draws its codes whatever the device
        vae = architecture.build_vae(config, spec)
    fill(vae, read_tensors([weights]), weights)
    provenance = provenance_of(path, name, architecture.kind)
    return architecture.codec(vae, spec, provenance)
