"""TAEF2: the tiny autoencoder for FLUX.2's latent space (Ollin Boer Bohan, https://github.com/madebyollin/taesd).

- `Block`, `encoder`, `decoder`: the two networks, with the published files' tensor names.
- `Taef2`: both of them; `Taef2Codec`: for use.
- `open_folder`: the folder with `taef2_encoder.safetensors` and `taef2_decoder.safetensors`.

RGB in [0, 1], 8 pixels a latent row, 32 channels, 64 wide throughout. diffusers' `AutoencoderTiny` cannot hold it,
since three blocks on either side of the latent begin with a group norm over the whole image. So the output depends
on the image's size: padding and tiling change it a little everywhere, not at the seams only.

The latent is that of FLUX.2's own 32-channel autoencoder before packing; measured on photographs it has mean 0.00
and standard deviation 0.85, so it is taken as normalised as it comes (shift 0, scale 1).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import hub
from ..errors import UserError
from ..codec import Codec, Provenance
from ..latent import Latent, LatentSpec, Point
from ..nn.tile_geometry import Layer
from ..nn.tile_layers import Pointwise, Residual
from .tiled import Halves, TiledCodec, layers_of, sequence, soft_clamp

WIDTH = 64
CHANNELS = 32
LICENCE = "MIT, (c) 2023 Ollin Boer Bohan"


class Block(nn.Module):
    """A residual block of three 3×3 convolutions; with `pool`, first a residual 1×1 bottleneck that sees the whole
    image through its group norm."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.pool: nn.Module | None = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False), nn.GroupNorm(4, 4 * WIDTH), nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:  # (b, 64, h, w) → (b, 64, h, w)
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))

    def tile_layers(self) -> list[Layer]:
        pool = [] if self.pool is None else [Residual(layers_of(self.pool))]
        return [*pool, Residual(layers_of(self.conv)), Pointwise(torch.relu_)]


class SoftClamp(nn.Module):
    """Outliers of a latent that a generator made are bent back into (-3, 3)."""

    def forward(self, z: Tensor) -> Tensor:
        return soft_clamp(z)

    def tile_layers(self) -> list[Layer]:
        return [Pointwise(soft_clamp)]


def encoder() -> nn.Sequential:
    """`(b, 3, h, w)` in [0, 1] → `(b, 32, h/8, w/8)`."""
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), Block()]
    for pool in (False, False, True):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False), *(Block(pool) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, CHANNELS, 3, padding=1))


def decoder() -> nn.Sequential:
    """`(b, 32, h/8, w/8)` → `(b, 3, h, w)`, about [0, 1]."""
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]
    for pool, blocks in ((True, 3), (False, 3), (False, 3)):
        layers += [*(Block(pool) for _ in range(blocks)), nn.Upsample(scale_factor=2),
                   nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(), nn.Conv2d(WIDTH, 3, 3, padding=1))


class Taef2(nn.Module):
    """Both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


class Taef2Codec(TiledCodec):
    """TAEF2 for use."""

    module: Taef2

    def __init__(self, module: Taef2, provenance: Provenance) -> None:
        super().__init__(module, LatentSpec(channels=CHANNELS, downsampling=8, kind="point"), provenance)

    def _encode(self, images: Tensor) -> Latent:
        return self._latent(self.module.encoder(images))

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module.decoder(raw)

    def _halves(self) -> Halves:
        return Halves(sequence(self.module.encoder), sequence(self.module.decoder))

    def _latent(self, moments: Tensor) -> Latent:
        return Point(moments)


def open_folder(path: Path, name: str) -> Codec:
    """Open the two files of the release.

    Raises:
        UserError: a file is cut short, or holds other tensors than TAEF2's.
    """
    files = [path / f"taef2_{part}.safetensors" for part in ("encoder", "decoder")]
    with torch.device("meta"):
        module = Taef2()
    for half, file in zip((module.encoder, module.decoder), files, strict=True):
        tensors, expected = hub.read_tensors([file]), half.state_dict()
        wrong = sorted(set(tensors) ^ set(expected)) or [k for k, v in tensors.items() if v.shape != expected[k].shape]
        if wrong:
            raise UserError(f"{file} is not TAEF2's (see its tensor {wrong[0]}): fetch it from madebyollin/taesd.")
        half.load_state_dict(tensors, strict=True, assign=True)
    provenance = Provenance(
        name=name, kind="taef2", weights_hash=hub.file_hash(*files), licence=LICENCE, path=str(path),
        card="Tiny autoencoder for FLUX.2's latent space by Ollin Boer Bohan (https://github.com/madebyollin/taesd).",
    )
    return Taef2Codec(module, provenance)
