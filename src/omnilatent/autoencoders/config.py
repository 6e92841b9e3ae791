"""The frozen configuration of image autoencoders and of their training. Nothing here imports torch.

- `KLConfig`, `TinyConfig`: the architectures; `ConvConfig`: what KL autoencoders and tokenizers share.
- `LossConfig`, `CropConfig`: what is minimised, and on which crops.
- `KLTraining`, `TinyTraining`: a recipe's whole configuration; a class for each architecture, so that a command
  line shows the options of its own model and a saved run comes back with its own model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from ..errors import UserError
from ..training.config import OptimizerConfig, RunConfig, check_least

LEAST_SPECTRUM = 8  # latent positions a side that have radial bands to speak of, as for the spectrum's slope


@dataclass(frozen=True)
class ConvConfig:
    """The encoder and decoder of latent diffusion's autoencoders (Rombach et al. 2022, arXiv 2112.10752).

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

    def __post_init__(self) -> None:
        _check_latent_channels(self.latent_channels)
        _check_least("--layers", self.layers)
        _check_least("--norm-groups", self.norm_groups)
        if not self.widths:
            raise ValueError("--widths names no level; give the channels of at least one")
        odd = [w for w in self.widths if w < 1 or w % self.norm_groups]
        if odd:
            raise ValueError(f"--widths holds {odd[0]}, which is no positive multiple of --norm-groups "
                             f"{self.norm_groups}")
        levels = [2**level for level in range(len(self.widths))]
        unknown = [a for a in self.attention if a not in levels]
        if unknown:
            raise ValueError(f"--attention {unknown[0]} is no level of this model; its levels are {levels}")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class KLConfig(ConvConfig):
    """The architecture of latent diffusion's KL autoencoder (Rombach et al. 2022, arXiv 2112.10752).

    The downsampling is 2^(len(widths) − 1): each level but the last halves the image.
    """

    quant_convs: bool = True
    """1×1 convolutions around the latent."""
    variational: bool = True
    """False: a plain autoencoder, the mean is the latent and no noise is drawn."""


@dataclass(frozen=True)
class TinyConfig:
    """The architecture of TAESD (Ollin Boer Bohan, https://github.com/madebyollin/taesd): residual blocks of plain
    convolutions, one width throughout each half, no norms and no attention; deterministic.

    The downsampling is 2^(len(encoder_blocks) − 1).
    """

    latent_channels: int = 4
    """Channels of the latent, 1 to 64."""
    encoder_width: int = 64
    """Channels of every layer of the encoder."""
    decoder_width: int = 64
    """Channels of every layer of the decoder."""
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Residual blocks of each level of the encoder, from the image's size down."""
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Residual blocks of each level of the decoder, from the latent's size up."""

    def __post_init__(self) -> None:
        _check_latent_channels(self.latent_channels)
        _check_least("--encoder-width", self.encoder_width)
        _check_least("--decoder-width", self.decoder_width)
        for option, blocks in (("--encoder-blocks", self.encoder_blocks), ("--decoder-blocks", self.decoder_blocks)):
            if not blocks:
                raise ValueError(f"{option} names no level; give the blocks of at least one")
            _check_least(option, min(blocks))
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(f"--encoder-blocks has {len(self.encoder_blocks)} levels and --decoder-blocks "
                             f"{len(self.decoder_blocks)}; images keep their size only with as many in both")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.encoder_blocks) - 1)

    @property
    def variational(self) -> bool:
        """Never: there is no posterior, so no noise is drawn and there is no KL term."""
        return False


def _check_latent_channels(channels: int) -> None:
    if not 1 <= channels <= 64:
        raise ValueError(f"--latent-channels is {channels}; possible are 1 to 64")


def _check_least(option: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{option} has {value}; the least is 1")


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
    disc_ramp: int = 0
    """Steps from there on over which its opinion grows to its whole weight."""
    disc_width: int = 64
    """Channels of its first layer."""
    disc_layers: int = 3
    """Its depth: three layers see patches of 70×70 pixels."""
    scale_equivariance: float = 0.0
    """Share of the steps that shrink the latent, decode it and compare with the image shrunk likewise (EQ-VAE,
    Kouzelis et al. 2025, arXiv 2502.09509: ‖D(τ E(x)) − τ x‖; there 0.5 with the rotation's)."""
    rotation_equivariance: float = 0.0
    """The same with the latent turned by 90°, 180° or 270°; with equal shares both happen in the same steps."""
    spectrum_weight: float = 0.0
    """Weight of (log p − log q)², mean over channels and radial bands: p the latent's share of power in a band, q the
    downsampled image's (why: Skorokhodov et al. 2025, arXiv 2502.14831). The term is 4.4 for white noise, 1 to 1.4 for
    the bundled model on photos, 0.1 for the three colours themselves."""

    def __post_init__(self) -> None:
        check_least(self, 0, "l1", "l2", "kl_weight", "perceptual_weight", "adversarial_weight", "disc_start_step", "disc_ramp",
                    "scale_equivariance", "rotation_equivariance", "spectrum_weight")
        check_least(self, 1, "disc_width", "disc_layers")
        if not (self.l1 or self.l2 or (self.perceptual != "none" and self.perceptual_weight)):
            raise ValueError("--l1, --l2 and --perceptual leave nothing to compare the image by; give one of them a "
                             "weight")
        for name in ("scale_equivariance", "rotation_equivariance"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; a share of the steps is at "
                                 "most 1")

    @property
    def disc_least_side(self) -> int:
        """The smallest height and width that the discriminator has an opinion on: each strided layer halves them, and
        the two that follow take one row each."""
        return 3 * 2**self.disc_layers

    @property
    def least_side(self) -> int:
        """The smallest height and width on which every term that is on is defined."""
        sides = [1]
        if self.adversarial_weight:
            sides.append(self.disc_least_side)
        if self.perceptual == "lpips" and self.perceptual_weight:
            sides.append(16)  # VGG halves it four times
        return max(sides)


def shrunk_sides(side: int) -> tuple[int, ...]:
    """The sides that scale equivariance shrinks a latent of `side` positions to: few, so that compiled shapes are."""
    return tuple(round(side * share) for share in (0.75, 0.5))


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

    def __post_init__(self) -> None:
        for name in ("size", "max_pixels", "validation_images"):
            _check_least(f"--{name.replace('_', '-')}", getattr(self, name))
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"--min-scale is {self.min_scale}; possible are numbers above 0, at most 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is {self.held_out}; possible are numbers between 0 and 1")


@dataclass(frozen=True)
class AutoencoderTraining:
    """A recipe's resolved configuration: the model, its loss, its optimiser, its crops and the run."""

    recipe: tyro.conf.Suppress[str]
    model: KLConfig | TinyConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    task: tyro.conf.Suppress[str] = "omnilatent.autoencoders.task:AutoencoderTask"
    """The class that trains this configuration."""

    def check(self, init: str | None) -> None:
        """Refuse, without torch, what does not go together; the architecture of `init` is not known before it loads.

        Raises:
            UserError: the crops are no multiple of the downsampling, or too small for the discriminator.
        """
        size, loss = self.crops.size, self.loss
        if init is None:
            self.check_grid()
        if loss.adversarial_weight and size < loss.disc_least_side:
            raise UserError(f"--size {size} is too small for --disc-layers {loss.disc_layers}, which needs "
                            f"{loss.disc_least_side} pixels: enlarge the crops, or take fewer layers.")

    def check_grid(self) -> None:
        """Refuse crops that the latent's grid is not made for.

        Raises:
            UserError: the crops are no multiple of the downsampling, or too small for a regulariser.
        """
        size, f, loss = self.crops.size, self.model.downsampling, self.loss
        if size % f:
            raise UserError(f"--size {size} is not a multiple of the model's downsampling {f}.")
        if loss.spectrum_weight and size < LEAST_SPECTRUM * f:
            raise UserError(f"--size {size} is too small for --spectrum-weight, which needs {LEAST_SPECTRUM} latent "
                            f"positions a side: enlarge the crops to at least {LEAST_SPECTRUM * f} pixels.")
        smallest = min(shrunk_sides(size // f)) * f
        if loss.scale_equivariance and smallest < loss.least_side:
            raise UserError(f"--size {size} is too small for --scale-equivariance, which shrinks the crops to "
                            f"{smallest} pixels where the loss needs {loss.least_side}: enlarge the crops.")


@dataclass(frozen=True)
class KLTraining(AutoencoderTraining):
    """A recipe's resolved configuration: a KL autoencoder, its loss, its optimiser, its crops and the run."""

    model: KLConfig = field(default_factory=KLConfig)


@dataclass(frozen=True)
class TinyTraining(AutoencoderTraining):
    """A recipe's resolved configuration: a tiny autoencoder, its loss, its optimiser, its crops and the run."""

    model: TinyConfig = field(default_factory=TinyConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(kl_weight=0.0))

    def __post_init__(self) -> None:
        if self.loss.kl_weight:
            raise ValueError(f"--kl-weight is {self.loss.kl_weight:g}, but a tiny autoencoder has no posterior; leave "
                             "it at 0")
