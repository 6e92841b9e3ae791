"""Our image codecs on images too large for their network, tile by tile and exact up to rounding (nn/tiles.py).

- `TiledCodec`: a codec whose two halves are known as layers. It turns to tiles by itself: see its `tile`.
- `Halves`: both halves as blocks of layers, images in [0, 1] on both ends.
- `kl_halves`, `tiny_halves`: diffusers' `AutoencoderKL` (and `AutoencoderKLFlux2`) and `AutoencoderTiny` as such.
- `sequence`: any modules as blocks; `layers_of` one. A module of ours may say itself what it is: `tile_layers()`.

A module with a part that is not known here, such as another kind of block, has no halves: its codec runs whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec import Codec
from ..latent import Latent, Size
from ..nn.tile_geometry import Layer
from ..nn.tile_layers import Conv, Norm, Pointwise, Residual, Upsample
from ..nn.tile_maps import Picture
from ..nn.tile_plan import MOST_BYTES, Block, Whole, plan
from ..nn.tiles import run_tiled

FREE_SHARE = 0.8  # of a GPU's free memory


class UnknownLayer(Exception):
    """A module that is not known as layers."""


@dataclass(frozen=True)
class Halves:
    """The encoder, images in [0, 1] → what `TiledCodec._latent` takes, and the decoder, raw latent → images about
    [0, 1]."""

    encoder: list[Block]
    decoder: list[Block]


class TiledCodec(Codec):
    """A codec that runs large images tile by tile, in a fraction of the memory; the result is that of the whole image
    up to rounding.

    Attributes:
        tile: side of a tile in pixels, a multiple of `spec.downsampling`. Images of more than 4 · tile² pixels run in
            tiles. None: always whole.
    """

    tile: int | None = 512

    @abstractmethod
    def _halves(self) -> Halves:
        """Both halves as layers, over the module's present weights.

        Raises:
            UnknownLayer: the module has a part that is not known as layers.
        """

    @abstractmethod
    def _latent(self, moments: Tensor) -> Latent:
        """What the encoder's layers give `(b, c, h/f, w/f)` → latent."""

    def _raw(self, raw: Tensor) -> Tensor:
        """Un-normalised latent → what the decoder's layers take."""
        return raw

    def _in_tiles(self, size: Size) -> bool:
        """Whether images of this size run tile by tile."""
        if self.tile is None:
            return False
        if self.tile < 1 or self.tile % self.spec.downsampling:
            raise ValueError(f"the tile of {self.label} is {self.tile} pixels; it must be a positive multiple of its "
                             f"downsampling, {self.spec.downsampling}, or None")
        if size[0] * size[1] <= 4 * self.tile**2:
            return False
        try:
            self._halves()
        except UnknownLayer:
            return False
        return True

    def _encode_any(self, images: Tensor) -> Latent:
        if not self._in_tiles((images.shape[-2], images.shape[-1])):
            return super()._encode_any(images)
        height, width = (n + -n % self.spec.downsampling for n in images.shape[-2:])
        return self._latent(self._run(self._halves().encoder, images, (height, width), self._floats, self.dtype))

    def _decode_any(self, raw: Tensor) -> Tensor:
        if not self._in_tiles((raw.shape[-2] * self.spec.downsampling, raw.shape[-1] * self.spec.downsampling)):
            return super()._decode_any(raw)
        raw = self._raw(raw)
        return self._run(self._halves().decoder, raw, (raw.shape[-2], raw.shape[-1]), lambda part: part, torch.float32)

    def _run(
        self, blocks: Sequence[Block], x: Tensor, size: Size, convert: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """`x` `(b, c, h, w)`, padded to `size` and converted tile by tile, through the blocks, image by image."""
        assert self.tile is not None
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        segments = plan(blocks, x.shape[1], size, self.tile, itemsize, self._room())
        last = segments[-1]
        out = torch.empty(len(x), last.out_channels, *last.out_size, dtype=dtype, device=self.device)
        for image, result in zip(x.split(1), out.split(1), strict=True):
            run_tiled(segments, Picture(image, size, convert), result)
        return out

    def _room(self) -> int:
        """Bytes for maps: on a GPU not more than most of what is free."""
        if self.device.type != "cuda":
            return MOST_BYTES
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return min(MOST_BYTES, round(FREE_SHARE * (torch.cuda.mem_get_info(self.device)[0] + cached)))


# -- diffusers' models as layers ---------------------------------------------------------------------------------------


def kl_halves(vae: Any) -> Halves:
    """`AutoencoderKL` and `AutoencoderKLFlux2`: their encoders and decoders are of one class."""
    encoder, decoder = vae.encoder, vae.decoder
    ending: list[nn.Module] = [] if vae.quant_conv is None else [vae.quant_conv]
    beginning: list[nn.Module] = [] if vae.post_quant_conv is None else [vae.post_quant_conv]
    return Halves(
        [[Pointwise(_to_signed), *layers_of(encoder.conv_in)], *sequence([*encoder.down_blocks, encoder.mid_block]),
         [*_of_all([encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, *ending])]],
        [[*_of_all([*beginning, decoder.conv_in])], *sequence([decoder.mid_block, *decoder.up_blocks]),
         [*_of_all([decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]), Pointwise(_to_unit)]],
    )


def tiny_halves(vae: Any) -> Halves:
    """`AutoencoderTiny`. Its convolutions see images in [0, 1] and a latent bent into (-3, 3)."""
    encoder = sequence(vae.encoder.layers)
    decoder = sequence(vae.decoder.layers)
    return Halves(encoder, [[Pointwise(soft_clamp), *decoder[0]], *decoder[1:]])


def sequence(modules: Iterable[nn.Module]) -> list[Block]:
    """Modules, one after the other, as blocks: a function joins the block before it and upsampling the one after."""
    blocks: list[Block] = []
    for module in modules:
        for block in _blocks_of(module):
            last = blocks[-1] if blocks else None
            joins = not isinstance(block, Whole) and all(isinstance(layer, Pointwise) for layer in block)
            waits = isinstance(last, list) and isinstance(last[-1], Upsample)
            if (joins or waits) and isinstance(last, list) and isinstance(block, list):
                last += block
            else:
                blocks.append(block)
    return blocks


def layers_of(module: nn.Module) -> list[Layer]:
    """The layers of a module that never needs the whole map at once.

    Raises:
        UnknownLayer: it is none of those known here.
    """
    if hasattr(module, "tile_layers"):
        return module.tile_layers()
    kind = type(module).__name__
    if kind not in _LAYERS:
        raise UnknownLayer(kind)
    return _LAYERS[kind](module)


def conv(module: nn.Conv2d, before: tuple[int, int] | None = None, after: tuple[int, int] | None = None) -> Conv:
    """A convolution; its own padding unless another is given."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise UnknownLayer(f"Conv2d padded by {module.padding_mode}")
    return Conv(module.weight, module.bias, module.stride, module.padding if before is None else before,
                module.padding if after is None else after, module.dilation, module.groups)


def norm(module: nn.GroupNorm) -> Norm:
    return Norm(module.num_groups, module.weight, module.bias, module.eps)


def soft_clamp(z: Tensor) -> Tensor:
    """What `DecoderTiny` does first."""
    return torch.tanh(z / 3) * 3


def _to_signed(images: Tensor) -> Tensor:
    return images * 2 - 1


def _to_unit(images: Tensor) -> Tensor:
    return images / 2 + 0.5


def _of_all(modules: Iterable[nn.Module]) -> list[Layer]:
    return [layer for module in modules for layer in layers_of(module)]


def _blocks_of(module: nn.Module) -> list[Block]:
    kind = type(module).__name__
    if kind == "Attention":
        return [Whole(module)]
    if kind == "UNetMidBlock2D":
        first, *others = module.resnets
        pairs = zip(module.attentions, others, strict=True)
        return sequence([first, *(part for pair in pairs for part in pair if part is not None)])
    if kind in ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"):
        parts: list[nn.Module] = []
        for number, resnet in enumerate(module.resnets):
            parts += [resnet, module.attentions[number]] if kind.startswith("Attn") else [resnet]
        samplers = module.downsamplers if "Down" in kind else module.upsamplers
        return sequence([*parts, *(samplers or [])])
    return [layers_of(module)]


def _resnet(block: Any) -> list[Layer]:
    """ResnetBlock2D without time embedding."""
    plain = (block.time_emb_proj is None and block.upsample is None and block.downsample is None
             and block.time_embedding_norm in ("default", "group"))
    if not plain:
        raise UnknownLayer("ResnetBlock2D with a time embedding or resampling")
    body = _of_all([block.norm1, block.nonlinearity, block.conv1, block.norm2, block.nonlinearity, block.conv2])
    shortcut = [] if block.conv_shortcut is None else layers_of(block.conv_shortcut)
    scale = block.output_scale_factor
    return [Residual(body, shortcut), *([] if scale == 1 else [Pointwise(lambda h: h / scale)])]


def _downsample(module: Any) -> list[Layer]:
    """Downsample2D with a convolution, which without padding of its own is padded at the bottom and the right."""
    if not module.use_conv or module.norm is not None:
        raise UnknownLayer("Downsample2D that pools or normalises")
    return [conv(module.conv, (0, 0), (1, 1)) if module.padding == 0 else conv(module.conv)]


def _upsample(module: Any) -> list[Layer]:
    if module.use_conv_transpose or module.norm is not None or not (module.interpolate and module.name == "conv"):
        raise UnknownLayer("Upsample2D that does not repeat pixels")
    return [Upsample(2), *(layers_of(module.conv) if module.use_conv else [])]


def _plain_upsample(module: nn.Upsample) -> list[Layer]:
    if module.mode != "nearest" or module.size is not None or module.scale_factor != int(module.scale_factor):
        raise UnknownLayer("Upsample that does not repeat pixels")
    return [Upsample(int(module.scale_factor))]


def _tiny_block(block: Any) -> list[Layer]:
    body = _of_all(block.conv)
    return [Residual(body, layers_of(block.skip)), *layers_of(block.fuse)]


_LAYERS: dict[str, Callable[[Any], list[Layer]]] = {
    "Conv2d": lambda module: [conv(module)],
    "GroupNorm": lambda module: [norm(module)],
    "Identity": lambda module: [],
    # All of these stand behind a layer that makes a new tensor.
    "SiLU": lambda module: [Pointwise(partial(F.silu, inplace=True))],
    "ReLU": lambda module: [Pointwise(torch.relu_)],
    "GELU": lambda module: [Pointwise(module)],
    "Mish": lambda module: [Pointwise(module)],
    "Upsample": _plain_upsample,
    "Sequential": lambda module: _of_all(module),
    "ResnetBlock2D": _resnet,
    "Downsample2D": _downsample,
    "Upsample2D": _upsample,
    "AutoencoderTinyBlock": _tiny_block,
}
