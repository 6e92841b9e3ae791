"""How like its teacher a clone is, picture by picture, in the words and under the file names of seed 000 and 001.

- `likeness`: teacher and clone on held-out pictures: seconds, cosine, L2, norms, reconstructions.
- `Likeness`: the figures. `draw`: the plots and pictures into a folder.

Latents are compared as `Codec.encode` gives them, normalised. A clone with one vector a picture is compared with the
teacher's first channels, averaged over its grid. The error of a picture is the mean squared difference of its values
in [-1, 1], its cosine that of all its values in [-1, 1] as one vector, as the seed's figures must have been made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..codec import Codec
from ..errors import UserError, library

if TYPE_CHECKING:
    from ..data.evaluation import EvaluationImages

SEED = {"teacher": {"l2": 0.006, "cosine": 0.996}, "clone": {"l2": 0.85, "cosine": 0.0}}  # of reconstructions, seed 001
TEACHER, CLONE = "#8a8f98", "#2563eb"


@dataclass
class Likeness:
    """Figures of each held-out picture, in order; lists are empty where a half is missing.

    Attributes:
        teacher_seconds, clone_seconds: of encoding one picture from 8 bits.
        cosine, l2: between the two latents; `l2` is the Euclidean distance divided by the root of their length.
        teacher_norm, clone_norm: of the latents, divided alike.
        shuffled_cosine: of each clone's latent with another picture's teacher latent: what chance gives.
        r2: share of the teacher's variance about each channel's mean that the clone explains.
        teacher_images, clone_images: error and cosine of each one's own reconstruction.
    """

    teacher: str
    clone: str
    keys: list[str] = field(default_factory=list)
    teacher_seconds: list[float] = field(default_factory=list)
    clone_seconds: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    l2: list[float] = field(default_factory=list)
    teacher_norm: list[float] = field(default_factory=list)
    clone_norm: list[float] = field(default_factory=list)
    shuffled_cosine: list[float] = field(default_factory=list)
    r2: float | None = None
    teacher_images: dict[str, list[float]] = field(default_factory=dict)
    clone_images: dict[str, list[float]] = field(default_factory=dict)

    @property
    def speed_up(self) -> float:
        """Median encoding time of the teacher over that of the clone."""
        return float(np.median(self.teacher_seconds) / np.median(self.clone_seconds))

    def lines(self) -> Iterator[str]:
        """What to tell at the end."""
        yield (f"{self.clone} encodes {self.speed_up:.1f} times as fast as {self.teacher} "
               f"({1000 * np.median(self.clone_seconds):.2f} against {1000 * np.median(self.teacher_seconds):.2f} ms a picture)")
        if self.cosine:
            chance = f" (shuffled {np.mean(self.shuffled_cosine):.3f})" if self.shuffled_cosine else ""
            explained = "" if self.r2 is None else f", R² {self.r2:.3f}"
            yield (f"latents: cosine {np.mean(self.cosine):.3f}{chance}, L2 {np.mean(self.l2):.3f}{explained}; norm "
                   f"{np.mean(self.clone_norm):.2f} ± {np.std(self.clone_norm):.2f} (teacher "
                   f"{np.mean(self.teacher_norm):.2f} ± {np.std(self.teacher_norm):.2f})")
        for name, images, seed in ((self.teacher, self.teacher_images, SEED["teacher"]),
                                   (self.clone, self.clone_images, SEED["clone"])):
            if images:
                yield (f"pictures through {name}: L2 {np.mean(images['l2']):.4f}, cosine {np.mean(images['cosine']):.3f} "
                       f"(the seed's: {seed['l2']}, {seed['cosine']})")


@torch.no_grad()
def likeness(
    teacher: Codec, clone: Codec, images: EvaluationImages, same_space: bool = True
) -> tuple[Likeness, list[Tensor]]:
    """Measure a clone on held-out pictures, one at a time.

    Args:
        same_space: whether the clone's latents are meant to be the teacher's; otherwise they are not compared.

    Returns:
        The figures, and `(original, teacher's, clone's)` reconstructions of the first picture, each `(3, h, w)` in
        [0, 1], as far as there are decoders.
    """
    found = Likeness(teacher.label, clone.label)
    theirs, ours, first = [], [], []
    for key, image in images:
        pixels = (image[None] * 255).round().to(torch.uint8)
        original = pixels.float() / 255
        if not found.keys:  # kernels are chosen and memory is taken at the first call
            teacher.encode(pixels)
            clone.encode(pixels)
        found.keys.append(key)
        latents = []
        for codec, seconds in ((teacher, found.teacher_seconds), (clone, found.clone_seconds)):
            start = time.perf_counter()
            latent = codec.encode(pixels)
            if codec.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            latents.append(latent)
        z, mine = comparable(*(latent.mode().float() for latent in latents)) if same_space else (None, None)
        if mine is not None:
            theirs.append(z.flatten(1).cpu())
            ours.append(mine.flatten(1).cpu())
        pictures = [original]
        for codec, latent, figures in ((teacher, latents[0], found.teacher_images),
                                       (clone, latents[1], found.clone_images)):
            if not codec.spec.decodes:
                continue
            picture = codec.decode(latent).cpu()
            a, b = (2 * x - 1 for x in (original, picture))
            figures.setdefault("l2", []).append(float((a - b).square().mean()))
            figures.setdefault("cosine", []).append(float(F.cosine_similarity(a.flatten(), b.flatten(), 0)))
            pictures.append(picture)
        first = first or [picture[0] for picture in pictures]
    if not found.keys:
        raise UserError("There is no held-out picture to compare teacher and clone on: give more data.")
    if ours:
        _compare(found, torch.cat(theirs), torch.cat(ours))
    return found, first


def comparable(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor | None]:
    """The teacher's latent as far as the clone speaks of it: its grid, or the mean over it of the clone's number of
    channels; None where the shapes do not fit."""
    if ours.shape[-2:] == (1, 1) and ours.shape[1] <= theirs.shape[1]:
        return theirs[:, : ours.shape[1]].mean((2, 3), keepdim=True), ours
    return theirs, ours if ours.shape == theirs.shape else None


def _compare(found: Likeness, theirs: Tensor, ours: Tensor) -> None:
    length = theirs.shape[1] ** 0.5
    found.cosine = F.cosine_similarity(ours, theirs).tolist()
    found.shuffled_cosine = F.cosine_similarity(ours, theirs.roll(1, 0)).tolist() if len(ours) > 1 else []
    found.l2 = ((ours - theirs).norm(dim=1) / length).tolist()
    found.teacher_norm, found.clone_norm = ((z.norm(dim=1) / length).tolist() for z in (theirs, ours))
    spread = (theirs - theirs.mean(0)).square().sum()
    found.r2 = float(1 - (ours - theirs).square().sum() / spread) if len(ours) > 1 and spread > 0 else None


def draw(found: Likeness, pictures: list[Tensor], folder: Path) -> list[Path]:
    """The seed's files: `speed_comp.png`, `speed_1.png`, `Cosine_sim.png`, `L2.png`, `Latent_norm.png`, `orig.png`,
    `sd_recon.png`, `o_recon.png`, `side_by_side.png`, as far as there is something to show; and `likeness.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    both = {found.teacher: found.teacher_seconds, found.clone: found.clone_seconds}
    milliseconds = {name: [1000 * s for s in seconds] for name, seconds in both.items()}
    plots: list[tuple[str, str, str, dict[str, list[float]]]] = [
        ("speed_comp.png", "Time to encode a picture", "ms", milliseconds),
        ("speed_1.png", f"Time to encode a picture: {found.clone} alone", "ms", {found.clone: milliseconds[found.clone]}),
    ]
    if found.cosine:
        plots += [
            ("Cosine_sim.png", "Cosine of the clone's latent with the teacher's", "cosine",
             {found.clone: found.cosine, **({"shuffled": found.shuffled_cosine} if found.shuffled_cosine else {})}),
            ("L2.png", "Distance of the two latents, a value", "L2", {found.clone: found.l2}),
            ("Latent_norm.png", "Norm of the latent, a value", "norm",
             {found.teacher: found.teacher_norm, found.clone: found.clone_norm}),
        ]
    written = [_plot(folder / name, title, unit, series) for name, title, unit, series in plots]
    names = ["orig.png", *(["sd_recon.png"] if found.teacher_images else []),
             *(["o_recon.png"] if found.clone_images else [])]
    for name, picture in zip(names, pictures, strict=True):
        _save(picture, folder / name)
        written.append(folder / name)
    _save(torch.cat(pictures, 2), folder / "side_by_side.png")
    (folder / "likeness.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return [*written, folder / "side_by_side.png", folder / "likeness.json"]


def _plot(file: Path, title: str, unit: str, series: dict[str, list[float]]) -> Path:
    plt: Any = library("matplotlib.figure")
    figure = plt.Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = [TEACHER, CLONE] if len(series) == 2 and unit in ("ms", "norm") else [CLONE, TEACHER]
    for (name, values), colour in zip(series.items(), colours, strict=False):
        axes.plot(values, ".-", color=colour, linewidth=1, markersize=4,
                  label=f"{name}: {np.median(values):.3g} (median)" if values else name)
    if unit in ("ms", "norm", "L2"):
        axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="held-out picture", ylabel=unit)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    return file


def _save(picture: Tensor, file: Path) -> None:
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
