"""Drop-in encoders and decoders of two teachers beside their nulls: PSNR on held-out photos, and time per image.

    python benchmarks/organic_dropin.py [--data FOLDER] [--lessons FOLDER] [--save FOLDER]

Learns on the train photos of imagenet-1k-sample (every twelfth chooses ridges and the number of layers) and measures
on its 100 val photos: the latents' R² and the PSNR of organic latents decoded by the teacher; of teacher latents
decoded organically; of both organic. Nulls: a linear map of the same code (one linear layer, no neurons), and the
teacher's latent mean. Times are medians of processor time on one thread, clone and teacher in turn. Lessons are those
of organic_pooled.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from organic_pooled import lessons_of, milliseconds
from torch import Tensor

import omnilatent
from omnilatent import hub
from omnilatent.codec import Codec
from omnilatent.metrics.pixel import psnr
from omnilatent.organic.dropin import KIND, Dropin, checkpoint_of
from omnilatent.organic.dropin_learning import DecoderConfig, EncoderConfig, learn_decoder_from, learn_encoder_from
from omnilatent.organic.grid_learning import GridConfig
from omnilatent.latent import LatentSpec
from omnilatent.organic.teaching import Lessons

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Drop-ins of kl-f8-small and TAEF2 beside their nulls."""

    data: Path = ROOT.parent / "shared" / "data"
    """holds imagenet-1k-sample/ and taef2/"""
    lessons: Path = ROOT / "runs" / "lessons"
    """where the teachers' latents are kept"""
    out: Path = ROOT / "benchmarks" / "results" / "organic_dropin.json"
    save: Path | None = None
    """folder for the checkpoints, one a teacher"""
    teachers: tuple[str, ...] = ("taef2", "kl-f8-small")
    layers: int = 3
    neurons: int = 384
    candidates: int = 1024
    sites: int = 48_000
    judged: int = 16_000
    val: int = 100
    """val photos that are decoded"""
    seed: int = 0


def decoded(decode: object, latents: Tensor, pictures: Tensor) -> float:
    """Mean PSNR in dB, in 8 bits, a picture at a time."""
    values = [psnr(picture[None].float() / 255, decode(z[None]).clamp(0, 1)) for z, picture in
              zip(latents, pictures, strict=True)]
    return float(torch.cat(values).mean())


def main(options: Options) -> None:
    results: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "seed": options.seed}
    table = ["| teacher | row | R² of latents | PSNR dB | ms | × teacher |", "| --- | --- | --- | --- | --- | --- |"]
    for name in options.teachers:
        teacher = omnilatent.load(options.data / "taef2" if name == "taef2" else name)
        lessons, val = lessons_of(teacher, name, "train", options), lessons_of(teacher, name, "val", options)
        step = max(1, len(val) // options.val)
        results[name], rows = _one(teacher, lessons, val[torch.arange(0, len(val), step)[: options.val]], options)
        table += [f"| {name} | {row} |" for row in rows]
        options.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n" + "\n".join(table))


def _one(teacher: Codec, lessons: Lessons, val: Lessons, options: Options) -> tuple[dict[str, object], list[str]]:
    held = torch.arange(len(lessons)) % 12 == 0
    train, exam = lessons[~held], lessons[held]
    grid = GridConfig(options.layers, options.neurons, options.candidates, options.sites, options.judged)
    encoders, decoders = {}, {}
    for label, change in (("linear", {"layers": 1, "neurons": 1, "candidates": 8}), ("clone", {})):
        encoders[label] = learn_encoder_from(
            teacher, train, exam, EncoderConfig(grid=replace(grid, **change)), _say, options.seed)
        reach = {"reach": 5 if label == "linear" else 3}
        decoders[label] = learn_decoder_from(
            teacher, train, exam, DecoderConfig(grid=replace(grid, **reach, **change)), _say, options.seed)
    module = Dropin(encoders["clone"][0], decoders["clone"][0])
    if options.save:
        _save(options.save / teacher.label.rsplit("/")[-1], module, teacher)
    z, pictures = val.latents.float(), val.pictures
    spread = (z - z.mean((0, 2, 3), keepdim=True)).square().mean()
    found = {label: torch.cat([encoder(part.float() / 255) for part in pictures.split(10)])
             for label, (encoder, _) in encoders.items()}
    r2 = {label: float(1 - (guess - z).square().mean() / spread) for label, guess in found.items()}
    mean = train.latents.float().mean((0, 2, 3))[None, :, None, None].expand_as(z)
    db = {
        "the teacher": decoded(teacher.decode, z, pictures),
        "null: mean latent, teacher's decoder": decoded(teacher.decode, mean[:8], pictures[:8]),
        "null: linear encoder, teacher's decoder": decoded(teacher.decode, found["linear"], pictures),
        "organic encoder, teacher's decoder": decoded(teacher.decode, found["clone"], pictures),
        "null: linear decoder of teacher's latents": decoded(decoders["linear"][0], z, pictures),
        "organic decoder of teacher's latents": decoded(module.decoder, z, pictures),
        "both organic": decoded(module.decoder, found["clone"], pictures),
    }
    picture, latent = pictures[:1].float() / 255, z[:1]
    ms = milliseconds({"encoder": lambda: module.encoder(picture), "decoder": lambda: module.decoder(latent),
                       "teacher's encoder": lambda: teacher.encode(picture),
                       "teacher's decoder": lambda: teacher.decode(latent)},
                      {"encoder": 5, "decoder": 5, "teacher's encoder": 1, "teacher's decoder": 1})
    faster = {half: ms[f"teacher's {half}"] / ms[half] for half in ("encoder", "decoder")}
    figures = {"psnr": db, "r2": r2, "ms": ms, "times_faster": faster, "n": len(val), "learned_on": len(train),
               "weights_hash": teacher.provenance.weights_hash, "grid": asdict(grid),
               "held_out_losses": {"encoder": encoders["clone"][1].losses, "decoder": decoders["clone"][1].losses},
               "learning_s": {"encoder": encoders["clone"][1].seconds, "decoder": decoders["clone"][1].seconds}}
    rows = []
    for row, value in db.items():
        half = "encoder" if row.startswith("organic enc") else "decoder" if row.startswith("organic dec") else None
        share = r2["linear"] if "linear enc" in row else r2["clone"] if row.startswith("organic enc") else None
        rows.append(f"{row} | {'' if share is None else f'{share:.3f}'} | {value:.2f} | "
                    + (f"{ms[half]:.1f} | {faster[half]:.0f}" if half else " | "))
    print(*rows, sep="\n", flush=True)
    return figures, rows


def _say(line: str) -> None:
    print(line, flush=True)


def _save(folder: Path, module: Dropin, teacher: Codec) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    spec = LatentSpec(channels=module.channels, downsampling=teacher.spec.downsampling, kind="point")
    with hub.new_folder(folder) as new:
        tensors = {key: value.half() for key, value in module.state_dict().items()}
        hub.write_model(new, KIND, checkpoint_of(module, teacher), spec, tensors, "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    main(tyro.cli(Options))
