"""The native O-VAE: an image autoencoder of lapped filters and layers of tanh neurons, learned without gradients.

- `NativeConfig`: its sizes.
- `NativeAutoencoder`: the encoder is one convolution, the decoder a `GridDecoder`.
- `NativeCodec`, `open_checkpoint`: for use; checkpoints of the kind "ovae".

It is a lapped transform (Malvar 1990) with learned filters. One site of the latent stands for 8×8 pixels. The encoder's
filters are some blocks wide and overlap, and so does what a channel adds to the decoded picture, so there are no seams
between blocks. The decoder's neurons, layer over layer, add what no linear map can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..codec import Codec
from ..errors import UserError
from ..hub import provenance_of, read_config
from ..latent import Latent, LatentSpec, Point
from .grids import GridDecoder, GridStack

KIND = "ovae"
BLOCK = 8  # pixels a site, each way
PIXELS = 3 * BLOCK**2  # numbers in a block


@dataclass(frozen=True)
class NativeConfig:
    """Sizes of a native O-VAE.

    Attributes:
        channels: of the latent.
        window: blocks that an encoder's filter is wide.
        reach: sites that a layer of the decoder sees, each way.
        context: numbers of each neighbour's guess that a later layer sees.
        sizes: neurons and outputs of each of the decoder's layers.
        adds: whether these add to each other.
    """

    channels: int = 32
    window: int = 3
    reach: int = 3
    context: int = 48
    sizes: Sequence[tuple[int, int]] = ((256, PIXELS),)
    adds: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= PIXELS:
            raise ValueError(f"channels {self.channels}: expected 1 to {PIXELS}")
        if self.window % 2 == 0 or self.reach % 2 == 0:
            raise ValueError(f"window {self.window}, reach {self.reach}: expected odd numbers of blocks")


class NativeAutoencoder(nn.Module):
    """Encoder and decoder. How they are learned stands in native_learning.py."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        side = config.window * BLOCK
        self.analysis = nn.Parameter(torch.zeros(config.channels, 3, side, side), requires_grad=False)
        stack = GridStack(config.channels, config.sizes, config.reach, config.context, config.adds)
        self.decoder = GridDecoder(stack, BLOCK)

    def encode(self, images: Tensor) -> Tensor:
        """Images `(b, 3, h, w)` in [0, 1], sides multiples of 8 → raw latent `(b, channels, h/8, w/8)`."""
        return analysed(images, self.analysis)

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latent `(b, channels, h, w)` → images `(b, 3, 8 h, 8 w)` in about [0, 1]."""
        return self.decoder(raw)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


def analysed(images: Tensor, filters: Tensor) -> Tensor:
    """What filters `(n, 3, side, side)` say of every block of images `(b, 3, h, w)` in [0, 1] and its surroundings:
    `(b, n, h/8, w/8)`; beyond the border the last pixels are repeated."""
    margin = (filters.shape[-1] - BLOCK) // 2
    return F.conv2d(F.pad(images - 0.5, (margin,) * 4, mode="replicate"), filters, stride=BLOCK)


class NativeCodec(Codec):
    """A native O-VAE for use. `encode` gives a `Point`."""

    module: NativeAutoencoder

    def _encode(self, images: Tensor) -> Latent:
        return Point(self.spec.normalise(self.module.encode(images)))

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module.decode(raw)


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "ovae".

    Raises:
        UserError: its configuration describes no such model, or the weights are missing, damaged or another model's.
    """
    saved = read_config(path)
    try:
        config, spec = NativeConfig(**saved["model"]), LatentSpec.from_json(saved["spec"])
    except (KeyError, TypeError, ValueError) as failure:
        raise UserError(f"{path / 'config.json'} does not describe a model of the kind {KIND} ({failure}): restore it "
                        "from its source.") from failure
    weights = path / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} is missing: the checkpoint is incomplete; restore it from its source.")
    module = NativeAutoencoder(config)
    try:
        module.load_state_dict({key: value.float() for key, value in load_file(weights).items()}, strict=True)
    except (RuntimeError, SafetensorError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"{weights} does not hold the model of its config.json ({reason}): restore it.") from failure
    provenance = provenance_of(path, name, KIND)
    return NativeCodec(module, spec, provenance)
