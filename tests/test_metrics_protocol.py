"""The protocol on codecs whose figures are known: rounding, any size, missing networks, codebooks, conditions."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_codecs import Blocks, Blur, FakeImages, Identity, Levels, photos
from omnilatent.errors import UserError
from omnilatent.codec import Codec
from omnilatent.latent import Codes, Latent, LatentSpec
from omnilatent.losses.lpips import NETWORKS
from omnilatent.metrics import judges, protocol
from omnilatent.metrics.catalogue import METRICS
from omnilatent.metrics.moments import RunningMoments
from omnilatent.metrics.pixel import PSNR_CAP, to_8bit
from omnilatent.metrics.precision import ieee_float32
from omnilatent.metrics.protocol import evaluate
from omnilatent.metrics.results import Evaluation, Figure
from torch import Tensor

KODAK = Path(__file__).parents[1].parent / "shared" / "data" / "kodak"
PLAIN = ["psnr", "ssim", "vif", "spectrum_high", "bits_per_pixel", "parameters"]


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNILATENT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def measure(codec: Codec, images: list[Tensor] | Tensor, **options: object) -> Evaluation:
    settings = {"metrics": PLAIN, "health": False, "speed": False, **options}
    return evaluate(codec, FakeImages(list(images)), **settings)[0]


def test_the_identity_is_perfect_and_everything_is_reported() -> None:
    images = FakeImages(list(photos(3, (180, 180))), skipped=2)
    evaluation, pictures = evaluate(Identity(), images, keep=2, batch_size=2)
    missing = {"lpips_vgg", "lpips_alex", "rfid", "fd_dinov2"}
    codebook = {"codes_used", "active_ratio", "entropy_bits", "perplexity"}
    assert list(evaluation.figures) == [name for name in METRICS if name not in codebook]
    for name, figure in evaluation.figures.items():
        assert (figure.value is None) == (name in missing), name
    assert evaluation.figures["psnr"] == Figure(PSNR_CAP, 3)
    assert [evaluation.figures[name].value for name in ("ssim", "ms_ssim")] == pytest.approx([1, 1])
    assert evaluation.figures["bits_per_pixel"].value == 48
    assert evaluation.per_image["psnr"] == [PSNR_CAP] * 3 and evaluation.keys == ["00.png", "01.png", "02.png"]
    assert evaluation.health["n"] == 3 and "batch" in evaluation.figures["decode_ips"].note
    conditions = evaluation.conditions
    assert (conditions["data"], conditions["n"], conditions["skipped"]) == ("fake photos", 3, 2)
    assert conditions["dtype"] == "float32" and set(conditions["versions"]) == {"omnilatent", "torch", "torchmetrics"}
    assert len(pictures) == 2 and pictures[0].original.shape == (180, 180, 3)
    json.dumps(evaluation.to_json(), allow_nan=False)


def test_missing_networks_say_which_file_and_no_number_stands_in() -> None:
    figures = measure(Identity(), photos(2), metrics=["lpips_vgg", "lpips_alex", "rfid", "fd_dinov2"]).figures
    names = ["vgg16-397923af.pth", "alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05-6726825d.pth",
             "dinov2-large"]
    for figure, name in zip(figures.values(), names, strict=True):
        assert figure.value is None and figure.n == 2 and name in figure.note and "fetch" in figure.note


def test_figures_are_those_of_8_bit_pictures() -> None:
    """A codec that is off by less than half a grey level is perfect; originals are rounded too."""

    class Off(Identity):
        def _decode(self, raw: Tensor) -> Tensor:
            return raw + 0.4 / 255

    assert measure(Off(), photos(2)).figures["psnr"].value == PSNR_CAP
    fine = photos(2) * 0.9 + 0.0013
    assert measure(Identity(), fine).figures["psnr"].value == PSNR_CAP


def test_the_mean_is_over_images_not_over_pooled_errors() -> None:
    class Worse(Identity):
        """Off by 1 grey level on a dark image, by 16 on a bright one."""

        def _decode(self, raw: Tensor) -> Tensor:
            return raw + torch.where(raw.mean((1, 2, 3), keepdim=True) > 0.5, 16 / 255, 1 / 255)

    images = [torch.full((3, 16, 16), 51 / 255), torch.full((3, 16, 16), 204 / 255)]
    evaluation = measure(Worse(), images)
    expected = [20 * math.log10(255), 20 * math.log10(255 / 16)]
    assert evaluation.per_image["psnr"] == pytest.approx(expected, abs=1e-4)
    assert evaluation.figures["psnr"].value == pytest.approx(sum(expected) / 2, abs=1e-4)


def test_nothing_depends_on_the_batch_size() -> None:
    images = list(photos(4)) + list(photos(1, (50, 70)))
    a, b = measure(Blur(), images, batch_size=1), measure(Blur(), images, batch_size=8)
    assert a.keys == b.keys and a.conditions["keys_hash"] == b.conditions["keys_hash"]
    for name, values in a.per_image.items():
        assert values == pytest.approx(b.per_image[name], rel=1e-5), name


def test_blur_shows_without_any_network() -> None:
    figures = measure(Blur(), photos(3)).figures
    assert figures["spectrum_high"].value < 0.5 and figures["spectrum_high"].note == "geometric mean"
    assert figures["ssim"].value < 0.99 and figures["vif"].value < 0.9


def test_every_size_passes_and_small_ones_are_left_out_aloud() -> None:
    images = [torch.rand(3, *size) for size in [(1, 1), (37, 53), (255, 300), (16, 9)]]
    evaluation, pictures = evaluate(Blur(), FakeImages(images), keep=4, speed=False)
    figures = evaluation.figures
    assert figures["psnr"].n == 4
    assert (figures["ssim"].n, figures["ssim"].note) == (2, "2 of 4 images have a side below 11 pixels")
    assert figures["ms_ssim"].n == 1 and "3 of 4 images have a side below 176 pixels" in figures["ms_ssim"].note
    assert figures["vif"].n == 1 and figures["spectrum_high"].n == 2
    assert math.isnan(evaluation.per_image["ms_ssim"][0]) and len(evaluation.per_image["ms_ssim"]) == 4
    assert [p.reconstruction.shape[:2] for p in pictures] == [(1, 1), (37, 53), (255, 300), (16, 9)]
    assert evaluation.to_json()["per_image"]["ms_ssim"][0] is None
    json.dumps(evaluation.to_json(), allow_nan=False)


def test_one_pixel_alone_passes() -> None:
    evaluation = evaluate(Blocks(), FakeImages([torch.rand(3, 1, 1)]), speed=False)[0]
    assert evaluation.figures["psnr"].n == 1
    assert evaluation.figures["ms_ssim"] == Figure(None, 0, "1 of 1 images have a side below 176 pixels.")
    assert evaluation.health["n"] == 0


def test_codebook_figures_come_from_hard_assignments_over_the_whole_set() -> None:
    flat = [torch.full((3, 8, 8), level) for level in (0.0, 0.0, 1 / 3, 1.0)]
    figures = measure(Levels(), flat, metrics=None, batch_size=1).figures
    assert figures["codes_used"] == Figure(3.0, 16, "of 4 codes")
    assert figures["entropy_bits"].value == pytest.approx(1.5) and figures["perplexity"].value == pytest.approx(2**1.5)
    assert figures["bits_per_pixel"].value == 2 / 16
    assert "codes_used" not in measure(Identity(), flat, metrics=None).figures


def test_several_books_are_counted_apart() -> None:
    class TwoBooks(Levels):
        def __init__(self) -> None:
            super().__init__()
            self.spec = replace(self.spec, num_codebooks=2)

        def _encode(self, images: Tensor) -> Latent:
            codes = super()._encode(images)
            return Codes(torch.stack([codes.indices, torch.zeros_like(codes.indices)], 1), codes.quantized)

    flat = [torch.full((3, 8, 8), level) for level in (0.0, 1.0)]
    figures = measure(TwoBooks(), flat, metrics=["codes_used", "active_ratio", "entropy_bits", "bits_per_pixel",
                                                   "compression"]).figures
    assert figures["codes_used"] == Figure(1.5, 16, "mean of 2 books of 4 codes")
    assert figures["entropy_bits"].value == pytest.approx(0.5) and figures["bits_per_pixel"].value == 4 / 16
    assert figures["active_ratio"].value == 1.5 / 4 and figures["compression"].value == 24 * 16 / 4


def test_pictures_are_spread_evenly_and_the_same_for_every_codec() -> None:
    images = FakeImages(list(photos(9, (16, 16))))
    kept = [evaluate(codec, images, metrics=["psnr"], health=False, speed=False, keep=3, batch_size=2)[1]
            for codec in (Identity(), Blur())]
    assert [p.key for p in kept[0]] == [p.key for p in kept[1]] == ["01.png", "04.png", "07.png"]
    assert kept[0][1].original.dtype == np.uint8
    np.testing.assert_array_equal(kept[0][1].original, kept[0][1].reconstruction)
    np.testing.assert_array_equal(kept[0][1].original, (images.images[4] * 255).round().byte().permute(1, 2, 0))
    assert (kept[1][1].reconstruction != kept[1][1].original).any()


def test_size_and_provenance_are_stated() -> None:
    evaluation = measure(Blocks(), photos(2), metrics=None)
    assert evaluation.figures["parameters"].value == 20 and evaluation.figures["weights_mb"].value == 80 / 1e6
    assert evaluation.figures["weights_mb"].note == "counted in float32"
    half = measure(Blocks().to(dtype=torch.float16), photos(2), metrics=["weights_mb"]).figures["weights_mb"]
    assert half == Figure(40 / 1e6, 0, "counted in float16")
    assert evaluation.codec["weights_hash"] == evaluation.conditions["weights_hash"] == "0123456789abcdef"
    assert (evaluation.codec["latent_channels"], evaluation.codec["downsampling"]) == (13, 2)


def test_progress_ends_at_the_whole() -> None:
    seen: list[tuple[int, int]] = []
    images = FakeImages(list(photos(5, (16, 16))), skipped=1)
    evaluate(Identity(), images, metrics=["psnr"], speed=False, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen[-1] == (7, 7) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_grey_codec_is_measured_on_luma() -> None:
    images = photos(2)
    fake = FakeImages(list(images))
    evaluation, pictures = evaluate(Identity(1), fake, metrics=PLAIN, health=False, speed=False, keep=2)
    assert evaluation.figures["psnr"].value == PSNR_CAP
    luma = to_8bit((images[0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0))
    for channel in range(3):
        np.testing.assert_array_equal(pictures[0].original[..., channel], (luma * 255).round().byte().numpy())


def test_mistakes_give_one_sentence() -> None:
    class EncodeOnly(Codec):
        def __init__(self) -> None:
            super().__init__(torch.nn.Identity(), LatentSpec(3, 1, decodes=False), Identity().provenance)

        def _encode(self, images: Tensor) -> Latent:
            raise AssertionError("not reached")

    with pytest.raises(UserError, match="identity only encodes: there are no reconstructions"):
        measure(EncodeOnly(), photos(1))
    with pytest.raises(UserError, match="no metric 'pnsr': choose from psnr, ssim"):
        measure(Identity(), photos(1), metrics=["pnsr"])
    with pytest.raises(UserError, match="fake photos holds no readable image"):
        measure(Identity(), [])
    with pytest.raises(UserError, match="images of 4 channels; evaluate knows 1 and 3"):
        measure(Identity(4), photos(1))


def test_nan_names_the_image_and_the_remedy() -> None:
    class Broken(Identity):
        def _decode(self, raw: Tensor) -> Tensor:
            return torch.where(raw.mean((1, 2, 3), keepdim=True) > 0.9, torch.nan, raw)

    with pytest.raises(UserError, match="decoded 01.png to NaN in float32: evaluate it with --dtype float32"):
        measure(Broken(), [torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])


def test_out_of_memory_names_a_batch_size() -> None:
    class Huge(Identity):
        def _decode(self, raw: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="ran out of memory on 4 images of 8×8: use --batch-size 2"):
        measure(Huge(), photos(4, (8, 8)), batch_size=4)


def test_lpips_and_frechet_are_figures_once_their_networks_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judges' arithmetic with a network of ours in place of the weight files."""

    class Mean(torch.nn.Module):
        dim = 3

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x.mean((2, 3)) if y is None else (x - y).abs().flatten(1).mean(1)

    monkeypatch.setitem(judges._NETWORK, "lpips_vgg", lambda device: judges.PerImage(Mean(), NETWORKS["vgg"].min_side))
    monkeypatch.setitem(judges._NETWORK, "rfid", lambda device: judges.Frechet(Mean(), 3))

    class Darker(Identity):
        def _decode(self, raw: Tensor) -> Tensor:
            return raw / 2

    images = 2 * (photos(5) * 127).round() / 255  # halves stay on the 8-bit grid
    evaluation = measure(Darker(), images, metrics=["lpips_vgg", "rfid"], batch_size=2)
    assert evaluation.figures["lpips_vgg"].value == pytest.approx(float(images.mean()) / 2, rel=1e-4)
    ours, theirs = RunningMoments(3), RunningMoments(3)
    ours.update(images.mean((2, 3)) / 2)
    theirs.update(images.mean((2, 3)))
    assert evaluation.figures["rfid"].value == pytest.approx(ours.distance(theirs), rel=1e-3)
    assert evaluation.figures["rfid"].note == "N = 5; compare only at equal N" and "rfid" not in evaluation.per_image
    two = measure(Darker(), images[:2], metrics=["rfid"]).figures["rfid"]
    assert two.note == "N = 2, fewer than the 3 features: biased upwards; compare only at equal N"
    one = measure(Darker(), images[:1], metrics=["rfid"]).figures["rfid"]
    assert one.value is None and "at least 2 images; there is 1" in one.note


def test_networks_run_without_tf32_and_settings_come_back() -> None:
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    with pytest.raises(RuntimeError, match="on purpose"), ieee_float32():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        raise RuntimeError("on purpose")
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_codec_runs_without_tf32_where_its_quality_is_measured(dtype: torch.dtype) -> None:
    seen: list[str] = []

    class Watched(Blocks):
        def _encode(self, images: Tensor) -> Latent:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return super()._encode(images)

        def _decode(self, raw: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return super()._decode(raw)

    outside = torch.backends.cudnn.conv.fp32_precision
    assert outside != "ieee"
    evaluate(Watched().to(dtype=dtype), FakeImages(list(photos(2))), metrics=["psnr"], speed=False)
    assert len(seen) > 4 and set(seen) == {"ieee" if dtype == torch.float32 else outside}
    seen.clear()
    evaluate(Watched(), FakeImages(list(photos(1))), metrics=["encode_ips"], health=False)
    assert seen[:2] == ["ieee"] * 2 and seen[2:] and set(seen[2:]) == {outside}  # the speed is that of common use


@pytest.mark.parametrize(("batch_size", "largest"), [(1, 1), (8, 4)])
def test_latent_health_keeps_to_the_batch_size(
    batch_size: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Watched(Blocks):
        def _encode(self, images: Tensor) -> Latent:
            sizes.append(len(images))
            return super()._encode(images)

        def _decode(self, raw: Tensor) -> Tensor:
            sizes.append(len(raw))
            return super()._decode(raw)

    health = protocol.latent_health
    monkeypatch.setattr(protocol, "latent_health", lambda *a, **k: (sizes.clear(), health(*a, **k))[1])
    evaluate(Watched(), FakeImages(list(photos(4))), metrics=["psnr"], speed=False, batch_size=batch_size)
    assert max(sizes) == largest


def test_kodak_through_jpeg_like_rounding() -> None:
    """Real photos: the protocol's PSNR is that of the 8-bit pictures it returns."""
    if not KODAK.is_dir():
        pytest.skip(f"no Kodak images at {KODAK}")
    from PIL import Image

    images = [torch.from_numpy(np.asarray(Image.open(path).convert("RGB").crop((0, 0, 201, 187))).copy())
              .permute(2, 0, 1).float() / 255 for path in sorted(KODAK.glob("*.webp"))[:3]]
    evaluation, pictures = evaluate(Blur(), FakeImages(images), health=False, speed=False, keep=3)
    for picture, value in zip(pictures, evaluation.per_image["psnr"], strict=True):
        error = np.mean((picture.original.astype(float) - picture.reconstruction.astype(float)) ** 2)
        assert value == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert evaluation.figures["spectrum_high"].value < 0.5 and 15 < evaluation.figures["psnr"].value < 40


def test_the_real_evaluation_images_fit(tmp_path: Path) -> None:
    from omnilatent.data.evaluation import EvaluationImages
    from omnilatent.data.sources import open_images
    from PIL import Image

    for number, image in enumerate(photos(3, (40, 60))):
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"text")
    images = EvaluationImages(open_images(str(tmp_path)), size=32)
    evaluation, _ = evaluate(Identity(), images, metrics=PLAIN, speed=False)
    assert (evaluation.conditions["n"], evaluation.conditions["skipped"], evaluation.conditions["size"]) == (3, 1, 32)
    assert evaluation.figures["psnr"].value == PSNR_CAP


def test_batches_are_taken_in_order() -> None:
    class Backwards(FakeImages):
        def batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
            yield from reversed(list(super().batches(batch_size)))

    images = Backwards(list(photos(4, (16, 16))))
    evaluation, _ = evaluate(Blur(), images, metrics=["psnr"], health=False, speed=False, batch_size=1)
    forwards = measure(Blur(), images.images, metrics=["psnr"])
    assert evaluation.keys == forwards.keys[::-1]
    assert evaluation.per_image["psnr"] == pytest.approx(forwards.per_image["psnr"][::-1])
