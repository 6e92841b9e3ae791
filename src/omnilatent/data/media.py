"""Which modality a file holds, and pictures and videos as files; nothing here imports torch.

- `modality_of`: by the file's ending; of a container that may hold either, by its tracks.
- `check_ending`: what a modality is written as.
- `write_picture`, `write_video`: 8-bit pixels as PNG (JPEG, WebP) and as H.264 or MPEG-4.
- `replaced`: a file that is whole or not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError, library
from .images import IMAGE_SUFFIXES
from .video import VIDEO_SUFFIXES

SUFFIXES = {
    "image": IMAGE_SUFFIXES,
    "audio": frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff"}),
    "video": VIDEO_SUFFIXES,
    "text": frozenset({".txt", ".md", ".text"}),
}
# what is written; the first is the usual one
WRITTEN = {"image": (".png", ".jpg", ".jpeg", ".webp"), "audio": (".wav",), "video": (".mp4", ".mkv", ".mov"),
           "text": (".txt", ".md")}


def modality_of(file: Path) -> str:
    """text, audio, image or video.

    Raises:
        UserError: it is not there, or of an unknown kind.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "is not there"
        raise UserError(f"{file} {what}: give a picture, a sound, a video or a text file.")
    for name, suffixes in SUFFIXES.items():
        if file.suffix.lower() in suffixes:
            return "audio" if name == "video" and _sound_alone(file) else name
    raise UserError(f"{file} has the ending {file.suffix or '(none)'}, which is no picture's, sound's, video's or text's: convert "
                    "it to PNG, WAV, MP4 or plain text.")


def _sound_alone(file: Path) -> bool:
    """Whether a container has a sound track and no pictures. What cannot be opened is left to its reader."""
    av = library("av")
    try:
        with av.open(str(file)) as container:
            return bool(container.streams.audio) and not container.streams.video
    except (av.FFmpegError, ValueError):
        return False


def check_ending(file: Path, modality: str) -> None:
    """Refuse a file whose ending does not fit what is to be written."""
    endings = WRITTEN[modality]
    if file.suffix.lower() not in endings:
        raise UserError(f"{file} does not fit: {modality} is written as {', '.join(endings)}; give a file with that ending.")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a name beside `file` that becomes `file` on success and vanishes on failure; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".writing-{file.name}")
    try:
        yield half
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)


def write_picture(file: Path, pixels: np.ndarray) -> None:
    """uint8 `(h, w, 3)` RGB, in the format of the ending."""
    Image.fromarray(pixels).save(file, quality=95)


def write_video(file: Path, frames: np.ndarray, rate: Fraction) -> None:
    """uint8 `(t, h, w, 3)` RGB at `rate` frames a second, as H.264, or MPEG-4 where this PyAV has no H.264. Both take even
    sides: of odd ones the last row or column is left out."""
    av = library("av")
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    if 0 in (height, width):
        raise UserError(f"{file}: a video's frames have 2 x 2 pixels at least; got {frames.shape[1]} x {frames.shape[2]}.")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
