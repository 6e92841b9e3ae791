"""Figures that papers report, and the comparison table of KL against VQ autoencoders with ours beside them.

- `PUBLISHED`: quoted figures, ImageNet validation images at 256², with their sources.
- `Benchmark`: one row of the table: type, downsampling, latent shape, rFID, PSNR, SSIM, LPIPS.
- `benchmark_rows`: our rows from evaluations; the quoted ones are never mixed with them.

A quoted figure was measured on another set, at another number of images and by another program than ours, so
the two kinds of rows show the order of magnitude, not a ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.results import Evaluation
from .cells import null_rows

PUBLISHED_SET = "ImageNet validation, 256²"
PUBLISHED_NOTE = (
    f"Quoted rows were published for {PUBLISHED_SET}; ours rest on the images named in this report, so the two "
    "do not rank against each other. A row often quoted as KL f8 with rFID 0.87, PSNR 24.08 and SSIM 0.68 belongs "
    "to the f16 model of the latent diffusion paper (16×16×16); its f8 model has rFID 0.90 and PSNR 24.19."
)
_LDM = "Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, Table 8"
_COLLECTED = "collected from the literature; no single paper is named for it"


@dataclass(frozen=True)
class Benchmark:
    """One autoencoder. `shape` is the latent of a 256² image (ours: of the measured size), height × width × channels.

    A figure that is not reported is None. `source` is "" for our own measurements.
    """

    label: str
    type: str
    downsampling: int | None
    shape: str
    rfid: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    source: str = ""


PUBLISHED = (
    Benchmark("LDM KL-f8", "KL", 8, "32×32×4", 0.90, 24.19, source=_LDM),
    Benchmark("LDM VQ-f8", "VQ", 8, "32×32×4", 1.14, 23.07, source=_LDM),
    Benchmark("LDM KL-f4", "KL", 4, "64×64×3", 0.27, 27.53, source=_LDM),
    Benchmark("sd-vae-ft-mse", "KL", 8, "32×32×4", 0.69, 26.91, 0.77, 0.130, source=_COLLECTED),
    Benchmark("SDXL VAE", "KL", 8, "32×32×4", 0.67, 27.38, 0.79, 0.122, source=_COLLECTED),
    Benchmark("FLUX.1 VAE", "KL", 8, "32×32×16", 0.17, 32.87, 0.92, 0.045, source=_COLLECTED),
    Benchmark("VQGAN, 16,384 codes", "VQ", 16, "16×16", 4.98, source="Esser et al. 2021, Taming Transformers"),
    Benchmark("LlamaGen, 16,384 codes", "VQ", 16, "16×16", 2.19, source="Sun et al. 2024, LlamaGen"),
    Benchmark("IBQ, 16,384 codes", "VQ", 16, "16×16", 1.37, source="Shi et al. 2024, Index Backpropagation"),
    Benchmark("Open-MAGVIT2, 2^18 codes", "LFQ", 16, "16×16", 1.17, source="Luo et al. 2024, Open-MAGVIT2"),
)


def benchmark_rows(evaluations: Sequence[Evaluation]) -> list[Benchmark]:
    """The evaluated codecs as rows of the table, KL, VQ or whatever they are, in the order given."""
    rows, nulls = [], null_rows(evaluations)
    for evaluation in evaluations:
        values = {key: _value(evaluation, metric) for key, metric in
                  (("rfid", "rfid"), ("psnr", "psnr"), ("ssim", "ssim"), ("lpips", "lpips_vgg"))}
        plain = "no KL" in nulls.get(evaluation.label, "")
        kind = "AE" if plain else codec_type(evaluation.codec)
        rows.append(Benchmark(evaluation.label, kind, evaluation.codec.get("downsampling"), latent_shape(evaluation),
                              **values))
    return rows


def codec_type(codec: dict[str, Any]) -> str:
    """The word of the table's first column: KL, VQ, identity, or AE for a deterministic latent."""
    if codec.get("kind") == "pixels":
        return "identity"
    return {"gaussian": "KL", "codes": "tokenizer", "point": "AE"}.get(str(codec.get("latent", "")), "not stated")


def latent_shape(evaluation: Evaluation) -> str:
    """`32×32×4` for a square evaluation size, `H/8×W/8×4` where images keep their own sizes."""
    channels, factor = evaluation.codec.get("latent_channels"), evaluation.codec.get("downsampling")
    size = evaluation.conditions.get("size")
    if not isinstance(factor, int) or channels is None:
        return "not stated"
    if isinstance(size, int):
        side = -(-size // factor)
        return f"{side}×{side}×{channels}"
    return f"H×W×{channels}" if factor == 1 else f"H/{factor}×W/{factor}×{channels}"


def _value(evaluation: Evaluation, key: str) -> float | None:
    figure = evaluation.figures.get(key)
    return figure.value if figure else None
