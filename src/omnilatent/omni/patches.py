"""Pictures, videos and mel spectrograms as patches: one geometry, one modality each by its numbers.

- `Patches`: cut a volume into patches and put it together again, at any size.
- `PatchModality`: a modality whose tokens are patches: linear in, linear out, learned queries between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .tokens import Tokens, grid, sequence

Size = tuple[int, ...]


@dataclass(frozen=True)
class Patches:
    """Volumes `(b, channels, t, h, w)` in patches of `patch` = (t, h, w)."""

    channels: int
    patch: tuple[int, int, int]

    @property
    def numbers(self) -> int:
        """Of one patch."""
        t, h, w = self.patch
        return self.channels * t * h * w

    def counts(self, volume: Size) -> tuple[int, int, int]:
        """(t, h, w) → patches along each axis, the last ones begun."""
        t, h, w = (-(-side // patch) for side, patch in zip(volume, self.patch, strict=True))
        return t, h, w

    def cut(self, volume: Tensor) -> Tensor:
        """`(b, c, t, h, w)` → `(b, n, numbers)`; what is missing of the last patches repeats the border."""
        counts = self.counts(tuple(volume.shape[2:]))
        for axis, (count, patch) in enumerate(zip(counts, self.patch, strict=True), 2):
            short = count * patch - volume.shape[axis]
            if short:
                edge = volume.narrow(axis, volume.shape[axis] - 1, 1)
                volume = torch.cat((volume, edge.repeat_interleave(short, axis)), axis)
        (t, h, w), (pt, ph, pw) = counts, self.patch
        parts = volume.unflatten(4, (w, pw)).unflatten(3, (h, ph)).unflatten(2, (t, pt))  # b c t pt h ph w pw
        return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def join(self, patches: Tensor, volume: Size) -> Tensor:
        """The inverse of `cut`, cropped to (t, h, w)."""
        (t, h, w), (pt, ph, pw) = self.counts(volume), self.patch
        parts = patches.unflatten(2, (self.channels, pt, ph, pw)).unflatten(1, (t, h, w))
        whole = parts.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)
        return whole[:, :, : volume[0], : volume[1], : volume[2]]


AXES = {1: "frames", 2: "height, width", 3: "frames, height, width"}


class PatchModality(nn.Module):
    """A modality of values in [0, 1] on a line, a plane or a volume: `(b, channels, *size)`, of any size.

    Args:
        name: as messages call it.
        dim: width of the tokens.
        patches: how it is cut.
        usual: the size of what is made where none is asked for; its length says how many axes there are.
        terms: (made, true) → the losses by name.
    """

    def __init__(self, name: str, dim: int, patches: Patches, usual: Size,
                 terms: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.name, self.channels, self.patches, self.usual, self.terms = name, patches.channels, patches, usual, terms
        self.embed, self.head = nn.Linear(patches.numbers, dim), nn.Linear(dim, patches.numbers)
        self.query, self.noisy = nn.Parameter(torch.randn(dim) * 0.02), nn.Linear(patches.numbers, dim)

    def check(self, data: Tensor) -> None:
        """Raise a ValueError that says what was expected and what came."""
        axes = f"floating point (b, {self.channels}, {AXES[len(self.usual)]})"
        shape = tuple(data.shape)
        if not data.is_floating_point():
            raise ValueError(f"{self.name} is {axes}; got {data.dtype} {shape}")
        if data.ndim != 2 + len(self.usual) or shape[1] != self.channels:
            raise ValueError(f"{self.name} is {axes}; got {shape}")
        if 0 in shape:
            raise ValueError(f"{self.name} is {axes} with nothing empty; got {shape}")

    def volume(self, size: Size) -> tuple[int, int, int]:
        """(frames,), (height, width) or (frames, height, width) → (t, h, w)."""
        t, h, w = {1: (*size, 1, 1), 2: (1, *size), 3: size}[len(self.usual)]
        return t, h, w

    def size_of(self, data: Tensor) -> Size:
        return tuple(data.shape[2:])

    def count(self, size: Size) -> int:
        """Tokens of one example."""
        t, h, w = self.patches.counts(self.volume(size))
        return t * h * w

    def positions(self, size: Size, device: torch.device) -> Tensor:
        """Of its tokens `(n, 3)`."""
        t, h, w = self.patches.counts(self.volume(size))
        return sequence(t, device) if len(self.usual) == 1 else grid(t, h, w, device)

    def cut(self, data: Tensor) -> Tensor:
        """A batch → its patches `(b, n, numbers)`, values 2x − 1."""
        return self.patches.cut((2 * data - 1).reshape(*data.shape[:2], *self.volume(self.size_of(data))))

    def join(self, patches: Tensor, size: Size) -> Tensor:
        """The inverse of `cut`; not clamped."""
        whole = self.patches.join(patches, self.volume(size))
        return (whole.reshape(*whole.shape[:2], *size) + 1) / 2

    def goal(self, data: Tensor) -> Tensor:
        """What `losses` compares with."""
        return data

    def losses(self, patches: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """What was made beside its goal: the terms by name."""
        return self.terms(self.join(patches, self.size_of(goal)), goal)

    def encode(self, data: Tensor) -> Tokens:
        """A batch as a source."""
        return Tokens(self.embed(self.cut(data).to(self.embed.weight.dtype)), self.positions(self.size_of(data), data.device))
