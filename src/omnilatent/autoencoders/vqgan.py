"""The tokenizer: the KL autoencoder's encoder and decoder around any quantizer (VQGAN, Esser et al. 2021, arXiv 2012.09841).

- `VQGAN`, `build_vae`: the layers; encoder and decoder are diffusers' blocks.
- `VQGANAutoencoder`: the module that trains, images in [-1, 1].
- `VQGANCodec`, `open_checkpoint`: the codec for use, images in [0, 1]; `encode` gives `Codes`.
- `TOKENIZER`: all of that as the row that training knows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import Codec
from ..errors import UserError
from ..latent import Codes, Latent, LatentSpec
from ..quantizers import build_quantizer
from ..training.config import from_json
from . import blocks
from .architecture import Architecture, Autoencoder, Reconstruction, open_trained
from .kl import ConvCodec
from .kl import build_vae as build_kl
from .regularisers import LatentTransform, transform_latent
from .vqgan_config import MODELS, VQGANConfig


class VQGAN(nn.Module):
    """encoder → quant_conv → quantizer → post_quant_conv → decoder."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        width, whole = config.latent_channels, build_kl(config.backbone())
        self.config = config
        self.encoder, self.decoder = whole.encoder, whole.decoder
        last = whole.encoder.conv_out  # which has a mean and a variance for each channel
        self.encoder.conv_out = nn.Conv2d(last.in_channels, width, last.kernel_size, padding=last.padding)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        with torch.device("cpu"):  # on meta it could neither draw its codes nor read its clock
            seed = {"seed": int(torch.randint(2**31, ()))} if hasattr(config.quantizer, "seed") else {}
            self.quantizer = build_quantizer(config.kind, width, **{**config.arguments(), **seed})


def build_vae(config: VQGANConfig, spec: LatentSpec | None = None) -> VQGAN:
    """Freshly initialised; the quantizer's seed is drawn from torch's generator as the weights are."""
    return VQGAN(config)


def config_of(vae: VQGAN, recipe: VQGANConfig) -> VQGANConfig:
    """The configuration of a model to start from.

    Raises:
        UserError: its quantizer is of another kind than the recipe's, or has other codes than were asked for.
    """
    if vae.config.kind != recipe.kind:
        raise UserError(f"--init: this tokenizer's quantizer is {vae.config.kind}, and the recipe trains {recipe.kind}: take "
                        f"the recipe {vae.config.kind}.")
    own = vae.config
    asked = {"--codes": (recipe.codebook_size, own.codes), "--codebooks": (recipe.num_codebooks, own.num_codebooks),
             "--residual-stages": (recipe.depth, own.depth)}
    if recipe.kind == "fsq":
        asked["--levels"] = (recipe.quantizer.levels, own.quantizer.levels)
    for option, (wished, there) in asked.items():
        if wished not in (None, 1, there):
            raise UserError(f"--init: this tokenizer has {option} {there}, and {option} {wished} was asked for: leave the option out, "
                            "or --init.")
    return replace(vae.config, quantizer=recipe.quantizer) if recipe.kind != "fsq" else vae.config


def latent_spec(config: VQGANConfig) -> LatentSpec:
    """The latent without its normalisation."""
    return LatentSpec(config.latent_channels, config.downsampling, "codes", codebook_size=config.codes,
                      num_codebooks=config.books)


class VQGANAutoencoder(Autoencoder):
    """The tokenizer that trains.

    Its quantizer sees the parts of an accumulated batch one after the other: codes that are moving averages, and the
    counts by which dead codes are known, then move several times a step, and LGQ's usage is that of each part.
    """

    vae: VQGAN

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.decoder.conv_out.weight

    def schedule(self, progress: float) -> dict[str, float]:
        quantizer = self.vae.quantizer
        return quantizer.schedule(progress) if quantizer.training else {}  # one kept by --freeze stays as it is

    def before_compile(self) -> None:
        """The quantizer's own kernels, draws and clock are no graph: the halves around it are compiled."""
        self._quantize = torch.compiler.disable(self._quantize)

    def forward(self, images: Tensor, noise: Tensor | None = None, transform: LatentTransform | None = None,
                features: bool = False) -> Reconstruction:
        """Images `(b, 3, h, w)` in [-1, 1]; `mean` of the result is the quantized latent, `logvar` None."""
        assert noise is None, "a tokenizer has no posterior to draw from"
        z, losses = self._quantize(blocks.encode(self.vae, images, self._run))
        last = blocks.decode_features(self.vae, transform_latent(z, transform), self._run)
        return Reconstruction(self.vae.decoder.conv_out(last), z, None, last if features else None, losses)

    def _quantize(self, vectors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.vae.quantizer(vectors)
        return result.quantized, result.losses


class VQGANCodec(ConvCodec):
    """A tokenizer for use."""

    module: VQGAN

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes `(b, h, w)`, or `(b, books, h, w)` of several codebooks → their normalised vectors `(b, c, h, w)`.

        Raises:
            UserError: a code that is not in the codebook.
            ValueError: no integers, or another number of axes or books.
        """
        spec = self.spec
        if indices.numel() and not indices.is_floating_point():
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= spec.codebook_size:
                raise UserError(f"{self.label} has the codes 0 to {spec.codebook_size - 1}, and the indices hold "
                                f"{low if low < 0 else high}: decode them with the tokenizer that made them.")
        return spec.normalise(self.module.quantizer.indices_to_vectors(indices.to(self.device)))

    def parameter_count(self) -> int:
        """The numbers of encoder, decoder and codebook, whether that is learned as a parameter or not."""
        quantizer = self.module.quantizer
        around = super().parameter_count() - sum(p.numel() for p in quantizer.parameters())
        return around + quantizer.parameter_count()

    def compile(self) -> Codec:
        if self.device.type == "cuda":
            self._latent = torch.compiler.disable(self._latent)  # the quantizer's own kernels are no graph
        return super().compile()

    def to_diffusers(self) -> nn.Module:
        raise UserError(f"{self.label} cannot be exported: diffusers has no class for a tokenizer with the quantizer "
                        f"{self.module.config.kind}.")

    def _latent(self, moments: Tensor) -> Latent:
        result = self.module.quantizer(moments.float())  # in bf16 the vectors would not be those that `lookup` gives
        known = moments.isfinite().all(1, keepdim=True)  # the nearest code to NaN would hide that float16 overflowed
        return Codes(result.indices, self.spec.normalise(torch.where(known, result.quantized, torch.nan)))


def _saved_config(**fields: Any) -> VQGANConfig:
    return from_json(MODELS[fields["kind"]], fields)


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "vqgan"."""
    return open_trained(TOKENIZER, path, name)


TOKENIZER = Architecture(
    kind="vqgan", module_class="VQGAN", recipe=lambda vae: f"{vae.config.kind}-small", config=_saved_config, build_vae=build_vae,
    config_of=config_of, spec=latent_spec, module=VQGANAutoencoder, codec=VQGANCodec,
    halves={"encoder": ("encoder", "quant_conv", "quantizer"), "decoder": ("decoder", "post_quant_conv")},
)
