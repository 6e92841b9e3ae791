"""Pixel metrics against scikit-image and closed forms; spectra of pictures whose spectrum is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omnilatent.metrics.pixel import (
    MIN_SIDE,
    PSNR_CAP,
    high_frequency_ratio,
    ms_ssim,
    psnr,
    radial_power,
    spectrum_ratio,
    ssim,
    to_8bit,
    vif,
)
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def picture(size: tuple[int, int] = (64, 80), seed: int = 0, count: int = 2) -> torch.Tensor:
    """Smooth noise on the 8-bit grid: something like a photo to these metrics."""
    coarse = torch.rand(count, 3, size[0] // 4 + 1, size[1] // 4 + 1, generator=torch.Generator().manual_seed(seed))
    fine = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed + 1))
    return to_8bit(0.8 * F.interpolate(coarse, size, mode="bicubic") + 0.2 * fine)


def noisy(images: torch.Tensor, strength: float) -> torch.Tensor:
    return to_8bit(images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(9)))


def blurred(images: torch.Tensor) -> torch.Tensor:
    return to_8bit(F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1))


def test_rounding_clamps_and_is_idempotent() -> None:
    found = to_8bit(torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.7]))
    assert torch.equal(found * 255, torch.tensor([0.0, 0.0, 0.0, 1.0, 255.0, 255.0]))
    assert torch.equal(to_8bit(picture()), picture())


def test_psnr_agrees_with_scikit_image_on_8_bit_values() -> None:
    x = picture()
    y = noisy(x, 0.05)
    found = psnr(x, y)
    for i in range(2):
        a, b = ((t[i] * 255).round().to(torch.uint8).numpy() for t in (x, y))
        assert float(found[i]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-4)


def test_psnr_rounds_clamps_and_is_per_image() -> None:
    x = torch.full((2, 3, 4, 4), 128 / 255)
    y = x.clone()
    y[1] += 1 / 255
    torch.testing.assert_close(psnr(x, y), torch.tensor([PSNR_CAP, 20 * np.log10(255)], dtype=torch.float32))
    assert torch.equal(psnr(x, x + 0.4 / 255), torch.full((2,), PSNR_CAP))  # below half a grey level
    assert torch.equal(psnr(x * 0 + 1, x * 0 + 5), torch.full((2,), PSNR_CAP))  # both white once clamped


def test_ssim_agrees_with_scikit_image() -> None:
    x = picture()
    y = noisy(x, 0.08)
    found = ssim(x, y)
    for i in range(2):
        # Both average over full windows only; edges reflected beforehand make every pixel the centre of one.
        a, b = (np.pad(t[i].double().numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for t in (x, y))
        expected = structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                         data_range=1.0, channel_axis=0)
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)
    assert float(found.max()) < 0.95


def test_ssim_does_not_depend_on_the_batch_or_on_the_pictures_own_range() -> None:
    """The data range is 1, not what happens to occur."""
    x = picture() * 0.2
    y = noisy(x, 0.02)
    torch.testing.assert_close(ssim(x, y)[:1], ssim(x[:1], y[:1]))
    assert float(ssim(x, y).mean()) > float(ssim(x * 5, y * 5).mean()) + 0.01


def test_equal_pictures_get_the_best_value() -> None:
    x = picture((180, 176), count=1)
    for metric in (ssim, ms_ssim, vif):
        torch.testing.assert_close(metric(x, x), torch.ones(1), rtol=1e-4, atol=1e-4)
    bands, high = spectrum_ratio(x, x)
    assert torch.equal(bands, torch.ones_like(bands)) and torch.equal(high, torch.ones(1))


def test_more_noise_is_worse() -> None:
    x = picture((180, 176), count=1)
    for metric in (psnr, ssim, ms_ssim, vif):
        values = [float(metric(noisy(x, s), x)) for s in (0.02, 0.08, 0.3)]
        assert values[0] > values[1] > values[2], metric.__name__


def test_vif_reads_values_up_to_255() -> None:
    """Its noise variance of 2 belongs to 8-bit values: on [0, 1] every score would be near what noise alone gives."""
    from torchmetrics.functional.image import visual_information_fidelity

    x = picture()
    y = noisy(x, 0.02)
    torch.testing.assert_close(vif(y, x), visual_information_fidelity(y * 255, x * 255, reduction="none"))
    assert abs(float(vif(y, x)[0] - visual_information_fidelity(y, x, reduction="none")[0])) > 0.05


def test_vif_of_a_flat_picture_is_undefined() -> None:
    flat = torch.full((1, 3, 48, 48), 0.5)
    assert bool(torch.isnan(vif(noisy(flat, 0.1), flat)))
    x = picture((48, 48), count=1)
    y = noisy(x, 0.05)
    half_flat = torch.cat([x[:, :2], torch.zeros(1, 1, 48, 48)], 1)
    found = vif(torch.cat([y[:, :2], torch.zeros(1, 1, 48, 48)], 1), half_flat)
    torch.testing.assert_close(found, vif(y[:, :2], x[:, :2]))


def test_blur_loses_high_frequencies_and_noise_adds_them() -> None:
    x = picture((128, 96))
    assert bool((high_frequency_ratio(blurred(x), x) < 0.5).all())
    assert bool((high_frequency_ratio(noisy(x, 0.2), x) > 1.5).all())
    bands, _ = spectrum_ratio(blurred(x), x, bins=8)
    assert bool((bands[:, 0] > 0.9).all() and (bands[:, -1] < bands[:, 2]).all())


def test_halved_contrast_is_a_quarter_of_the_power_in_every_band() -> None:
    x = torch.rand(2, 3, 32, 48, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    bands, high = spectrum_ratio(0.5 * x + 0.3, x, bins=8)
    torch.testing.assert_close(bands, torch.full((2, 8), 0.25), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(high, torch.full((2,), 0.25), rtol=1e-4, atol=1e-5)


def test_a_wave_lands_in_its_band() -> None:
    """0.375 cycles a pixel is 3/4 of Nyquist: band 6 of 8, whatever the aspect ratio."""
    columns = torch.arange(128.0)
    wave = (0.5 + 0.4 * torch.sin(2 * torch.pi * 0.375 * columns)).expand(1, 3, 64, 128)
    power = radial_power(wave, 8)[0]
    assert float(power[5:7].sum() / power.sum()) > 0.99  # the window spreads it to its neighbours
    power = radial_power(wave.transpose(2, 3), 8)[0]
    assert float(power[5:7].sum() / power.sum()) > 0.99


def test_a_flat_picture_has_no_ratio() -> None:
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert bool(torch.isnan(high_frequency_ratio(flat, flat)))


@pytest.mark.parametrize(("name", "metric"), [("ssim", ssim), ("ms_ssim", ms_ssim), ("vif", vif),
                                              ("spectrum_high", high_frequency_ratio)])
def test_the_smallest_side_is_exact(name: str, metric) -> None:
    side = MIN_SIDE[name]
    x = picture((side, side + 3), count=1)
    assert bool(torch.isfinite(metric(noisy(x, 0.02), x)).all())
    small = picture((side + 3, side - 1), count=1)
    with pytest.raises(ValueError, match=f"{name} needs sides of at least {side} pixels; got"):
        metric(small, small)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5))
