"""An autoencoder in one .safetensors file: alone, or inside a whole Stable Diffusion checkpoint.

- `LAYOUTS`: one row a naming scheme: how to know it, its diffusers class, its names, its shapes.
- `open_file`: the opener.

The architecture comes from the tensors' shapes. What shapes cannot tell, the latent's normalisation above all, comes
from `configs/*.json`, chosen by the first of these that decides: what `omnilatent export` wrote into the file; the
checkpoint's other tensors (SDXL's text encoders …); the file's name (`sdxl`, `sd3`, `flux`); else what is usual for
that shape (4 channels: Stable Diffusion 1; 16: FLUX.1). `Provenance.card` says which it was. Only the autoencoder's
tensors are read from disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hub
from ..errors import UserError
from ..hub import open_safetensors, read_tensors
from ..codec import Codec, Provenance
from . import diffusers_codecs, key_names, shapes, taef2
from .loading import INDEX, build
from .shapes import Shapes

CONFIGS = Path(__file__).parent / "configs"
PREFIXES = ("first_stage_model.", "model.first_stage_model.", "vae.", "")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.", "conv1.", "conv2.")
METADATA = "omnilatent"  # the entry that `omnilatent export --to safetensors` writes


@dataclass(frozen=True)
class Layout:
    """A way to name an autoencoder's tensors.

    Attributes:
        matches: whether a file's shapes (without prefix) are named so.
        class_name: the diffusers class.
        rename: all names → diffusers' names.
        configure: shapes under diffusers' names → configuration.
        linear_attention: the class has matrices where files may have 1×1 convolutions.
    """

    matches: Callable[[dict[str, tuple[int, ...]]], bool]
    class_name: str
    rename: Callable[[Any], dict[str, str]]
    configure: Callable[[Shapes], dict[str, Any]]
    linear_attention: bool = False


def _begins(*prefixes: str) -> Callable[[dict[str, tuple[int, ...]]], bool]:
    return lambda names: all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def _unpacks_while_sampling(names: dict[str, tuple[int, ...]]) -> bool:
    """Hunyuan-Image's convolution before a downsampling gives a quarter of the next level's channels."""
    shape = names.get("encoder.down.0.downsample.conv.weight")
    return shape is not None and shape[0] < shape[1]


# The first row that matches counts.
LAYOUTS = (
    Layout(_begins("encoder.downsamples.", "decoder.upsamples."), "AutoencoderKLQwenImage", key_names.from_wan,
           shapes.qwen_image),
    Layout(_begins("encoder.down_blocks.0.norm1.gamma", "decoder.up_blocks.0.resnets."), "AutoencoderKLQwenImage",
           key_names.modern, shapes.qwen_image),
    Layout(_begins("encoder.layers.", "decoder.layers."), "AutoencoderTiny", key_names.modern, shapes.tiny),
    Layout(_begins("encoder.0.weight", "decoder.1.weight"), "AutoencoderTiny", key_names.from_taesd, shapes.tiny),
    Layout(_unpacks_while_sampling, "AutoencoderKLHunyuanImage", key_names.from_hunyuan, shapes.hunyuan_image),
    Layout(_begins("encoder.down_blocks.0.norm1.weight"), "AutoencoderKLHunyuanImage", key_names.modern,
           shapes.hunyuan_image),
    Layout(_begins("bn.", "encoder.down."), "AutoencoderKLFlux2", key_names.from_ldm, shapes.flux2, True),
    Layout(_begins("bn.", "encoder.down_blocks."), "AutoencoderKLFlux2", key_names.modern, shapes.flux2, True),
    Layout(_begins("encoder.down."), "AutoencoderKL", key_names.from_ldm, shapes.kl, True),
    Layout(_begins("encoder.down_blocks."), "AutoencoderKL", key_names.modern, shapes.kl, True),
)


def open_file(path: Path, name: str) -> Codec:
    """Open one .safetensors file.

    Args:
        path: the file. If it lies in a checkpoint of ours or in a diffusers folder, that folder's config.json counts.
        name: what the codec is called in reports.

    Raises:
        UserError: the file is damaged, holds no autoencoder that we know, or lacks some of its tensors.
    """
    folder_codec = _as_part_of_a_folder(path, name)
    if folder_codec is not None:
        return folder_codec
    with open_safetensors(path) as handle:
        keys, metadata = list(handle.keys()), handle.metadata() or {}
        if METADATA in metadata:
            return _open_exported(path, name, metadata)
        if any(".pool." in key for key in keys) and path.name.startswith("taef2_"):
            return taef2.open_folder(path.parent, name)
        halves = _other_half(path, keys)
        if halves is not None:
            tensors = _read_halves(halves)
            found: dict[str, tuple[int, ...]] = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            prefix = ""
        else:
            prefix, found = _find(path, {key: tuple(handle.get_slice(key).get_shape()) for key in keys})
            tensors = {key: handle.get_tensor(prefix + key).clone() for key in found}
        statistics = {key: handle.get_tensor(key).flatten().tolist() for key in ("edm_mean", "edm_std") if key in keys}
    layout = next(layout for layout in LAYOUTS if layout.matches(found))
    new = layout.rename(found)
    tensors = {new[key]: _squeezed(new[key], tensor, layout) for key, tensor in tensors.items()}
    elsewhere = [key for key in keys if prefix and not key.startswith(prefix)]
    config, told = _configuration(layout, Shapes({k: tuple(t.shape) for k, t in tensors.items()}, path), elsewhere)
    if len(statistics) == 2:  # Playground 2.5's checkpoints carry their latent's moments a channel
        config.update(scaling_factor=0.5, latents_mean=statistics["edm_mean"], latents_std=statistics["edm_std"])
        told = "Playground 2.5's normalisation (from edm_mean and edm_std in the file)."
    module = build(layout.class_name, config, tensors, path)
    files = [path] if halves is None else list(halves)
    provenance = Provenance(
        name=name, kind="single-file", path=str(path), card=told,
        weights_hash=hub.file_hash(*files) if not elsewhere else _tensor_hash(tensors),
        licence=metadata.get("modelspec.license", metadata.get("license", "not stated")),
    )
    return diffusers_codecs.DiffusersCodec(module, provenance)


def _as_part_of_a_folder(path: Path, name: str) -> Codec | None:
    """A weight file that lies beside its own config.json is opened with it."""
    if not (path.parent / "config.json").exists():
        return None
    config = hub.read_json(path.parent / "config.json")
    if "omnilatent" in config and path.name == "model.safetensors":
        return hub.open_kind(hub.recognise(path.parent), path.parent, name)
    if "_class_name" in config and path.name.startswith("diffusion_pytorch_model"):
        sharded = (path.parent / INDEX).exists()
        return diffusers_codecs.open_folder(path.parent, name, None if sharded else [path])
    return None


def _open_exported(path: Path, name: str, metadata: dict[str, str]) -> Codec:
    """A file by `omnilatent export` states its class and configuration."""
    try:
        stated = json.loads(metadata[METADATA])
        class_name, config = stated["class"], stated["config"]
        if class_name not in diffusers_codecs.FAMILIES:
            raise KeyError(class_name)
    except (ValueError, KeyError, TypeError) as failure:
        raise UserError(f"{path} states no class that we know in its '{METADATA}' entry ({failure}).") from failure
    module = build(class_name, config, read_tensors([path]), path)
    provenance = Provenance(
        name=name, kind="single-file", path=str(path), weights_hash=hub.file_hash(path),
        licence=metadata.get("license", "not stated"), card="Its class and configuration are stored in the file.",
    )
    return diffusers_codecs.DiffusersCodec(module, provenance)


def _find(path: Path, all_shapes: dict[str, tuple[int, ...]]) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The prefix under which an autoencoder lies in the file, and its tensors' shapes without it."""
    for prefix in PREFIXES:
        found = {key[len(prefix):]: shape for key, shape in all_shapes.items()
                 if key.startswith(prefix) and key[len(prefix):].startswith(PARTS)}
        if any(layout.matches(found) for layout in LAYOUTS):
            return prefix, found
    first = next(iter(all_shapes), "none at all")
    raise UserError(
        f"{path} holds no autoencoder that we know (its {len(all_shapes)} tensors begin with {first}): expected one of "
        f"{', '.join(dict.fromkeys(layout.class_name for layout in LAYOUTS))}, alone or inside a checkpoint."
    )


def _other_half(path: Path, keys: list[str]) -> tuple[Path, Path] | None:
    """TAESD is published as two files, `…encoder…` and `…decoder…`, whose names are bare positions."""
    if not keys or not all(key[0].isdigit() for key in keys):
        return None
    for half in ("encoder", "decoder"):
        if half in path.name:
            pair = tuple(path.with_name(path.name.replace(half, part)) for part in ("encoder", "decoder"))
            missing = [file for file in pair if not file.exists()]
            if missing:
                raise UserError(f"{path} is one half of an autoencoder: put {missing[0].name} beside it.")
            return pair[0], pair[1]
    return None


def _read_halves(halves: tuple[Path, Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, file in zip(("encoder", "decoder"), halves, strict=True):
        tensors.update({f"{part}.{key}": tensor for key, tensor in read_tensors([file]).items()})
    if not any(layout.matches({key: tuple(t.shape) for key, t in tensors.items()}) for layout in LAYOUTS):
        raise UserError(f"{halves[0]} and {halves[1].name} are not TAESD's: fetch both from madebyollin/taesd.")
    return tensors


def _squeezed(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    """Files write the attention's matrices as 1×1 (or length-1) convolutions."""
    matrix = layout.linear_attention and ".attentions." in name and name.endswith(".weight")
    if matrix and tensor.ndim > 2 and all(size == 1 for size in tensor.shape[2:]):
        return tensor.flatten(1)
    return tensor


def _configuration(layout: Layout, found: Shapes, elsewhere: list[str]) -> tuple[dict[str, Any], str]:
    """The configuration, and a sentence about where its normalisation comes from."""
    config = layout.configure(found)
    channels = config.get("latent_channels", config.get("z_dim"))
    rows = [hub.read_json(file) for file in sorted(CONFIGS.glob("*.json"))]
    rows = [r for r in rows if r["class"] == layout.class_name and r["latent_channels"] in (channels, None)]
    if not rows:
        return config, f"No known {layout.class_name} has {channels} channels: the latent is not normalised."
    inside = [r for r in rows if any(key.startswith(mark) for mark in r["inside"] for key in elsewhere)]
    named = [r for r in rows if any(part in found.source.name.lower() for part in r["names"])]
    for chosen, how in ((inside, "known by the checkpoint's other tensors"), (named, "known by the file's name"),
                        ([r for r in rows if r["assumed"]], "" if len(rows) == 1 else "assumed")):
        if chosen:
            others = [r["names"][0] for r in rows if r is not chosen[0] and r["names"]]
            remedy = f"; if it is another model's, put {' or '.join(others)} into the file's name" if others else ""
            why = f" ({how}{remedy if how == 'assumed' else ''})" if how else ""
            return {**config, **chosen[0]["config"]}, f"{chosen[0]['title']}'s normalisation{why}."
    raise AssertionError(f"configs/ has no assumed row for {layout.class_name} with {channels} channels")


def _tensor_hash(tensors: dict[str, Tensor]) -> str:
    """As `hub.file_hash`, over the autoencoder's part of a checkpoint only: names in order, and bytes."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
