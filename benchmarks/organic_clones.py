"""Clones of TAEF2 and kl-f8-small beside their teachers, their nulls and their twins trained with gradients.

    python benchmarks/organic_clones.py learn [--only NAME ...] [--device cuda]     all runs; 15 minutes on one H200
    python benchmarks/organic_clones.py measure                                     half an hour of one CPU thread
    python benchmarks/organic_clones.py curve                                       the trade of TAEF2's clones, as a picture

`learn` runs `omnilatent clone` for every entry of `RUNS` into RUNS_FOLDER; lessons are shared. `measure` reads what is
there and measures it on the 100 val photos, which no run has seen: latents' R², cosine and L2; PSNR of organic latents
decoded by the teacher, of teacher latents decoded organically, and of both; milliseconds of processor time on one thread.
Nulls: the mean, a linear map of an 8×8 thumbnail (pooled), linear maps of the same retina and of 3×3 latents (grid).
Writes results/organic_clones.json and, with what organic_hybrid.py wrote, results/organic_curve.png.
"""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import omnilatent
from omnilatent.cli.clone import main as clone
from omnilatent.codec import Codec
from omnilatent.data import EvaluationImages, open_images
from omnilatent.metrics.pixel import psnr
from omnilatent.organic.fovea import Fovea, FoveaFit
from omnilatent.organic.grids import GridStack
from omnilatent.organic.pooled_learning import agreement
from omnilatent.organic.regression import Regression, fit_moments

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "organic_clones.json"
GRID = "--latent grid --layers 4 --neurons 224"
POOLED = "--latent pooled --neurons 256 --candidates 4096"
NATIVE = {"4": "--latent native --channels 4 --layers 4 --neurons 256",
          "16": "--latent native --channels 16 --layers 4 --neurons 192",
          "32": "--latent native --channels 32 --layers 3 --neurons 192"}
SCALE = (30, 100, 300, 753)
RUNS: dict[str, tuple[str, str]] = {  # name: teacher, options
    "taef2-pooled": ("taef2", f"{POOLED} --part both"),
    "taef2-grid": ("taef2", f"{GRID} --sweeps 1000 --sites 1000000"),
    "ovae": ("kl-f8-small", "--latent pooled --neurons 96 --part encoder"),
    "kl-grid": ("kl-f8-small", "--latent grid --layers 3 --neurons 224 --sweeps 600"),
    "native-4": ("kl-f8-small", f"{NATIVE['4']} --turns 30 --sweeps 600 --sites 3000000"),
    "native-16": ("kl-f8-small", f"{NATIVE['16']} --turns 30 --sweeps 600 --sites 3000000"),
    "native-32": ("kl-f8-small", f"{NATIVE['32']} --turns 30 --sweeps 600 --sites 3000000"),
    "twin-taef2-pooled": ("taef2", f"{POOLED} --part both --gradients --steps 3000"),
    "twin-taef2-grid": ("taef2", f"{GRID} --gradients --steps 4000"),
    **{f"twin-native-{n}": ("kl-f8-small", f"{options} --gradients --steps 2500") for n, options in NATIVE.items()},
    **{f"scale-native-{n}": ("kl-f8-small", f"--most {n} --latent native --layers 2 --neurons 224 --sweeps 400 --sites 200000")
       for n in SCALE},
    **{f"scale-taef2-{n}": ("taef2", f"--most {n} --part encoder --layers 2 --neurons 224 --sweeps 400 --sites 200000")
       for n in SCALE},
}


@dataclass(frozen=True)
class Learn:
    """Learn the clones."""

    only: tuple[str, ...] = ()
    """by default all"""
    data: Path = ROOT.parent / "shared" / "data"
    runs: Path = ROOT / "runs" / "organic"
    device: str = "auto"


@dataclass(frozen=True)
class Measure:
    """Measure the clones that are there."""

    data: Path = ROOT.parent / "shared" / "data"
    runs: Path = ROOT / "runs" / "organic"
    photos: int = 100
    """val photos"""
    taught: int = 300
    """train photos that the nulls are fitted on"""


@dataclass(frozen=True)
class Curve:
    """Draw speed against likeness."""


def main(options: Learn | Measure | Curve) -> None:
    {Learn: learn, Measure: measure, Curve: curve}[type(options)](options)


def learn(options: Learn) -> None:
    """Every run that is not there yet, by the command that a user would give."""
    for name in options.only or RUNS:
        teacher, settings = RUNS[name]
        if (options.runs / name / "final").exists():
            continue
        few = f"-{name}" if name.startswith("scale") else ""
        kind = "pictures" if "native" in settings else teacher
        given = (f"{options.data / 'taef2' if teacher == 'taef2' else teacher} --data "
                 f"{options.data / 'imagenet-1k-sample' / 'train.tar'} --views 6 --lessons "
                 f"{options.runs / 'lessons' / (kind + few)} --out {options.runs / name} --device {options.device}")
        usual = "" if "--sites" in settings else " --sites 600000"
        usual += "" if "--candidates" in settings else " --candidates 2048"
        with torch.enable_grad():  # the twins train with gradients
            clone(shlex.split(f"{given} {settings}{usual}"))


class Photos:
    """Pictures `(n, 3, 256, 256)` uint8 and a teacher's latents of them."""

    def __init__(self, teacher: Codec, source: str, count: int) -> None:
        images = EvaluationImages(open_images(source), 256, count)
        self.pictures = torch.stack([(image * 255).round().to(torch.uint8) for _, image in images])
        self.latents = torch.cat([teacher.encode(part).mode().float() for part in self.pictures.split(4)])

    def decibels(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> float:
        """Mean PSNR of decoded latents, in 8 bits."""
        values = [psnr(picture[None].float() / 255, decode(z[None]).clamp(0, 1))
                  for picture, z in zip(self.pictures, latents, strict=True)]
        return round(float(torch.cat(values).mean()), 3)


def measure(options: Measure) -> None:
    record: dict[str, object] = {"torch": torch.__version__, "photos": options.photos, "threads": torch.get_num_threads(),
                                 "milliseconds": "processor time, median, one uint8 picture of 256², retina included"}
    tars = options.data / "imagenet-1k-sample"
    for name in ("taef2", "kl-f8-small"):
        teacher = omnilatent.load(str(options.data / "taef2") if name == "taef2" else name)
        val = Photos(teacher, str(tars / "val.tar"), options.photos)
        train = Photos(teacher, str(tars / "train.tar"), options.taught)
        rows: dict[str, dict[str, float]] = {}
        record[name] = rows
        rows["teacher"] = {"psnr": val.decibels(teacher.decode, val.latents)}
        folders: dict[str, Path] = {}
        rows |= pooled_nulls(train, val) | grid_nulls(teacher, train, val)
        report(rows)
        for run, (whose, settings) in RUNS.items():
            folder = options.runs / run
            if whose == name and "native" not in settings and (folder / "final").exists():
                depths = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:])) if run.endswith("grid") else []
                for place, path in enumerate([*depths, folder / "final"]):
                    if (path / "config.json").exists():
                        label = run if path.name == "final" else f"{run}, after round {place + 1}"
                        rows[label] = pooled(path, val) if "pooled" in settings else grid(path, teacher, val)
                        folders[label] = path
                        report({label: rows[label]})
        for label, ms in speeds({"teacher": teacher, **{label: omnilatent.load(str(path)) for label, path in folders.items()
                                                        if not label.startswith("scale")}}).items():
            rows[label] |= ms
            report({label: ms})
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = {}
    record["native, by photos"] = rows
    images = EvaluationImages(open_images(str(tars / "val.tar")), 256, options.photos)
    for n in SCALE:
        folder = options.runs / f"scale-native-{n}" / "final"
        if folder.exists():
            codec = omnilatent.load(str(folder))
            values = [psnr(x := (image[None] * 255).round() / 255, codec.reconstruct(x)) for _, image in images]
            rows[str(n)] = {"psnr": round(float(torch.cat(values).mean()), 3)}
    report(rows)
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def curve(options: Curve) -> None:
    """TAEF2's drop-ins after every layer, their twins and nulls, and the hybrids: times as fast against PSNR; the area of
    a point is the size of its weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads(RESULTS.read_text(encoding="utf-8"))["taef2"]
    hybrids = json.loads(RESULTS.with_name("organic_hybrid.json").read_text(encoding="utf-8"))["rows"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for panel, half, title in zip(panels, ("encoder", "decoder"), ("organic encoder, TAEF2's decoder",
                                                                   "TAEF2's encoder, organic decoder"), strict=True):
        name = "encode_ms" if half == "encoder" else "decode_ms"
        layers = sorted((row for label, row in found.items() if label.startswith("taef2-grid")), key=lambda r: -r[name])
        points = [(found["teacher"][name] / row[name], row[f"{half}_psnr"], row[f"{half}_parameters"] / 2500) for row in layers]
        panel.plot(*zip(*((x, y) for x, y, _ in points), strict=True), color="#2563eb", lw=1)
        panel.scatter(*zip(*points, strict=True), color="#2563eb", label="without gradients, layer by layer")
        twin = found["twin-taef2-grid"]
        panel.scatter(found["teacher"][name] / twin[name], twin[f"{half}_psnr"], twin[f"{half}_parameters"] / 2500,
                      color="#d97706", label="the same, by backpropagation")
        mixed = next(row for row in hybrids.values() if row["half"] == half)
        panel.scatter(hybrids["TAEF2"][name] / mixed[name], mixed["psnr"], 120, marker="*", color="#059669",
                      label="with three of TAEF2's blocks")
        nulls = [row[f"{half}_psnr"] for label, row in found.items() if "linear" in label and f"{half}_psnr" in row]
        panel.axhline(max(nulls), color="#8a8f98", ls=":", label="linear map (null)")
        panel.axhline(found["teacher"]["psnr"], color="#8a8f98", label="TAEF2")
        panel.set(xscale="log", xlabel=f"times as fast as TAEF2's {half}, one CPU thread", title=title)
        panel.set_xticks([15, 20, 30, 50, 100], ["15", "20", "30", "50", "100"])
        panel.minorticks_off()
    panels[0].set_ylabel("PSNR on 100 val photos [dB]")
    panels[1].legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.72), markerscale=0.5)
    figure.tight_layout()
    figure.savefig(RESULTS.with_name("organic_curve.png"), dpi=110)


def report(rows: dict[str, dict[str, float]]) -> None:
    for label, row in rows.items():
        print(label, json.dumps(row), flush=True)


def pooled(folder: Path, val: Photos) -> dict[str, float]:
    codec = omnilatent.load(str(folder))
    encoder, decoder = codec.module.encoder, codec.module.decoder
    wanted = val.latents[:, : encoder.outputs].mean((2, 3))
    row = compared(torch.cat([encoder(part) for part in val.pictures.split(10)]), wanted)
    if decoder is not None:
        small = F.interpolate(val.pictures.float() / 255, (64, 64), mode="bilinear", antialias=True)
        said = decoder(wanted[..., None]).view(-1, 3, 64, 64).clamp(0, 1)
        row["decoder_psnr_64"] = round(float(psnr(small, said).mean()), 3)
    return row | {"bytes": (folder / "model.safetensors").stat().st_size}


def grid(folder: Path, teacher: Codec, val: Photos) -> dict[str, float]:
    codec = omnilatent.load(str(folder))
    encoder, decoder = codec.module.encoder, codec.module.decoder
    row: dict[str, float] = {"bytes": (folder / "model.safetensors").stat().st_size}
    if encoder is not None:
        found = torch.cat([encoder(part.float() / 255) for part in val.pictures.split(10)])
        row |= {"r2": explained(found, val.latents), "encoder_psnr": val.decibels(teacher.decode, found),
                "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
                "cosine": round(float(F.cosine_similarity(found.flatten(1), val.latents.flatten(1)).mean()), 4)}
    if decoder is not None:
        row |= {"decoder_psnr": val.decibels(decoder, val.latents),
                "decoder_parameters": sum(p.numel() for p in decoder.parameters())}
    if encoder is not None and decoder is not None:
        row["both_psnr"] = val.decibels(decoder, found)
    return row


def explained(found: Tensor, wanted: Tensor) -> float:
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    return round(float(1 - (found - wanted).square().mean() / spread), 4)


def compared(found: Tensor, wanted: Tensor) -> dict[str, float]:
    same = agreement(found, wanted)
    return {"r2": round(same.r2, 4), "cosine": round(same.cosine, 4), "l2": round(same.l2, 4)}


def pooled_nulls(train: Photos, val: Photos) -> dict[str, dict[str, float]]:
    """The mean; a linear map of an 8×8 thumbnail; and the best linear map of the four numbers to a picture of 64²."""
    def thumbnails(pictures: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pictures.float() / 255, 8).flatten(1)

    goal, wanted = (part.latents[:, :4].mean((2, 3)) for part in (train, val))
    seen, held = Regression(192, 4), Regression(192, 4)
    seen.add(thumbnails(train.pictures), goal)
    held.add(thumbnails(val.pictures), wanted)
    fits = [fit_moments(seen, ridge) for ridge in (1e-3, 1e-2, 1e-1, 1.0)]
    linear = min(fits, key=lambda fit: float(held.losses(fit.weight, fit.bias).mean()))  # the best for it, on val itself
    small = [F.interpolate(part.pictures.float() / 255, (64, 64), mode="bilinear", antialias=True) for part in (train, val)]
    back = Regression(4, small[0][0].numel())
    back.add(goal, small[0].flatten(1))
    said = fit_moments(back)(wanted).view(-1, 3, 64, 64).clamp(0, 1)
    return {"null: pooled mean": compared(goal.mean(0).expand_as(wanted), wanted),
            "null: pooled, linear on a thumbnail": compared(linear(thumbnails(val.pictures)), wanted),
            "linear optimum of the pooled decoder": {"decoder_psnr_64": round(float(psnr(small[1], said).mean()), 3)}}


def grid_nulls(teacher: Codec, train: Photos, val: Photos) -> dict[str, dict[str, float]]:
    """Linear maps of the clones' own retina, and of 3×3 and 5×5 latents to pixels."""
    device, channels = torch.device("cpu"), teacher.spec.channels
    fit, draw = FoveaFit(Fovea(), device), torch.Generator().manual_seed(0)
    for part in train.pictures.split(10):
        fit.add(part.float() / 255, draw)
    code = fit.code()
    seen = Regression(code.fovea.outputs, channels)
    for pictures, latents in zip(train.pictures.split(10), train.latents.split(10), strict=True):
        seen.add(code(pictures.float() / 255).flatten(2).mT.flatten(0, 1), latents.flatten(2).mT.flatten(0, 1))
    linear = fit_moments(seen, 1e-5)
    found = torch.cat([linear(code(part.float() / 255).movedim(1, 3)).movedim(3, 1) for part in val.pictures.split(10)])
    mean = train.latents.mean((0, 2, 3))[None, :, None, None].expand_as(val.latents)
    rows = {"null: grid mean": {"encoder_psnr": val.decibels(teacher.decode, mean)},
            "null: grid, linear on the retina": {"r2": explained(found, val.latents),
                                                 "encoder_psnr": val.decibels(teacher.decode, found)}}
    for reach in (3, 5):
        stack = GridStack(channels, [], reach, 0)
        back = Regression(channels * reach**2, 192)
        for pictures, latents in zip(train.pictures.split(10), train.latents.split(10), strict=True):
            blocks = F.pixel_unshuffle(pictures.float() / 255, 8)
            back.add(stack.inputs(latents, None).mT.flatten(0, 1), blocks.flatten(2).mT.flatten(0, 1))
        decoder = fit_moments(back, 1e-6)

        def decode(z: Tensor, stack: GridStack = stack, decoder: object = decoder) -> Tensor:
            return F.pixel_shuffle(decoder(stack.inputs(z, None).mT).mT.unflatten(2, z.shape[-2:]), 8)

        rows[f"null: linear decoder of {reach}×{reach} latents"] = {"decoder_psnr": val.decibels(decode, val.latents)}
    return rows


def speeds(codecs: dict[str, Codec], rounds: int = 15) -> dict[str, dict[str, float]]:
    """Medians of processor time, all codecs in turn, of the halves that are a codec's own."""
    picture = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for label, codec in codecs.items():
        halves = getattr(codec.module, "encoder", codec.module), getattr(codec.module, "decoder", codec.module)
        latent = codec.encode(picture)
        if halves[0] is not None:
            calls[label, "encode_ms"] = lambda codec=codec: codec.encode(picture)
        if halves[1] is not None:
            calls[label, "decode_ms"] = lambda codec=codec, latent=latent: codec.decode(latent)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.process_time()
            call()
            taken[key].append(time.process_time() - start)
    found: dict[str, dict[str, float]] = {}
    for (label, half), seconds in taken.items():
        found.setdefault(label, {})[half] = round(1000 * statistics.median(seconds), 2)
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main(tyro.cli(Learn | Measure | Curve))
