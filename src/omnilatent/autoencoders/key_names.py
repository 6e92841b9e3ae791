"""Tensor names of the autoencoders in the wild → diffusers' names.

- `modern`: diffusers' own older names of the attention's parts.
- `from_ldm`: latent-diffusion's (Stable Diffusion, SD3, FLUX.1, FLUX.2).
- `from_hunyuan`: the original Hunyuan-Image's; they look like latent-diffusion's, but number the decoder upwards.
- `from_wan`: the original Wan 2.1's, which Qwen-Image shares.
- `from_taesd`: TAESD's, which are positions in an `nn.Sequential`.

Each takes all the names at once, since some positions depend on how many layers there are, and returns old → new.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Names = dict[str, str]
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_HUNYUAN_ATTENTION = {**_LDM_ATTENTION, "norm": "norm", "proj_out": "proj"}
_WAN_PARTS = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
              "shortcut": "conv_shortcut"}
_WAN_WHOLE = {"encoder.conv1": "encoder.conv_in", "decoder.conv1": "decoder.conv_in", "conv1": "quant_conv",
              "conv2": "post_quant_conv", "encoder.head.0": "encoder.norm_out", "encoder.head.2": "encoder.conv_out",
              "decoder.head.0": "decoder.norm_out", "decoder.head.2": "decoder.conv_out"}
_WAN_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}


def positions(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers that `pattern`'s only group takes at the beginning of the names."""
    found = (re.match(pattern, name) for name in names)
    return {int(match.group(1)) for match in found if match}


def modern(names: Iterable[str]) -> Names:
    """diffusers before 0.17 called an attention's projections query, key, value and proj_attn."""
    def new(name: str) -> str:
        return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
                      lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name)

    return {name: new(name) for name in names}


def _shared(name: str, attention: dict[str, str]) -> str:
    """What latent-diffusion and Hunyuan-Image name alike: the middle, and the parts of a block."""
    name = re.sub(r"\.mid\.block_(\d+)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(r"\.mid\.attn_(\d+)\.", lambda m: f".mid_block.attentions.{int(m[1]) - 1}.", name)
    name = re.sub(r"(\.attentions\.\d+\.)(\w+)\.(weight|bias)$",
                  lambda m: f"{m[1]}{attention.get(m[2], m[2])}.{m[3]}", name)
    return name.replace(".nin_shortcut.", ".conv_shortcut.")


def from_ldm(names: Iterable[str]) -> Names:
    """latent-diffusion numbers the decoder's levels from the finest, diffusers from the coarsest."""
    names = list(names)
    last = max(positions(names, r"decoder\.up\.(\d+)\."), default=0)
    parts = {"block": "resnets", "attn": "attentions"}

    def level(match: re.Match[str]) -> str:
        way, number, rest = match[1], int(match[2]), match[3]
        number = last - number if way == "up" else number
        inner = re.sub(r"^(block|attn)\.", lambda m: f"{parts[m[1]]}.", rest)
        inner = re.sub(r"^(up|down)sample\.", r"\1samplers.0.", inner)
        return f".{way}_blocks.{number}.{inner}"

    def new(name: str) -> str:
        name = re.sub(r"\.(up|down)\.(\d+)\.(.+)", level, name)
        name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
        # FLUX.2 keeps the two 1×1 convolutions inside the encoder and the decoder.
        name = re.sub(r"^(?:encoder|decoder)\.((?:post_)?quant_conv)\.", r"\1.", name)
        return _shared(name, _LDM_ATTENTION)

    return {name: new(name) for name in names}


def from_hunyuan(names: Iterable[str]) -> Names:
    """diffusers lays Hunyuan-Image's levels out as one flat list: blocks, then the resampling, level after level."""
    names = list(names)
    flat: dict[str, str] = {}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        position = 0
        for number in sorted(positions(names, rf"{half}\.{way}\.(\d+)\.")):
            stem = f"{half}.{way}.{number}"
            for block in sorted(positions(names, rf"{re.escape(stem)}\.block\.(\d+)\.")):
                flat[f"{stem}.block.{block}."] = f"{half}.{way}_blocks.{position}."
                position += 1
            if any(name.startswith(f"{stem}.{way}sample.") for name in names):
                flat[f"{stem}.{way}sample."] = f"{half}.{way}_blocks.{position}."
                position += 1

    def new(name: str) -> str:
        match = re.match(r"\w+\.(?:up|down)\.\d+\.(?:block\.\d+|upsample|downsample)\.", name)
        name = name if match is None else flat[match[0]] + name[match.end():]
        return _shared(name, _HUNYUAN_ATTENTION)

    return {name: new(name) for name in names}


def from_wan(names: Iterable[str]) -> Names:
    """Wan's two flat lists; diffusers groups the decoder's into up-blocks that end with a resampling."""
    names = list(names)
    ends = sorted(positions(names, r"decoder\.upsamples\.(\d+)\.resample\."))

    def up(match: re.Match[str]) -> str:
        number = int(match[1])
        block = sum(end < number for end in ends)
        first = ends[block - 1] + 1 if block else 0
        part = "upsamplers.0" if number in ends else f"resnets.{number - first}"
        return f"decoder.up_blocks.{block}.{part}."

    def new(name: str) -> str:
        stem, _, last = name.rpartition(".")
        if stem in _WAN_WHOLE:
            return f"{_WAN_WHOLE[stem]}.{last}"
        name = re.sub(r"^decoder\.upsamples\.(\d+)\.", up, name)
        name = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", name)
        name = re.sub(r"^(encoder|decoder)\.middle\.([012])\.", lambda m: f"{m[1]}.{_WAN_MIDDLE[m[2]]}.", name)
        return re.sub(r"\.(residual\.\d|shortcut)\.", lambda m: f".{_WAN_PARTS.get(m[1], m[1])}.", name)

    return {name: new(name) for name in names}


def from_taesd(names: Iterable[str]) -> Names:
    """TAESD's decoder begins with a clamp that diffusers does not count."""
    return {name: re.sub(r"^(encoder|decoder)\.(\d+)\.",
                         lambda m: f"{m[1]}.layers.{int(m[2]) - (m[1] == 'decoder')}.", name) for name in names}
