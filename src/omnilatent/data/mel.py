"""Sound as mel spectrograms, by one record that is saved with every model, and back.

- `MelSpec`: rate, window, bands, and the logarithm's range; `to_mel` and `to_wave`.
- `centred`: a sound brought to a length.
- `read_sound`: whatever PyAV reads, the track of a video too. `write_sound`: 16-bit WAV.

A mel spectrogram is `(bands, frames)` in [0, 1]: 0 is `floor_db` below full scale or less, 1 is full scale.
"""

from __future__ import annotations

import math
import wave as wave_file
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, library


@dataclass(frozen=True)
class MelSpec:
    """Everything that a mel spectrogram depends on."""

    rate: int = 16_000
    """Samples a second."""
    n_fft: int = 1_024
    """Samples of a window (Hann) and of its Fourier transform."""
    hop: int = 160
    """Samples from frame to frame."""
    bands: int = 128
    """Triangular filters, equally spaced on the mel scale (O'Shaughnessy's 2595 log10(1 + f / 700)), each of peak 1."""
    low: float = 20.0
    """Lower edge of the first, Hz."""
    high: float = 8_000.0
    """Upper edge of the last, Hz; no more than half the rate."""
    floor_db: float = -80.0
    """What 0 stands for, in decibel below full scale (a sine of amplitude 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= self.rate / 2:
            raise ValueError(f"mel bands lie within 0 to half the rate, {self.rate / 2:g} Hz; got {self.low:g} to {self.high:g}")
        if not 1 <= self.hop <= self.n_fft:
            raise ValueError(f"hop is 1 to n_fft, {self.n_fft}; got {self.hop}")
        if self.bands < 1 or self.floor_db >= 0:
            raise ValueError(f"bands is at least 1 and floor_db below 0; got {self.bands} and {self.floor_db}")

    def frames(self, samples: int) -> int:
        """Frames of so many samples."""
        return samples // self.hop + 1

    def to_mel(self, wave: Tensor) -> Tensor:
        """Samples `(…, n)` in [-1, 1] at `rate`, n ≥ 1 → `(…, bands, frames)` in [0, 1]."""
        if wave.shape[-1] == 0:
            raise ValueError("a sound has at least one sample; got none")
        spectrum = self._stft(wave)
        power = (spectrum.real.square() + spectrum.imag.square()) / (self.n_fft / 4) ** 2  # a sine of amplitude 1 has the peak 1
        mel = _filters(self).to(power) @ power
        decibel = 10 * mel.clamp_min(10 ** (self.floor_db / 10)).log10()
        return (1 - decibel / self.floor_db).clamp(0, 1)

    def to_wave(self, mel: Tensor, iterations: int = 64) -> Tensor:
        """`(…, bands, frames)` in [0, 1] → samples `(…, (frames − 1) · hop)`: magnitudes that the bands explain, phases by
        Griffin & Lim (1984), accelerated (Perraudin et al. 2013, momentum 0.99)."""
        shape = mel.shape[:-2]
        mel = mel.detach().float().reshape(-1, *mel.shape[-2:]).clamp(0, 1)
        loud = mel > 0
        power = torch.where(loud, 10 ** (self.floor_db * (1 - mel) / 10), 0.0)
        magnitude = self._bins(power).sqrt() * (self.n_fft / 4)
        length = (mel.shape[-1] - 1) * self.hop
        if length <= 0:
            return mel.new_zeros(*shape, 0)
        generator = torch.Generator().manual_seed(0)
        phase = torch.rand(magnitude.shape, generator=generator).to(mel) * (2 * math.pi)
        now, before = torch.polar(torch.ones_like(phase), phase), torch.zeros_like(phase, dtype=torch.complex64)
        for _ in range(iterations):
            heard = self._stft(self._inverse(magnitude * now, length))
            now = heard - 0.99 / 1.99 * before
            now, before = now / now.abs().clamp_min(1e-12), heard
        return self._inverse(magnitude * now, length).reshape(*shape, length).clamp(-1, 1)

    def _bins(self, power: Tensor, iterations: int = 100) -> Tensor:
        """Power in the bands `(b, bands, frames)` → a power in the bins, none negative, that the bands hear so (multiplicative
        updates, Lee & Seung 2001)."""
        filters = _filters(self).to(power)
        wanted, found = filters.T @ power, (filters.T @ power).clamp_min(1e-12)
        for _ in range(iterations):
            found = found * (wanted / (filters.T @ (filters @ found)).clamp_min(1e-12))
        return found

    def _stft(self, wave: Tensor) -> Tensor:
        window = torch.hann_window(self.n_fft, device=wave.device)
        flat = torch.nn.functional.pad(wave.float().reshape(-1, wave.shape[-1]), (self.n_fft // 2, self.n_fft // 2))
        found = torch.stft(flat, self.n_fft, self.hop, window=window, center=False, return_complex=True)
        return found.reshape(*wave.shape[:-1], *found.shape[-2:])

    def _inverse(self, spectrum: Tensor, length: int) -> Tensor:
        window = torch.hann_window(self.n_fft, device=spectrum.device)
        return torch.istft(spectrum, self.n_fft, self.hop, window=window, center=True, length=length)


@cache
def _filters(spec: MelSpec) -> Tensor:
    """`(bands, n_fft / 2 + 1)`."""
    mel = 2595 * np.log10(1 + np.array([spec.low, spec.high]) / 700)
    edges = 700 * (10 ** (np.linspace(*mel, spec.bands + 2) / 2595) - 1)
    bins = np.arange(spec.n_fft // 2 + 1) * spec.rate / spec.n_fft
    # no narrower than two bins, or a low band between two of them would hear nothing
    lower = np.minimum(edges[:-2], edges[1:-1] - spec.rate / spec.n_fft)
    upper = np.maximum(edges[2:], edges[1:-1] + spec.rate / spec.n_fft)
    rising = (bins - lower[:, None]) / (edges[1:-1] - lower)[:, None]
    falling = (upper[:, None] - bins) / (upper - edges[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling))).float()


def centred(wave: Tensor, samples: int) -> Tensor:
    """The middle of a wave `(n,)` that is longer, or a shorter one in the middle of silence: `(samples,)`."""
    wave = wave[max(0, len(wave) - samples) // 2 :][:samples]
    room = samples - len(wave)
    return torch.nn.functional.pad(wave, (room // 2, room - room // 2))


def read_sound(file: str | Path | IO[bytes], rate: int, name: str | None = None) -> Tensor:
    """A file's sound, its channels averaged, at `rate` `(n,)` in [-1, 1].

    Args:
        file: a path, or an open file, which messages call `name`.

    Raises:
        UserError: it is not there, holds no sound, or cannot be read.
    """
    name = name or str(file)
    if isinstance(file, (str, Path)) and not Path(file).is_file():
        raise UserError(f"{name} is not there: give a sound file.")
    av = library("av")
    try:
        with av.open(str(file) if isinstance(file, Path) else file) as container:
            if not container.streams.audio:
                raise UserError(f"{name} holds no sound track: give a file that does.")
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
            frames = [f for packet in container.decode(audio=0) for f in resampler.resample(packet)] + resampler.resample(None)
            parts = [frame.to_ndarray()[0] for frame in frames]
    except UserError:
        raise
    except (av.FFmpegError, IndexError, ValueError) as failure:
        raise UserError(f"{name} cannot be read as sound ({failure}): give a WAV, FLAC, MP3 or video file.") from failure
    wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(wave):
        raise UserError(f"{name} holds no samples: give a sound that is longer.")
    return torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)).clamp(-1, 1)


def write_sound(file: Path, wave: Tensor, rate: int) -> None:
    """Samples `(n,)` in [-1, 1] as 16-bit WAV, one channel."""
    with wave_file.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((wave.detach().cpu().clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())
