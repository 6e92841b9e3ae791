"""What a made modality is compared with: the terms of each, weights that are learned, and alignment.

- `audio_terms`, `image_terms`, `video_terms`: (made, true) → losses by name, images and sounds in [0, 1].
- `latent_terms`: (made, true) patches of a codec's latents → losses by name.
- `text_terms`: cross-entropy in units of log vocabulary.
- `flow_terms`: flow matching.
- `LearnedWeights`: homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115).
- `info_nce`: pooled latents of a pair beside those of the batch's other pairs.

Constants bring all terms to the same size where a model knows nothing yet, so that none drowns another
(`benchmarks/omni_losses.py` prints the table).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

FREQUENCY, TEMPORAL, SQUARED, LATENT, FLOW = 3.0, 2.0, 3.0, 0.55, 0.35
LEAST_LEFT = 0.3  # of 1 − t, or the last details would outweigh what is drawn


def audio_terms(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Mel spectrograms `(b, bands, frames)`: mean absolute and mean squared error."""
    return {"l1": l1_loss(made, true), "l2": SQUARED * mse_loss(made, true)}


def image_terms(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Pictures `(b, 3, h, w)`: mean absolute error, and that of the orthonormal Fourier transform's amplitudes."""
    amplitudes = [torch.fft.rfft2(x.float(), norm="ortho").abs() for x in (made, true)]
    return {"l1": l1_loss(made, true), "frequency": FREQUENCY * l1_loss(*amplitudes)}


def video_terms(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Videos `(b, 3, t, h, w)`: mean absolute error, and that of the change from frame to frame."""
    terms = {"l1": l1_loss(made, true)}
    if true.shape[2] > 1:
        terms["temporal"] = TEMPORAL * l1_loss(made.diff(dim=2), true.diff(dim=2))
    return terms


def latent_terms(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Patches of normalised latents `(b, n, p)`: mean absolute and mean squared error."""
    return {"l1": LATENT * l1_loss(made, true), "l2": LATENT * mse_loss(made, true)}


def text_terms(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits `(b, n, vocabulary)` and ids `(b, n)`, −100 where none is asked for: cross-entropy over log vocabulary."""
    return {"cross_entropy": cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / math.log(logits.shape[-1])}


def flow_terms(made: Tensor, true: Tensor, time: Tensor) -> dict[str, Tensor]:
    """Patches `(b, n, p)` that the model takes for the clean ones, at `time` `(b,)`: the squared error of the velocity
    (x − noise) that follows from them, v̂ − v = (x̂ − x) / (1 − t), with 1 − t no less than 0.3 (in Li & He 2025, arXiv
    2511.13720, 0.05)."""
    left = (1 - time).clamp_min(LEAST_LEFT)[:, None, None]
    return {"flow": FLOW * ((made.float() - true.float()) / left).square().mean()}


class LearnedWeights(nn.Module):
    """exp(−s) L + s for a loss L, with one learned s for each name."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, name: str, loss: Tensor) -> Tensor:
        return (-self.log_variance[name]).exp() * loss + self.log_variance[name]


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    """Latents `(n, dim)` of the two sides of n pairs: the mean cross-entropy of finding each one's partner, both ways
    (van den Oord et al. 2018, arXiv 1807.03748)."""
    a, b = (nn.functional.normalize(x.float(), dim=-1) for x in (a, b))
    similar = a @ b.T / temperature
    wanted = torch.arange(len(a), device=a.device)
    return (cross_entropy(similar, wanted) + cross_entropy(similar.T, wanted)) / 2
