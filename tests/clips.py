"""Short video files for tests."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor


def write_clip(
    file: Path, frames: int = 6, size: tuple[int, int] = (48, 64), sound: Tensor | None = None, rate: int = 8_000
) -> None:
    """A moving bar at 6 frames a second, and a sound `(n,)` at `rate` or none, in Matroska; no frames: the sound alone."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(6)) if frames else None
        track = None if sound is None else container.add_stream("pcm_s16le", rate=rate, layout="mono")
        if stream is not None:
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for number in range(frames):
                pixels = np.zeros((*size, 3), np.uint8)
                pixels[:, 8 * number : 8 * number + 8] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        if track is not None:
            samples = (sound.clamp(-1, 1) * 32767).round().short().numpy()[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.rate, frame.pts = rate, 0
            container.mux(track.encode(frame))
            container.mux(track.encode())
