"""The KL autoencoder: built from diffusers' blocks, trained through one `forward`, used as a codec.

- `build_vae`: a `KLConfig` → diffusers' `AutoencoderKL`, so weights go both ways; `config_of` is the inverse.
- `KLAutoencoder`: the module that trains, images in [-1, 1].
- `KLCodec`, `open_checkpoint`: the codec for use, images in [0, 1]; `ConvCodec`: what it shares with tokenizers.
- `KL`: all of that as the row that training knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError, library
from ..codec import Codec
from ..latent import DiagonalGaussian, Latent, LatentSpec, Point
from . import blocks
from .architecture import (Architecture, Autoencoder, Reconstruction, TrainedCodec, check_same_layers, continuous_spec,
                           open_trained)
from .config import KLConfig
from .regularisers import LatentTransform, transform_latent
from .tiled import Halves, TiledCodec, kl_halves

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0  # of a posterior, as in LDM and diffusers


def build_vae(config: KLConfig, spec: LatentSpec | None = None) -> AutoencoderKL:
    """diffusers' `AutoencoderKL` of this architecture, freshly initialised; `spec` gives its scaling factor."""
    attends = [2**level in config.attention for level in range(len(config.widths))]
    scalar = spec is not None and len(spec.shift) == len(spec.scale) == 1
    return library("diffusers").AutoencoderKL(
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        block_out_channels=config.widths, layers_per_block=config.layers, latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups, mid_block_add_attention=config.mid_attention,
        use_quant_conv=config.quant_convs, use_post_quant_conv=config.quant_convs, sample_size=256,
        scaling_factor=spec.scale[0] if scalar else 1.0,
        shift_factor=spec.shift[0] if scalar and spec.shift[0] else None,
    )


def config_of(vae: AutoencoderKL, recipe: KLConfig | None = None) -> KLConfig:
    """The `KLConfig` of a diffusers `AutoencoderKL`; whether it is variational is said by `recipe`.

    Raises:
        UserError: the model holds blocks that a KL autoencoder of ours has not.
    """
    had = vae.config
    kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    if any(kind not in kinds for kind in had.down_block_types) or had.use_quant_conv != had.use_post_quant_conv:
        raise UserError(f"--init: blocks of the kind {', '.join(had.down_block_types)} are not trainable here.")
    config = KLConfig(
        widths=tuple(had.block_out_channels), layers=had.layers_per_block, latent_channels=had.latent_channels,
        attention=tuple(2**level for level, kind in enumerate(had.down_block_types) if kinds[kind]),
        mid_attention=had.mid_block_add_attention, norm_groups=had.norm_num_groups, quant_convs=had.use_quant_conv,
        variational=recipe is None or recipe.variational,
    )
    with torch.device("meta"):
        check_same_layers(vae, build_vae(config))
    return config


class KLAutoencoder(Autoencoder):
    """The KL autoencoder that trains."""

    vae: AutoencoderKL

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.decoder.conv_out.weight

    def forward(self, images: Tensor, noise: Tensor | None, transform: LatentTransform | None = None,
                features: bool = False) -> Reconstruction:
        """Images `(b, 3, h, w)` in [-1, 1], `noise` `(b, c, h/f, w/f)` drawn from N(0, I).

        Without noise the decoder gets the posterior's mean.
        """
        mean, logvar = self.posterior(images)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        last = self.features(transform_latent(z, transform))
        return Reconstruction(self.vae.decoder.conv_out(last), mean, logvar, last if features else None)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, the latter within `LEAST_LOGVAR` and `MOST_LOGVAR`."""
        moments = blocks.encode(self.vae, images, self._run)
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR)

    def features(self, z: Tensor) -> Tensor:
        """Un-normalised latent → the input of the decoder's last convolution `(b, widths[0], h, w)`."""
        return blocks.decode_features(self.vae, z, self._run)


class ConvCodec(TiledCodec, TrainedCodec):
    """A codec whose module has the KL autoencoder's encoder and decoder; `_latent` says what stands between them."""

    def _encode(self, images: Tensor) -> Latent:
        doubled = _two_if_single(images, self.spec.downsampling)
        return self._latent(blocks.encode(self.module, doubled * 2 - 1)[: len(images)])

    def _halves(self) -> Halves:
        return kl_halves(self.module)

    def _decode(self, raw: Tensor) -> Tensor:
        return blocks.decode(self.module, _two_if_single(raw, 1))[: len(raw)] / 2 + 0.5


class KLCodec(ConvCodec):
    """A KL autoencoder for use. `encode` gives a `DiagonalGaussian`, or a `Point` for a plain autoencoder."""

    module: AutoencoderKL

    def to_diffusers(self) -> nn.Module:
        """As for every trained codec. diffusers always draws from a posterior; a plain autoencoder's log-variance was
        never trained, so its export states the least that diffusers knows: every draw is the mean."""
        model = super().to_diffusers()
        if self.spec.kind == "point":
            last = model.encoder.conv_out if model.quant_conv is None else model.quant_conv
            with torch.no_grad():
                last.weight[self.spec.channels :].zero_()
                last.bias[self.spec.channels :].fill_(LEAST_LOGVAR)
        return model

    def _latent(self, moments: Tensor) -> Latent:
        mean, logvar = moments.chunk(2, dim=1)
        if self.spec.kind == "point":
            return Point(self.spec.normalise(mean))
        return DiagonalGaussian(mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR), self.spec)


def _two_if_single(x: Tensor, side: int) -> Tensor:
    """A lone `(1, c, side, side)` twice, anything else as it is.

    Where a model has as many norm groups as channels, torch's group_norm refuses the single value a group of a 1×1
    latent, though its result, zero, is defined.
    """
    return x.expand(2, -1, -1, -1) if x.shape[0] == 1 and x.shape[-2:] == (side, side) else x


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "kl"."""
    return open_trained(KL, path, name)


KL = Architecture(
    kind="kl", module_class="AutoencoderKL", recipe=lambda _: "kl-f8-small", config=KLConfig, build_vae=build_vae,
    config_of=config_of, spec=continuous_spec, module=KLAutoencoder, codec=KLCodec,
    halves={"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")},
)
