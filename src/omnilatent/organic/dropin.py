"""Drop-ins: an organic encoder and decoder for a teacher's latent grid, either of which stands in for the teacher's.

- `DropinEncoder`: pictures → the teacher's normalised latents. `DropinDecoder`: these → pictures.
- `Dropin`: one of them or both; the teacher does what is missing.
- `DropinCodec`, `open_checkpoint`, `checkpoint_of`: the kind "ovae-grid" of `hub.load`.

How they are learned stands in dropin_learning.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import hub
from ..codec import Codec, Provenance
from ..errors import UserError
from ..latent import Latent, LatentSpec, Point
from .fovea import Fovea, FoveaCode
from .grids import GridLayer, GridStack
from .neurons import Neurons
from .pairs import Affine

KIND = "ovae-grid"
_LAYER = ("weight", "bias", "skip", "out", "out_bias")


class DropinEncoder(nn.Module):
    """Pictures `(b, 3, h, w)` in [0, 1], sides multiples of the fovea's cell → latents `(b, c, h/cell, w/cell)` in the
    teacher's normalised units."""

    def __init__(self, code: FoveaCode, stack: GridStack) -> None:
        super().__init__()
        self.code, self.stack = code, stack

    def forward(self, pictures: Tensor) -> Tensor:
        return self.stack(self.code(pictures))

    @property
    def channels(self) -> int:
        return len(self.stack.layers[-1].out_bias)


class DropinDecoder(nn.Module):
    """Normalised latents `(b, c, h, w)` → pictures `(b, 3, cell·h, cell·w)`, about [0, 1].

    Args:
        stack: latents → coordinates of every cell's pixels.
        basis: `(3·cell², k)`, a cell's pixels from its coordinates; centre: `(3·cell²,)`, added to them.
        cell: side in pixels.
        channels: c.
    """

    def __init__(self, stack: GridStack, basis: Tensor, centre: Tensor, cell: int, channels: int) -> None:
        super().__init__()
        if basis.shape[0] != 3 * cell**2 or basis.shape[1] != len(stack.layers[-1].out_bias):
            raise UserError(f"Dimension mismatch: a basis of shape {tuple(basis.shape)} for cells of {3 * cell**2} "
                            f"numbers and {len(stack.layers[-1].out_bias)} coordinates.")
        self.stack, self.cell, self.channels = stack, cell, channels
        self.register_buffer("basis", basis.clone())
        self.register_buffer("centre", centre.clone())

    def forward(self, latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents have shape (b, {self.channels}, h, w); got {tuple(latents.shape)}")
        coordinates = self.stack(latents)
        pixels = (self.basis @ coordinates.flatten(2)).add_(self.centre[:, None])
        return F.pixel_shuffle(pixels.unflatten(2, coordinates.shape[-2:]), self.cell)


class Dropin(nn.Module):
    """`encoder` or `decoder`, or both."""

    def __init__(self, encoder: DropinEncoder | None, decoder: DropinDecoder | None) -> None:
        super().__init__()
        if encoder is None and decoder is None:
            raise ValueError("a drop-in has an encoder, a decoder or both")
        if encoder is not None and decoder is not None and encoder.channels != decoder.channels:
            raise UserError(f"Dimension mismatch: the encoder gives latents of shape (b, {encoder.channels}, h, w), "
                            f"and the decoder takes (b, {decoder.channels}, h, w).")
        self.encoder, self.decoder = encoder, decoder

    @property
    def channels(self) -> int:
        return (self.encoder or self.decoder).channels

    @property
    def whole(self) -> bool:
        """Whether no teacher is needed."""
        return self.encoder is not None and self.decoder is not None


class DropinCodec(Codec):
    """Drop-ins for use; `teacher` does the half that is missing. Latents are a `Point` in the teacher's normalised
    units, so they go to whatever works on the teacher's.

    Raises:
        UserError: the teacher's latents have another shape, or it is needed and missing.
    """

    module: Dropin

    def __init__(self, module: Dropin, downsampling: int, provenance: Provenance, teacher: Codec | None = None) -> None:
        spec = LatentSpec(channels=module.channels, downsampling=downsampling, kind="point")
        if not module.whole:
            if teacher is None:
                raise UserError(f"{provenance.name} has only one half, and the other is its teacher's: give it.")
            theirs = teacher.spec
            if (theirs.channels, theirs.downsampling) != (spec.channels, spec.downsampling):
                raise UserError(f"Dimension mismatch: {provenance.name} works on latents of shape (b, {spec.channels}, "
                                f"h/{spec.downsampling}, w/{spec.downsampling}), and {teacher.label} on (b, "
                                f"{theirs.channels}, h/{theirs.downsampling}, w/{theirs.downsampling}).")
        super().__init__(module, spec, provenance)
        self.teacher = None if module.whole else teacher

    def _encode(self, images: Tensor) -> Latent:
        if self.module.encoder is None:
            assert self.teacher is not None
            return Point(self.teacher.encode(images).mode())
        return Point(self.module.encoder(images))

    def _decode(self, raw: Tensor) -> Tensor:
        if self.module.decoder is None:
            assert self.teacher is not None
            return self.teacher.decode(raw)
        return self.module.decoder(raw)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Codec:
        if self.teacher is not None:
            self.teacher.to(device, dtype)
        return super().to(device, dtype)

    # Its weights are buffers.
    @property
    def device(self) -> torch.device:
        return next(self.module.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.buffers()).dtype

    def parameter_count(self) -> int:
        return sum(buffer.numel() for buffer in self.module.buffers())


def checkpoint_of(module: Dropin, teacher: Codec) -> dict[str, Any]:
    """The `model` entry of its config.json."""
    model: dict[str, Any] = {"channels": module.channels, "downsampling": teacher.spec.downsampling, "teacher": {
        "name": teacher.provenance.name, "kind": teacher.provenance.kind,
        "path": str(Path(teacher.provenance.path).resolve()) if teacher.provenance.path else None,
        "weights_hash": teacher.provenance.weights_hash}}
    if module.encoder is not None:
        stack = module.encoder.stack
        model["encoder"] = {"fovea": asdict(module.encoder.code.fovea), "layers": len(stack.layers),
                            "reach": stack.reach, "context": stack.context}
    if module.decoder is not None:
        stack = module.decoder.stack
        model["decoder"] = {"cell": module.decoder.cell, "layers": len(stack.layers), "reach": stack.reach,
                            "context": stack.context}
    return model


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "ovae-grid", and its teacher if a half is missing.

    Raises:
        UserError: the folder is damaged, the teacher cannot be had, or it is another one than the clone learned from.
    """
    saved, weights = hub.read_config(path), path / "model.safetensors"
    try:
        tensors = {key: value.float() for key, value in load_file(weights).items()}
        model = saved["model"]
        encoder, decoder = _encoder(model, tensors), _decoder(model, tensors)
        reference, channels = model["teacher"], model["channels"]
    except (OSError, SafetensorError, KeyError, TypeError) as failure:
        raise UserError(f"{path} is not a whole drop-in ({failure}): fetch it again.") from failure
    card = path / "README.md"
    provenance = Provenance(
        name=name, kind=KIND, weights_hash=hub.file_hash(weights), licence=hub.card_licence(path), path=str(path),
        card=card.read_text(encoding="utf-8") if card.exists() else "")
    module = Dropin(encoder, decoder)
    if module.channels != channels:
        raise UserError(f"{weights} works on latents of shape (b, {module.channels}, h, w), but its config.json states "
                        f"(b, {channels}, h, w): they belong to two models.")
    return DropinCodec(module, model["downsampling"], provenance, None if module.whole else _teacher(reference, name))


def _teacher(reference: dict[str, Any], name: str) -> Codec:
    """By the name it had then, else where it lay."""
    known, place = reference["name"], reference.get("path")
    if known not in hub.bundled_names() and not Path(known).exists() and place is not None:
        if not Path(place).exists():
            raise UserError(f"{name} needs the half that it does not have from {known}, which is not at {place} any more: "
                            "put it back.")
        known = place
    teacher = hub.load(known)
    found = teacher.provenance.weights_hash
    if found != reference["weights_hash"]:
        raise UserError(f"{name} was cloned from {reference['name']} with the weights {reference['weights_hash']}, and "
                        f"{reference['name']} now has {found}: load that teacher, or clone anew.")
    return teacher


def _encoder(model: dict[str, Any], tensors: dict[str, Tensor]) -> DropinEncoder | None:
    if "encoder" not in model:
        return None
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in model["encoder"]["fovea"].items()}
    fovea = Fovea(**fields)
    if (fovea.kind, fovea.low, fovea.high) != (Fovea.kind, Fovea.low, Fovea.high):
        raise UserError(f"This drop-in was learned behind the retina {fovea.identity()}, and this version computes "
                        f"only {Fovea.kind} in [{Fovea.low:g}, {Fovea.high:g}]: learn it anew.")
    code = FoveaCode(fovea, [tensors[f"encoder.code.kernel_{s}"] for s in fovea.scales],
                     [tensors[f"encoder.code.bias_{s}"] for s in fovea.scales])
    return DropinEncoder(code, _stack(model["encoder"], tensors, "encoder.stack"))


def _decoder(model: dict[str, Any], tensors: dict[str, Tensor]) -> DropinDecoder | None:
    if "decoder" not in model:
        return None
    return DropinDecoder(_stack(model["decoder"], tensors, "decoder.stack"), tensors["decoder.basis"],
                         tensors["decoder.centre"], model["decoder"]["cell"], model["channels"])


def _stack(entry: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> GridStack:
    layers = []
    for number in range(entry["layers"]):
        part = {key: tensors[f"{prefix}.layers.{number}.{key}"] for key in _LAYER}
        readout = Neurons(torch.cat([part["skip"], part["out"]], 1), part["out_bias"])
        layers.append(GridLayer(Affine(part["weight"], part["bias"]), readout))
    return GridStack(layers, entry["reach"], entry["context"])
