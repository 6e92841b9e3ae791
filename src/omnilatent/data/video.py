"""A video file → its frames as images, at constant memory however long it is.

- `VideoFrames`: an image source; reading in order decodes each frame once, any other order seeks.
- `VIDEO_SUFFIXES`: the suffixes that make a file a video.

PyAV decodes; it is imported when a video is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, library
from .images import MAX_PIXELS, UnreadableImage

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv"})
GAP = 1.0  # seconds between what is trained on and what is held out: neighbouring frames are nearly copies


class VideoFrames:
    """The frames of one video, upright, RGB.

    Keys are "clip.mp4/000123". It holds no open file when it is pickled; every process decodes by itself.

    Args:
        path: the file.
        max_pixels: videos with larger frames are refused.

    Raises:
        UserError: it does not exist, is no video, or has no frames.
    """

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self.name = path, path.name
        try:
            with self._open() as container:
                if not container.streams.video:
                    kinds = sorted({stream.type for stream in container.streams})
                    raise UserError(f"{path} has no picture track (its tracks: {', '.join(kinds) or 'none'}): give a video.")
                stream = container.streams.video[0]
                self.size = stream.height, stream.width
                self.rate = float(stream.average_rate or stream.guessed_rate or 25)
                times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        except library("av").FFmpegError as failure:
            reason = " ".join(str(failure).split()) or type(failure).__name__
            raise UserError(f"{path} is no video that can be read ({reason}): convert it to MP4.") from failure
        if not times:
            raise UserError(f"{path} holds no frames: convert it to MP4 again.")
        if self.size[0] * self.size[1] > max_pixels:
            raise UserError(f"{path} has frames of {self.size[1]} x {self.size[0]} pixels, above the limit of "
                            f"{max_pixels}: raise --max-pixels or make it smaller.")
        self._times = np.unique(np.array(times, np.int64))  # in the stream's own units
        self._decoder: _Decoder | None = None

    def __len__(self) -> int:
        return len(self._times)

    def key(self, i: int) -> str:
        return f"{self.name}/{i:06}"

    def read(self, i: int) -> np.ndarray:
        """uint8 `(h, w, 3)`; raises `UnreadableImage`."""
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        try:
            if self._decoder is None or self._decoder.process != os.getpid():
                self._decoder = _Decoder(self)
            return self._decoder.frame(i)
        except (library("av").FFmpegError, IndexError) as failure:  # it may have changed since
            self._decoder = None
            reason = " ".join(str(failure).split())
            raise UnreadableImage(self.key(i), f"cannot be decoded ({reason}): convert the video again") from failure

    def stretches(self, held_out: float) -> tuple[range, range]:
        """(training, held out): the last share of the frames is held out, and a second before it left aside. A single
        frame is trained on."""
        first = min(max(1, round(len(self) * (1 - held_out))), max(1, len(self) - 1))
        gap = max(0, min(round(GAP * self.rate), first - 1))
        return range(first - gap), range(first, len(self))

    def _open(self) -> Any:
        try:
            return library("av").open(str(self.path))
        except FileNotFoundError as missing:
            raise UserError(f"{self.path} does not exist: check the path.") from missing

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None}


class _Decoder:
    """An open video and the place in it."""

    def __init__(self, video: VideoFrames) -> None:
        self.process = os.getpid()
        self._times = video._times
        self._container = video._open()
        self._stream = self._container.streams.video[0]
        self._ahead = round(2 * video.rate)
        self._frames: Iterator[Any] = iter(())
        self._next = -1  # index of the frame that comes next; -1: none

    def frame(self, i: int) -> np.ndarray:
        if not 0 <= i - self._next <= self._ahead or self._next < 0:  # far ahead, a keyframe is nearer
            self._container.seek(int(self._times[i]), stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
        for frame in self._frames:
            if frame.pts is None or frame.pts < self._times[i]:
                continue
            self._next = int(np.searchsorted(self._times, frame.pts, side="right"))
            pixels = frame.to_ndarray(format="rgb24")
            return np.ascontiguousarray(np.rot90(pixels, round((frame.rotation or 0) / 90)))
        self._next = -1
        raise UnreadableImage(f"{self._container.name}", f"ends before frame {i}: convert the video again")
