"""Diffusers' autoencoders behind our contract.

- `FAMILIES`: one row a class: its downsampling, its normalisation, how it encodes and decodes.
- `DiffusersCodec`: the codec over any of them.
- `open_folder`: a diffusers folder (its `config.json`, or a pipeline's `vae/`), safetensors only.

All six classes take and return images in [-1, 1]; `DiffusersCodec` moves between that and [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import hub
from ..errors import UserError
from ..codec import Codec, Provenance
from ..latent import DiagonalGaussian, Latent, LatentSpec, Point
from . import blocks
from .key_names import modern
from .loading import build, weight_files
from .tiled import Halves, TiledCodec, UnknownLayer, kl_halves, tiny_halves

Config = Mapping[str, Any]
Moments = tuple[Tensor, Tensor | None]  # mean and log variance; no variance for a deterministic encoder


@dataclass(frozen=True)
class Family:
    """What tells one diffusers class from another.

    Attributes:
        downsampling: configuration → pixels for one latent row.
        channels: configuration → channels of the latent as this package shows it.
        encode: (module, images in [-1, 1]) → moments, un-normalised.
        decode: (module, un-normalised latent) → images in [-1, 1].
        statistics: (module, configuration) → shift and scale of `LatentSpec`, as the model's pipeline normalises.
        kind: the kind of latent.
        halves: module → its layers, for images that need tiles; None: such images run whole.
    """

    downsampling: Callable[[Config], int]
    channels: Callable[[Config], int]
    encode: Callable[[Any, Tensor], Moments]
    decode: Callable[[Any, Tensor], Tensor]
    statistics: Callable[[nn.Module, Config], tuple[tuple[float, ...], tuple[float, ...]]]
    kind: str = "gaussian"
    halves: Callable[[Any], Halves] | None = None


def _posterior(module: Any, images: Tensor) -> Moments:
    posterior = module.encode(images).latent_dist
    return posterior.mean, posterior.logvar


def _decode(module: Any, raw: Tensor) -> Tensor:
    return module.decode(raw).sample


def _kl_posterior(module: Any, images: Tensor) -> Moments:
    if not blocks.fits(module):
        return _posterior(module, images)
    mean, logvar = blocks.encode(module, images).chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)  # as diffusers' posterior


def _kl_decode(module: Any, raw: Tensor) -> Tensor:
    return blocks.decode(module, raw) if blocks.fits(module) else _decode(module, raw)


def _packed_posterior(module: Any, images: Tensor) -> Moments:
    """FLUX.2's transformer sees squares of `patch_size` latent pixels as channels, ordered (channel, row, column)."""
    patch = module.config.patch_size[0]
    mean, logvar = _kl_posterior(module, images)
    return F.pixel_unshuffle(mean, patch), F.pixel_unshuffle(logvar, patch)


def _decode_packed(module: Any, raw: Tensor) -> Tensor:
    return _kl_decode(module, F.pixel_shuffle(raw, module.config.patch_size[0]))


def _first_frame_posterior(module: Any, images: Tensor) -> Moments:
    """A video autoencoder sees an image as a video of one frame, (b, c, 1, h, w)."""
    mean, logvar = _posterior(module, images.unsqueeze(2))
    return mean.squeeze(2), logvar.squeeze(2)


def _decode_first_frame(module: Any, raw: Tensor) -> Tensor:
    return _decode(module, raw.unsqueeze(2)).squeeze(2)


def _factors(module: nn.Module, config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`(z - shift_factor) * scaling_factor`, or `(z - mean) * scaling_factor / std` where the channels have their own.

    As in the pipelines of Stable Diffusion XL (means and deviations), SD3 and FLUX.1 (a shift), Sana and
    Hunyuan-Image (a factor only) and Qwen-Image (means and deviations, no factor).
    """
    factor = 1.0 if config.get("scaling_factor") is None else float(config["scaling_factor"])
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return tuple(map(float, mean)), tuple(factor / float(s) for s in std)
    return (float(config.get("shift_factor") or 0.0),), (factor,)


def _running_statistics(module: Any, config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """FLUX.2 normalises the packed latent by a batch norm's running statistics."""
    deviation = torch.sqrt(module.bn.running_var.double() + config["batch_norm_eps"])
    return tuple(module.bn.running_mean.tolist()), tuple((1 / deviation).tolist())


def _halvings(key: str) -> Callable[[Config], int]:
    """One halving between each two neighbouring levels of the list `key`."""
    return lambda config: 2 ** (len(config[key]) - 1)


def _hunyuan_downsampling(config: Config) -> int:
    return 2 ** min(int(config["spatial_compression_ratio"]).bit_length() - 1, len(config["block_out_channels"]) - 1)


FAMILIES = {
    "AutoencoderKL": Family(
        _halvings("block_out_channels"), lambda c: c["latent_channels"], _kl_posterior, _kl_decode, _factors,
        halves=kl_halves),
    "AutoencoderTiny": Family(
        _halvings("encoder_block_out_channels"), lambda c: c["latent_channels"],
        lambda module, images: (module.encode(images).latents, None), _decode, _factors, "point",
        tiny_halves),
    "AutoencoderDC": Family(
        _halvings("encoder_block_out_channels"), lambda c: c["latent_channels"],
        lambda module, images: (module.encode(images).latent, None), _decode, _factors, "point"),
    "AutoencoderKLFlux2": Family(
        lambda c: _halvings("block_out_channels")(c) * c["patch_size"][0],
        lambda c: c["latent_channels"] * c["patch_size"][0] ** 2,
        _packed_posterior, _decode_packed, _running_statistics, halves=kl_halves),
    "AutoencoderKLQwenImage": Family(
        lambda c: 2 ** len(c["temperal_downsample"]), lambda c: c["z_dim"],
        _first_frame_posterior, _decode_first_frame, _factors),
    "AutoencoderKLHunyuanImage": Family(
        _hunyuan_downsampling, lambda c: c["latent_channels"], _posterior, _decode, _factors),
}


class DiffusersCodec(TiledCodec):
    """One of diffusers' autoencoders for use. `to_diffusers` gives the model itself back."""

    def __init__(self, module: Any, provenance: Provenance) -> None:
        self.family = FAMILIES[type(module).__name__]
        config = module.config
        shift, scale = self.family.statistics(module, config)
        spec = LatentSpec(
            channels=self.family.channels(config), downsampling=self.family.downsampling(config),
            kind=self.family.kind, image_channels=config.get("in_channels") or config.get("input_channels") or 3,
            shift=shift, scale=scale,
        )
        super().__init__(module, spec, provenance)

    def to_diffusers(self) -> nn.Module:
        """The diffusers model, in its present type and on its present device."""
        return self.module

    def _encode(self, images: Tensor) -> Latent:
        mean, logvar = self.family.encode(self.module, images * 2 - 1)
        if logvar is None:
            return Point(self.spec.normalise(mean))
        return DiagonalGaussian(mean, logvar, self.spec)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.family.decode(self.module, raw) / 2 + 0.5

    def _halves(self) -> Halves:
        if self.family.halves is None:
            raise UnknownLayer(type(self.module).__name__)
        return self.family.halves(self.module)

    def _latent(self, moments: Tensor) -> Latent:
        if self.spec.kind == "point":
            return Point(self.spec.normalise(moments))
        moments = F.pixel_unshuffle(moments, self._patch)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0), self.spec)  # as diffusers' posterior

    def _raw(self, raw: Tensor) -> Tensor:
        return F.pixel_shuffle(raw, self._patch)

    @property
    def _patch(self) -> int:
        """Side of the squares that FLUX.2 packs into channels."""
        return self.module.config.get("patch_size", (1,))[0]


def open_folder(path: Path, name: str, files: list[Path] | None = None) -> Codec:
    """Open a diffusers autoencoder.

    Args:
        path: the folder with its `config.json`, or a pipeline's folder with `vae/`.
        name: what the codec is called in reports.
        files: the weight files to read, if not those that diffusers would.

    Raises:
        UserError: the class is not one of `FAMILIES`, or the weights are incomplete, pickled or another model's.
    """
    folder = path if (path / "config.json").exists() else path / "vae"
    config = hub.read_json(folder / "config.json")
    class_name = config.get("_class_name")
    if class_name not in FAMILIES:
        raise UserError(f"{folder} holds diffusers' {class_name}, which is not supported: {', '.join(FAMILIES)} are.")
    files = files or weight_files(folder)
    tensors = hub.read_tensors(files)
    new = modern(tensors)
    module = build(class_name, config, {new[key]: tensor for key, tensor in tensors.items()}, folder)
    licence = hub.card_licence(folder)
    readme = next((r for r in (folder / "README.md", path / "README.md") if r.exists()), None)
    provenance = Provenance(
        name=name, kind="diffusers", weights_hash=hub.file_hash(*files), path=str(folder),
        licence=hub.card_licence(path) if licence == "not stated" else licence,
        card="" if readme is None else readme.read_text(encoding="utf-8"),
    )
    return DiffusersCodec(module, provenance)
