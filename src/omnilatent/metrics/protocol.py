"""The protocol: one codec on one set of images, measured the same way every time.

- `evaluate`: a codec and images → an `Evaluation`, and a few pictures to look at.
- `Picture`: an image beside its reconstruction.

Originals are rounded to 8 bits and encoded; the posterior's mode is decoded, clamped and rounded to 8 bits; every
judge sees these two pictures. A float32 codec runs without TF32, except where its speed is measured. The figures'
conditions are stored with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import UserError, is_out_of_memory
from ..codec import Codec
from ..latent import Codes, Latent
from .catalogue import choose
from .codebooks import CodebookUsage
from .health import latent_health
from .judges import open_judges
from .pixel import to_8bit
from .precision import as_stated
from .results import Evaluation, Figure
from .speed import measure_speed

if TYPE_CHECKING:
    from ..data.evaluation import EvaluationImages

PROTOCOL = (
    "Originals resized and cropped as the data says and rounded to 8 bits; posterior mode; output clamped and rounded "
    "to 8 bits; PSNR by image (at most 100 dB), then the mean; SSIM and MS-SSIM with a Gaussian window of 11, sigma "
    "1.5, range 1; Frechet distances against the same cropped images."
)
SPEED_SIZE = 256
# Health decodes each picture about nine times: a large model takes seconds for one on a CPU.
HEALTH_CPU, HEALTH_GPU = {"limit": 4, "size": 128}, {"limit": 16, "size": 256}


@dataclass(frozen=True)
class Picture:
    """An image and its reconstruction, uint8 `(h, w, 3)`."""

    key: str
    original: np.ndarray
    reconstruction: np.ndarray


def evaluate(
    codec: Codec, images: EvaluationImages, *, batch_size: int = 8, metrics: Sequence[str] | None = None, seed: int = 0,
    keep: int = 0, health: bool = True, speed: bool = True, progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, list[Picture]]:
    """Measure a codec.

    Args:
        codec: one that decodes, where it shall run and in the dtype to be measured.
        images: what to reconstruct. A codec of one channel gets their luma (Rec. 601).
        batch_size: images at a time, at most.
        metrics: keys of catalogue.py's `METRICS`; by default all that apply.
        seed: of what is random in the latent health.
        keep: so many pictures to return, spread evenly over the set: the same for every codec.
        health: measure the latent health, on 16 images of at most 256², on a CPU on 4 of at most 128².
        speed: time encoding and decoding, at 256².
        progress: called with (steps done, steps in all): a step for each image, and one each for health and speed.

    Returns:
        The evaluation, and the pictures. A metric that could not be had is a `Figure` without a value whose note says
        why; codebook figures are there only for a codec with a codebook.

    Raises:
        UserError: the codec only encodes, takes other than 1 or 3 channels, or decoded to NaN; an unknown metric; no
            readable image; not enough memory.
    """
    spec = codec.spec
    if not spec.decodes:
        raise UserError(f"{codec.label} only encodes: there are no reconstructions to evaluate; give a codec that "
                        "decodes.")
    if spec.image_channels not in (1, 3):
        raise UserError(f"{codec.label} takes images of {spec.image_channels} channels; evaluate knows 1 and 3.")
    chosen = choose(metrics)
    judges = open_judges(chosen, codec.device)
    steps = len(images) + health + speed
    setting = HEALTH_CPU if codec.device.type == "cpu" else HEALTH_GPU
    shown, probed = _Spread(len(images), keep), _Spread(len(images), setting["limit"] if health else 0)
    keys: list[str] = []
    pictures: list[Picture] = []
    samples: list[Tensor] = []
    books: list[CodebookUsage] = []

    for names, batch in images.batches(batch_size):
        original = to_8bit(_channels(batch, spec.image_channels)).to(codec.device)
        latent, reconstruction = _reconstruct(codec, original, names)
        for judge in judges.values():
            judge.add(reconstruction, original)
        _count_codes(books, latent, spec.codebook_size)
        for offset, name in enumerate(names):
            if shown.take(len(keys), len(images.skipped)):
                pictures.append(Picture(name, _bytes(original[offset]), _bytes(reconstruction[offset])))
            if probed.take(len(keys), len(images.skipped)):
                samples.append(original[offset].cpu())
            keys.append(name)
        if progress:
            progress(min(len(keys) + len(images.skipped), len(images)), steps)
    if not keys:
        raise UserError(f"{images.source.name} holds no readable image: give other data.")

    found = {name: judge.figure(len(keys)) for name, judge in judges.items()}
    found |= _codebook_figures(books) | _size_figures(codec)
    evaluation = Evaluation(
        label=codec.label, codec=_describe(codec), keys=keys,
        conditions=_conditions(codec, images, keys, batch_size, seed),
        per_image={name: judge.values for name, judge in judges.items() if judge.values},
    )
    if health:
        with as_stated(codec.dtype):
            evaluation.health = latent_health(codec, samples, seed, **setting, batch_size=min(batch_size, 4))
        if progress:
            progress(len(images) + 1, steps)
    if speed and {"encode_ips", "decode_ips"} & set(chosen):
        timed = measure_speed(codec, SPEED_SIZE, batch_size)
        n = timed.repeats * timed.batch_size
        found["encode_ips"] = Figure(timed.encode_ips, n, timed.conditions())
        found["decode_ips"] = Figure(timed.decode_ips, n, timed.conditions())
    if progress:
        progress(steps, steps)
    evaluation.figures = {name: found[name] for name in chosen if name in found}
    return evaluation, pictures


def _reconstruct(codec: Codec, original: Tensor, names: list[str]) -> tuple[Latent, Tensor]:
    """Encode and decode one batch; the pictures are clamped and on the 8-bit grid."""
    try:
        with as_stated(codec.dtype):
            latent = codec.encode(original)
            decoded = codec.decode(latent)
    except (RuntimeError, MemoryError) as failure:
        if not is_out_of_memory(failure):
            raise
        count, height, width = len(original), *original.shape[-2:]
        remedy = f"use --batch-size {max(1, count // 2)}" if count > 1 else "use smaller images, or another device"
        sentence = f"{codec.label} ran out of memory on {count} images of {height}×{width}: {remedy}."
        raise UserError(sentence) from failure
    finite = torch.isfinite(decoded).flatten(1).all(1)
    if not bool(finite.all()):
        bad = names[int((~finite).nonzero()[0])]
        raise UserError(f"{codec.label} decoded {bad} to NaN in {_dtype(codec)}: evaluate it with --dtype float32.")
    return latent, to_8bit(decoded)


def _channels(images: Tensor, channels: int) -> Tensor:
    """RGB `(b, 3, h, w)` → luma `(b, 1, h, w)` for a grey codec."""
    if channels == 3:
        return images
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _count_codes(books: list[CodebookUsage], latent: Latent, codebook_size: int | None) -> None:
    """Add a batch's codes, each book of a tokenizer with several to its own count."""
    if not isinstance(latent, Codes) or codebook_size is None:
        return
    indices = latent.indices if latent.indices.ndim == 4 else latent.indices[:, None]  # (b, books, h, w)
    while len(books) < indices.shape[1]:
        books.append(CodebookUsage(codebook_size))
    for book, part in zip(books, indices.unbind(1), strict=True):
        book.update(part)


def _codebook_figures(books: list[CodebookUsage]) -> dict[str, Figure]:
    """Usage from hard assignments over the whole set; the mean of several books."""
    if not books:
        return {}
    size, n = books[0].codebook_size, sum(book.total for book in books)
    note = f"of {size} codes" if len(books) == 1 else f"mean of {len(books)} books of {size} codes"
    values = {
        "codes_used": [float(book.used) for book in books],
        "active_ratio": [book.used / book.codebook_size for book in books],
        "entropy_bits": [book.entropy_bits for book in books],
        "perplexity": [book.perplexity for book in books],
    }
    return {name: Figure(sum(counts) / len(counts), n, note) for name, counts in values.items()}


def _size_figures(codec: Codec) -> dict[str, Figure]:
    return {
        "bits_per_pixel": Figure(codec.spec.bits_per_pixel()),
        "compression": Figure(8 * codec.spec.image_channels / codec.spec.bits_per_pixel()),
        "parameters": Figure(float(codec.parameter_count())),
        "weights_mb": Figure(codec.parameter_count() * torch.empty((), dtype=codec.dtype).element_size() / 1e6,
                             note=f"counted in {_dtype(codec)}"),
    }


def _describe(codec: Codec) -> dict[str, Any]:
    provenance, spec = codec.provenance, codec.spec
    return {
        "name": provenance.name, "kind": provenance.kind, "licence": provenance.licence,
        "weights_hash": provenance.weights_hash, "parameters": codec.parameter_count(), "latent": spec.kind,
        "latent_channels": spec.channels, "downsampling": spec.downsampling, "codebook_size": spec.codebook_size,
    }


def _conditions(codec: Codec, images: EvaluationImages, keys: list[str], batch_size: int, seed: int) -> dict[str, Any]:
    """What the figures rest on."""
    device = codec.device
    return {
        "protocol": PROTOCOL, "data": images.source.name, "n": len(keys), "size": images.size,
        "skipped": len(images.skipped),
        "keys_hash": hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()[:16],
        "seed": seed, "batch_size": batch_size, "dtype": _dtype(codec), "weights_hash": codec.provenance.weights_hash,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {"omnilatent": __version__, "torch": torch.__version__, "torchmetrics": version("torchmetrics")},
    }


def _dtype(codec: Codec) -> str:
    return str(codec.dtype).removeprefix("torch.")


@dataclass
class _Spread:
    """Chooses `count` of `n` candidates, the middles of equal stretches; all of them where there are no more.

    Unreadable candidates become known on the way: they shorten the stretches that are left.
    """

    n: int
    count: int
    taken: int = 0

    def take(self, position: int, skipped: int) -> bool:
        """Whether the readable image at `position` is one, when `skipped` were found unreadable so far."""
        if self.taken == self.count or position < int((self.taken + 0.5) * (self.n - skipped) / self.count):
            return False
        self.taken += 1
        return True


def _bytes(image: Tensor) -> np.ndarray:
    """`(1 or 3, h, w)` on the 8-bit grid → uint8 `(h, w, 3)`."""
    colour = (image.expand(3, -1, -1) * 255).round().to(torch.uint8)
    return colour.permute(1, 2, 0).cpu().numpy()
