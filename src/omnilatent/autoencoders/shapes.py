"""An autoencoder's configuration from the shapes of its tensors (diffusers' names).

- `kl`, `flux2`, `tiny`, `qwen_image`, `hunyuan_image`: one function a diffusers class.
- `Shapes`: name → shape, with a sentence for a tensor that is not there.

What shapes cannot tell (scaling factors, group counts) is in `configs/*.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .key_names import positions

Config = dict[str, Any]


class Shapes(dict[str, tuple[int, ...]]):
    """Name → shape of the tensors of one file."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
        super().__init__(shapes)
        self.source = source

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise UserError(
            f"{self.source} lacks the tensor {name} (diffusers' name), without which its autoencoder cannot be built: "
            "fetch the file again, or give the complete one."
        )

    def count(self, pattern: str) -> int:
        """How many things are numbered by the pattern's group; gaps count, so that they are found missing later."""
        return max(positions(self, pattern), default=-1) + 1


def _levels(shapes: Shapes, way: str) -> list[int]:
    """The width of each level of an encoder ("down") or a decoder ("up"), in the order they are computed."""
    half = "encoder" if way == "down" else "decoder"
    levels = shapes.count(rf"{half}\.{way}_blocks\.(\d+)\.")
    if not levels:
        shapes[f"{half}.{way}_blocks.0.resnets.0.conv1.weight"]
    return [shapes[f"{half}.{way}_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]


def kl(shapes: Shapes) -> Config:
    """`AutoencoderKL`: widths, layers, attention at which levels, 1×1 convolutions around the latent or not."""
    widths = _levels(shapes, "down")
    attentive = positions(shapes, r"encoder\.down_blocks\.(\d+)\.attentions\.")
    attentive_up = positions(shapes, r"decoder\.up_blocks\.(\d+)\.attentions\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1], "block_out_channels": widths,
        "layers_per_block": shapes.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": [
            "AttnDownEncoderBlock2D" if i in attentive else "DownEncoderBlock2D" for i in range(len(widths))],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if i in attentive_up else "UpDecoderBlock2D" for i in range(len(widths))],
        "use_quant_conv": "quant_conv.weight" in shapes, "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in shapes),
        "scaling_factor": 1.0,  # unless the table knows it; diffusers' own default is SD 1's
    }


def flux2(shapes: Shapes) -> Config:
    """`AutoencoderKLFlux2`: as `kl`, with a decoder of its own width and a batch norm over packed latents."""
    config = kl(shapes)
    del config["scaling_factor"]
    packed = shapes["bn.running_mean"][0] // config["latent_channels"]
    return {**config, "patch_size": [math.isqrt(packed)] * 2,
            "decoder_block_out_channels": _levels(shapes, "up")[::-1]}


def tiny(shapes: Shapes) -> Config:
    """`AutoencoderTiny`: stages of blocks, each begun (encoder) or ended (decoder) by a convolution."""
    config: Config = {"in_channels": shapes["encoder.layers.0.weight"][1],
                      "latent_channels": shapes["decoder.layers.0.weight"][1]}
    for half in ("encoder", "decoder"):
        last = shapes.count(rf"{half}\.layers\.(\d+)\.") - 1
        convolutions = [i for i in range(last + 1) if f"{half}.layers.{i}.weight" in shapes]
        blocks = [i for i in range(last + 1) if f"{half}.layers.{i}.conv.0.weight" in shapes]
        pairs = list(zip(convolutions, convolutions[1:], strict=False))
        config[f"num_{half}_blocks"] = [sum(a < i < b for i in blocks) for a, b in pairs]
        config[f"{half}_block_out_channels"] = [
            shapes[f"{half}.layers.{a if half == 'encoder' else b}.weight"][0 if half == "encoder" else 1]
            for a, b in pairs]
    return {**config, "out_channels": shapes[f"decoder.layers.{last}.weight"][0]}


def qwen_image(shapes: Shapes) -> Config:
    """`AutoencoderKLQwenImage`: the encoder is one flat list of residual blocks with resamplings between levels."""
    base, channels = shapes["encoder.conv_in.weight"][:2]
    multiples, widths, temporal, layers, first = [], [], [], 0, True
    for i in range(shapes.count(r"encoder\.down_blocks\.(\d+)\.")):
        if f"encoder.down_blocks.{i}.resample.1.weight" in shapes:
            multiples.append(widths[-1] // base if widths else 1)
            temporal.append(f"encoder.down_blocks.{i}.time_conv.weight" in shapes)
            first = False
        else:
            widths.append(shapes[f"encoder.down_blocks.{i}.conv1.weight"][0])
            layers += first
    if not widths:
        shapes["encoder.down_blocks.0.conv1.weight"]
    z = shapes["decoder.conv_in.weight"][1]
    return {"base_dim": base, "z_dim": z, "dim_mult": [*multiples, widths[-1] // base], "num_res_blocks": layers,
            "temperal_downsample": temporal, "input_channels": channels,
            "latents_mean": [0.0] * z, "latents_std": [1.0] * z}  # unless the table of configurations knows them


def hunyuan_image(shapes: Shapes) -> Config:
    """`AutoencoderKLHunyuanImage`: one flat list again; a resampling has one convolution, `conv`."""
    widths: list[int] = []
    layers = halvings = 0
    level_ended = True
    matching = True
    for i in range(shapes.count(r"encoder\.down_blocks\.(\d+)\.")):
        resampling = f"encoder.down_blocks.{i}.conv.weight"
        if resampling in shapes:
            halvings, level_ended = halvings + 1, True
            out = 4 * shapes[resampling][0]
            following = shapes[f"encoder.down_blocks.{i + 1}.conv1.weight"]
            matching = matching and out == following[0]
            continue
        width = shapes[f"encoder.down_blocks.{i}.conv1.weight"][0]
        if level_ended:
            widths.append(width)
        layers += len(widths) == 1
        level_ended = False
    return {"in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1], "block_out_channels": widths,
            "layers_per_block": layers, "spatial_compression_ratio": 2**halvings,
            "scaling_factor": 1.0, "sample_size": 384,  # the latter only matters for diffusers' own tiling
            "downsample_match_channel": matching, "upsample_match_channel": matching}
