"""The pooled clone: an image → a few numbers, the mean of a teacher's latent over its grid.

- `Retina`: what the encoder sees of a picture, computed and never stored; its identity is saved with the weights.
- `PooledEncoder`: tanh neurons on patches at several scales → mean over the picture → linear.
- `OrganicEncoder`: the bundled one by its name, a plain module `(b, 3, h, w)` → `(b, 4)`.
- `Pooled`: it and, if wanted, a decoder. `PooledCodec`, `open_checkpoint`, `checkpoint_of`: the kind "ovae-pooled" of `hub.load`.

The nonlinearity stands before the pooling, since a mean over the grid of what a patch tells is no linear function of
the picture. How it is learned stands in pooled_learning.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from ..latent import Latent, LatentSpec, Point, Size
from .grids import GridLayer
from .neurons import Neurons
from .pairs import Affine

KIND = "ovae-pooled"
PICTURE = 64  # side of what the decoder says


@dataclass(frozen=True)
class Retina:
    """Square patches of `patch`² on the picture at `size`², averaged by each of `scales`; one every 16 px, or as
    densely as patches of that scale fit side by side. `low` and `high` are the pixels' range."""

    size: int = 256
    low: float = 0.0
    high: float = 1.0
    patch: int = 8
    scales: tuple[int, ...] = (1, 2, 4, 8)
    kind: str = "pooled-patches"

    def __post_init__(self) -> None:
        powers = all(scale > 0 and scale & (scale - 1) == 0 for scale in self.scales)
        fit = powers and list(self.scales) == sorted(set(self.scales)) and bool(self.scales)
        if not fit or self.patch > 16 or any(self.size % (scale * self.stride(scale)) for scale in self.scales):
            raise UserError(f"No retina is {self.identity()}: scales are rising powers of 2, a patch has at most 16 "
                            "pixels a side, and patches fit the size at every scale.")

    def identity(self) -> str:
        """In one line, for errors."""
        scales = ", ".join(f"1/{s}" for s in self.scales)
        return f"{self.kind} {self.patch}×{self.patch} at {scales} of {self.size}² in [{self.low:g}, {self.high:g}]"

    @property
    def inputs(self) -> int:
        return 3 * self.patch**2

    def stride(self, scale: int) -> int:
        """In pixels of the averaged picture."""
        return max(16 // scale, self.patch)

    def sites(self, scale: int) -> int:
        """Patches a side."""
        return self.size // scale // self.stride(scale)

    def picture(self, images: Tensor) -> Tensor:
        """`(b, 3, h, w)` in [0, 1] or uint8 → `(b, 3, size, size)` floats, resized where they are not of that size:
        bilinear, with antialiasing where it gets smaller."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"images have shape (b, 3, h, w); got {tuple(images.shape)}")
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise ValueError(f"images are floats in [0, 1] or uint8 in 0..255; got {images.dtype}")
        picture = images.float().div_(255) if images.dtype == torch.uint8 else images.float()  # resizing needs it
        height, width = picture.shape[-2:]
        if (height, width) == (self.size, self.size):
            return picture
        smaller = max(height, width) > self.size
        return F.interpolate(picture, (self.size, self.size), mode="bilinear", antialias=smaller)

    def averaged(self, picture: Tensor) -> list[Tensor]:
        """The picture at every scale, each from the one before it. At full size a patch lies in the middle of its 16×16
        pixels, so the rim is cut off."""
        found, last, done = [], picture, 1
        for scale in self.scales:
            while done < scale:
                last, done = halved(last), 2 * done
            rim = (self.stride(scale) - self.patch) // 2
            found.append(last[..., rim:, rim:] if rim else last)
        return found

    def patches(self, images: Tensor) -> list[Tensor]:
        """For each scale `(b, sites², 3·patch²)`, sites row by row."""
        pictures = self.averaged(self.picture(images))
        return [F.unfold(p, self.patch, stride=self.stride(s)).mT for s, p in zip(self.scales, pictures, strict=True)]


def halved(picture: Tensor) -> Tensor:
    """Means of 2×2 pixels; by sums of strided views, which are eight times faster than avg_pool2d on a CPU."""
    rows = picture[..., 0::2, :] + picture[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * 0.25


class PooledEncoder(nn.Module):
    """Images `(b, 3, h, w)` in [0, 1], or uint8, of any size → `(b, k)` in the teacher's normalised units.

    Args:
        retina: what it sees.
        sizes: tanh neurons at each scale; 0 is allowed.
        outputs: k.

    Raises:
        UserError: there is not one size for each scale.
    """

    def __init__(self, retina: Retina, sizes: Sequence[int], outputs: int) -> None:
        super().__init__()
        if len(sizes) != len(retina.scales):
            raise UserError(f"Dimension mismatch: {len(sizes)} groups of neurons, but the retina {retina.identity()} "
                            f"has {len(retina.scales)} scales.")
        self.retina, self.sizes = retina, list(sizes)
        shapes = {"readout_weight": (outputs, sum(sizes)), "readout_bias": (outputs,)}
        for scale, size in zip(retina.scales, sizes, strict=True):
            shapes |= {f"weight_{scale}": (size, retina.inputs), f"bias_{scale}": (size,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @classmethod
    def of(cls, retina: Retina, neurons: Sequence[Affine], readout: Neurons) -> PooledEncoder:
        """From the neurons of each scale and the linear map on their means, one scale after the other."""
        encoder = cls(retina, [len(group) for group in neurons], readout.outputs).to(readout.weight.device)
        parts = {"readout_weight": readout.weight, "readout_bias": readout.bias}
        for scale, group in zip(retina.scales, neurons, strict=True):
            parts |= {f"weight_{scale}": group.weight, f"bias_{scale}": group.bias}
        encoder.load_state_dict(parts)
        return encoder

    @property
    def outputs(self) -> int:
        return self.readout_weight.shape[0]

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pooled(images.to(self.readout_weight.device))
        return torch.addmm(self.readout_bias, pooled, self.readout_weight.mT)  # (b, k)

    def pooled(self, images: Tensor) -> Tensor:
        """The neurons' means over the picture, `(b, n)`."""
        retina, found = self.retina, []
        for scale, picture in zip(retina.scales, retina.averaged(retina.picture(images)), strict=True):
            weight, bias = getattr(self, f"weight_{scale}"), getattr(self, f"bias_{scale}")
            if len(weight):
                kernel = weight.view(-1, 3, retina.patch, retina.patch)
                sums = F.conv2d(picture.to(weight.dtype), kernel, bias, retina.stride(scale))
                found.append(torch.tanh(sums).mean((2, 3)))
        return torch.cat(found, 1)


class OrganicEncoder(nn.Module):
    """The bundled pooled clone as a plain module; there is nothing to train, so `.eval()` changes nothing.

        encoder = OrganicEncoder().eval()
        latent = encoder(images)          # (b, 3, 256, 256) in [0, 1] → (b, 4)

    Args:
        name: a bundled model's name or the path of a checkpoint folder.

    Raises:
        UserError: there is none of that name, or it is no pooled clone.
    """

    def __init__(self, name: str | Path = "ovae") -> None:
        super().__init__()
        codec = hub.load(name)
        if not isinstance(codec, PooledCodec):
            raise UserError(f"{name} is a codec of the kind {codec.provenance.kind}, and OrganicEncoder opens only "
                            f"{KIND}: use omnilatent.load({str(name)!r}).")
        self.encoder = codec.module.encoder
        self.provenance = codec.provenance

    def forward(self, images: Tensor) -> Tensor:
        """`(b, 3, h, w)` in [0, 1], or uint8 → `(b, 4)`. Floats outside of [0, 1] are refused: the usual cause is
        preprocessing for another encoder, and the answer would be wrong without a sign of it."""
        if images.is_floating_point() and images.numel():
            low, high = (float(v) for v in images.aminmax())
            if low < -0.01 or high > 1.01:
                raise ValueError(f"images are in [0, 1], which the retina {self.encoder.retina.identity()} expects; "
                                 f"got values from {low:.3g} to {high:.3g}")
        return self.encoder(images)


class Pooled(nn.Module):
    """The encoder and, where there is one, a decoder `(b, k)` → `(b, 3, 64, 64)`."""

    def __init__(self, encoder: PooledEncoder, decoder: GridLayer | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def decode(self, latents: Tensor) -> Tensor:
        """`(b, k, 1, 1)` → pictures at the retina's size, made of 64² pixels, about [0, 1]."""
        assert self.decoder is not None, "asked only where there is a decoder"
        small = self.decoder(latents.flatten(2)).view(-1, 3, PICTURE, PICTURE)
        size = self.encoder.retina.size
        return F.interpolate(small, (size, size), mode="bilinear")


class PooledCodec(Codec):
    """The pooled clone for use. `encode` gives a `Point` of `(b, k, 1, 1)`, whatever the images' size. Where it decodes,
    pictures come out at the retina's size, or at the size asked for."""

    module: Pooled

    def __init__(self, module: Pooled, provenance: Provenance) -> None:
        super().__init__(module, spec_of(module), provenance)
        self.retina = module.encoder.retina.identity()

    def _encode(self, images: Tensor) -> Latent:
        return Point(self.module.encoder(images)[..., None, None].float())

    def _encode_any(self, images: Tensor) -> Latent:
        return self._encode(self._floats(images))  # not padded: resized

    def _decode(self, raw: Tensor) -> Tensor:
        return self.module.decode(raw)

    def decode(self, latent: Latent | Tensor, size: Size | None = None) -> Tensor:
        """As `Codec.decode`, but stretched to the size, as pictures were when they were encoded."""
        z = latent if isinstance(latent, Tensor) else latent.mode()
        size = size or (None if isinstance(latent, Tensor) else latent.size)
        images = super().decode(z)
        return images if size in (None, images.shape[-2:]) else F.interpolate(images, size, mode="bilinear").clamp(0, 1)


def spec_of(module: Pooled) -> LatentSpec:
    """One latent pixel for the whole picture, in the teacher's normalised units."""
    encoder = module.encoder
    return LatentSpec(channels=encoder.outputs, downsampling=encoder.retina.size, kind="point",
                      decodes=module.decoder is not None)


def checkpoint_of(module: Pooled, teacher: Provenance) -> dict[str, Any]:
    """The `model` entry of its config.json: the retina's identity, its sizes, and whose clone it is."""
    encoder, decoder = module.encoder, module.decoder
    return {"retina": asdict(encoder.retina), "sizes": encoder.sizes,
            "decoder": None if decoder is None else decoder.sizes[0],
            "teacher": {"name": teacher.name, "kind": teacher.kind, "weights_hash": teacher.weights_hash}}


def open_checkpoint(path: Path, name: str) -> Codec:
    """Open a checkpoint folder of kind "ovae-pooled".

    Raises:
        UserError: its retina is none of this version's, its weights are missing or damaged, or do not fit the retina.
    """
    saved, weights = hub.read_config(path), path / "model.safetensors"
    try:
        model = saved["model"]
        retina = Retina(**{**model["retina"], "scales": tuple(model["retina"]["scales"])})
        sizes, hidden = model["sizes"], model["decoder"]
        channels = LatentSpec.from_json(saved["spec"]).channels
    except (KeyError, TypeError) as failure:
        raise UserError(f"{path / 'config.json'} does not describe a model of the kind {KIND} ({failure}): restore it "
                        "from its source.") from failure
    if (retina.kind, retina.low, retina.high) != (Retina.kind, Retina.low, Retina.high):
        raise UserError(f"{path} was learned behind the retina {retina.identity()}, and this version computes only "
                        f"{Retina.kind} in [{Retina.low:g}, {Retina.high:g}]: learn it anew.")
    try:
        decoder = None if hidden is None else GridLayer(channels, hidden, 3 * PICTURE**2)
        module = Pooled(PooledEncoder(retina, sizes, channels), decoder)
        module.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    except (OSError, RuntimeError, SafetensorError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"{weights} is not the pooled clone of its config.json ({reason}): fetch it again.") from failure
    provenance = hub.provenance_of(path, name, KIND)
    return PooledCodec(module, provenance)
