"""The tiny autoencoder (TAESD's architecture): diffusers' `AutoencoderTiny`, trained through one `forward`.

- `build_vae`: a `TinyConfig` → diffusers' `AutoencoderTiny`, so weights go both ways; `config_of` is the inverse.
- `TinyAutoencoder`: the module that trains, images in [-1, 1].
- `TinyCodec`, `open_checkpoint`: the codec for use, images in [0, 1].
- `TINY`: all of that as the row that training knows.

diffusers' halves take and give images in [-1, 1], though their convolutions see [0, 1]; the decoder bends its input
into (-3, 3). The latent that is encoded, normalised and stored is not yet bent. diffusers' own `forward` also rounds
the latent to 8 bits, which belongs to storing it and is no part of the model: `encode` and `decode` do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError, library
from ..codec import Codec
from ..latent import Latent, LatentSpec, Point
from .architecture import (Architecture, Autoencoder, Reconstruction, TrainedCodec, check_same_layers, continuous_spec,
                           open_trained)
from .config import TinyConfig
from .regularisers import LatentTransform, transform_latent
from .tiled import Halves, TiledCodec, tiny_halves

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def build_vae(config: TinyConfig, spec: LatentSpec | None = None) -> AutoencoderTiny:
    """diffusers' `AutoencoderTiny` of this architecture, freshly initialised; `spec` gives its scaling and shift."""
    scalar = spec is not None and len(spec.shift) == len(spec.scale) == 1
    levels = len(config.encoder_blocks)
    return library("diffusers").AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(config.encoder_width,) * levels, num_encoder_blocks=config.encoder_blocks,
        decoder_block_out_channels=(config.decoder_width,) * levels, num_decoder_blocks=config.decoder_blocks,
        scaling_factor=spec.scale[0] if scalar else 1.0, shift_factor=spec.shift[0] if scalar else 0.0,
    )


def config_of(vae: AutoencoderTiny, recipe: TinyConfig | None = None) -> TinyConfig:
    """The `TinyConfig` of a diffusers `AutoencoderTiny`; `recipe` has nothing to add.

    Raises:
        UserError: the model has layers that a tiny autoencoder of ours has not.
    """
    had = vae.config
    for half, widths in (("encoder", had.encoder_block_out_channels), ("decoder", had.decoder_block_out_channels)):
        if len(set(widths)) > 1:
            raise UserError(f"--init: this AutoencoderTiny's {half} has the widths {list(widths)}, and we train only "
                            "one width throughout: choose another model to start from.")
    config = TinyConfig(
        latent_channels=had.latent_channels, encoder_width=had.encoder_block_out_channels[0],
        decoder_width=had.decoder_block_out_channels[0], encoder_blocks=tuple(had.num_encoder_blocks),
        decoder_blocks=tuple(had.num_decoder_blocks),
    )
    with torch.device("meta"):
        check_same_layers(vae, build_vae(config))
    return config


class TinyAutoencoder(Autoencoder):
    """The tiny autoencoder that trains. Its latent is a point, so it takes no noise."""

    vae: AutoencoderTiny
    output_gain = 2.0  # the last convolution gives [0, 1]

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.decoder.layers[-1].weight

    def forward(self, images: Tensor, noise: Tensor | None = None, transform: LatentTransform | None = None,
                features: bool = False) -> Reconstruction:
        """Images `(b, 3, h, w)` in [-1, 1]; `mean` of the result is the latent, `logvar` None."""
        assert noise is None, "a tiny autoencoder has no posterior to draw from"
        z = self._through(self.vae.encoder.layers, (images + 1) / 2).float()
        *body, out = self.vae.decoder.layers
        last = self._through(body, torch.tanh(transform_latent(z, transform) / 3) * 3)
        return Reconstruction(out(last) * 2 - 1, z, None, last if features else None)

    def _through(self, layers: Iterable[nn.Module], h: Tensor) -> Tensor:
        """Not diffusers' own checkpointing, which leaves out the encoder's step from [-1, 1] to [0, 1]."""
        for layer in layers:
            residual = next(layer.children(), None) is not None  # a lone convolution has nothing to recompute
            h = self._run(layer, h) if residual else layer(h)
        return h


class TinyCodec(TiledCodec, TrainedCodec):
    """A tiny autoencoder for use. `encode` gives a `Point`."""

    module: AutoencoderTiny
    no_shift = 0.0

    def _encode(self, images: Tensor) -> Latent:
        return self._latent(self.module.encoder(images * 2 - 1))

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module.decoder(raw) / 2 + 0.5

    def _halves(self) -> Halves:
        return tiny_halves(self.module)

    def _latent(self, moments: Tensor) -> Latent:
        return Point(self.spec.normalise(moments))


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "tiny"."""
    return open_trained(TINY, path, name)


TINY = Architecture(
    kind="tiny", module_class="AutoencoderTiny", recipe=lambda _: "tiny-f8", config=TinyConfig, build_vae=build_vae,
    config_of=config_of, spec=continuous_spec, module=TinyAutoencoder, codec=TinyCodec,
    halves={"encoder": ("encoder",), "decoder": ("decoder",)},
)
