"""How a native O-VAE is learned: from forward evaluations alone, no gradient and no system of equations solved.

- `NativeLearning`: how much of what; `learn`: crops → a `NativeAutoencoder`.
- `lapped_filters`: analysis and synthesis learn from each other; `Filters`: both.
- `principal_components`: orthogonal iteration; takes no targets.
- `gate_directions`, `class_components`: what the classes are, and the bases of their detail.
- `measured_spec`: the latent's normalisation, measured on crops.

The filters. Synthesis is fitted to the blocks of the image by `fit_linear` (conjugate probes), given what the analysis
says of the neighbourhood. Then the analysis takes the synthesis' patches as its filters, turned round: reciprocal
weights. The pair of steps is D = C Eᵀ (E C Eᵀ)⁻¹, E ← Dᵀ, that is orthogonal iteration with the image's covariance C
(Golub & Van Loan, section 8.2), so it climbs to the principal component filter bank (Vaidyanathan 1998) as far as the
window is wide; nobody computes C, nor the inverse: both are in what the probes find. It starts from the principal
components of single blocks. A later stage learns on what the earlier ones leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..latent import LatentSpec
from .native import BLOCK, NativeAutoencoder, NativeConfig, around
from .probes import fit_linear

PIXELS = 3 * BLOCK**2  # numbers in a block
_BATCH = 8  # crops at a time


@dataclass(frozen=True)
class NativeLearning:
    """How much a native O-VAE learns from.

    Attributes:
        sites: rows of each fit; a fit holds `sites` · `bands` · `context`² numbers.
        turns: times that analysis and synthesis change places, for each stage of the filters.
        rounds: times that the whole is learned anew from the synthesis so far; kept if held-out crops gain.
        held_out: crops that nothing is fitted on.
        seed: of the choice of sites and of the first directions of the gate.
    """

    sites: int = 80_000
    turns: int = 5
    rounds: int = 1
    held_out: int = 24
    seed: int = 0


class Filters(NamedTuple):
    """`analysis` `(n, 3, side, side)` of unit norm each; `synthesis` `(192, n, context, context)` and its `bias`."""

    analysis: Tensor
    synthesis: Tensor
    bias: Tensor


@torch.no_grad()
def learn(
    crops: Tensor, config: NativeConfig, learning: NativeLearning | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> NativeAutoencoder:
    """Learn encoder and decoder together.

    Args:
        crops: uint8 `(n, 3, s, s)` RGB, s a multiple of 8; the last `held_out` of them choose between rounds.
        report: called with one line after each stage: what it is and what held-out crops lose.

    Raises:
        UserError: there are too few crops, or they are not of such a size.
    """
    learning = learning or NativeLearning()
    if crops.ndim != 4 or crops.shape[1] != 3 or crops.dtype != torch.uint8 or crops.shape[2] % BLOCK or \
            crops.shape[3] % BLOCK:
        raise UserError(f"The crops have shape {tuple(crops.shape)} and type {crops.dtype}; expected uint8 (n, 3, h, w) "
                        f"with sides that are multiples of {BLOCK}.")
    if len(crops) <= learning.held_out:
        raise UserError(f"{len(crops)} crops are too few: {learning.held_out} are held out; give more.")
    fitting, held = crops[: len(crops) - learning.held_out], crops[len(crops) - learning.held_out :]
    generator = torch.Generator().manual_seed(learning.seed)

    stages: list[Filters] = []
    sizes = sorted({config.channels, config.bands})
    for low, high in zip([0, *sizes], sizes, strict=False):
        stages.append(lapped_filters(fitting, stages, high - low, config, learning, generator))
        report(f"filters {low + 1}-{high}: held-out {held_out_psnr(lambda x: x - _left(x, stages) + 0.5, held):.3f} dB")
    analysis = torch.cat([stage.analysis for stage in stages])
    best = assemble(fitting, analysis, config, learning, generator)
    reached = held_out_psnr(best, held)
    report(f"gate, detail, synthesis: held-out {reached:.3f} dB")
    for number in range(learning.rounds):
        analysis = turned_round(best.synthesis, config.window)
        tried = assemble(fitting, analysis, config, learning, generator)
        psnr = held_out_psnr(tried, held)
        report(f"round {number + 1}: held-out {psnr:.3f} dB, {'kept' if psnr > reached else 'rolled back'}")
        if psnr <= reached:
            break
        best, reached = tried, psnr
    return best


def lapped_filters(
    crops: Tensor, stages: list[Filters], count: int, config: NativeConfig, learning: NativeLearning,
    generator: torch.Generator,
) -> Filters:
    """`count` filters for what `stages` leave of the crops."""
    second = torch.zeros(PIXELS, PIXELS, dtype=torch.float64)
    for images in _batches(crops):
        rows = _rows_of(F.pixel_unshuffle(_left(images, stages) - 0.5, BLOCK))
        second += (rows.mT @ rows).double()
    blocks = principal_components(second, count).float()  # (192, count)
    side, margin = config.window * BLOCK, (config.window - 1) * BLOCK // 2
    analysis = F.pad(blocks.mT.reshape(count, 3, BLOCK, BLOCK), (margin,) * 4)

    def seen(images: Tensor) -> tuple[Tensor, Tensor]:
        left = _left(images, stages)
        return _analyse(left, analysis), left

    turns = learning.turns if not stages else (learning.turns + 1) // 2  # what is left matters less
    for turn in range(turns + 1):
        synthesis, bias = _fit_synthesis(crops, seen, config.context, learning, generator)
        if turn < turns:
            analysis = turned_round(synthesis, config.window)
    assert analysis.shape == (count, 3, side, side)
    return Filters(analysis, synthesis, bias)


def turned_round(synthesis: Tensor, window: int) -> Tensor:
    """The patches that a synthesis `(192, n, k, k)` adds for each band, as filters `(n, 3, side, side)` of unit norm.

    A band reaches the block at offset (i, j) through the weight at (−i, −j), hence the flip. A context narrower than
    the window leaves zeros around, a wider one is cut.
    """
    k, n = synthesis.shape[-1], synthesis.shape[1]
    patches = synthesis.flip(-2, -1).view(3, BLOCK, BLOCK, n, k, k).permute(3, 0, 4, 1, 5, 2)
    patches = patches.reshape(n, 3, k * BLOCK, k * BLOCK)
    margin = (window - k) * BLOCK // 2
    return F.normalize(F.pad(patches, (margin,) * 4).flatten(1)).view(n, 3, window * BLOCK, window * BLOCK)


def assemble(
    crops: Tensor, analysis: Tensor, config: NativeConfig, learning: NativeLearning, generator: torch.Generator
) -> NativeAutoencoder:
    """Analysis filters `(bands, 3, side, side)` → the whole: base rotated, gate, detail, then the synthesis."""
    model = NativeAutoencoder(config)
    model.analysis.copy_(analysis)
    second, count = torch.zeros(config.channels, config.channels, dtype=torch.float64), 0
    for images in _batches(crops):
        rows = _rows_of(model.analyse(images)[:, : config.channels])
        second += (rows.mT @ rows).double()
        count += len(rows)
    turn = principal_components(second, config.channels)
    leading = torch.einsum("bn,bcij->ncij", turn.float(), analysis[: config.channels])
    model.analysis[: config.channels] = leading
    spread = ((turn.mT @ second @ turn).diagonal() / count).sqrt().clamp(min=1e-4)
    model.base_spread.copy_(spread[: config.base])
    if config.classes:
        inputs, detail = _gate_rows(crops, model, learning, generator)
        model.directions.copy_(gate_directions(inputs, config.classes, generator))
        chosen = (inputs @ model.directions.mT).abs().argmax(1)
        components, spread = class_components(detail, chosen, config.classes, config.detail)
        model.components.copy_(components)
        model.spread.copy_(spread)
    synthesis, bias = _fit_synthesis(crops, lambda x: (model.expand(model.encode(x)), x), config.context, learning,
                                     generator)
    model.synthesis.copy_(synthesis)
    model.bias.copy_(bias)
    return model


def principal_components(second: Tensor, count: int, iterations: int = 300) -> Tensor:
    """The leading eigenvectors of second moments `(…, d, d)` as columns `(…, d, count)`, by orthogonal iteration.

    A few columns more than asked for are carried along, since the last ones settle late.
    """
    d = second.shape[-1]
    second = second.double()
    vectors = torch.randn(d, min(d, count + 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = vectors.expand(*second.shape[:-2], -1, -1)
    for _ in range(iterations):
        vectors = torch.linalg.qr(second @ vectors).Q
    energy = (vectors * (second @ vectors)).sum(-2)
    order = energy.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return vectors.gather(-1, order[..., None, :].expand(*vectors.shape[:-1], -1))


def gate_directions(inputs: Tensor, classes: int, generator: torch.Generator, iterations: int = 8) -> Tensor:
    """Axial k-means: the `(classes, d)` unit vectors that rows `(N, d)` are most parallel to, up to sign.

    Each vector goes towards the leading principal component of the rows that chose it.
    """
    start = torch.randperm(len(inputs), generator=generator)[:classes]
    directions = F.normalize(inputs[start])
    for _ in range(iterations):
        chosen = (inputs @ directions.mT).abs().argmax(1)
        for number in range(classes):
            members = inputs[chosen == number]
            for _ in range(2 if len(members) else 0):
                directions[number] = F.normalize(members.mT @ (members @ directions[number]), dim=0)
    return directions


def class_components(detail: Tensor, chosen: Tensor, classes: int, count: int, prior: int = 100
                     ) -> tuple[Tensor, Tensor]:
    """For each class the principal components `(classes, m, count)` of its detail and the spread along them.

    Args:
        detail: `(N, m + 1)`: the detail bands at N sites, and in the last column the energy of the image that the site
            is from, by which the components (not the spread) are weighed, lest few pictures decide.
        chosen: `(N,)` class of each row.
        prior: rows of average detail that every class is given besides.
    """
    rows, energy = detail[:, :-1], detail[:, -1:]
    even = rows / energy.sqrt()
    everywhere = (even.mT @ even).double() / len(even)
    parts = [even[chosen == number] for number in range(classes)]
    second = torch.stack([(part.mT @ part).double() + prior * everywhere for part in parts])
    components = principal_components(second, count).float()
    spread = [(torch.cat([rows[chosen == number], rows[: prior // 4]]) @ components[number]).square().mean(0).sqrt()
              for number in range(classes)]
    return components, torch.stack(spread).clamp(min=1e-3)


def measured_spec(model: NativeAutoencoder, crops: Tensor) -> LatentSpec:
    """The latent's normalisation: mean and standard deviation of every channel over uint8 crops `(n, 3, s, s)`."""
    total, squares, count = 0.0, 0.0, 0
    for images in _batches(crops):
        z = _rows_of(model.encode(images)).double()
        total, squares, count = total + z.sum(0), squares + z.square().sum(0), count + len(z)
    mean = total / count
    std = (squares / count - mean**2).sqrt().clamp(min=1e-6)
    return LatentSpec(channels=model.config.channels, downsampling=BLOCK, kind="point", shift=tuple(mean.tolist()),
                      scale=tuple((1 / std).tolist()))


def held_out_psnr(reconstruct: Callable[[Tensor], Tensor], crops: Tensor) -> float:
    """Mean over uint8 crops of the PSNR in dB, output clamped and rounded to 8 bits."""
    values = []
    for images in _batches(crops):
        found = (reconstruct(images).clamp(0, 1) * 255).round()
        error = (found - (images * 255).round()).square().flatten(1).mean(1)
        values.append(10 * torch.log10(255**2 / error.clamp(min=1e-4)))
    return float(torch.cat(values).mean())


def _left(images: Tensor, stages: list[Filters]) -> Tensor:
    """What the stages do not tell of images in [0, 1], around 0.5."""
    for stage in stages:
        bands = _analyse(images, stage.analysis)
        blocks = F.conv2d(around(bands, stage.synthesis.shape[-1] // 2), stage.synthesis, stage.bias)
        images = images - F.pixel_shuffle(blocks, BLOCK)
    return images


def _analyse(images: Tensor, analysis: Tensor) -> Tensor:
    return F.conv2d(around(images - 0.5, (analysis.shape[-1] - BLOCK) // 2), analysis, stride=BLOCK)


def _fit_synthesis(
    crops: Tensor, pair: Callable[[Tensor], tuple[Tensor, Tensor]], context: int, learning: NativeLearning,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Weights `(192, n, context, context)` and bias `(192,)`, by probes.

    Args:
        pair: images → the bands `(b, n, h/8, w/8)`, and the picture `(b, 3, h, w)` that they are to give.
    """
    inputs, targets = [], []
    for images, places in zip(_batches(crops), _places(crops, learning.sites, generator), strict=True):
        bands, target = pair(images)
        seen = F.unfold(around(bands, context // 2), context)
        inputs.append(_rows_of(seen[..., None])[places])
        targets.append(_rows_of(F.pixel_unshuffle(target - 0.5, BLOCK))[places])
    neurons, _ = fit_linear(torch.cat(inputs), torch.cat(targets), sweeps=2, seed=learning.seed)
    return neurons.weight.view(PIXELS, -1, context, context), neurons.bias


def _gate_rows(crops: Tensor, model: NativeAutoencoder, learning: NativeLearning, generator: torch.Generator
               ) -> tuple[Tensor, Tensor]:
    """What the gate sees `(N, 9 base)` and the detail with the image's energy `(N, m + 1)`, at the same sites."""
    base = model.config.base
    inputs, detail = [], []
    for images, places in zip(_batches(crops), _places(crops, learning.sites, generator), strict=True):
        bands = model.analyse(images)
        energy = bands[:, base:].square().mean((1, 2, 3), keepdim=True) + 1e-4
        inputs.append(model.gate_inputs(bands[:, :base])[places])
        detail.append(_rows_of(torch.cat([bands[:, base:], energy.expand(-1, 1, *bands.shape[2:])], 1))[places])
    return torch.cat(inputs), torch.cat(detail)


def _batches(crops: Tensor) -> Iterator[Tensor]:
    for part in crops.split(_BATCH):
        yield part.float() / 255


def _places(crops: Tensor, sites: int, generator: torch.Generator) -> Iterator[Tensor]:
    """For each batch the sites that are fitted on: an equal share of every batch."""
    grid = crops.shape[-2] * crops.shape[-1] // BLOCK**2
    for part in crops.split(_BATCH):
        share = min(len(part) * grid, -(-sites * len(part) // len(crops)))
        yield torch.randperm(len(part) * grid, generator=generator)[:share]


def _rows_of(maps: Tensor) -> Tensor:
    """`(b, c, h, w)` → `(b h w, c)`."""
    return maps.flatten(2).mT.flatten(0, 1)


