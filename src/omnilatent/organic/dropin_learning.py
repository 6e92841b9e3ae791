"""How drop-ins learn: from a teacher's latents of photos, and from its decoder's answers to small changes.

- `EncoderLearning`: pictures → the teacher's latents. `DecoderLearning`: latents → the pictures themselves.
- `decoder_responses`: how much each latent direction moves the decoded picture.

Not every channel counts alike: TAEF2's decoder answers to two of its 32 channels with thirty times the squared change
of most others. So an encoder's neurons are chosen and tuned for the errors that the decoder shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import Codec
from .dropin import DropinEncoder
from .fovea import Fovea, FoveaCode, FoveaFit
from .grid_learning import GridConfig, Maps, StackLearning
from .grids import GridDecoder, GridStack, frequencies
from .learning import Learning, Pace
from .lessons import Lessons
from .peers import Peers
from .search import generator

_CROPS = 16
_NUDGE = 0.3  # of a latent channel, standard deviation


class EncoderLearning(Learning):
    """The first round is the retina's, the others are the stack's, a layer each.

    Args:
        goal: what it says, of lessons, `(b, k, h, w)`; by default the teacher's latents.
        weighing: of `decoder_responses`; None: all channels count alike.
    """

    def __init__(self, fovea: Fovea, config: GridConfig, pace: Pace, peers: Peers, device: torch.device,
                 weighing: Tensor | None, goal: Maps = lambda lessons: lessons.taught) -> None:
        super().__init__(pace, peers, device)
        self.rounds, self.config, self.weighing, self.goal = 1 + config.layers, config, weighing, goal
        self.fit, self.layers = FoveaFit(fovea, device), None

    @torch.no_grad()
    def see(self, lessons: Lessons, held: bool, position: int) -> None:
        if self.layers is not None:
            self.layers.see(lessons, held, position)
        elif not held:
            self.fit.add(lessons.images, generator("windows", self.pace.seed, position))

    def work(self, last: bool) -> None:
        if self.layers is not None:
            self.layers.work(last)
            self.left, self.over = self.layers.left, self.layers.over
        elif last:
            self._open(self.fit.code(self.peers))
        self.done += 1
        if last:
            self.round, self.done = self.round + 1, 0

    def _open(self, code: FoveaCode) -> None:
        stack = GridStack(code.fovea.outputs, [], self.config.reach, self.config.context)
        self.code = code
        self.layers = StackLearning(stack, lambda lessons: code(lessons.images), self.goal,
                                    self.config, self.pace, self.peers, self.device, self.weighing)

    def model(self) -> DropinEncoder | None:
        stack = None if self.layers is None else self.layers.model()
        return None if stack is None else DropinEncoder(self.code, stack)

    def state(self) -> dict[str, Any]:
        own: dict[str, Any] = {"numbers": [self.round, self.done], "fit": [m.state() for m in self.fit.moments]}
        if self.layers is not None:
            own["code"] = {"components": list(self.code.fovea.components), "weights": self.code.state_dict()}
            own["layers"] = self.layers.state()
        return own

    def load_state(self, state: dict[str, Any]) -> None:
        self.round, self.done = state["numbers"]
        for moments, saved in zip(self.fit.moments, state["fit"], strict=True):
            moments.load_state({name: value.to(self.device) for name, value in saved.items()})
        if "layers" in state:
            code = FoveaCode(replace(self.fit.fovea, components=tuple(state["code"]["components"])))
            code.load_state_dict(state["code"]["weights"])
            self._open(code.to(self.device))
            self.layers.load_state(state["layers"])
            self.left, self.over = self.layers.left, self.layers.over


class DecoderLearning(StackLearning):
    """A `GridDecoder`'s stack, whose layers add to each other.

    Args:
        code: of lessons, `(b, channels, h, w)`; for a drop-in the teacher's latents.
    """

    def __init__(self, code: Maps, channels: int, cell: int, config: GridConfig, pace: Pace, peers: Peers,
                 device: torch.device) -> None:
        self.cell, self.waves = cell, frequencies(cell).to(device)
        stack = GridStack(channels, [], config.reach, config.context, adds=True)
        super().__init__(stack, code, self._cosines, config, pace, peers, device)

    def _cosines(self, lessons: Lessons) -> Tensor:
        return torch.einsum("kp,bphw->bkhw", self.waves, F.pixel_unshuffle(lessons.images - 0.5, self.cell))

    def model(self) -> GridDecoder | None:
        stack = super().model()
        return None if stack is None else GridDecoder(stack, self.cell).to(self.device)


@torch.no_grad()
def decoder_responses(teacher: Codec, lessons: Lessons, draw: torch.Generator) -> Tensor:
    """`(c, c)`: its rows' inner products are those of the changes that the channels make in a decoded picture.

    Forward evaluations only: c + 1 decodings of 16 crops of 12×12 latent pixels, noise on one channel at a time. The
    changes are turned to as few numbers as there are channels (QR decomposition).
    """
    side = min(12, *lessons.taught.shape[-2:])
    z = lessons.taught[:: max(1, len(lessons) // _CROPS), :, :side, :side][:_CROPS]
    noise = torch.randn(len(z), side, side, generator=draw).to(z.device) * _NUDGE
    still, rows = teacher.decode(z), []
    for channel in range(z.shape[1]):
        moved = z.clone()
        moved[:, channel] += noise
        rows.append((teacher.decode(moved) - still).flatten())
    changes = torch.stack(rows)
    changes /= changes.square().sum(1).mean().sqrt().clamp(min=1e-12)
    return torch.linalg.qr(changes.double().mT).R.mT.float().contiguous()
