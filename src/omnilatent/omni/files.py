"""Real files in, real files out: what `translate` reads for a model and writes of it.

- `Fit`: whether and to what size pictures, videos and sounds are brought.
- `read_source`: a picture, a sound, a video or a text file as a modality's batch of one; `text_source`: a string.
- `write_target`: what a model made, as PNG, WAV, MP4 or UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.images import read_image
from ..data.media import replaced, write_picture, write_video
from ..data.mel import MelSpec, centred, read_sound, write_sound
from ..data.video import VideoFrames
from ..errors import UserError
from .model import OmniLatentModel
from .patches import PatchModality, Size
from .tokenizer import pad


@dataclass(frozen=True)
class Fit:
    """How sources are brought to a size. Pictures and videos: the short side first, with antialiasing, then the centre is cut
    out. Sounds: the middle of a longer one, a shorter one in the middle of silence, as the digits world has them.

    Attributes:
        size: height and width that all get; None: those with more pixels than the model's usual get the usual.
        as_is: all keep their own, videos all their frames, and sounds their length.
    """

    size: tuple[int, int] | None = None
    as_is: bool = False

    def of(self, own: tuple[int, int], usual: Size) -> tuple[int, int]:
        """Height and width for a picture that has `own`."""
        if self.size is not None:
            return self.size
        return own if self.as_is or own[0] * own[1] <= usual[0] * usual[1] else (usual[0], usual[1])


def read_source(
    file: Path, modality: str, model: OmniLatentModel, fit: Fit = Fit(), say: Callable[[str], None] = lambda line: None
) -> Tensor:
    """A file as a batch of one: `(1, 3, h, w)`, `(1, 3, t, h, w)`, `(1, bands, frames)` or ids `(1, n)`.

    A video with more frames than the model's usual is read at that many, evenly spread; a sound is brought to the usual length.

    Args:
        say: is told of every file that is not taken as it is.

    Raises:
        UserError: it cannot be read, is empty, or the model has no such modality.
    """
    if modality not in model.modalities:
        raise UserError(f"{file} is {modality}, and this model takes {', '.join(model.modalities)}.")
    if modality == "text":
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as failure:
            raise UserError(f"{file} is not UTF-8 ({failure.reason} at byte {failure.start}): convert it.") from failure
        return text_source(text.rstrip("\r\n"), model, str(file))
    if modality == "audio":
        spec = mel_of(model)
        wave = read_sound(file, spec.rate)
        if not fit.as_is and spec.frames(len(wave)) != model.config.mel_frames:
            wanted = (model.config.mel_frames - 1) * spec.hop
            own, usual = f"{len(wave) / spec.rate:.2f} s", f"{wanted / spec.rate:.2f} s"
            say(f"{file}: the middle {usual} of {own} are taken; --as-is takes all" if len(wave) > wanted else
                f"{file}: its {own} are put in the middle of {usual} of silence; --as-is leaves them alone")
            wave = centred(wave, wanted)
        return spec.to_mel(wave)[None]
    part = model.part(modality)
    assert isinstance(part, PatchModality)
    if modality == "image":
        pixels = read_image(file, str(file))[None]
        wanted = fit.of(pixels.shape[1:3], part.usual)
    else:
        video = VideoFrames(file)
        count = len(video) if fit.as_is else min(len(video), part.usual[0])
        places = np.linspace(0, len(video) - 1, count).round().astype(int)
        pixels = np.stack([video.read(int(i)) for i in places])
        wanted = fit.of(pixels.shape[1:3], part.usual[1:])
        if count < len(video):
            say(f"{file}: {count} of {len(video)} frames are taken, evenly; --as-is takes all")
    if wanted != pixels.shape[1:3]:
        say(f"{file}: {_by(pixels.shape[1:3])} pixels are brought to {_by(wanted)}; --as-is keeps them")
        pixels = np.stack([_resized(frame, wanted) for frame in pixels])
    frames = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255
    return frames[None] if modality == "video" else frames[None, :, 0]


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), Image.Resampling.BICUBIC))


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def text_source(text: str, model: OmniLatentModel, name: str) -> Tensor:
    """A string, which messages call `name`, as ids `(1, n)`."""
    ids = model.tokenizer.encode(text)
    if not ids:
        raise UserError(f"{name} is empty: give a text with at least one letter.")
    return pad([ids])


def mel_of(model: OmniLatentModel) -> MelSpec:
    """The model's mel spectrograms.

    Raises:
        UserError: it was trained without sound of known form.
    """
    if model.mel is None:
        raise UserError("this model does not say what its mel spectrograms are, so it neither hears nor makes sound files: train by a "
                        "recipe, or give Trainer its mel.")
    return model.mel


def write_target(out: Tensor, modality: str, file: Path, model: OmniLatentModel, rate: Fraction = Fraction(8)) -> None:
    """One example of what the model made, into a file with an ending of the modality's; it is whole or not there.

    Args:
        out: `(3, h, w)`, `(3, t, h, w)`, `(bands, frames)`, or ids `(n,)`.
        rate: frames a second of a video.
    """
    with replaced(file) as half:
        if modality == "text":
            half.write_text(model.tokenizer.decode(out.tolist()) + "\n", encoding="utf-8", errors="replace")
        elif modality == "audio":
            spec = mel_of(model)
            write_sound(half, spec.to_wave(out.float().cpu().clamp(0, 1)), spec.rate)
        elif modality == "image":
            write_picture(half, _pixels(out))
        else:
            write_video(half, _pixels(out), rate)


def _pixels(out: Tensor) -> np.ndarray:
    """`(3, …)` in [0, 1] → uint8 `(…, 3)`."""
    return (out.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
