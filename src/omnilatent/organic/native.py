"""The native O-VAE: an image autoencoder of lapped filters and tanh neurons, learned without gradients.

- `NativeConfig`: its sizes.
- `NativeAutoencoder`: encoder and decoder, one convolution each and one layer of neurons.
- `NativeCodec`, `open_checkpoint`: for use; checkpoints of the kind "ovae".

It is a lapped transform (Malvar 1990) with learned filters. One site of the latent stands for 8×8 pixels. The encoder's
filters are three blocks wide and overlap. The decoder sums overlapping patches, one for every channel of a site, so
there are no seams between blocks; tanh neurons that see 3×3 sites add what no linear map can.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..codec import Codec, Provenance
from ..errors import UserError
from ..hub import card_licence, file_hash, read_config
from ..latent import Latent, LatentSpec, Point

BLOCK = 8  # pixels a site, each way
PIXELS = 3 * BLOCK**2  # numbers in a block
COLOURS = 3  # leading channels whose mean over a neighbourhood is mere brightness and hue
_FLAT = 1e-2  # contrast, in standard deviations of the latent, below which a neighbourhood counts as flat


@dataclass(frozen=True)
class NativeConfig:
    """Sizes of a native O-VAE.

    Attributes:
        channels: of the latent.
        window: blocks that an encoder's filter is wide.
        context: sites that a decoded block sees, each way.
        hidden: tanh neurons of the decoder.
    """

    channels: int = 32
    window: int = 3
    context: int = 3
    hidden: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= PIXELS or self.hidden < 0:
            raise ValueError(f"channels {self.channels}, hidden {self.hidden}: expected 1 <= channels <= {PIXELS} and "
                             "hidden >= 0")
        if self.window % 2 == 0 or self.context % 2 == 0:
            raise ValueError(f"window {self.window}, context {self.context}: expected odd numbers of blocks")


class NativeAutoencoder(nn.Module):
    """Encoder and decoder. Its parameters never ask for a gradient: see native_learning.py."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        side = config.window * BLOCK
        self.analysis = _fixed(config.channels, 3, side, side)
        self.synthesis = _fixed(PIXELS, config.channels, config.context, config.context)
        self.bias = _fixed(PIXELS)
        self.spread = _fixed(config.channels)  # standard deviation of each channel, which the neurons divide by
        if config.hidden:
            self.hidden = _fixed(config.hidden, 9 * config.channels)
            self.hidden_bias = _fixed(config.hidden)
            self.output = _fixed(PIXELS, config.hidden)

    def encode(self, images: Tensor) -> Tensor:
        """Images `(b, 3, h, w)` in [0, 1], sides multiples of 8 → raw latent `(b, channels, h/8, w/8)`; beyond the
        border the last pixels are repeated."""
        margin = (self.config.window - 1) * BLOCK // 2
        return F.conv2d(around(images - 0.5, margin), self.analysis, stride=BLOCK)

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latent `(b, channels, h, w)` → images `(b, 3, 8 h, 8 w)` in about [0, 1]."""
        blocks = F.conv2d(around(raw, self.config.context // 2), self.synthesis, self.bias)
        if self.config.hidden:
            answers = self.neurons(*self.neuron_inputs(raw)) @ self.output.mT  # (b h w, 192)
            blocks = blocks + answers.view(len(raw), -1, PIXELS).mT.reshape(blocks.shape)
        return F.pixel_shuffle(blocks, BLOCK) + 0.5

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    def neuron_inputs(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """What the neurons see of each site, `(b h w, 9 channels)`, and the contrast it was divided by, `(b h w, 1)`.

        It is the site's 3×3 neighbourhood in standard deviations, the leading channels without their mean.
        """
        near = F.unfold(around(raw / self.spread.view(-1, 1, 1), 1), 3).mT.reshape(-1, raw.shape[1], 9)
        leading = near[:, :COLOURS]
        near = torch.cat([leading - leading.mean(2, keepdim=True), near[:, COLOURS:]], 1).flatten(1)
        contrast = near.square().mean(1, keepdim=True).sqrt().clamp(min=_FLAT)
        return near / contrast, contrast

    def neurons(self, inputs: Tensor, contrast: Tensor) -> Tensor:
        """contrast · tanh(W inputs + b), `(N, hidden)`: twice the contrast in a picture is twice the answer."""
        return torch.tanh(torch.addmm(self.hidden_bias, inputs, self.hidden.mT)) * contrast


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
        raise UserError(f"{path / 'config.json'} does not describe a model of the kind ovae ({failure}): restore it "
                        "from its source.") from failure
    weights, card = path / "model.safetensors", path / "README.md"
    if not weights.exists():
        raise UserError(f"{weights} is missing: the checkpoint is incomplete; restore it from its source.")
    with torch.device("meta"):
        module = NativeAutoencoder(config)
    try:
        module.load_state_dict(load_file(weights), strict=True, assign=True)
    except (RuntimeError, SafetensorError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"{weights} does not hold the model of its config.json ({reason}): restore it.") from failure
    provenance = Provenance(name=name, kind="ovae", weights_hash=file_hash(weights), licence=card_licence(path),
                            path=str(path), card=card.read_text(encoding="utf-8") if card.exists() else "")
    return NativeCodec(module, spec, provenance)


def around(maps: Tensor, margin: int) -> Tensor:
    """Maps `(b, c, h, w)` with `margin` rows and columns more on each side, the outermost repeated."""
    return F.pad(maps, (margin,) * 4, mode="replicate") if margin else maps


def _fixed(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)
