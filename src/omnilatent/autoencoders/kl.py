"""The KL autoencoder: built from diffusers' blocks, trained through one `forward`, used as a codec.

- `build_vae`: a `KLConfig` → diffusers' `AutoencoderKL`, so weights go both ways; `config_of` is the inverse.
- `KLAutoencoder`: the module that trains, images in [-1, 1].
- `KLCodec`, `open_checkpoint`: the codec for use, images in [0, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError, library
from ..hub import card_licence, file_hash, read_config
from ..latent import Codec, DiagonalGaussian, Latent, LatentSpec, Point, Provenance
from .config import KLConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


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
        scaling_factor=spec.scale[0] if scalar else 1.0, shift_factor=spec.shift[0] if scalar and spec.shift[0] else None,
    )


def config_of(vae: nn.Module) -> KLConfig:
    """The `KLConfig` of a diffusers `AutoencoderKL`.

    Raises:
        UserError: the model is of another class or holds blocks that a KL autoencoder of ours has not.
    """
    if type(vae).__name__ != "AutoencoderKL":
        raise UserError(f"--init takes a KL autoencoder; this one is a {type(vae).__name__}.")
    had = vae.config
    kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    if any(kind not in kinds for kind in had.down_block_types) or had.use_quant_conv != had.use_post_quant_conv:
        raise UserError(f"--init: blocks of the kind {', '.join(had.down_block_types)} are not trainable here.")
    return KLConfig(
        widths=tuple(had.block_out_channels), layers=had.layers_per_block, latent_channels=had.latent_channels,
        attention=tuple(2**level for level, kind in enumerate(had.down_block_types) if kinds[kind]),
        mid_attention=had.mid_block_add_attention, norm_groups=had.norm_num_groups, quant_convs=had.use_quant_conv,
    )


class Reconstruction(NamedTuple):
    """What a training forward gives: `images` `(b, 3, h, w)` in about [-1, 1], the posterior's `mean` and
    `logvar` `(b, c, h/f, w/f)`, and `features`, the input of the decoder's last convolution."""

    images: Tensor
    mean: Tensor
    logvar: Tensor
    features: Tensor


class KLAutoencoder(nn.Module):
    """The trained module. `forward` is the whole of it, so that compilation, autocast and DDP see every layer."""

    def __init__(self, vae: AutoencoderKL, checkpointing: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.checkpointing = checkpointing

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.decoder.conv_out.weight

    def forward(self, images: Tensor, noise: Tensor | None) -> Reconstruction:
        """Images `(b, 3, h, w)` in [-1, 1], `noise` `(b, c, h/f, w/f)` drawn from N(0, I).

        Without noise the decoder gets the posterior's mean.
        """
        mean, logvar = self.posterior(images)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        features = self.features(z)
        return Reconstruction(self.vae.decoder.conv_out(features), mean, logvar, features)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, the latter within [-30, 20] as in LDM."""
        encoder = self.vae.encoder
        h = encoder.conv_in(images)
        for block in encoder.down_blocks:
            h = self._run(block, h)
        h = self._run(encoder.mid_block, h)
        moments = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(h)))
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def features(self, z: Tensor) -> Tensor:
        """Un-normalised latent → the input of the decoder's last convolution `(b, widths[0], h, w)`."""
        decoder = self.vae.decoder
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        h = self._run(decoder.mid_block, decoder.conv_in(z))
        for block in decoder.up_blocks:
            h = self._run(block, h)
        return decoder.conv_act(decoder.conv_norm_out(h))

    def _run(self, block: nn.Module, h: Tensor) -> Tensor:
        return checkpoint(block, h, use_reentrant=False) if self.checkpointing and self.training else block(h)


class KLCodec(Codec):
    """A KL autoencoder for use. `encode` gives a `DiagonalGaussian`, or a `Point` for a plain autoencoder."""

    module: AutoencoderKL

    def _encode(self, images: Tensor) -> Latent:
        moments = self.module.encoder(images * 2 - 1)
        if self.module.quant_conv is not None:
            moments = self.module.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        if self.spec.kind == "point":
            return Point(self.spec.normalise(mean))
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0), self.spec)

    def _decode(self, raw: Tensor) -> Tensor:
        if self.module.post_quant_conv is not None:
            raw = self.module.post_quant_conv(raw)
        return self.module.decoder(raw) / 2 + 0.5

    def to_diffusers(self) -> AutoencoderKL:
        """The same weights as a plain diffusers model, its scaling and shift factor set to our normalisation."""
        if len(self.spec.scale) > 1 or len(self.spec.shift) > 1:
            raise UserError(f"{self.label} is normalised a channel, which diffusers' AutoencoderKL cannot state.")
        self.module.register_to_config(scaling_factor=self.spec.scale[0], shift_factor=self.spec.shift[0] or None)
        return self.module


def open_checkpoint(path: Path, name: str) -> KLCodec:
    """Open a checkpoint folder of kind "kl"."""
    saved = read_config(path)
    fields: dict[str, Any] = {**saved["model"], "widths": tuple(saved["model"]["widths"]),
                              "attention": tuple(saved["model"]["attention"])}
    config, spec = KLConfig(**fields), LatentSpec.from_json(saved["spec"])
    weights = path / "model.safetensors"
    vae = build_vae(config, spec)
    load_weights(vae, weights)
    card = path / "README.md"
    provenance = Provenance(name=name, kind="kl", weights_hash=file_hash(weights), licence=card_licence(path),
                            path=str(path), card=card.read_text(encoding="utf-8") if card.exists() else "")
    return KLCodec(vae, spec, provenance)


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a .safetensors file strictly, keeping its floating point type.

    Raises:
        UserError: the file is missing, unreadable, or of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except FileNotFoundError as failure:
        raise UserError(f"{file} is missing: the checkpoint is incomplete; take another step-N/ of its run.") from failure
    except SafetensorError as failure:
        raise UserError(f"{file} is damaged ({failure}): copy it again from its source.") from failure
    dtype = next(iter(tensors.values())).dtype
    try:
        module.to(dtype).load_state_dict(tensors, strict=True)
    except RuntimeError as failure:
        raise UserError(f"{file} does not fit the architecture in its config.json: {str(failure)[:200]}") from failure

