"""Weights from disk into a diffusers model, all or nothing.

- `build`: a model from a configuration and tensors.
- `fill`: tensors into a model on the meta device: nothing missing, nothing left over, no meta tensor.
- `weight_files`: which files of a diffusers folder to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import hub
from ..errors import UserError, library

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def build(class_name: str, config: Mapping[str, Any], tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """A diffusers model with exactly these weights.

    The model is laid out on the meta device and filled by assignment, so no random initialisation is computed and
    none can survive: see `fill`.

    Raises:
        UserError: diffusers refuses the configuration, or the tensors are not the model's: one is missing, too many,
            or of another shape.
    """
    model_class = getattr(library("diffusers"), class_name)
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            module = model_class.from_config(arguments)
    except (ValueError, TypeError, KeyError, NotImplementedError, ZeroDivisionError) as failure:
        raise UserError(
            f"diffusers cannot build the {class_name} that {source} describes ({failure}): repair its configuration."
        ) from failure
    fill(module, tensors, source)
    return module


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Give a model that is laid out on the meta device these weights, in their own floating point type.

    Mixed floating types are brought to float32.

    Raises:
        UserError: the tensors are not the model's: one is missing, too many, or of another shape.
    """
    class_name = type(module).__name__
    expected = module.state_dict()
    for key in expected:  # counters for training, which files for use leave out
        if key.endswith("num_batches_tracked"):
            tensors.setdefault(key, torch.tensor(0))
        elif key.endswith("quantizer.counts"):  # all codes in equal use, as before the first step
            tensors.setdefault(key, torch.ones(expected[key].shape))
    _check_tensors(expected, tensors, class_name, source)
    module.load_state_dict(tensors, strict=True, assign=True)
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(types) > 1:
        nn.Module.to(module, dtype=torch.float32)
    left = [name for name, t in itertools.chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    assert not left, f"{class_name} keeps meta tensors: {left}"


def _check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], class_name: str, source: Path) -> None:
    missing = [key for key in expected if key not in given]
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of the {len(expected)} tensors of its {class_name}, the first being "
            f"{missing[0]} (diffusers' name): fetch the file again, or give the complete one."
        )
    extra = [key for key in given if key not in expected]
    if extra:
        raise UserError(
            f"{source} holds {len(extra)} tensors that its {class_name} has no place for, the first being {extra[0]}: "
            "its configuration belongs to another model."
        )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"{source} holds {key} of shape {tuple(tensor.shape)}, but its {class_name} needs "
                f"{tuple(expected[key].shape)}: its configuration belongs to another model."
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers folder, in order: one file, else the parts of a sharded model.

    Raises:
        UserError: there are only pickles, or a part is missing.
    """
    if (folder / INDEX).exists():
        names = sorted(set(hub.read_json(folder / INDEX).get("weight_map", {}).values()))
        lost = [name for name in names if not (folder / name).exists()]
        if lost or not names:
            raise UserError(f"{folder} lacks {lost[0] if lost else 'the files'} named in its {INDEX}: fetch it again.")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"), key=lambda p: ("fp16" in p.name, "non_ema" in p.name, p.name))
    preferred = folder / "diffusion_pytorch_model.safetensors"
    if found:
        return [preferred] if preferred in found else found[:1]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in hub.PICKLES)
    if pickled:
        raise UserError(
            f"{folder} holds its weights only as a pickle ({pickled[0]}), which can run code when loaded: fetch or "
            "make the .safetensors version."
        )
    raise UserError(f"{folder} has a config.json but no weights: put diffusion_pytorch_model.safetensors beside it.")
