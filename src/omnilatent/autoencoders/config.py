"""The frozen configuration of image autoencoders and of their training. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from ..training.config import OptimizerConfig, RunConfig


@dataclass(frozen=True)
class KLConfig:
    """The architecture of latent diffusion's KL autoencoder (Rombach et al. 2022, arXiv 2112.10752).

    The downsampling is 2^(len(widths) − 1): each level but the last halves the image.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level."""
    layers: int = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latent, 1 to 64."""
    attention: tuple[int, ...] = ()
    """Levels with self-attention, named by their downsampling: 8 is the level at an eighth of the image's side."""
    mid_attention: bool = True
    """Self-attention in the middle block, at the lowest resolution."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    quant_convs: bool = True
    """1×1 convolutions around the latent."""
    variational: bool = True
    """False: a plain autoencoder, the mean is the latent and no noise is drawn."""

    def __post_init__(self) -> None:
        if not 1 <= self.latent_channels <= 64:
            raise ValueError(f"--latent-channels is {self.latent_channels}; possible are 1 to 64")
        odd = [w for w in self.widths if w % self.norm_groups]
        if odd:
            raise ValueError(f"--widths holds {odd[0]}, which --norm-groups {self.norm_groups} does not divide")
        levels = [2**level for level in range(len(self.widths))]
        unknown = [a for a in self.attention if a not in levels]
        if unknown:
            raise ValueError(f"--attention {unknown[0]} is no level of this model; its levels are {levels}")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class LossConfig:
    """What an autoencoder minimises. All terms are means over pixel values, so their weights mean the same at
    every image size; KL is summed over the latent and divided by the number of pixel values, as in LDM."""

    l1: float = 1.0
    """Weight of |x̂ − x|, images in [-1, 1]."""
    l2: float = 0.0
    """Weight of (x̂ − x)²."""
    kl_weight: float = 1e-6
    """Weight of KL(q ‖ N(0, I))."""
    perceptual: Literal["none", "lpips", "laplacian"] = "lpips"
    """lpips: the true network, whose weight file must be there; laplacian: pyramid L1, needs no download."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual term."""
    adversarial_weight: float = 0.5
    """Weight of the discriminator's opinion, on top of the adaptive weight. 0: no discriminator."""
    disc_start_step: int = 50_000
    """Step at which the discriminator starts."""
    disc_width: int = 64
    """Channels of its first layer."""
    disc_layers: int = 3
    """Its depth: three layers see patches of 70×70 pixels."""


@dataclass(frozen=True)
class CropConfig:
    """How a training picture is cut from a photo."""

    size: int = 256
    """Side of the square crops, in pixels; a multiple of the downsampling."""
    flip: bool = True
    """Mirror half of them."""
    min_scale: float = 1.0
    """Below 1: crops of a random share of the short side, from this up to 1, resized to `size`."""
    max_pixels: int = 2**28
    """Pictures with more pixels are skipped, counted and listed."""
    held_out: float = 0.1
    """Share of the images kept for validation where no --val is given."""
    validation_images: int = 100
    """Most images a validation looks at."""


@dataclass(frozen=True)
class AutoencoderTraining:
    """A recipe's resolved configuration: the model, its loss, its optimiser, its crops and the run."""

    recipe: tyro.conf.Suppress[str]
    model: KLConfig = field(default_factory=KLConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    task: tyro.conf.Suppress[str] = "omnilatent.autoencoders.task:AutoencoderTask"
    """The class that trains this configuration."""
