"""Drop-ins: an organic encoder and decoder for a teacher's latent grid, either of which stands in for the teacher's.

- `DropinEncoder`: pictures → the teacher's normalised latents. Its inverse is a `GridDecoder`.
- `Dropin`: one of them or both; the teacher does what is missing.
- `DropinCodec`, `open_checkpoint`, `checkpoint_of`: the kind "ovae-grid" of `hub.load`.

How they are learned stands in dropin_learning.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import hub
from ..codec import Codec, Provenance
from ..errors import UserError
from ..latent import Latent, LatentSpec, Point
from .fovea import Fovea, FoveaCode
from .grids import GridDecoder, GridStack

KIND = "ovae-grid"


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
        return self.stack.layers[-1].sizes[1]


class Dropin(nn.Module):
    """`encoder` or `decoder`, or both."""

    def __init__(self, encoder: DropinEncoder | None, decoder: GridDecoder | None) -> None:
        super().__init__()
        if encoder is None and decoder is None:
            raise ValueError("a drop-in has an encoder, a decoder or both")
        if encoder is not None and decoder is not None and encoder.channels != decoder.stack.channels:
            raise UserError(f"Dimension mismatch: the encoder gives latents of shape (b, {encoder.channels}, h, w), "
                            f"and the decoder takes (b, {decoder.stack.channels}, h, w).")
        self.encoder, self.decoder = encoder, decoder

    @property
    def channels(self) -> int:
        return self.decoder.stack.channels if self.encoder is None else self.encoder.channels

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
        self.retina = None if module.encoder is None else module.encoder.code.fovea.identity()
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


def checkpoint_of(module: Dropin, teacher: Codec) -> dict[str, Any]:
    """The `model` entry of its config.json."""
    model: dict[str, Any] = {"channels": module.channels, "downsampling": teacher.spec.downsampling, "teacher": {
        "name": teacher.provenance.name, "kind": teacher.provenance.kind,
        "path": str(Path(teacher.provenance.path).resolve()) if teacher.provenance.path else None,
        "weights_hash": teacher.provenance.weights_hash}}
    if module.encoder is not None:
        model["encoder"] = {"fovea": asdict(module.encoder.code.fovea), "stack": module.encoder.stack.config()}
    if module.decoder is not None:
        model["decoder"] = {"cell": module.decoder.cell, "stack": module.decoder.stack.config()}
    return model


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "ovae-grid", and its teacher if a half is missing.

    Raises:
        UserError: the folder is damaged, the teacher cannot be had, or it is another one than the clone learned from.
    """
    saved, weights = hub.read_config(path), path / "model.safetensors"
    try:
        model = saved["model"]
        reference, channels, downsampling = model["teacher"], model["channels"], model["downsampling"]
        module = Dropin(_encoder(model), _decoder(model))
        module.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    except (OSError, RuntimeError, SafetensorError, KeyError, TypeError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"{path} is not a whole drop-in ({reason}): fetch it again.") from failure
    provenance = hub.provenance_of(path, name, KIND)
    if module.channels != channels:
        raise UserError(f"{weights} works on latents of shape (b, {module.channels}, h, w), but its config.json states "
                        f"(b, {channels}, h, w): they belong to two models.")
    return DropinCodec(module, downsampling, provenance, None if module.whole else _teacher(reference, name))


def _teacher(reference: dict[str, Any], name: str) -> Codec:
    """By the name it had then, else where it lay; a teacher from the hub may have to be fetched again."""
    known, place = reference["name"], reference.get("path")
    if known not in hub.bundled_names() and not Path(known).exists() and place is not None and Path(place).exists():
        known = place
    try:
        teacher = hub.load(known)
    except UserError as failure:
        lost = f", which is not at {place} any more: put it back" if place and not Path(place).exists() else ""
        raise UserError(f"{name} needs the half that it does not have from {reference['name']}{lost} ({failure})"
                        ) from failure
    found = teacher.provenance.weights_hash
    if found != reference["weights_hash"]:
        raise UserError(f"{name} was cloned from {reference['name']} with the weights {reference['weights_hash']}, and "
                        f"{reference['name']} now has {found}: load that teacher, or clone anew.")
    return teacher


def _encoder(model: dict[str, Any]) -> DropinEncoder | None:
    if "encoder" not in model:
        return None
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in model["encoder"]["fovea"].items()}
    fovea = Fovea(**fields)
    if (fovea.kind, fovea.low, fovea.high) != (Fovea.kind, Fovea.low, Fovea.high):
        raise UserError(f"This drop-in was learned behind the retina {fovea.identity()}, and this version computes "
                        f"only {Fovea.kind} in [{Fovea.low:g}, {Fovea.high:g}]: learn it anew.")
    return DropinEncoder(FoveaCode(fovea), GridStack(**model["encoder"]["stack"]))


def _decoder(model: dict[str, Any]) -> GridDecoder | None:
    if "decoder" not in model:
        return None
    return GridDecoder(GridStack(**model["decoder"]["stack"]), model["decoder"]["cell"])
