"""The Gaussian autoencoder: small grey pictures, an encoder whose filters are sums of oriented Gaussians.

- `GaussianAutoencoder`: the module; `GaussianConv2d` (nn/gaussian_conv.py) is its layer.
- `GaussianCodec`, `open_checkpoint`: for use; checkpoints of the kind "gaussian".

    model = GaussianAutoencoder(in_ch=1, latent_dim=32)
    reconstruction, latent = model(images)               # (b, 1, 28, 28) in [0, 1], (b, 32)
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..codec import Codec
from ..errors import UserError
from ..hub import provenance_of, read_config, read_tensors
from ..latent import Latent, LatentSpec, Point
from ..nn.gaussian_conv import GaussianConv2d
from ..training.config import from_json
from .gaussian_config import KERNEL, SIDE, SIDES, GaussianConfig
from .loading import fill

__all__ = ["KIND", "GaussianAutoencoder", "GaussianCodec", "GaussianConv2d", "open_checkpoint"]

KIND = "gaussian"
DARK = -2.0  # what the last layer's bias begins with: 0.12 after the sigmoid, about a digit picture's mean


class GaussianAutoencoder(nn.Module):
    """Encoder and decoder; pictures of 28×28 only.

    Args:
        in_ch: channels of the pictures.
        latent_dim: numbers of the latent.
        config: the architecture; its channels and latent are those given here.
    """

    def __init__(self, in_ch: int = 1, latent_dim: int = 32, config: GaussianConfig | None = None) -> None:
        super().__init__()
        self.config = replace(config or GaussianConfig(), in_channels=in_ch, latent_dim=latent_dim)
        widths, decoder = self.config.encoder_widths, self.config.decoder_widths
        # Nothing bends what enters or leaves the latent's linear maps: without these two activations 280 steps reach
        # an MSE of 0.0079 instead of 0.0096 (lr 6e-3), with Gaussians and without.
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((in_ch, *widths)):
            layers += [self._convolution(inputs, outputs), nn.GELU()]
        features = widths[-1] * SIDES[len(widths)] ** 2
        self.encoder = nn.Sequential(*layers[:-1], nn.Flatten(), nn.Linear(features, latent_dim))
        sides = SIDES[len(decoder) :: -1]  # from the smallest map up to 28
        layers = [nn.Linear(latent_dim, decoder[0] * sides[0] ** 2), nn.Unflatten(1, (decoder[0], sides[0], sides[0]))]
        for (inputs, outputs), (small, large) in zip(pairwise((*decoder, in_ch)), pairwise(sides), strict=True):
            size = 4 if large == 2 * small else 3  # 4 → 7 takes a kernel of 3
            layers += [nn.ConvTranspose2d(inputs, outputs, size, stride=2, padding=1), nn.GELU()]
        layers[-1] = nn.Sigmoid()
        nn.init.constant_(layers[-2].bias, DARK)
        self.decoder = nn.Sequential(*layers)

    @classmethod
    def of(cls, config: GaussianConfig) -> GaussianAutoencoder:
        """The model that a configuration describes."""
        return cls(config.in_channels, config.latent_dim, config)

    def encode(self, images: Tensor) -> Tensor:
        """Images `(b, in_ch, 28, 28)` in [0, 1] → latent `(b, latent_dim)`.

        Raises:
            ValueError: the images are of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (self.config.in_channels, SIDE, SIDE):
            raise ValueError(f"images have shape (b, {self.config.in_channels}, {SIDE}, {SIDE}); got "
                             f"{tuple(images.shape)}: resize them, or use omnilatent.load's codec, which tiles")
        return self.encoder(images)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent `(b, latent_dim)` → images `(b, in_ch, 28, 28)` in [0, 1]."""
        return self.decoder(latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(b, in_ch, 28, 28)` in [0, 1] → (reconstruction of that shape, latent `(b, latent_dim)`)."""
        latent = self.encode(images)
        return self.decode(latent), latent

    def _convolution(self, inputs: int, outputs: int) -> nn.Module:
        if self.config.plain:
            return nn.Conv2d(inputs, outputs, KERNEL, stride=2, padding=KERNEL // 2)
        return GaussianConv2d(inputs, outputs, KERNEL, self.config.num_gaussians, stride=2, padding=KERNEL // 2)


class GaussianCodec(Codec):
    """A Gaussian autoencoder for use. `encode` gives a `Point` `(b, latent_dim, h/28, w/28)`: larger pictures are
    tiles of 28×28, each encoded by itself."""

    module: GaussianAutoencoder

    def _encode(self, images: Tensor) -> Latent:
        rows, columns = images.shape[-2] // SIDE, images.shape[-1] // SIDE
        tiles = images.unflatten(-1, (columns, SIDE)).unflatten(-3, (rows, SIDE))  # (b, c, rows, 28, columns, 28)
        z = self.module.encode(tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
        return Point(self.spec.normalise(z.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 2)))

    def _decode(self, raw: Tensor) -> Tensor:
        rows, columns = raw.shape[-2:]
        tiles = self.module.decode(raw.permute(0, 2, 3, 1).flatten(0, 2)).unflatten(0, (-1, rows, columns))
        return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (b, c, rows · 28, columns · 28)


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "gaussian".

    Raises:
        UserError: its configuration describes no such model, or the weights are missing, damaged or another model's.
    """
    saved = read_config(path)
    try:
        config, spec = from_json(GaussianConfig, saved["model"]), LatentSpec.from_json(saved["spec"])
    except (KeyError, TypeError, ValueError) as failure:
        raise UserError(f"{path / 'config.json'} does not describe a model of the kind {KIND} ({failure}): restore it "
                        "from its source.") from failure
    weights = path / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} is missing: the checkpoint is incomplete; take another step-N/ of its run.")
    with torch.device("meta"):
        module = GaussianAutoencoder.of(config)
    fill(module, read_tensors([weights]), weights)
    provenance = provenance_of(path, name, KIND)
    return GaussianCodec(module, spec, provenance)
