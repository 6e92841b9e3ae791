"""The native O-VAEs beside their nulls, their twins trained with gradients, and TAEF2.

    python benchmarks/organic_native.py [--runs runs/organic]

The nulls are principal components of 8×8 blocks with a ridge regression on 3×3 latents: what textbooks have. The twins are
the runs twin-native-* of organic_clones.py, where they are there. On the 100 val photos at 256² and on the Kodak photos in
their own size; writes results/organic_native.json, a sheet of crops, and each bundled model's card. DATA holds
imagenet-1k-sample/, kodak/ and taef2/. Speed is that of one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import variants  # noqa: E402
from organic_clones import RUNS  # noqa: E402

from omnilatent import hub  # noqa: E402
from omnilatent.codec import Codec  # noqa: E402
from omnilatent.data import EvaluationImages, open_images  # noqa: E402
from omnilatent.data.training import batches  # noqa: E402
from omnilatent.data.samples import TrainingImages  # noqa: E402
from omnilatent.latent import LatentSpec  # noqa: E402
from omnilatent.metrics.pixel import high_frequency_ratio, psnr, ssim  # noqa: E402
from omnilatent.organic.grids import neighbourhood  # noqa: E402
from omnilatent.organic.native import BLOCK  # noqa: E402

MODELS = {4: "ovae-f8c4", 16: "ovae-f8c16", 32: "ovae-f8c32"}
RESULTS = Path(__file__).parent / "results" / "organic_native.json"
SIZE = 256
TRAIN, VAL = "imagenet-1k-sample/train.tar", "imagenet-1k-sample/val.tar"
LICENCE = ("MIT for the weights as far as they are ours; the training photos are ImageNet's, for "
           "non-commercial research and education")


@dataclass(frozen=True)
class Measure:
    """Measure all models beside TAEF2, null and twin, and write their figures into their cards."""

    data: Path = Path("../shared/data")
    runs: Path = Path("runs/organic")
    weights: Path = Path("src/omnilatent/weights")
    limit: int | None = None
    """Most photos of each set."""
    teacher: bool = True
    """Measure TAEF2 too, which takes ten minutes."""


def training_crops(data: Path, count: int, seed: int) -> Tensor:
    """uint8 `(count, 3, 256, 256)`."""
    images = TrainingImages(open_images(str(data / TRAIN)), SIZE, seed=seed)
    return torch.cat([batch.images for batch in batches(images, 1, 0, count)])


def measure(options: Measure) -> None:
    """Every codec on every set; then the table, the pictures and the cards."""
    sets = {"val, 256²": EvaluationImages(open_images(str(options.data / VAL)), SIZE, options.limit),
            "Kodak, own size": EvaluationImages(open_images(str(options.data / "kodak")), None, options.limit)}
    crops = training_crops(options.data, 200, 0)
    codecs: dict[str, Callable[[], Codec | Null]] = {}
    for channels, name in MODELS.items():
        codecs[name] = lambda name=name: hub.load(options.weights / name)
        codecs[f"PCA + ridge, {channels}"] = lambda n=channels: null(crops, n)
        if (twin := options.runs / f"twin-native-{channels}" / "final").exists():
            codecs[f"with gradients, {channels}"] = lambda twin=twin: hub.load(twin)
    if options.teacher:
        codecs["TAEF2"] = lambda: hub.load(options.data / "taef2")
    rows, shown = {}, {}
    for label, open_it in codecs.items():
        rows[label], shown[label] = row(open_it(), sets)
        print(label, json.dumps(rows[label], ensure_ascii=False), flush=True)
    conditions = {"threads": torch.get_num_threads(), "dtype": "float32", "torch": torch.__version__,
                  "omnilatent": version("omnilatent"), "sets": {k: len(v) for k, v in sets.items()},
                  "seconds": "CPU time, median of 15 calls on one uint8 256² image, one thread, preprocessing included"}
    RESULTS.write_text(json.dumps({"conditions": conditions, "codecs": rows}, indent=1, ensure_ascii=False) + "\n")
    picture(sets["Kodak, own size"], shown, rows)
    for name in MODELS.values():
        write_card(options.weights / name, name, rows)


def row(codec: Codec | Null, sets: dict[str, EvaluationImages]) -> tuple[dict, list[Tensor]]:
    """Figures of one codec, and its reconstructions of the last set."""
    found: dict = {}
    pictures: list[Tensor] = []
    for label, images in sets.items():
        figures = []
        pictures = []
        for _, image in images:
            x = (image[None] * 255).round() / 255
            y = codec.reconstruct(x)
            figures.append([psnr(x, y).item(), ssim(x, y).item(), high_frequency_ratio(y, x).item()])
            pictures.append(y[0])
        values = np.mean(figures, 0)
        found[label] = {"n": len(figures), "psnr": round(values[0], 3), "ssim": round(values[1], 4),
                        "high_frequency_power": round(values[2], 4),
                        "psnr_each": [round(f[0], 2) for f in figures] if len(figures) <= 8 else None}
    found["encode_ms"], found["decode_ms"] = milliseconds(codec)
    if isinstance(codec, Codec):
        found["parameters"], found["weights"] = codec.parameter_count(), codec.provenance.weights_hash
        found["latent"] = latent_figures(codec, sets["val, 256²"])
    return found, pictures


def latent_figures(codec: Codec, images: EvaluationImages) -> dict:
    """How the latent is spread over the val photos, and what fp16 storage and noise on it cost, in dB of PSNR."""
    latents, psnrs = [], []
    generator = torch.Generator().manual_seed(0)
    for number, (_, image) in enumerate(images):
        x = (image[None] * 255).round() / 255
        z = codec.encode(x).mode()
        latents.append(z[0].flatten(1))
        if number < 16:
            noisy = [z, z.half().float(), *(z + s * torch.randn(z.shape, generator=generator) for s in (0.05, 0.2))]
            psnrs.append([psnr(x, codec.decode(n)).item() for n in noisy])
    z = torch.cat(latents, 1)
    correlation = torch.corrcoef(z).fill_diagonal_(0).abs()
    exact, half, little, more = np.mean(psnrs, 0)
    return {"mean": round(z.mean().item(), 4), "std": round(z.std().item(), 4),
            "channel_std": [round(v, 3) for v in (z.std(1).min().item(), z.std(1).max().item())],
            "correlation_largest": round(correlation.max().item(), 4),
            "correlation_mean": round(correlation.sum().item() / max(len(z) * (len(z) - 1), 1), 5),
            "psnr_16_photos": round(exact, 3), "lost_fp16": round(exact - half, 3),
            "lost_noise_0.05": round(exact - little, 3), "lost_noise_0.2": round(exact - more, 3)}


def milliseconds(codec: Codec | Null, repeats: int = 15) -> tuple[float, float]:
    """CPU time to encode and to decode one uint8 256² image."""
    image = (torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 255).byte()
    latent = codec.encode(image)
    codec.decode(latent)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for kept, call in zip(times, (lambda: codec.encode(image), lambda: codec.decode(latent)), strict=True):
            begin = time.process_time()  # not the clock on the wall: others may use the machine
            call()
            kept.append((time.process_time() - begin) * 1000)
    return round(statistics.median(times[0]), 2), round(statistics.median(times[1]), 2)


@dataclass(frozen=True)
class Null:
    """Principal components of 8×8 blocks, decoded by ridge regression from 3×3 latents."""

    components: Tensor  # (channels, 3, 8, 8)
    weight: Tensor  # (192, channels, 3, 3)
    bias: Tensor

    def encode(self, images: Tensor) -> Tensor:
        floats = images.float() / 255 if images.dtype == torch.uint8 else images
        below, right = -floats.shape[-2] % BLOCK, -floats.shape[-1] % BLOCK
        return F.conv2d(F.pad(floats, (0, right, 0, below), mode="replicate") - 0.5, self.components, stride=BLOCK)

    def decode(self, latent: Tensor) -> Tensor:
        return (F.pixel_shuffle(F.conv2d(F.pad(latent, (1, 1, 1, 1), mode="replicate"), self.weight, self.bias), BLOCK) + 0.5).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))[..., : images.shape[-2], : images.shape[-1]]


def null(crops: Tensor, channels: int, ridge: float = 1e-5) -> Null:
    """The null's fit: the eigenvectors and the linear system that the O-VAE does without."""
    blocks = [F.unfold(part.float() / 255 - 0.5, BLOCK, stride=BLOCK).mT.flatten(0, 1) for part in crops.split(8)]
    second = sum(part.mT @ part for part in blocks)
    vectors = torch.linalg.eigh(second.double())[1].flip(1)[:, :channels].float()
    code = Null(vectors.mT.reshape(channels, 3, BLOCK, BLOCK), torch.empty(0), torch.empty(0))
    across, towards = 0, 0
    for part, target in zip(crops.split(8), blocks, strict=True):
        seen = neighbourhood(code.encode(part), 3).mT.flatten(0, 1)
        seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
        across, towards = across + (seen.mT @ seen).double(), towards + (seen.mT @ target).double()
    across = across + ridge * across.diagonal().mean() * torch.eye(len(across))
    weight = torch.linalg.solve(across, towards).float().mT
    return replace(code, weight=weight[:, :-1].reshape(-1, channels, 3, 3), bias=weight[:, -1].contiguous())


def picture(images: EvaluationImages, shown: dict[str, list[Tensor]], rows: dict[str, dict], side: int = 96) -> None:
    """Crops where four Kodak photos have most detail, every codec beside the original."""
    def pixels(image: Tensor) -> np.ndarray:
        return (image.permute(1, 2, 0) * 255).round().byte().numpy()

    originals = [pixels(image) for _, image in images]
    places = [variants.busiest(original, side) for original in originals]
    chosen = range(0, len(originals), max(1, len(originals) // 4))
    columns = {"original": [variants.crop(originals[i], places[i], side) for i in chosen]}
    below = {"original": ["PSNR, Kodak", "SSIM"]}
    for label, pictures in shown.items():
        columns[label] = [variants.crop(pixels(pictures[i]), places[i], side) for i in chosen]
        figures = rows[label]["Kodak, own size"]
        below[label] = [f"{figures['psnr']:.2f} dB", f"{figures['ssim']:.3f}"]
    variants.grid(columns, below, 2).save(RESULTS.with_suffix(".png"), optimize=True)


def write_card(folder: Path, name: str, rows: dict[str, dict]) -> None:
    """The same weights with the figures of `rows` in their card."""
    saved, tensors = hub.read_config(folder), load_file(folder / "model.safetensors")
    channels, record = saved["spec"]["channels"], saved["training"]
    command, options = RUNS[f"native-{channels}"]
    lines = []
    for label in [name, f"PCA + ridge, {channels}", *(label for label in [f"with gradients, {channels}"] if label in rows), *(["TAEF2"] if "TAEF2" in rows else [])]:
        for images in ("val, 256²", "Kodak, own size"):
            f = rows[label][images]
            lines.append(f"| {label} | {images} | {f['n']} | {f['psnr']:.2f} | {f['ssim']:.3f} | "
                         f"{f['high_frequency_power']:.3f} | {rows[label]['encode_ms']} | {rows[label]['decode_ms']} |")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    latent = rows[name]["latent"]
    card = (
        "---\nlicense: other\nlicense_name: mit-trained-on-imagenet\nlibrary_name: omnilatent\n---\n"
        f"# {name}\n\n"
        f"Native O-VAE: an image autoencoder learned without gradients, f8, {channels} channels, "
        f"{rows[name]['parameters']:,} parameters, {size / 1e6:.2f} MB as fp16. Learned in minutes on an H200 from "
        f"{record['views']} views of 753 of the ImageNet sample's train photos, {record['sites']:,} places of them a layer, by "
        "forward evaluations alone. \"With gradients\" is the same model, trained end to end by Adam from random weights for "
        "2,500 steps of 16 pictures.\n\n"
        "Measured on the fp16 file as loaded (fp32 arithmetic, output in 8 bits); milliseconds of CPU for one uint8 256² "
        "image on one thread, preprocessing included. TAEF2 has 32 channels and is not made for PSNR alone.\n\n"
        "| codec | images | N | PSNR dB | SSIM | high-frequency power | encode ms | decode ms |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n\n"
        f"Latent on the val photos: standard deviation {latent['std']}, by channel {latent['channel_std'][0]} to "
        f"{latent['channel_std'][1]}; largest correlation of two channels {latent['correlation_largest']}. Stored in "
        f"fp16 it loses {latent['lost_fp16']} dB, under noise of 0.05 {latent['lost_noise_0.05']} dB, of 0.2 "
        f"{latent['lost_noise_0.2']} dB.\n\n"
        "PSNR is what it is made for: fine texture that its channels do not hold comes out smooth, not invented.\n\n"
        f"Licence: {LICENCE}.\n\n"
        f"Command: `omnilatent clone {command} --data ../shared/data/imagenet-1k-sample/train.tar --views 6 {options} "
        "--candidates 2048`, then `python benchmarks/organic_native.py`.\n"
    )
    with hub.new_folder(folder) as new:
        hub.write_model(new, "ovae", saved["model"], LatentSpec.from_json(saved["spec"]), tensors, card, training=record)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    measure(tyro.cli(Measure))
