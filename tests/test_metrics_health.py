"""Latent health of codecs whose figures are known, and speed."""

import json
import math
import time

import pytest
import torch
from metrics_codecs import Blocks, Blur, Identity, Levels, photos
from omnilatent.codec import Codec
from omnilatent.latent import Latent
from omnilatent.metrics.health import channel_statistics, common_crop, latent_health, spectrum_slope
from omnilatent.metrics.pixel import PSNR_CAP
from omnilatent.metrics.probes import cycle_error
from omnilatent.metrics.speed import measure_speed
from torch import Tensor


@pytest.fixture(scope="module")
def blocks() -> dict:
    return latent_health(Blocks(), photos(6), seed=3)


def test_an_exact_inverse_has_no_cycle_error(blocks: dict) -> None:
    identity = latent_health(Identity(), photos(4))
    assert identity["cycle"]["real"] < 1e-10 and identity["cycle"]["interpolated"] < 1e-10
    assert identity["cycle"]["prior"] > 0.01  # N(0, 1) leaves the range of pictures: decode clamps
    assert blocks["cycle"]["real"] < 1e-10


def test_posterior_figures_are_the_closed_forms(blocks: dict) -> None:
    images = photos(6)
    mean = 2 * images - 1
    expected = float((0.5 * (mean**2 + 0.01 - 1 - math.log(0.01))).sum((1, 2, 3)).mean())
    assert blocks["kl"] == pytest.approx(expected, rel=1e-4)
    assert blocks["channels"]["kl"][-1] == pytest.approx(0, abs=1e-7)  # the unused channel is the prior
    assert sum(blocks["channels"]["kl"]) * 32 * 32 == pytest.approx(blocks["kl"], rel=1e-5)
    assert blocks["active_units"] == 12 and blocks["channels"]["active"] == [True] * 12 + [False]
    assert (blocks["n"], blocks["size"], blocks["seed"]) == (6, 64, 3)


def test_active_units_follow_burda_threshold() -> None:
    """Var_x(E[z|x]) just above and just below 0.01, the posterior's own variance notwithstanding."""
    from omnilatent.latent import DiagonalGaussian, LatentSpec

    spread = torch.tensor([0.0099, 0.0101]).sqrt().view(1, 2, 1, 1)
    mean = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1) * spread * 2**-0.5 * torch.ones(2, 2, 3, 3)  # unbiased variance
    mean += torch.arange(9.0).view(3, 3)  # a pattern that all pictures share is no information about them
    found = channel_statistics(mean, [DiagonalGaussian(mean, torch.zeros_like(mean), LatentSpec(2, 1))])
    assert found["channels"]["active"] == [False, True] and found["active_units"] == 1


def test_moments_agree_with_scipy() -> None:
    from scipy.stats import kurtosis, skew

    z = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)) ** 2
    found = channel_statistics(z, [])["channels"]
    for c in range(2):
        values = z[:, c].flatten().double().numpy()
        expected = {"mean": values.mean(), "std": values.std(), "skew": skew(values), "kurtosis": kurtosis(values)}
        for name, value in expected.items():
            assert found[name][c] == pytest.approx(value, rel=1e-6), name
    dead = channel_statistics(torch.zeros(2, 1, 4, 4), [])["channels"]
    assert dead == {"mean": [0.0], "std": [0.0], "skew": [None], "kurtosis": [None]}


def test_noise_moves_the_picture_by_what_was_added() -> None:
    """Identity, without clamping: PSNR = −20 log10(ε · σ of the pixels)."""
    images = 0.5 + 0.2 * (photos(4) - 0.5)
    found = latent_health(Identity(), images)["noise_psnr"]
    sigma = float(images.transpose(0, 1).flatten(1).var(1, correction=0).mean().sqrt())
    for strength in (0.5, 1.0):  # at 0.1 the rounding to 8 bits is as large as the noise
        assert found[str(strength)] == pytest.approx(-20 * math.log10(strength * sigma), abs=0.3)
    assert found["0.1"] > found["0.5"] > found["1.0"]


def test_pixels_are_equivariant_and_blocks_are_not(blocks: dict) -> None:
    identity = latent_health(Identity(), photos(4))["equivariance"]
    assert identity["rotation"] == PSNR_CAP and identity["scale"] > 55  # rounding to 8 bits
    assert identity["rotation_reference"] == PSNR_CAP
    # A rotated grid of blocks keeps the pixels inside a block unrotated.
    assert blocks["equivariance"]["rotation"] < 35 and blocks["equivariance"]["rotation_reference"] == PSNR_CAP


def test_cycle_error_of_a_constant_encoder_is_one() -> None:
    class Constant(Identity):
        def _encode(self, images: Tensor) -> Latent:
            latent = super()._encode(images)
            return type(latent)(latent.z.mean((0, 2, 3), keepdim=True).expand_as(latent.z))

    codec = Constant()
    z = codec.spec.normalise(photos(4))
    assert cycle_error(codec, z, batch_size=4) == pytest.approx(1, abs=1e-3)
    assert cycle_error(codec, torch.zeros(2, 3, 8, 8), 2) is None


def test_spectrum_slope_recovers_a_power_law() -> None:
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.0, -2.0):
        frequency = torch.hypot(torch.fft.fftfreq(128)[:, None], torch.fft.fftfreq(128)[None]).clamp(min=1 / 128)
        noise = torch.fft.fft2(torch.randn(8, 3, 128, 128, generator=generator)) * frequency ** (alpha / 2)
        assert spectrum_slope(torch.fft.ifft2(noise).real) == pytest.approx(alpha, abs=0.15)
    assert spectrum_slope(torch.zeros(1, 1, 32, 32)) is None and spectrum_slope(torch.rand(1, 1, 7, 32)) is None


def test_health_is_a_function_of_the_seed_and_not_of_the_batch_size() -> None:
    a, b, c = (latent_health(Blur(), photos(3), seed=seed, batch_size=size) for seed, size in [(0, 2), (0, 3), (1, 2)])
    assert a["noise_psnr"] == pytest.approx(b["noise_psnr"]) and a["cycle"] == pytest.approx(b["cycle"])
    assert a["cycle"]["prior"] != c["cycle"]["prior"] and a["cycle"]["real"] == c["cycle"]["real"]


def test_tokenizers_and_points_have_no_posterior() -> None:
    found = latent_health(Levels(), photos(3))
    assert "kl" not in found and "active_units" not in found and "active" not in found["channels"]
    assert found["notes"] == ["Interpolated, noisy and prior latents are not on the codebook."]
    assert found["cycle"]["real"] == pytest.approx(0, abs=1e-10)  # brightness of a flat block is its own code
    json.dumps(found, allow_nan=False)


def test_pictures_of_any_sizes_become_one_batch() -> None:
    sizes = [(37, 53), (255, 300), (1, 1), (64, 40)]
    mixed = [torch.rand(3, *size) for size in sizes]
    batch = common_crop(mixed, 16, 256, 4)
    assert batch.shape == (3, 3, 36, 36)
    torch.testing.assert_close(batch[0], mixed[0][:, :36, 8:44])  # the centre
    assert common_crop(mixed, 1, 256, 4).shape == (1, 3, 36, 36) and common_crop(mixed, 16, 16, 4).shape[-1] == 16
    found = latent_health(Blocks(), iter([torch.rand(2, 3, 40, 40), torch.rand(2, 3, 1, 1)]))
    assert (found["n"], found["size"]) == (2, 40)


def test_pictures_that_are_too_small_give_a_note() -> None:
    found = latent_health(Blocks(), [torch.rand(3, 1, 1)])
    assert found == {"n": 0, "size": 0, "seed": 0,
                     "notes": ["Latent health needs pictures with sides of at least 4 pixels."]}
    one = latent_health(Blocks(), photos(1))
    assert one["cycle"]["interpolated"] is None and one["active_units"] is None and "pairs" in one["notes"][0]


def test_speed_counts_images_by_the_second() -> None:
    class Slow(Identity):
        def _encode(self, images: Tensor) -> Latent:
            time.sleep(0.01 * len(images))
            return super()._encode(images)

        def _decode(self, raw: Tensor) -> Tensor:
            time.sleep(0.02 * len(raw))
            return super()._decode(raw)

    speed = measure_speed(Slow(), size=8, batch_size=4, repeats=3)
    assert 60 < speed.encode_ips <= 100 and 35 < speed.decode_ips <= 50
    assert (speed.batch_size, speed.repeats) == (4, 3) and speed.conditions() == "8×8, batch 4, median of 3 calls"


def test_a_slow_codec_is_timed_on_what_fits() -> None:
    class Slower(Codec):
        def __init__(self) -> None:
            inner = Identity()
            super().__init__(inner.module, inner.spec, inner.provenance)

        _encode, calls = Identity._encode, 0

        def _decode(self, raw: Tensor) -> Tensor:
            type(self).calls += 1
            time.sleep(0.06 * len(raw))
            return raw

    speed = measure_speed(Slower(), size=8, batch_size=64, repeats=50, budget=0.15)
    assert (speed.batch_size, speed.repeats) == (1, 3) or speed.repeats < 4
    assert Slower.calls <= 6 and speed.conditions().startswith("8×8, batch 1, ")
