"""The digits world: four aligned modalities of the ten digits, for nothing.

A handwritten digit (image), the digit spoken or dialled (audio), its English word (text), and the handwritten digit moving
(video). Handwriting is MNIST's or scikit-learn's, speech is the Free Spoken Digit Dataset's recordings, and where these are
not given the tones of a telephone's keys take their place.

- `DigitWorld`: one part (training or test); a sample is a pure function of (seed, position).
- `open_world`: both parts, from DATA. `refuse_recordings_alone`: DATA that is only their sound.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .digits import Digits, embedded_digits, holds_idx, open_idx
from .keyed import EpochOrder, below, draws, unit
from .mel import MelSpec, centred, read_sound

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MEL = MelSpec(rate=8_000, n_fft=512, hop=128, bands=64, low=50.0, high=4_000.0)
SIDE, FRAMES, MEL_FRAMES = 32, 8, 64
INNER = 20  # pixels of the moving digit
SAMPLES = (MEL_FRAMES - 1) * MEL.hop  # 1.008 s
EMBEDDED = "digits"
TONES = {0: (941, 1336), 1: (697, 1209), 2: (697, 1336), 3: (697, 1477), 4: (770, 1209), 5: (770, 1336), 6: (770, 1477),
         7: (852, 1209), 8: (852, 1336), 9: (852, 1477)}  # Hz, ITU-T Q.23


@dataclass(frozen=True)
class Recording:
    """A spoken digit: `wave` float32 `(n,)` at `MEL.rate`, and who spoke."""

    digit: int
    speaker: str
    wave: Tensor


@dataclass(frozen=True)
class DigitSample:
    """One example, each modality made when it is asked for.

    Attributes:
        label: 0 to 9.
        pixels: the handwriting `(28, 28)` in [0, 1].
        draw: what everything random in it is drawn from.
    """

    world: DigitWorld
    label: int
    pixels: Tensor
    draw: list[int]

    @property
    def image(self) -> Tensor:
        """`(3, 32, 32)` in [0, 1]."""
        return colour(torch.nn.functional.pad(self.pixels, (2, 2, 2, 2)))

    @property
    def wave(self) -> Tensor:
        """The sound `(8064,)`, at `MEL.rate`."""
        return self.world.wave(self.label, self.draw)

    @property
    def audio(self) -> Tensor:
        """Its mel spectrogram `(64, 64)` in [0, 1]."""
        return MEL.to_mel(self.wave)

    @property
    def video(self) -> Tensor:
        """`(3, 8, 32, 32)` in [0, 1]."""
        return moving(self.pixels, self.draw[4:])

    @property
    def text(self) -> str:
        """The English word."""
        return WORDS[self.label]


@dataclass(frozen=True)
class DigitWorld:
    """One part of the world.

    Attributes:
        digits: the handwriting, with labels.
        recordings: the speech; none: the telephone's tones.
        seed: of everything that is drawn.
        varied: whether recordings are shifted, stretched, made louder and noisy, as for training.
    """

    name: str
    digits: Digits
    recordings: tuple[Recording, ...] = ()
    seed: int = 0
    varied: bool = True

    def __len__(self) -> int:
        return len(self.digits)

    def sample(self, position: int) -> DigitSample:
        """Handwriting in a random order an epoch; everything else follows from (seed, position)."""
        epoch, place = divmod(position, len(self))
        index = EpochOrder(len(self), self.seed, epoch)[place] if self.varied else place
        assert self.digits.labels is not None
        label, pixels = int(self.digits.labels[index]), torch.from_numpy(self.digits.pixels[index].copy()).float() / 255
        return DigitSample(self, label, pixels, draws("digit world", self.name, self.seed, position, count=8))

    def wave(self, label: int, draw: list[int]) -> Tensor:
        """The digit as a sound `(8064,)`."""
        if not self.recordings:
            return tone(label, draw)
        own = [recording for recording in self.recordings if recording.digit == label]
        return within_a_second(own[below(draw[0], len(own))].wave, draw if self.varied else None)


def colour(grey: Tensor) -> Tensor:
    """`(…, h, w)` → `(3, …, h, w)`."""
    return grey.expand(3, *grey.shape)


def moving(pixels: Tensor, draw: list[int]) -> Tensor:
    """A digit of 28×28 made smaller, on a straight way through 32×32 that turns round at the borders `(3, 8, 32, 32)`."""
    small = torch.nn.functional.interpolate(pixels[None, None], (INNER, INNER), mode="bilinear", antialias=True)[0, 0]
    room = SIDE - INNER
    canvas = torch.zeros(FRAMES, SIDE, SIDE)
    start = [unit(d) * room for d in draw[:2]]
    speed = [(unit(d) - 0.5) * 6 for d in draw[2:4]]
    for frame in range(FRAMES):
        y, x = (round(abs((s + v * frame + room) % (2 * room) - room)) for s, v in zip(start, speed, strict=True))
        canvas[frame, y : y + INNER, x : x + INNER] = small
    return colour(canvas)


def heard(wave: Tensor) -> Tensor:
    """A recording, in the middle of one second, as a mel spectrogram `(64, 64)`."""
    return MEL.to_mel(within_a_second(wave, None))


def within_a_second(wave: Tensor, draw: list[int] | None) -> Tensor:
    """A recording in the middle of one second; with draws at another place, speed and loudness, with noise."""
    if draw is None:
        return centred(wave, SAMPLES).clamp(-1, 1)
    longer = round(len(wave) * (0.85 + 0.3 * unit(draw[1])))
    wave = torch.nn.functional.interpolate(wave[None, None], longer, mode="linear", align_corners=True)[0, 0]
    wave = wave * 10 ** (unit(draw[2]) - 0.7)
    wave = wave[max(0, len(wave) - SAMPLES) // 2 :][:SAMPLES]
    room = SAMPLES - len(wave)
    before = below(draw[3], room + 1)
    wave = torch.nn.functional.pad(wave, (before, room - before))
    noise = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(draw[0] >> 1))
    return (wave + noise * 10 ** (-4.5 + 2 * unit(draw[4]))).clamp(-1, 1)


def tone(label: int, draw: list[int]) -> Tensor:
    """A telephone's key `(8064,)`: two tones, of a drawn length, place and loudness, with a little noise."""
    length = round(SAMPLES * (0.3 + 0.5 * unit(draw[1])))
    time = torch.arange(length) / MEL.rate
    two = sum(torch.sin(2 * torch.pi * hertz * time + unit(d) * 6.28) for hertz, d in zip(TONES[label], draw[2:4], strict=True))
    assert isinstance(two, Tensor)
    ramp = torch.minimum(torch.arange(length), torch.arange(length - 1, -1, -1)).div(80).clamp(max=1)
    before = below(draw[5], SAMPLES - length + 1)
    wave = torch.nn.functional.pad(two * ramp * (0.1 + 0.3 * unit(draw[4])), (before, SAMPLES - length - before))
    return wave + 1e-3 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(draw[0] >> 1))


def holds_world(data: str) -> bool:
    """Whether `open_world` takes DATA."""
    return data == EMBEDDED or any(place.is_dir() and holds_idx(place) for place in (Path(data), Path(data) / "mnist"))


def open_world(data: str, seed: int = 0) -> tuple[DigitWorld, DigitWorld]:
    """(training, test). DATA is 'digits', scikit-learn's handwriting and telephone tones; or a folder that holds MNIST's files
    or a folder mnist with them, and, where there is one, fsdd with train.tar and test.tar of recordings.

    Raises:
        UserError: DATA is neither.
    """
    if data == EMBEDDED:
        digits, recordings = embedded_digits(), {"train": (), "test": ()}
    else:
        folder = Path(data)
        places = [place for place in (folder, folder / "mnist") if place.is_dir() and holds_idx(place)]
        if not places:
            raise UserError(f"{data} holds no digits: give 'digits', or a folder with MNIST's files or with mnist/ and fsdd/.")
        digits = open_idx(places[0])
        recordings = {part: read_recordings(folder / "fsdd" / f"{part}.tar") for part in ("train", "test")}
    if digits.labels is None or digits.test is None or digits.test.labels is None:
        raise UserError(f"{data}: the digits world needs labels and test pictures beside the training pictures.")
    training = DigitWorld(f"{data}/train", digits, recordings["train"], seed)
    return training, replace(training, name=f"{data}/test", digits=digits.test, recordings=recordings["test"], varied=False)


def refuse_recordings_alone(data: str) -> None:
    """Raise a UserError where DATA is the recordings, or the folder above them, and there is no handwriting beside them."""
    for folder in (Path(data), Path(data) / "fsdd"):
        tar = folder / "train.tar"
        if tar.is_file() and tarfile.is_tarfile(tar):
            with tarfile.open(tar) as archive:
                first = archive.next()
            if first is not None and Path(first.name).suffix in (".flac", ".wav"):
                raise UserError(f"{data} holds spoken digits and no handwritten ones: give the folder that holds mnist/ (MNIST's files) "
                                "and fsdd/ (train.tar and test.tar).")


def read_recordings(tar: Path) -> tuple[Recording, ...]:
    """Recordings named DIGIT_SPEAKER_NUMBER.flac or .wav of a tar; none where it is not there."""
    if not tar.exists():
        return ()
    found = []
    with tarfile.open(tar) as archive:
        for member in archive.getmembers():
            digit, _, rest = Path(member.name).stem.partition("_")
            if digit.isdigit() and int(digit) < 10 and (file := archive.extractfile(member)) is not None:
                found.append(Recording(int(digit), rest.rpartition("_")[0], read_sound(file, MEL.rate, f"{tar}:{member.name}")))
    missing = sorted(set(range(10)) - {recording.digit for recording in found})
    if missing:
        raise UserError(f"{tar} holds no recording of {WORDS[missing[0]]}: expected DIGIT_SPEAKER_NUMBER.flac for every digit.")
    return tuple(found)
