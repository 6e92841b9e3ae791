"""Real files in, real files out: what `translate` reads for a model and writes of it.

- `read_source`: a picture, a sound, a video or a text file as a modality's batch of one. `modality_of`: by the file's ending.
- `write_target`: what a model made, as PNG, WAV, MP4 or UTF-8.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.images import IMAGE_SUFFIXES, UnreadableImage, read_image
from ..data.mel import read_sound, write_sound
from ..data.video import VIDEO_SUFFIXES, VideoFrames
from ..errors import UserError, library
from .model import OmniLatentModel
from .patches import Size
from .tokenizer import pad

SOUND_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff"})
TEXT_SUFFIXES = frozenset({".txt", ".md", ".text"})


def modality_of(file: Path) -> str:
    """Which modality a file holds, by its ending.

    Raises:
        UserError: it is not there, or of an unknown kind.
    """
    if not file.is_file():
        raise UserError(f"{file} is not there: give a picture, a sound, a video or a text file.")
    known = {"image": IMAGE_SUFFIXES, "audio": SOUND_SUFFIXES, "video": VIDEO_SUFFIXES, "text": TEXT_SUFFIXES}
    for name, suffixes in known.items():
        if file.suffix.lower() in suffixes:
            return name
    raise UserError(f"{file} has the ending {file.suffix or '(none)'}, which is no picture's, sound's, video's or text's.")


def read_source(file: Path, modality: str, model: OmniLatentModel, as_is: bool = False) -> Tensor:
    """A file as a batch of one: `(1, 3, h, w)`, `(1, 3, t, h, w)`, `(1, bands, frames)` or ids `(1, n)`.

    Pictures and videos with more pixels than the model usually sees are resized to that size, short side first, then the centre;
    of a video as many frames as the model usually sees are taken, evenly. `as_is` keeps them as they are.

    Raises:
        UserError: it cannot be read, is empty, or the model has no such modality.
    """
    if modality not in model.modalities:
        raise UserError(f"{file} is {modality}, and this model has {', '.join(model.modalities)}.")
    if modality == "text":
        return text_source(file.read_text(encoding="utf-8", errors="replace"), model, str(file))
    if modality == "audio":
        spec = mel_of(model)
        return spec.to_mel(read_sound(file, spec.rate))[None]
    usual = model.modalities[modality].usual
    try:
        if modality == "image":
            return _picture(read_image(file, str(file)), None if as_is else usual)[None]
        frames = VideoFrames(file)
        if not len(frames):
            raise UserError(f"{file} has no frames: give a video that has.")
        wanted = len(frames) if as_is else min(usual[0], len(frames))
        places = np.linspace(0, len(frames) - 1, wanted).round().astype(int)
        return torch.stack([_picture(frames.read(int(i)), None if as_is else usual[1:]) for i in places], 1)[None]
    except UnreadableImage as unreadable:
        raise UserError(f"{file} {unreadable.reason}.") from unreadable


def text_source(text: str, model: OmniLatentModel, name: str) -> Tensor:
    """A string as ids `(1, n)`."""
    ids = model.tokenizer.encode(text)
    if not ids:
        raise UserError(f"{name} is empty: give a text with at least one letter.")
    return pad([ids])


def mel_of(model: OmniLatentModel):  # noqa: ANN201
    """The model's mel spectrograms.

    Raises:
        UserError: it was trained without sound of known form.
    """
    if model.mel is None:
        raise UserError("this model does not say what its mel spectrograms are, so it neither hears nor makes sound files.")
    return model.mel


def _picture(pixels: np.ndarray, size: Size | None) -> Tensor:
    """uint8 `(h, w, 3)` → `(3, h, w)` in [0, 1], of at most `size`."""
    if size is not None and pixels.shape[0] * pixels.shape[1] > size[0] * size[1]:
        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), Image.Resampling.LANCZOS))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def write_target(out: Tensor, modality: str, file: Path, model: OmniLatentModel, rate: Fraction = Fraction(8)) -> None:
    """One example of what the model made, into a file of the modality's own ending.

    Args:
        out: `(3, h, w)`, `(3, t, h, w)`, `(bands, frames)`, or ids `(n,)`.
        rate: frames a second of a video.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if modality == "text":
        file.write_text(model.tokenizer.decode(out.tolist()) + "\n", encoding="utf-8")
    elif modality == "audio":
        spec = mel_of(model)
        write_sound(file, spec.to_wave(out.float().cpu().clamp(0, 1)), spec.rate)
    elif modality == "image":
        Image.fromarray(_pixels(out)).save(file)
    else:
        _write_video(_pixels(out), file, rate)


def _pixels(out: Tensor) -> np.ndarray:
    """`(3, …)` in [0, 1] → uint8 `(…, 3)`."""
    return (out.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


def _write_video(frames: np.ndarray, file: Path, rate: Fraction) -> None:
    """uint8 `(t, h, w, 3)` as H.264, or MPEG-4 where this PyAV has no H.264; odd sides lose their last row or column."""
    av = library("av")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
