"""Independent judges of the digits world: small networks that read a digit off a picture, a sound or a video.

They are trained on real data alone and never see what a model made. Each knows its own accuracy on held-out real data, which is
the most that a model can be given. Text is read by comparing it with the ten words.

- `Reader`: one network; `read` gives digits, `features` what a Fréchet distance is taken in. `fit_reader`: train one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.digit_world import WORDS

WIDTHS = (32, 64, 128)


class Reader(nn.Module):
    """Three convolutions of stride 2 and two layers; a video's frames are centred first, and their features averaged.

    Takes pictures `(b, 3, h, w)`, mel spectrograms `(b, bands, frames)` or videos `(b, 3, t, h, w)` in [0, 1].

    Attributes:
        accuracy: on held-out real data, a share; NaN before it was measured.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
                       nn.Conv2d(after, after, 3, 2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.LazyLinear(128), nn.SiLU())
        self.last = nn.Linear(128, len(WORDS))
        self.accuracy = float("nan")

    def features(self, data: Tensor) -> Tensor:
        """`(b, 128)`."""
        frames = data.transpose(1, 2).flatten(0, 1) if data.ndim == 5 else data
        grey = frames.mean(1, keepdim=True) if frames.ndim == 4 else frames[:, None]
        grey = centred(grey) if data.ndim == 5 else grey
        maps = self.convolutions(grey)
        if data.ndim == 5:
            maps = maps.unflatten(0, (len(data), -1)).mean(1)
        elif data.ndim == 3:  # a word may begin at any time; its bands stay where they are
            maps = torch.cat((maps.mean(3), maps.amax(3)), 1)
        return self.hidden(maps.flatten(1))

    def forward(self, data: Tensor) -> Tensor:
        """Logits `(b, 10)`."""
        return self.last(self.features(data))

    @torch.no_grad()
    def read(self, data: Tensor, batch: int = 256) -> Tensor:
        """Digits `(b,)`."""
        return torch.cat([self(part).argmax(1) for part in data.split(batch)])


def centred(frames: Tensor) -> Tensor:
    """Frames `(n, 1, h, w)` moved so that the centre of what is bright is in their middle: a digit that moves stays still."""
    h, w = frames.shape[-2:]
    mass = frames.clamp_min(0).square() + 1e-6
    total = mass.sum((1, 2, 3))
    y, x = ((mass.sum((1, axis)) * torch.linspace(-1, 1, side, device=frames.device)).sum(1) / total
            for axis, side in ((3, h), (2, w)))
    still = torch.eye(2, 3, device=frames.device).repeat(len(frames), 1, 1)
    still[:, 0, 2], still[:, 1, 2] = x, y
    grid = nn.functional.affine_grid(still, list(frames.shape), align_corners=True)
    return nn.functional.grid_sample(frames, grid, align_corners=True)


def fit_reader(
    data: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, steps: int, seed: int = 0, batch: int = 64,
) -> Reader:
    """Train a reader with AdamW (1e-3 at first, falling to 0) on shifted copies of real data, and measure it.

    Args:
        data: pictures, sounds or videos, on the device to train on; `labels` int64 `(n,)`.
    """
    devices = [data.device] if data.is_cuda else []
    with torch.random.fork_rng(devices):  # leaves the caller's random numbers as they are
        torch.manual_seed(seed)
        reader = Reader().to(data.device)
        reader(data[:2])
        optimizer = torch.optim.AdamW(reader.parameters(), 1e-3, weight_decay=0.05)
        with torch.enable_grad():
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 - step / steps)
                rows = torch.randint(len(data), (batch,)).to(data.device)
                loss = cross_entropy(reader(_shifted(data[rows], torch.randint(-2, 3, (2,)).tolist())), labels[rows],
                                     label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    reader.eval().requires_grad_(False)
    reader.accuracy = float((reader.read(held_out) == held_out_labels).float().mean())
    return reader


def _shifted(data: Tensor, by: Sequence[int]) -> Tensor:
    """Pictures and videos moved by some pixels, sounds by some frames."""
    return data.roll(by[0] * 2, -1) if data.ndim == 3 else data.roll(tuple(by), (-2, -1))


def read_words(texts: Sequence[str]) -> Tensor:
    """The digits that texts name exactly, −1 for any other text, int64 `(n,)`."""
    known = {word: digit for digit, word in enumerate(WORDS)}
    return torch.tensor([known.get(text, -1) for text in texts])
