"""Are the latents of an O-VAE good for what comes after? Clones beside their teachers, natives on their own.

    python benchmarks/organic_downstream.py [--pair kl-f8-small ovae] [--pair TEACHER LABEL:FOLDER] [--alone NAME ...]

On the val photos at 256²: the latent's norm and its spread over the photos, and how far the latent moves when a photo
is shifted by one pixel (cut from 257², so nothing is made up at the border), saved as JPEG of quality 75, or given
Gaussian noise of 1 %, always in 8 bits: relative L2 ‖z′ − z‖/‖z‖ and cosine, beside another photo's latent (the null).
Standing still is no merit alone: a coarse latent does.

Heads, the same for all, Adam, the same steps and batches, three seeds, what the last step left counts:
- digits: MNIST, enlarged to 32² RGB, 20,000 to learn from, accuracy on the 10,000 test digits.
- turns: by which quarter a photo is turned (850 photos × 4 to learn from, 100 × 4 asked).
- colour, edges: one head for a photo's mean colour and the logarithm of its mean gradient, the same photos, R².
A grid gets two convolutions and a linear map, the numbers of a pooled clone an MLP; its teacher is pooled likewise.
Nulls: pixels averaged to about as many numbers, as many random orthonormal filters on blocks, chance. "CLONE, head of
TEACHER": the head learned on the teacher's latents, and is asked about the clone's. Of a pooled clone that tells
little, since it enlarges every picture to 256² and its teacher does not.

Photos are of 128² for the heads, for the teachers' sake. Writes results/organic_downstream.json. With the defaults
about 25 minutes on one core, most of it heads.
"""

from __future__ import annotations

import json
import lzma
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
import torch.nn.functional as F
import tyro
from organic_speed import row_name
from PIL import Image
from torch import Tensor, nn

import omnilatent
from omnilatent.codec import Codec
from omnilatent.data import EvaluationImages, open_images
from omnilatent.errors import UserError

ROOT = Path(__file__).parents[1]
BATCH, LEARNING_RATE = 128, 1e-3
DIGITS, TURNS = 10, 4
TASKS = {"digits": ("digits",), "photos": ("turns", "colour", "edges")}  # set → tasks


@dataclass(frozen=True)
class Options:
    """Norms, small changes of the picture, and heads: clones beside their teachers, natives on their own."""

    pair: tyro.conf.UseAppendAction[tuple[tuple[str, str], ...]] = ()
    """TEACHER CLONE, names that omnilatent.load opens; repeat it. By default kl-f8-small ovae."""
    alone: tuple[str, ...] = ("kl-f8-small", "ovae-f8c4", "ovae-f8c16", "ovae-f8c32")
    """Codecs on their own."""
    data: Path = ROOT.parent / "shared" / "data"
    """Holds imagenet-1k-sample/ and mnist/."""
    limit: int | None = None
    """Most pictures of each set; by default all."""
    digit_side: int = 32
    photo_side: int = 128
    """Pictures' side for the heads; the changes are measured at 256²."""
    steps: int = 500
    """Of Adam, batches of 128."""
    seeds: int = 3
    out: Path = ROOT / "benchmarks" / "results" / "organic_downstream.json"


See = Callable[[Tensor], Tensor]  # uint8 pictures (b, 3, h, w) → latents (b, c, h/f, w/f)


@dataclass(frozen=True)
class View:
    """What a head gets to see: latents of `channels`, over the grid where there is a `downsampling`, else as means."""

    see: See
    channels: int
    downsampling: int | None

    def numbers(self, side: int) -> int:
        return self.channels * (side // self.downsampling) ** 2 if self.downsampling else self.channels


class Latents:
    """Latents of whole sets of pictures, each made once."""

    def __init__(self) -> None:
        self.kept: dict[tuple[See, int], Tensor] = {}

    def of(self, view: View, images: Tensor) -> Tensor:
        key = view.see, images.data_ptr()
        if key not in self.kept:
            batch = max(1, 2**17 // (images.shape[-2] * images.shape[-1]))  # pictures that a cache has room for
            self.kept[key] = torch.cat([view.see(part) for part in images.split(batch)])
        z = self.kept[key][:, : view.channels]
        return z if view.downsampling else z.mean((2, 3), keepdim=True)


Pairs = list[tuple[str, str]]  # labels of clone and teacher


# -- ways to see -------------------------------------------------------------------------------------------------------


def views(options: Options) -> tuple[dict[str, View], Pairs]:
    """Label → view of every codec, clones before their teachers, and who is whose; what cannot be opened, or is no
    pair, is said and left out."""
    found: dict[str, View] = {}
    pairs: Pairs = []
    opened: dict[str, tuple[Codec, See]] = {}
    for teacher, clone in options.pair or (("kl-f8-small", "ovae"),):
        try:
            ours, theirs = opening(clone, opened), opening(teacher, opened)
            label, channels = row_name(teacher), ours[0].spec.channels
            if is_pooled(ours[0]):
                label, view = f"{label} ({channels} means)", View(theirs[1], channels, None)
            else:
                view = view_of(*theirs)
                check_pair(ours[0], theirs[0])
        except UserError as reason:
            say(f"{clone} is left out: {reason}")
            continue
        found |= {row_name(clone): view_of(*ours), label: view}
        pairs.append((row_name(clone), label))
    for name in options.alone:
        try:
            found.setdefault(row_name(name), view_of(*opening(name, opened)))
        except UserError as reason:
            say(f"{name} is left out: {reason}")
    return found, pairs


def opening(name: str, opened: dict[str, tuple[Codec, See]]) -> tuple[Codec, See]:
    """The codec and its normalised latents, opened once."""
    if name not in opened:
        codec = omnilatent.load(name)
        opened[name] = codec, lambda images: codec.encode(images).mode().float()
    return opened[name]


def is_pooled(codec: Codec) -> bool:
    return codec.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).mode().shape[-2:] == (1, 1)


def check_pair(clone: Codec, teacher: Codec) -> None:
    (c, f), (theirs, f_theirs) = ((codec.spec.channels, codec.spec.downsampling) for codec in (clone, teacher))
    if (c, f) != (theirs, f_theirs):
        raise UserError(f"its latents have {c} channels at f{f}, and those of {teacher.label} {theirs} at f{f_theirs}: "
                        "they are no pair.")


def view_of(codec: Codec, see: See) -> View:
    return View(see, codec.spec.channels, None if is_pooled(codec) else codec.spec.downsampling)


def random_filters(channels: int, downsampling: int | None) -> View:
    """The null of an encoder: orthonormal random filters on blocks."""
    side = downsampling or 8
    square = torch.randn(3 * side**2, 3 * side**2, generator=torch.Generator().manual_seed(0))
    kernel = torch.linalg.qr(square)[0][:channels].reshape(channels, 3, side, side)
    return View(lambda images: F.conv2d(images.float() / 255 - 0.5, kernel, stride=side), channels, downsampling)


def pixels(numbers: int, grey: bool) -> View:
    """The null of a latent: areas averaged to about as many numbers; digits in grey, since their colours are equal."""
    colours = 1 if grey else 3
    side = max(1, round((numbers / colours) ** 0.5))
    return View(lambda images: F.adaptive_avg_pool2d(images[:, :colours].float() / 255, side), colours, 1)


# -- pictures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskSet:
    """Pictures to learn from and to be asked about, uint8, and for each head what is right."""

    tasks: tuple[str, ...]
    train: Tensor
    test: Tensor
    known: list[Tensor]
    wanted: list[Tensor]

    def chances(self) -> dict[str, float]:
        """What the most frequent answer gets, and the mean."""
        first = self.known[0].mode().values
        return {task: 0.0 if number else round(float((self.wanted[0] == first).float().mean()), 4)
                for number, task in enumerate(self.tasks)}


def task_sets(options: Options) -> dict[str, TaskSet]:
    sets: dict[str, TaskSet] = {}
    if present(options.data / "mnist" / "t10k-images-idx3-ubyte.xz", "digits"):
        (train, known), (test, wanted) = digits(options, "train"), digits(options, "t10k")
        sets["digits"] = TaskSet(TASKS["digits"], train, test, [known], [wanted])
    if present(options.data / "imagenet-1k-sample" / "train.tar", "turns, colour and edges"):
        train, test = (turned(photos(options, part, options.photo_side)) for part in ("train", "val"))
        sets["photos"] = TaskSet(TASKS["photos"], train, test, answers(train), answers(test))
    return sets


def present(path: Path, what: str) -> bool:
    if not path.exists():
        say(f"{what}: left out, for {path} is not there; --data names the folder that holds it.")
    return path.exists()


def photos(options: Options, part: str, size: int) -> Tensor:
    """uint8 `(n, 3, size, size)` of train.tar or val.tar."""
    source = open_images(str(options.data / "imagenet-1k-sample" / f"{part}.tar"))
    images = EvaluationImages(source, size, options.limit)
    return torch.stack([(image * 255).round().byte() for _, image in images])


def turned(images: Tensor) -> Tensor:
    """`(n, 3, s, s)` → `(4 n, 3, s, s)`: all of them, then all by 90° and so on."""
    return torch.cat([torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)])


def answers(images: Tensor) -> list[Tensor]:
    """What heads are to say of turned photos: the turn; the mean colour and the logarithm of the mean gradient."""
    grey = images.float().mean(1) / 255
    gradient = (grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))) / 2
    looks = torch.cat([images.float().mean((2, 3)) / 255, gradient.clamp(min=1e-4).log()[:, None]], 1)
    return [torch.arange(TURNS).repeat_interleave(len(images) // TURNS), looks]


def digits(options: Options, part: str) -> tuple[Tensor, Tensor]:
    """MNIST's pictures as uint8 RGB of `digit_side`², and their labels."""
    raw = {kind: lzma.decompress((options.data / "mnist" / f"{part}-{kind}-ubyte.xz").read_bytes())
           for kind in ("images-idx3", "labels-idx1")}
    images = torch.from_numpy(np.frombuffer(raw["images-idx3"], np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
    labels = torch.from_numpy(np.frombuffer(raw["labels-idx1"], np.uint8, offset=8).copy()).long()
    images, labels = images[: options.limit], labels[: options.limit]
    side = (options.digit_side, options.digit_side)
    large = torch.cat([F.interpolate(p.float(), side, mode="bilinear").round().byte() for p in images.split(1000)])
    return large.expand(-1, 3, -1, -1), labels


def changed(options: Options) -> dict[str, Tensor]:
    """The val photos as they are, and with each small change; uint8 `(n, 3, 256, 256)`."""
    wide = photos(options, "val", 257)
    plain = wide[..., :256, :256]
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)) * 0.01 * 255
    return {"photo": plain, "shift": wide[..., :256, 1:], "jpeg": torch.stack([jpeg(image) for image in plain]),
            "noise": (plain + noise).round().clamp(0, 255).byte()}


def jpeg(image: Tensor, quality: int = 75) -> Tensor:
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


# -- figures -----------------------------------------------------------------------------------------------------------


def steadiness(view: View, pictures: dict[str, Tensor], latents: Latents) -> dict[str, Any]:
    """The norm over the photos, and mean relative L2 and cosine of every change and of another photo."""
    z = {name: latents.of(view, images).flatten(1) for name, images in pictures.items()}
    plain = z.pop("photo")
    norm = plain.norm(dim=1)
    found: dict[str, Any] = {"numbers": plain.shape[1], "norm": spread(norm.tolist())}
    for name, other in (z | {"another photo": plain.roll(1, 0)}).items():
        found[name] = {"l2": round(float(((other - plain).norm(dim=1) / norm).mean()), 4),
                       "cosine": round(float(F.cosine_similarity(other, plain).mean()), 4)}
    return found


def head(shape: torch.Size, outputs: int) -> nn.Module:
    """For `(c, h, w)`: two convolutions and a linear map; for `(k, 1, 1)` an MLP."""
    c, h, _ = shape
    if h == 1:
        return nn.Sequential(nn.Flatten(), nn.Linear(c, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                             nn.Linear(64, outputs))
    stride, cells = max(1, h // 8), min(4, h)
    return nn.Sequential(
        nn.Conv2d(c, 32, max(3, stride), stride, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2 if h > 8 else 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(cells), nn.Flatten(), nn.Linear(64 * cells**2, outputs))


class Head:
    """A head with its inputs' standardisation (and its targets', where they are numbers), learned at once."""

    def __init__(self, z: Tensor, target: Tensor, steps: int, seed: int) -> None:
        self.mean = z.mean((0, 2, 3), keepdim=True)
        self.spread = z.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        self.classes = target.dtype == torch.long
        self.shift, self.scale = (0.0, 1.0) if self.classes else (target.mean(0), target.std(0).clamp(min=1e-6))
        torch.manual_seed(seed)
        self.net = head(z.shape[1:], int(target.max()) + 1 if self.classes else target.shape[1])
        optimiser = torch.optim.Adam(self.net.parameters(), LEARNING_RATE)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(z), (BATCH,))
                said = self.net((z[rows] - self.mean) / self.spread)
                wanted = target[rows] if self.classes else (target[rows] - self.shift) / self.scale
                loss = F.cross_entropy(said, wanted) if self.classes else F.mse_loss(said, wanted)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    def scores(self, z: Tensor, target: Tensor) -> list[float]:
        """The accuracy, or R² of colour and of edges."""
        said = torch.cat([self.net((part - self.mean) / self.spread) for part in z.split(500)])
        if self.classes:
            return [float((said.argmax(1) == target).float().mean())]
        error = (said * self.scale + self.shift - target).square().sum(0)
        whole = (target - target.mean(0)).square().sum(0)
        return [float(1 - error[part].sum() / whole[part].sum()) for part in (slice(0, 3), slice(3, 4))]


def heads(seen: dict[str, View], pairs: Pairs, task_set: TaskSet, options: Options) -> dict[str, dict[str, Any]]:
    """Row → numbers that its head sees and, by task, mean and deviation of the score over the seeds."""
    latents, rows = Latents(), {}
    asked = {label: latents.of(view, task_set.test) for label, view in seen.items()}
    for label, view in seen.items():
        z = latents.of(view, task_set.train)
        scores: dict[str, list[list[float]]] = {row: [] for row in (label, *(c for c, t in pairs if t == label))}
        for seed in range(options.seeds):
            learned = [Head(z, known, options.steps, seed) for known in task_set.known]
            for row, found in scores.items():
                found.append([score for one, wanted in zip(learned, task_set.wanted, strict=True)
                              for score in one.scores(asked[row], wanted)])
        for row, found in scores.items():
            name = row if row == label else f"{row}, head of {label}"
            by_task = dict(zip(task_set.tasks, map(list, zip(*found, strict=True)), strict=True))
            rows[name] = {"numbers": z[0].numel()} | {task: spread(values) for task, values in by_task.items()}
            say(f"{name}: {', '.join(f'{task} {statistics.mean(values):.3f}' for task, values in by_task.items())}")
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(statistics.mean(values), 4),
            "sd": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0}


# -- the run -----------------------------------------------------------------------------------------------------------


def main(options: Options) -> None:
    (seen, pairs), sets = views(options), task_sets(options)
    shapes = dict.fromkeys((view.channels, view.downsampling) for view in seen.values())
    seen |= {f"{c} random filters{'' if f else ', means'} (null)": random_filters(c, f) for c, f in shapes}
    record: dict[str, Any] = {
        "command": command(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "steps": options.steps,
        "batch": BATCH, "seeds": options.seeds, "pairs": pairs, "photos": 0, "steadiness": {}, "sets": {}}
    if present(options.data / "imagenet-1k-sample" / "val.tar", "norms and small changes"):
        pictures, latents = changed(options), Latents()
        record["photos"] = len(pictures["photo"])
        for label, view in seen.items():
            record["steadiness"][label] = steadiness(view, pictures, latents)
            say(f"{label}: {json.dumps(record['steadiness'][label])}")
    if not (sets or record["steadiness"]):
        raise UserError(f"There is nothing to measure on in {options.data}: --data names the folder that holds "
                        "imagenet-1k-sample/ and mnist/.")
    for name, task_set in sets.items():
        side = task_set.test.shape[-1]
        counts = sorted({view.numbers(side) for view in seen.values()})
        nulls = {f"pixels averaged, about {count:,} (null)": pixels(count, grey=name == "digits") for count in counts}
        record["sets"][name] = {
            "learned_from": len(task_set.train), "asked": len(task_set.test), "side": side,
            "rows": heads(seen | nulls, pairs, task_set, options), "chance": task_set.chances()}
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n" + tables.organic_downstream(record))


def command() -> str:
    """As typed, without places of this machine."""
    words = [word.replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../") for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/organic_downstream.py", *words])


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    try:
        main(tyro.cli(Options))
    except UserError as mistake:
        raise SystemExit(f"organic_downstream.py: {mistake}") from None
