"""How a native O-VAE is learned: from forward evaluations alone, no gradient and no system of equations solved.

- `NativeLearning`: how much of what; `learn`: crops → a `NativeAutoencoder`.
- `turned_round`: the decoder's patches as the encoder's filters.
- `decorrelated`: the same model with a latent of uncorrelated channels, by falling variance.
- `grown`: tanh neurons on what the linear decoder leaves; `pair_neurons`: where their weights are from.
- `principal_components`: orthogonal iteration; takes no targets.
- `measured_spec`: the latent's normalisation; `held_out_psnr`: what selects.

The decoder is fitted to the blocks of the image by `fit_linear` (conjugate probes), given what the encoder says of the
neighbourhood. Then the encoder takes the decoder's patches as its filters, turned round: reciprocal weights. The pair
of steps is D = C Eᵀ (E C Eᵀ)⁻¹, E ← Dᵀ, that is orthogonal iteration with the image's covariance C (Golub & Van Loan,
Matrix Computations, section 8.2), so it climbs to the principal component filter bank (Vaidyanathan 1998) as far as the
window is wide. Nobody computes the inverse: the probes find what it would give. It starts from the principal components
of single blocks, and the turn that held-out crops like best is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..latent import LatentSpec
from .native import BLOCK, PIXELS, NativeAutoencoder, NativeConfig, around
from .probes import fit_linear

_BATCH = 8  # crops at a time


@dataclass(frozen=True)
class NativeLearning:
    """How much a native O-VAE learns from.

    Attributes:
        sites: rows of each fit, which holds `sites` · `channels` · `context`² numbers; 20 a weight at least.
        turns: times that the encoder takes over the decoder's patches.
        held_out: crops that nothing is fitted on.
        seed: of the choice of sites, and of the pairs that the neurons are from.
    """

    sites: int = 80_000
    turns: int = 5
    held_out: int = 24
    seed: int = 0


@torch.no_grad()
def learn(
    crops: Tensor, config: NativeConfig, learning: NativeLearning | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> NativeAutoencoder:
    """Learn encoder and decoder together.

    Args:
        crops: uint8 `(n, 3, h, w)` RGB, sides multiples of 8; the last `held_out` of them choose.
        report: called with one line after each turn: what held-out crops lose.

    Raises:
        UserError: there are too few crops, or they are not of such a size.
    """
    learning = learning or NativeLearning()
    if crops.ndim != 4 or crops.shape[1] != 3 or crops.dtype != torch.uint8 or any(s % BLOCK for s in crops.shape[2:]):
        raise UserError(f"The crops have shape {tuple(crops.shape)} and type {crops.dtype}; expected uint8 (n, 3, h, w) "
                        f"with sides that are multiples of {BLOCK}.")
    if len(crops) <= learning.held_out:
        raise UserError(f"{len(crops)} crops are too few: {learning.held_out} are held out; give more.")
    fitting, held = crops[: len(crops) - learning.held_out], crops[len(crops) - learning.held_out :]
    generator = torch.Generator().manual_seed(learning.seed)
    model = NativeAutoencoder(replace(config, hidden=0))
    model.analysis.copy_(_block_filters(fitting, config))
    best, reached = model.state_dict(), -math.inf
    for turn in range(learning.turns + 1):
        _fit_synthesis(model, fitting, learning, generator)
        psnr = held_out_psnr(model, held)
        report(f"turn {turn}: held-out {psnr:.3f} dB{'' if psnr > reached else ', rolled back at the end'}")
        if psnr > reached:
            best, reached = {name: tensor.clone() for name, tensor in model.state_dict().items()}, psnr
        model.analysis.copy_(turned_round(model.synthesis, config.window))
    model.load_state_dict(best)
    decorrelated(model, fitting)
    return grown(model, config.hidden, fitting, held, learning, generator, report) if config.hidden else model


def turned_round(synthesis: Tensor, window: int) -> Tensor:
    """The patches that a synthesis `(192, n, k, k)` adds for each channel, as filters `(n, 3, side, side)` of norm 1.

    A channel reaches the block at offset (i, j) through the weight at (−i, −j), hence the flip. A context narrower than
    the window leaves zeros around, a wider one is cut.
    """
    k, n = synthesis.shape[-1], synthesis.shape[1]
    patches = synthesis.flip(-2, -1).view(3, BLOCK, BLOCK, n, k, k).permute(3, 0, 4, 1, 5, 2)
    patches = patches.reshape(n, 3, k * BLOCK, k * BLOCK)
    margin = (window - k) * BLOCK // 2
    return F.normalize(F.pad(patches, (margin,) * 4).flatten(1)).view(n, 3, window * BLOCK, window * BLOCK)


def decorrelated(model: NativeAutoencoder, crops: Tensor) -> None:
    """Turn the latent's axes, in place: channels uncorrelated over the crops, by falling variance; images as before."""
    rows = [_rows(model.encode(images)) for images in _batches(crops)]
    count = sum(map(len, rows))
    mean = sum(part.sum(0).double() for part in rows) / count
    second = sum((part.mT @ part).double() for part in rows) / count - torch.outer(mean, mean)
    axes = principal_components(second, len(second))
    variance = (axes * (second @ axes)).sum(0)
    turn = axes.float()
    model.analysis.copy_(torch.einsum("bn,bcij->ncij", turn, model.analysis))
    model.synthesis.copy_(torch.einsum("pbij,bn->pnij", model.synthesis, turn))
    model.spread.copy_(variance.sqrt().clamp(min=1e-4))


def grown(
    model: NativeAutoencoder, hidden: int, crops: Tensor, held: Tensor, learning: NativeLearning,
    generator: torch.Generator, report: Callable[[str], None],
) -> NativeAutoencoder:
    """The model with `hidden` tanh neurons on what it leaves, if held-out crops gain by them; else as it was."""
    larger = NativeAutoencoder(replace(model.config, hidden=hidden))
    larger.load_state_dict({**larger.state_dict(), **model.state_dict()})
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for images, places in zip(_batches(crops), _places(crops, learning.sites, generator), strict=True):
        inputs, contrast = model.neuron_inputs(model.encode(images))
        left = _rows(F.pixel_unshuffle(images - model(images), BLOCK))
        for kept, rows in zip(parts, (inputs, contrast, left), strict=True):
            kept.append(rows[places])
    inputs, contrast, left = map(torch.cat, parts)
    weight, bias = pair_neurons(inputs, left / contrast, hidden, generator)
    larger.hidden.copy_(weight)
    larger.hidden_bias.copy_(bias)
    neurons, _ = fit_linear(larger.neurons(inputs, contrast), left, sweeps=2, ridge=1e-6, seed=learning.seed)
    larger.output.copy_(neurons.weight)
    larger.bias.add_(neurons.bias)
    before, after = held_out_psnr(model, held), held_out_psnr(larger, held)
    report(f"{hidden} tanh neurons: held-out {before:.3f} to {after:.3f} dB, {'kept' if after > before else 'left out'}")
    return larger if after > before else model


def pair_neurons(inputs: Tensor, targets: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights `(count, d)` and biases `(count,)` of tanh neurons that are −½ at one row of a pair and ½ at the other.

    Pairs are drawn that differ much in their targets `(N, k)` for how little their inputs `(N, d)` do (SWIM, arXiv
    2306.16830).
    """
    one, other = torch.randint(len(inputs), (2, 20 * count), generator=generator)
    apart, answers = inputs[other] - inputs[one], (targets[other] - targets[one]).norm(dim=1)
    distance = apart.norm(dim=1)
    drawn = torch.multinomial(answers / (distance + 0.1 * distance.mean()) + 1e-12, count, generator=generator)
    apart = apart[drawn]
    weight = 2 * math.atanh(0.5) * apart / apart.square().sum(1, keepdim=True).clamp(min=1e-6)
    middle = (inputs[one[drawn]] + inputs[other[drawn]]) / 2
    return weight, -(weight * middle).sum(1)


def principal_components(second: Tensor, count: int, iterations: int = 300) -> Tensor:
    """The leading eigenvectors of second moments `(d, d)` as columns `(d, count)`, by orthogonal iteration.

    A few columns more than asked for are carried along, since the last ones settle late.
    """
    d, second = len(second), second.double()
    vectors = torch.randn(d, min(d, count + 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(iterations):
        vectors = torch.linalg.qr(second @ vectors).Q
    energy = (vectors * (second @ vectors)).sum(0)
    return vectors[:, energy.argsort(dim=-1, descending=True, stable=True)[:count]]


def measured_spec(model: NativeAutoencoder, crops: Tensor) -> LatentSpec:
    """The latent's normalisation: mean and standard deviation of every channel over uint8 crops `(n, 3, h, w)`."""
    total, squares, count = 0.0, 0.0, 0
    for images in _batches(crops):
        z = _rows(model.encode(images)).double()
        total, squares, count = total + z.sum(0), squares + z.square().sum(0), count + len(z)
    mean = total / count
    std = (squares / count - mean**2).sqrt().clamp(min=1e-6)
    return LatentSpec(channels=model.config.channels, downsampling=BLOCK, kind="point", shift=tuple(mean.tolist()),
                      scale=tuple((1 / std).tolist()))


def held_out_psnr(reconstruct: Callable[[Tensor], Tensor], crops: Tensor) -> float:
    """Mean over uint8 crops `(n, 3, h, w)` of the PSNR in dB, output clamped and rounded to 8 bits."""
    values = []
    for images in _batches(crops):
        found = (reconstruct(images).clamp(0, 1) * 255).round()
        error = (found - (images * 255).round()).square().flatten(1).mean(1)
        values.append(10 * torch.log10(255**2 / error.clamp(min=1e-4)))
    return float(torch.cat(values).mean())


def _block_filters(crops: Tensor, config: NativeConfig) -> Tensor:
    """The principal components of single blocks as filters `(channels, 3, side, side)`, zero outside their block."""
    second = torch.zeros(PIXELS, PIXELS, dtype=torch.float64)
    for images in _batches(crops):
        rows = _rows(F.pixel_unshuffle(images - 0.5, BLOCK))
        second += (rows.mT @ rows).double()
    filters = principal_components(second, config.channels).float().mT.reshape(-1, 3, BLOCK, BLOCK)
    return F.pad(filters, ((config.window - 1) * BLOCK // 2,) * 4)


def _fit_synthesis(
    model: NativeAutoencoder, crops: Tensor, learning: NativeLearning, generator: torch.Generator
) -> None:
    """The linear decoder for the encoder as it is, by probes, in place."""
    context = model.config.context
    inputs, targets = [], []
    for images, places in zip(_batches(crops), _places(crops, learning.sites, generator), strict=True):
        seen = F.unfold(around(model.encode(images), context // 2), context)
        inputs.append(_rows(seen[..., None])[places])
        targets.append(_rows(F.pixel_unshuffle(images - 0.5, BLOCK))[places])
    neurons, _ = fit_linear(torch.cat(inputs), torch.cat(targets), sweeps=2, seed=learning.seed)
    model.synthesis.copy_(neurons.weight.view_as(model.synthesis))
    model.bias.copy_(neurons.bias)


def _batches(crops: Tensor) -> Iterator[Tensor]:
    for part in crops.split(_BATCH):
        yield part.float() / 255


def _places(crops: Tensor, sites: int, generator: torch.Generator) -> Iterator[Tensor]:
    """For each batch the sites that are fitted on: an equal share of every batch."""
    grid = crops.shape[-2] * crops.shape[-1] // BLOCK**2
    for part in crops.split(_BATCH):
        share = min(len(part) * grid, -(-sites * len(part) // len(crops)))
        yield torch.randperm(len(part) * grid, generator=generator)[:share]


def _rows(maps: Tensor) -> Tensor:
    """`(b, c, h, w)` → `(b h w, c)`."""
    return maps.flatten(2).mT.flatten(0, 1)
