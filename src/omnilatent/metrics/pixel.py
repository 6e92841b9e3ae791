"""Quality of a reconstruction against its image, one number an image, without any learned network.

- `to_8bit`: round to the 256 grey levels that a picture file can hold; every figure is taken there.
- `psnr`, `ssim`, `ms_ssim`, `vif`: the usual four.
- `spectrum_ratio`, `high_frequency_ratio`: reconstructed over original power by frequency; blur shows as < 1.
- `MIN_SIDE`: the smallest side that each of them is defined on.

All take images `(b, c, h, w)` in [0, 1], original and reconstruction in any order except where it says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import library
from .precision import ieee_float32

# Smallest height and width: SSIM's window is 11; MS-SSIM needs it on the fifth scale (torchmetrics: 11 · 16); VIF
# shrinks four times by up to 17 taps; below 16 pixels a radial spectrum has no bands to speak of.
MIN_SIDE = {"psnr": 1, "ssim": 11, "ms_ssim": 176, "vif": 41, "spectrum_high": 16}
PSNR_CAP = 100.0  # dB, what equal images count as, so that a mean stays finite
BANDS = 16
# Power below this is rounding in float32 rather than content: such a band has no ratio.
_NO_POWER = 1e-9


def to_8bit(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to multiples of 1/255; float32, same shape."""
    return (images.float().clamp(0, 1) * 255).round() / 255


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image `(b,)`, 10 log10(255² / MSE) on 8-bit values.

    At most `PSNR_CAP`, which is also what equal images get.
    """
    _check(x, y, "psnr")
    difference = (to_8bit(x) * 255).round() - (to_8bit(y) * 255).round()  # whole numbers: equal images give 0 exactly
    error = difference.square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=PSNR_CAP)


@ieee_float32()
def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image `(b,)` (Wang et al. 2004): Gaussian window of 11 pixels, σ 1.5, range 1.

    The mean over all positions and channels, edges reflected, as torchmetrics has it.
    """
    _check(x, y, "ssim")
    metric = library("torchmetrics.functional.image").structural_similarity_index_measure
    found = metric(x.float(), y.float(), sigma=1.5, kernel_size=11, data_range=1.0, reduction="none")
    return found.view(len(x))


@ieee_float32()
def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale SSIM of each image `(b,)` (Wang, Simoncelli & Bovik 2003): five scales, negative terms count 0."""
    _check(x, y, "ms_ssim")
    metric = library("torchmetrics.functional.image").multiscale_structural_similarity_index_measure
    found = metric(x.float(), y.float(), sigma=1.5, kernel_size=11, data_range=1.0, normalize="relu", reduction="none")
    return found.view(len(x))


@ieee_float32()
def vif(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Pixel-based visual information fidelity of each image `(b,)` (Sheikh & Bovik 2006), mean over the channels.

    1 for equal images, lower for blur, above 1 for raised contrast. A flat channel holds no information to keep and is
    left out; NaN where the whole original is flat.
    """
    _check(reconstruction, original, "vif")
    metric = library("torchmetrics.functional.image").visual_information_fidelity
    # Its noise variance of 2 is meant for values up to 255.
    ours, theirs = ((t.float() * 255).flatten(0, 1).unsqueeze(1) for t in (reconstruction, original))  # (b·c, 1, h, w)
    found = metric(ours, theirs, reduction="none")
    flat = theirs.amax((1, 2, 3)) - theirs.amin((1, 2, 3)) < 0.5
    return torch.where(flat, torch.nan, found).view(original.shape[:2]).nanmean(1)


def spectrum_ratio(reconstruction: Tensor, original: Tensor, bins: int = BANDS) -> tuple[Tensor, Tensor]:
    """Reconstructed over original power in `bins` bands of frequency, and in the upper half of frequencies.

    Bands are of equal width in |f| from 0 to the Nyquist frequency; the corners beyond it count to the last. The
    image's mean is taken out, and a Hann window keeps the jump between opposite edges from posing as detail.

    Returns:
        The ratios `(b, bins)` and the high-frequency power ratio `(b,)`: above half of Nyquist, summed before the
        division. 1 is faithful, less is blur, more is noise or ringing; NaN where the original has no power.
    """
    _check(reconstruction, original, "spectrum_high")
    ours, theirs = radial_power(reconstruction, bins), radial_power(original, bins)
    upper = bins // 2
    high = _ratio(ours[:, upper:].sum(1), theirs[:, upper:].sum(1))
    return _ratio(ours, theirs), high


def high_frequency_ratio(reconstruction: Tensor, original: Tensor) -> Tensor:
    """The second result of `spectrum_ratio` alone, `(b,)`."""
    return spectrum_ratio(reconstruction, original)[1]


def radial_power(images: Tensor, bins: int) -> Tensor:
    """Power of `(b, c, h, w)` summed over channels and over the frequencies of each radial band, `(b, bins)`."""
    height, width = images.shape[-2:]
    window = torch.outer(_hann(height, images), _hann(width, images))
    centred = images.float() - images.float().mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centred * window, norm="ortho").abs().square().sum(1)  # (b, h, w)
    band = (radius(height, width).to(images.device) * bins).long().clamp(max=bins - 1)
    return power.new_zeros(len(images), bins).index_add_(1, band.flatten(), power.flatten(1))


def radius(height: int, width: int) -> Tensor:
    """|f| of each FFT coefficient `(h, w)` as a share of the Nyquist frequency: up to √2 in the corners."""
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    return torch.hypot(rows[:, None], columns[None, :]) / 0.5


def _hann(length: int, like: Tensor) -> Tensor:
    return torch.hann_window(length, periodic=False, device=like.device, dtype=torch.float32)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > _NO_POWER, over / under.clamp(min=_NO_POWER), torch.nan)


def _check(x: Tensor, y: Tensor, metric: str) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two batches of one shape (b, c, h, w); got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[-2:]) < MIN_SIDE[metric]:
        raise ValueError(f"{metric} needs sides of at least {MIN_SIDE[metric]} pixels; got {tuple(x.shape[-2:])}")
