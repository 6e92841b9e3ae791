"""What the protocol can measure, in the order of a table.

- `MetricInfo`: a metric's heading, unit, which way is better, digits to print, and what it needs.
- `METRICS`: key → `MetricInfo`.
- `choose`: the keys a user asked for, checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown. `better` is "" where neither direction is good in itself."""

    name: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    digits: int = 2
    needs: str = ""


METRICS: dict[str, MetricInfo] = {
    "psnr": MetricInfo("PSNR", "dB", "higher", 2),
    "ssim": MetricInfo("SSIM", "", "higher", 3, "sides of at least 11 pixels"),
    "ms_ssim": MetricInfo("MS-SSIM", "", "higher", 4, "sides of at least 176 pixels"),
    "vif": MetricInfo("VIF", "", "higher", 3, "sides of at least 41 pixels"),
    "spectrum_high": MetricInfo("High-frequency power ratio", "×", "", 3, "sides of at least 16 pixels; 1 is faithful"),
    "lpips_vgg": MetricInfo("LPIPS (VGG)", "", "lower", 4, "vgg16-397923af.pth; sides of at least 16 pixels"),
    "lpips_alex": MetricInfo("LPIPS (Alex)", "", "lower", 4, "alexnet-owt-7be5be79.pth; sides of at least 31 pixels"),
    "rfid": MetricInfo("rFID", "", "lower", 2, "weights-inception-2015-12-05-6726825d.pth; torch-fidelity; 2 images"),
    "fd_dinov2": MetricInfo("FD-DINOv2", "", "lower", 1, "facebook/dinov2-large; transformers; 2 images"),
    "codes_used": MetricInfo("Codes used", "", "higher", 0, "a codebook"),
    "active_ratio": MetricInfo("Active ratio", "", "higher", 3, "a codebook"),
    "entropy_bits": MetricInfo("Code entropy", "bits", "higher", 2, "a codebook"),
    "perplexity": MetricInfo("Perplexity", "", "higher", 0, "a codebook"),
    "bits_per_pixel": MetricInfo("Bits per pixel", "bit", "lower", 3),
    "compression": MetricInfo("Compression", "×", "higher", 1),
    "encode_ips": MetricInfo("Encode", "img/s", "higher", 1),
    "decode_ips": MetricInfo("Decode", "img/s", "higher", 1),
    "parameters": MetricInfo("Parameters", "", "lower", 0),
    "weights_mb": MetricInfo("Weights", "MB", "lower", 1),
}


def choose(metrics: Sequence[str] | None) -> list[str]:
    """The keys asked for in the order of the table; None asks for all.

    Raises:
        UserError: there is no such metric.
    """
    if metrics is None:
        return list(METRICS)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UserError(f"There is no metric {unknown[0]!r}: choose from {', '.join(METRICS)}.")
    return [name for name in METRICS if name in metrics]
