"""How the pooled clone learns: forward evaluations of a teacher, of candidate neurons, and of their linear readout.

- `PooledConfig`: retina, neurons, and how they are looked for.
- `learn`: from a teacher and photos. `learn_from`: from pictures and targets at hand.
- `agreement`, `Agreement`: R², cosine and L2 between two sets of latents.

Candidates come from pairs of patches whose targets differ (pairs.py); those are kept that explain most of the pooled
targets by forward selection. A teacher's grid says more than its mean does, so the readout also learns from the means
of parts of a picture: a quarter of the picture is a smaller picture with a target of its own, at no cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import Codec
from ..data import ImageSource
from ..errors import UserError
from .neurons import Neurons
from .pairs import Affine, draw_pairs, fit_readout, forward_selection
from .pooled import PooledEncoder, Retina
from .teaching import Lessons, Progress, quiet, teach

_SITES = 40_000  # patches of each scale that pairs are drawn from


@dataclass(frozen=True)
class PooledConfig:
    """Which clone, and how it is looked for.

    Attributes:
        outputs: the teacher's first channels that are cloned.
        neurons: chosen of all candidates; as many of these are kept as lower the held-out loss.
        candidates: drawn for each scale.
        windows: the readout learns from windows² parts of every picture; a power of 2 up to 4.
        crops: views of each photo that the teacher encodes.
    """

    outputs: int = 4
    neurons: int = 512
    candidates: int = 768
    windows: int = 2
    crops: int = 2
    retina: Retina = field(default_factory=Retina)

    def __post_init__(self) -> None:
        if self.neurons > self.candidates * len(self.retina.scales):
            raise UserError(f"{self.neurons} neurons cannot be chosen among "
                            f"{self.candidates * len(self.retina.scales)} candidates: draw more.")


def debug() -> PooledConfig:
    """A few neurons on 64² pictures, in a second on one core; for tests."""
    retina = Retina(size=64, scales=(1, 2))
    return PooledConfig(neurons=16, candidates=32, windows=1, crops=1, retina=retina)


@dataclass(frozen=True)
class Agreement:
    """Between latents `(N, k)`: `r2`, the share of the variance about each channel's mean that is explained, all
    channels together; `cosine` and `l2`, means over the pictures of the plain vectors'."""

    r2: float
    cosine: float
    l2: float

    def __str__(self) -> str:
        return f"R² {self.r2:.3f}, cosine {self.cosine:.3f}, L2 {self.l2:.3f}"


@dataclass(frozen=True)
class PooledReport:
    """What a learning says of itself. `held_out` is on the photos that chose the ridge and how many neurons
    are kept."""

    train: Agreement
    held_out: Agreement
    mean_null: Agreement
    pictures: int
    neurons: tuple[int, ...]
    """Kept at each scale."""
    seconds: float


def agreement(found: Tensor, wanted: Tensor) -> Agreement:
    """Compare latents `(N, k)` with the teacher's."""
    if found.shape != wanted.shape:
        raise UserError(f"Dimension mismatch: latents of shape {tuple(found.shape)} against the teacher's "
                        f"{tuple(wanted.shape)}.")
    error, spread = (found - wanted).square().sum(), (wanted - wanted.mean(0)).square().sum()
    return Agreement(float(1 - error / spread), float(F.cosine_similarity(found, wanted).mean()),
                     float((found - wanted).norm(dim=1).mean()))


def learn(
    teacher: Codec, photos: ImageSource, held_out: ImageSource, config: PooledConfig = PooledConfig(),
    progress: Progress = quiet, seed: int = 0,
) -> tuple[PooledEncoder, PooledReport]:
    """Clone the mean of a teacher's first channels.

    Args:
        photos: to learn from.
        held_out: other photos, which choose the ridge and how many neurons are kept.
        progress: is called with a line of text now and then.

    Raises:
        UserError: no photo can be read, or the teacher has fewer channels than `config.outputs`.
    """
    if teacher.spec.channels < config.outputs:
        raise UserError(f"Dimension mismatch: {teacher.label} has latents of shape (b, {teacher.spec.channels}, h, w), "
                        f"and the clone is to give (b, {config.outputs}).")
    size = config.retina.size
    lessons = teach(teacher, photos, size, config.crops, progress, seed)
    exam = teach(teacher, held_out, size, 1, progress, seed)
    return learn_from(lessons, exam, config, progress, seed)


@torch.no_grad()
def learn_from(
    lessons: Lessons, exam: Lessons, config: PooledConfig = PooledConfig(), progress: Progress = quiet, seed: int = 0,
) -> tuple[PooledEncoder, PooledReport]:
    """Learn from pictures and their latents; latents of one pixel `(N, c, 1, 1)` are targets already pooled (then
    `config.windows` is 1).

    Raises:
        UserError: the pictures are not of the retina's size.
    """
    begin, retina, k = time.perf_counter(), config.retina, config.outputs
    for part in (lessons, exam):
        if part.pictures.shape[1:] != (3, retina.size, retina.size):
            raise UserError(f"Dimension mismatch: pictures of shape {tuple(part.pictures.shape)}, and the retina "
                            f"{retina.identity()} takes (N, 3, {retina.size}, {retina.size}).")
    generator = torch.Generator().manual_seed(seed)
    groups = [_candidates(lessons, place, config, generator) for place in range(len(retina.scales))]
    progress(f"{sum(map(len, groups)):,} candidate neurons drawn")
    features, targets = _features(lessons, groups, config.windows, retina), _rows(lessons.pooled(k, config.windows))
    chosen = forward_selection(features, targets, config.neurons)
    progress(f"{config.neurons} of them chosen")
    exam_features, exam_targets = _features(exam, groups, 1, retina), _rows(exam.pooled(k))
    readout, loss, groups, kept = _read_out(features, targets, exam_features, exam_targets, groups, chosen)
    progress(f"{len(kept)} kept: held-out loss {loss:.5f}, of the mean alone {float(exam_targets.var(0, correction=0).mean()):.5f}")
    encoder, exam_features = PooledEncoder(retina, groups, readout), exam_features[:, kept]
    whole = _rows(lessons.pooled(k))
    found = torch.cat([encoder(part) for part in lessons.pictures.split(32)])
    return encoder, PooledReport(
        train=agreement(found, whole), held_out=agreement(readout(exam_features), exam_targets),
        mean_null=agreement(whole.mean(0).expand_as(exam_targets), exam_targets), pictures=len(lessons),
        neurons=tuple(map(len, groups)), seconds=time.perf_counter() - begin,
    )


def _candidates(lessons: Lessons, place: int, config: PooledConfig, generator: torch.Generator) -> Affine:
    """Neurons of one scale, from pairs of patches and the latent where they lie."""
    retina = config.retina
    sites = retina.sites(retina.scales[place])
    some = torch.randperm(len(lessons), generator=generator)[: max(2, 2 * _SITES // sites**2)]
    inputs = torch.cat([retina.patches(part)[place] for part in lessons.pictures[some].split(32)]).flatten(0, 1)
    grid = lessons.latents.shape[-1]
    here = min(sites, grid)
    targets = _rows(lessons[some].pooled(config.outputs, here).repeat_interleave(sites // here, 2)
                    .repeat_interleave(sites // here, 3))
    kept = torch.randperm(len(inputs), generator=generator)[:_SITES]
    return draw_pairs(inputs[kept], targets[kept], config.candidates, generator)


def _features(lessons: Lessons, groups: list[Affine], windows: int, retina: Retina) -> Tensor:
    """Means of all neurons over each window: `(N·windows², n)`."""
    found = []
    for part in lessons.pictures.split(32):
        maps = []
        for patches, group in zip(retina.patches(part), groups, strict=True):
            sites = int(patches.shape[1] ** 0.5)
            grid = group(patches).mT.reshape(len(part), len(group), sites, sites)
            maps.append(_rows(F.avg_pool2d(grid, sites // windows)))
        found.append(torch.cat(maps, 1))
    return torch.cat(found)


def _rows(maps: Tensor) -> Tensor:
    """`(N, c, h, w)` → `(N·h·w, c)`."""
    return maps.movedim(1, 3).reshape(-1, maps.shape[1])


def _read_out(
    features: Tensor, targets: Tensor, exam_features: Tensor, exam_targets: Tensor, groups: list[Affine],
    chosen: Tensor,
) -> tuple[Neurons, float, list[Affine], Tensor]:
    """The readout of the first half, quarter … of the chosen neurons, or of all: whichever has the lowest held-out
    loss; with it the neurons that are kept and their indices."""
    found = []
    for share in (8, 4, 2, 1):
        kept_groups, kept = _keep(groups, chosen[: max(1, len(chosen) // share)])
        readout, loss = fit_readout(features[:, kept], targets, exam_features[:, kept], exam_targets)
        found.append((readout, loss, kept_groups, kept))
    return min(found, key=lambda one: one[1])


def _keep(groups: list[Affine], chosen: Tensor) -> tuple[list[Affine], Tensor]:
    """The chosen neurons of each group, and their indices in that order."""
    chosen, kept, first = chosen.sort().values, [], 0
    for group in groups:
        inside = chosen[(chosen >= first) & (chosen < first + len(group))]
        kept.append(group[inside - first])
        first += len(group)
    return kept, chosen
