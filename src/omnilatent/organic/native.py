"""The native O-VAE: an image autoencoder of lapped filters and gated detail, learned without gradients.

- `NativeConfig`: its sizes.
- `NativeAutoencoder`: encoder and decoder, a few convolutions and one matrix a site.
- `NativeCodec`, `open_checkpoint`: for use; checkpoints of the kind "ovae".

It is a lapped transform (Malvar 1990) whose filters are learned, with a backward-adaptive choice of basis (classified
transform coding; Goyal 2001, section on adaptive transforms). One site stands for 8×8 pixels.

1. *Analysis*: filters three blocks wide give `bands` numbers a site.
2. The first `base` of them are kept everywhere. Their 3×3 neighbourhood, without its mean colour and its contrast, says
   which of `classes` directions it is most parallel to, up to sign. The decoder knows the base, so it knows the class.
3. *Detail*: the other bands, projected on the principal components that they have within this class.
4. *Synthesis*: the decoder expands the detail again and sums overlapping patches; tanh neurons that see the
   neighbourhood add what no linear map can.
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
COLOURS = 3  # leading bands whose mean over a neighbourhood is mere brightness and hue, which does not tell the class
_CHUNK = 4096  # sites whose class bases are gathered at a time


@dataclass(frozen=True)
class NativeConfig:
    """Sizes of a native O-VAE.

    Attributes:
        channels: of the latent.
        base: leading channels that mean the same at every site.
        bands: outputs of the analysis filters, of which `base` are kept and the rest become `channels - base`.
        classes: bases of the detail; 0 if and only if `base` = `channels` = `bands`.
        window: blocks that an analysis filter is wide.
        context: sites that a synthesised block sees, each way.
        hidden: tanh neurons of the decoder.
    """

    channels: int = 32
    base: int = 20
    bands: int = 64
    classes: int = 64
    window: int = 3
    context: int = 3
    hidden: int = 0

    def __post_init__(self) -> None:
        gated = self.classes > 0
        if not (1 <= self.base <= self.channels <= self.bands <= 3 * BLOCK**2) or self.hidden < 0 or self.classes < 0:
            raise ValueError(f"base {self.base}, channels {self.channels}, bands {self.bands}, classes {self.classes}, "
                             f"hidden {self.hidden}: expected 1 <= base <= channels <= bands <= {3 * BLOCK**2}, "
                             "classes and hidden >= 0")
        if gated != (self.base < self.channels) or (not gated and self.bands != self.channels):
            raise ValueError(f"classes {self.classes}, base {self.base}, channels {self.channels}, bands {self.bands}: "
                             "with classes, base < channels; without, base = channels = bands")
        if self.window % 2 == 0 or self.context % 2 == 0:
            raise ValueError(f"window {self.window}, context {self.context}: expected odd numbers of blocks")

    @property
    def detail(self) -> int:
        """Channels that depend on the class."""
        return self.channels - self.base


class NativeAutoencoder(nn.Module):
    """Encoder and decoder. Its parameters never ask for a gradient: see native_learning.py."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        side, c = config.window * BLOCK, config
        self.analysis = _fixed(c.bands, 3, side, side)
        self.synthesis = _fixed(3 * BLOCK**2, c.bands, c.context, c.context)
        self.bias = _fixed(3 * BLOCK**2)
        self.base_spread = _fixed(c.base)  # standard deviation of each base channel, which the gate divides by
        if c.classes:
            self.directions = _fixed(c.classes, 9 * c.base)  # unit vectors
            self.components = _fixed(c.classes, c.bands - c.base, c.detail)  # orthonormal columns
            self.spread = _fixed(c.classes, c.detail)  # standard deviation along each
        if c.hidden:
            self.hidden = _fixed(c.hidden, c.channels, 3, 3)
            self.hidden_bias = _fixed(c.hidden)
            self.output = _fixed(3 * BLOCK**2, c.hidden)

    def encode(self, images: Tensor) -> Tensor:
        """Images `(b, 3, h, w)` in [0, 1], sides multiples of 8 → raw latent `(b, channels, h/8, w/8)`: the base in
        the images' units, the detail of about unit variance."""
        bands = self.analyse(images)
        if not self.config.classes:
            return bands
        base = self.config.base
        chosen = self.classify(bands[:, :base])
        detail = _per_class(_rows(bands[:, base:]), self.components, chosen) / self.spread[chosen]
        return torch.cat([bands[:, :base], _maps(detail, bands)], 1)

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latent `(b, channels, h, w)` → images `(b, 3, 8 h, 8 w)` in about [0, 1]."""
        blocks = F.conv2d(around(self.expand(raw), self.config.context // 2), self.synthesis, self.bias)
        if self.config.hidden:
            blocks = blocks + self.residual(raw)
        return F.pixel_shuffle(blocks, BLOCK) + 0.5

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    def analyse(self, images: Tensor) -> Tensor:
        """Images in [0, 1] → `(b, bands, h/8, w/8)`; beyond the border the last pixels are repeated."""
        margin = (self.config.window - 1) * BLOCK // 2
        return F.conv2d(around(images - 0.5, margin), self.analysis, stride=BLOCK)

    def expand(self, raw: Tensor) -> Tensor:
        """Raw latent → the bands that it stands for, `(b, bands, h, w)`."""
        if not self.config.classes:
            return raw
        base = raw[:, : self.config.base]
        chosen = self.classify(base)
        detail = _rows(raw[:, self.config.base :]) * self.spread[chosen]
        return torch.cat([base, _maps(_per_class(detail, self.components.mT, chosen), raw)], 1)

    def classify(self, base: Tensor) -> Tensor:
        """Base channels `(b, base, h, w)` → the class of each site, `(b h w,)` int64, sites in reading order."""
        return (self.gate_inputs(base) @ self.directions.mT).abs().argmax(1)

    def gate_inputs(self, base: Tensor) -> Tensor:
        """Base channels `(b, base, h, w)` → the direction of each site's neighbourhood, `(b h w, 9 base)`."""
        scaled = base / self.base_spread.view(-1, 1, 1)
        around_site = _rows(F.unfold(around(scaled, 1), 3).unflatten(2, base.shape[-2:]))
        around_site = around_site.view(-1, base.shape[1], 9)
        leading = around_site[:, :COLOURS]
        return F.normalize(torch.cat([leading - leading.mean(2, keepdim=True), around_site[:, COLOURS:]], 1).flatten(1),
                           eps=1e-2)


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


def _rows(maps: Tensor) -> Tensor:
    """`(b, c, h, w)` → `(b h w, c)`."""
    return maps.flatten(2).mT.flatten(0, 1)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """`(b h w, c)` → `(b, c, h, w)`, b, h and w as `like` has them."""
    b, _, h, w = like.shape
    return rows.view(b, h * w, -1).mT.reshape(b, -1, h, w)


def _per_class(rows: Tensor, matrices: Tensor, chosen: Tensor) -> Tensor:
    """Row n times the matrix of its class: `(N, i)`, `(K, i, o)`, `(N,)` → `(N, o)`."""
    parts = zip(rows.split(_CHUNK), chosen.split(_CHUNK), strict=True)
    return torch.cat([torch.bmm(part[:, None], matrices[which])[:, 0] for part, which in parts])
