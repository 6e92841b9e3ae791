"""diffusers' blocks of the KL autoencoder, written for the channels-last layout: same weights, same function.

- `encode`, `decode`: the whole halves, with their 1×1 convolutions; `fits`: whether a model consists of these blocks.
- `resnet`, `attention`, `downsample`, `upsample`, `norm`: the blocks that they consist of.

What is different from diffusers is the order of the arithmetic only. A GroupNorm's statistics are those of its
channels put together, since in channels-last memory a reduction over pixels reads whole rows, where one over a
group's few channels reads crumbs. Nearest upsampling and the 3×3 convolution after it are one transposed 4×4
convolution, 16 products a value in place of 36. Attention is two matrix products while its weights are few: at one
head of 512 channels no flash kernel is faster. And nothing leaves the layout, as diffusers' shortcuts do in training
and its upsampling from 64 images on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Run = Callable[[Callable[..., Tensor], Any, Tensor], Tensor]  # (function, block, map) → map: checkpointing enters here
DENSE_TOKENS = 4096  # up to so many, attention's weights are written out


_BLOCKS = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}


def fits(vae: Any) -> bool:
    """Whether these functions compute what a diffusers model does."""
    config = vae.config
    return config["act_fn"] == "silu" and {*config["down_block_types"], *config["up_block_types"]} <= _BLOCKS


def call(function: Callable[..., Tensor], block: Any, h: Tensor) -> Tensor:
    return function(block, h)


def encode(vae: AutoencoderKL, images: Tensor, run: Run = call) -> Tensor:
    """Images `(b, 3, h, w)` in [-1, 1] → the posterior's moments `(b, 2c, h/f, w/f)`."""
    encoder = vae.encoder
    h = encoder.conv_in(images)
    for block in encoder.down_blocks:
        h = run(_down_block, block, h)
    h = run(_mid_block, encoder.mid_block, h)
    h = encoder.conv_out(F.silu(norm(encoder.conv_norm_out, h)))
    return h if vae.quant_conv is None else vae.quant_conv(h)


def decode(vae: AutoencoderKL, z: Tensor, run: Run = call) -> Tensor:
    """Un-normalised latent `(b, c, h/f, w/f)` → images `(b, 3, h, w)` in about [-1, 1]."""
    return vae.decoder.conv_out(decode_features(vae, z, run))


def decode_features(vae: AutoencoderKL, z: Tensor, run: Run = call) -> Tensor:
    """Un-normalised latent → the input of the decoder's last convolution `(b, widths[0], h, w)`."""
    decoder = vae.decoder
    h = decoder.conv_in(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    h = run(_mid_block, decoder.mid_block, h)
    for block in decoder.up_blocks:
        h = run(_up_block, block, h)
    return F.silu(norm(decoder.conv_norm_out, h))


def _down_block(block: Any, h: Tensor) -> Tensor:
    h = _resnets(block, h)
    return h if block.downsamplers is None else downsample(block.downsamplers[0], h)


def _mid_block(block: Any, h: Tensor) -> Tensor:
    h = resnet(block.resnets[0], h)
    for attend, after in zip(block.attentions, block.resnets[1:], strict=True):
        h = resnet(after, h if attend is None else attention(attend, h))
    return h


def _up_block(block: Any, h: Tensor) -> Tensor:
    h = _resnets(block, h)
    return h if block.upsamplers is None else upsample(block.upsamplers[0], h)


def _resnets(block: Any, h: Tensor) -> Tensor:
    for number, part in enumerate(block.resnets):
        h = resnet(part, h)
        if getattr(block, "attentions", None):
            h = attention(block.attentions[number], h)
    return h


def resnet(block: Any, x: Tensor) -> Tensor:
    """ResnetBlock2D: x + conv(silu(norm(conv(silu(norm(x))))))."""
    h = block.conv1(F.silu(norm(block.norm1, x)))
    h = block.conv2(F.silu(norm(block.norm2, h)))
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return (shortcut + h) / block.output_scale_factor if block.output_scale_factor != 1 else shortcut + h


def attention(block: Any, x: Tensor) -> Tensor:
    """Self-attention over all pixels `(b, c, h, w)` with its norm and its residual."""
    b, c, height, width = x.shape
    tokens = norm(block.group_norm, x).permute(0, 2, 3, 1).reshape(b, height * width, c)
    weight = torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight])
    bias = torch.cat([block.to_q.bias, block.to_k.bias, block.to_v.bias])
    heads = block.heads
    qkv = F.linear(tokens, weight, bias).view(b, -1, 3, heads, c // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if height * width <= DENSE_TOKENS:
        weights = (q * (c // heads) ** -0.5 @ k.transpose(-1, -2)).float().softmax(-1)
        mixed = weights.to(v.dtype) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    out = block.to_out[0](mixed.transpose(1, 2).reshape(b, height * width, c))
    return x + out.view(b, height, width, c).permute(0, 3, 1, 2)


def downsample(block: Any, x: Tensor) -> Tensor:
    """A 3×3 convolution of stride 2, padded at the bottom and the right."""
    return block.conv(F.pad(x, (0, 1, 0, 1)))


def upsample(block: Any, x: Tensor) -> Tensor:
    """Nearest ×2 and a 3×3 convolution in one: output 2i sees x[i−1] through w₀ and x[i] through w₁ + w₂, output
    2i + 1 sees x[i] through w₀ + w₁ and x[i+1] through w₂."""
    w = block.conv.weight.float()
    for axis in (2, 3):
        first, second, third = w.unbind(axis)
        w = torch.stack([third, second + third, first + second, first], axis)
    w = w.transpose(0, 1).to(x.dtype)
    bias = None if block.conv.bias is None else block.conv.bias.to(x.dtype)
    return F.conv_transpose2d(x, w, bias, stride=2, padding=1)


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm of `(b, c, h, w)`: the mean of a group is that of its channels' means, its variance the mean of their
    variances and the variance of their means. Without a compiler that fuses this, torch's own is faster."""
    if not torch.compiler.is_compiling():
        return layer(x)
    b, c, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(b, height * width, c).float()
    var, mean = torch.var_mean(rows, 1, correction=0)  # (b, c)
    mean, var = (part.view(b, layer.num_groups, -1) for part in (mean, var))
    centre = mean.mean(-1, keepdim=True)
    spread = (var + (mean - centre) ** 2).mean(-1, keepdim=True)
    inverse = torch.rsqrt(spread + layer.eps)
    scale = inverse * layer.weight.float().view(layer.num_groups, -1)
    shift = layer.bias.float().view(layer.num_groups, -1) - centre * scale
    normed = rows * scale.reshape(b, 1, c) + shift.reshape(b, 1, c)
    return normed.to(x.dtype).view(b, height, width, c).permute(0, 3, 1, 2)
