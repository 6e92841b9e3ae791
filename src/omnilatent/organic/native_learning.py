"""How a native O-VAE is learned: from forward evaluations alone, no gradient and no system of equations solved.

- `NativeLearning`: first the filters, in turns, then the decoder, a layer a round.
- `turned_round`: the decoder's patches as the encoder's filters. `principal_components`: orthogonal iteration.

A linear decoder is fitted to the blocks of the pictures, given what the encoder says of the neighbourhood. Then the
encoder takes the decoder's patches as its filters, turned round: reciprocal weights. The pair of steps is
D = C Eᵀ (E C Eᵀ)⁻¹, E ← Dᵀ, that is orthogonal iteration with the picture's covariance C (Golub & Van Loan, Matrix
Computations, section 8.2), so it climbs to the principal component filter bank (Vaidyanathan 1998) as far as the window
is wide. Nobody computes the inverse: the probes find what it would give. It starts from the principal components of
single blocks, and the turn that held-out pictures like best is kept. The latent's axes are then turned so that its
channels are uncorrelated, by falling variance, each of variance 1; the decoder of tanh neurons learns from that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..latent import LatentSpec
from .dropin_learning import DecoderLearning
from .grid_learning import GridConfig
from .grids import neighbourhood
from .learning import Learning, Pace
from .lessons import Lessons
from .native import BLOCK, PIXELS, NativeAutoencoder, NativeConfig, analysed
from .peers import Peers
from .regression import Regression, fit_moments
from .retina import Moments

_LEAST_SPREAD = 1e-3  # of a channel, in shares of the widest one's: what varies less is not stretched to variance 1
_RIDGE = 1e-7  # of the linear decoder, in shares of the inputs' variance


class NativeLearning(Learning):
    """The first round is of principal components of blocks, `turns` + 1 are of the filters, the others of the layers.

    Args:
        config: its `sizes` do not count: they are the layers that are learned.
        grid: the decoder's layers.
        turns: times that the encoder takes over the decoder's patches.
    """

    def __init__(self, config: NativeConfig, grid: GridConfig, turns: int, pace: Pace, peers: Peers, device: torch.device
                 ) -> None:
        super().__init__(pace, peers, device)
        self.config, self.grid, self.turns = config, grid, turns
        self.rounds = 1 + turns + 1 + grid.layers
        self.blocks = Moments(PIXELS, device)
        self.filters = torch.zeros(0)  # of the turn at hand
        self.fits: dict[bool, Regression] = {}
        self.best, self.lowest = (torch.zeros(0), torch.zeros(0)), float("inf")  # filters; latents' second moments
        self.layers: DecoderLearning | None = None

    @torch.no_grad()
    def see(self, lessons: Lessons, held: bool, position: int) -> None:
        if self.layers is not None:
            self.layers.see(lessons, held, position)
        elif self.round == 0:
            if not held:
                self.blocks.add(_blocks(lessons).mT.flatten(0, 1))
        else:
            seen = neighbourhood(analysed(lessons.images, self.filters), self.config.reach)
            self.fits[held].add(seen.mT.flatten(0, 1), _blocks(lessons).mT.flatten(0, 1))

    @torch.no_grad()
    def work(self, last: bool) -> None:
        if self.layers is not None:
            self.layers.work(last)
            self.over, self.left = self.layers.over, min(self.left, self.layers.left)
        elif last and self.round == 0:
            self._turn(self._of_blocks())
        elif last:
            self._fit()
        self.done += 1
        if last:
            self.round, self.done = self.round + 1, 0

    def _of_blocks(self) -> Tensor:
        """The principal components of single blocks as filters, zero outside their block."""
        blocks = self.blocks.over(self.peers)
        axes = principal_components(blocks.second / blocks.count, self.config.channels)
        filters = axes.float().mT.reshape(-1, 3, BLOCK, BLOCK)
        return F.pad(filters, ((self.config.window - 1) * BLOCK // 2,) * 4)

    def _turn(self, filters: Tensor) -> None:
        self.filters, d = filters, self.config.channels * self.config.reach**2
        self.fits = {held: Regression(d, PIXELS, self.device) for held in (False, True)}

    def _fit(self) -> None:
        seen, held = (self.fits[part].over(self.peers) for part in (False, True))
        decoder, n, reach = fit_moments(seen, _RIDGE), self.config.channels, self.config.reach
        loss = float(held.losses(decoder.weight, decoder.bias).mean())
        variance = float((held.squares / held.inputs.count - held.mean.square()).mean())
        self.left = min(self.left, loss / max(variance, 1e-12))
        if loss < self.lowest:
            middle = torch.arange(n, device=self.device) * reach**2 + reach**2 // 2
            latents = seen.inputs.part(middle)
            mean = latents.sum / latents.count
            covariance = latents.second / latents.count - torch.outer(mean, mean)
            self.best, self.lowest = (self.filters, covariance), loss
        if self.round <= self.turns:
            self._turn(turned_round(decoder.weight.view(PIXELS, n, reach, reach), self.config.window))
        else:
            self._open(*self.best)

    def _open(self, filters: Tensor, covariance: Tensor) -> None:
        """Go on with the layers, on latents that are uncorrelated and of variance 1."""
        axes = principal_components(covariance, len(covariance))
        spread = (axes * (covariance @ axes)).sum(0).clamp(min=0).sqrt()
        spread = spread.clamp(min=_LEAST_SPREAD * float(spread.max()))
        self.filters = torch.einsum("bn,bcij->ncij", (axes / spread).float(), filters)
        self.layers = DecoderLearning(lambda lessons: analysed(lessons.images, self.filters), self.config.channels, BLOCK,
                                      replace(self.grid, reach=self.config.reach, context=self.config.context),
                                      self.pace, self.peers, self.device)
        self.fits = {}  # done with; they would be saved with every checkpoint

    def model(self) -> NativeAutoencoder | None:
        decoder = None if self.layers is None else self.layers.model()
        if decoder is None:
            return None
        found = NativeAutoencoder(replace(self.config, sizes=[layer.sizes for layer in decoder.stack.layers]))
        found.to(self.device).decoder.load_state_dict(decoder.state_dict())
        found.analysis.data.copy_(self.filters)
        return found

    def state(self) -> dict[str, Any]:
        return {"numbers": [self.round, self.over, self.left, self.done, self.lowest], "blocks": self.blocks.state(),
                "filters": self.filters, "best": list(self.best),
                "fits": {str(held): fit.state() for held, fit in self.fits.items()},
                "layers": None if self.layers is None else self.layers.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.round, self.over, self.left, self.done, self.lowest = state["numbers"]
        self.blocks.load_state({name: value.to(self.device) for name, value in state["blocks"].items()})
        self.best = tuple(tensor.to(self.device) for tensor in state["best"])
        if state["layers"] is not None:
            self._open(*self.best)
            self.layers.load_state(state["layers"])
        elif self.round:
            self._turn(state["filters"].to(self.device))
            for held, fit in self.fits.items():
                fit.load_state({name: value.to(self.device) for name, value in state["fits"][str(held)].items()})


def turned_round(synthesis: Tensor, window: int) -> Tensor:
    """The patches that a synthesis `(192, n, k, k)` adds for each channel, as filters `(n, 3, side, side)` of norm 1.

    A channel reaches the block at offset (i, j) through the weight at (−i, −j), hence the flip. A reach narrower than
    the window leaves zeros around, a wider one is cut.
    """
    k, n = synthesis.shape[-1], synthesis.shape[1]
    patches = synthesis.flip(-2, -1).view(3, BLOCK, BLOCK, n, k, k).permute(3, 0, 4, 1, 5, 2)
    patches = patches.reshape(n, 3, k * BLOCK, k * BLOCK)
    margin = (window - k) * BLOCK // 2
    return F.normalize(F.pad(patches, (margin,) * 4).flatten(1)).view(n, 3, window * BLOCK, window * BLOCK)


def principal_components(second: Tensor, count: int, iterations: int = 300) -> Tensor:
    """The leading eigenvectors of second moments `(d, d)` as columns `(d, count)`, by orthogonal iteration.

    A few columns more than asked for are carried along, since the last ones settle late.
    """
    d, second = len(second), second.double()
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(d, min(d, count + 8), generator=draw, dtype=torch.float64).to(second.device)
    for _ in range(iterations):
        vectors = torch.linalg.qr(second @ vectors).Q
    energy = (vectors * (second @ vectors)).sum(0)
    return vectors[:, energy.argsort(dim=-1, descending=True, stable=True)[:count]]


def measured_spec(channels: int, latents: Tensor) -> LatentSpec:
    """The latent's normalisation: mean and standard deviation of every channel of raw latents `(n, c, h, w)`."""
    z = latents.double().movedim(1, 3).flatten(0, 2)
    return LatentSpec(channels=channels, downsampling=BLOCK, kind="point", shift=tuple(z.mean(0).tolist()),
                      scale=tuple((1 / z.std(0).clamp(min=1e-6)).tolist()))


def _blocks(lessons: Lessons) -> Tensor:
    """`(b, 192, sites)`."""
    return F.pixel_unshuffle(lessons.images - 0.5, BLOCK).flatten(2)
