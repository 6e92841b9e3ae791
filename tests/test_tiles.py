"""Tile by tile is the whole image: every supported codec, any network of the layers, and what the plan promises."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilatent.autoencoders import recipes
from omnilatent.autoencoders.config import KLConfig, TinyConfig
from omnilatent.autoencoders.diffusers_codecs import DiffusersCodec
from omnilatent.autoencoders.kl import KLCodec, build_vae
from omnilatent.autoencoders.taef2 import Taef2, Taef2Codec
from omnilatent.autoencoders.tiled import TiledCodec, UnknownLayer, conv, kl_halves, sequence
from omnilatent.autoencoders.tiny import TinyCodec
from omnilatent.autoencoders.tiny import build_vae as build_tiny
from omnilatent.codec import Provenance
from omnilatent.latent import DiagonalGaussian, Latent, LatentSpec
from omnilatent.nn import tiles as engine
from omnilatent.nn.moments import Statistics
from omnilatent.nn.tile_geometry import Box, Layer, Tile, channels, sizes, steps
from omnilatent.nn.tile_layers import Conv, Norm, Pointwise, Residual, Upsample
from omnilatent.nn.tile_maps import KeptMap, Picture
from omnilatent.nn.tile_plan import Segment, Whole, plan
from omnilatent.nn.tiles import run_tiled

ORIGIN = Provenance("model", "test")


def kl(**changes: Any) -> KLCodec:
    config = KLConfig(**{"widths": (8, 16, 16), "layers": 1, "latent_channels": 3, "norm_groups": 4} | changes)
    spec = LatentSpec(3, config.downsampling, "gaussian" if config.variational else "point", shift=(0.1,), scale=(2.0,))
    return KLCodec(build_vae(config), spec, ORIGIN)


def tiny() -> TinyCodec:
    config = TinyConfig(latent_channels=4, encoder_width=8, decoder_width=8, encoder_blocks=(1, 2, 1),
                        decoder_blocks=(1, 2, 1))
    return TinyCodec(build_tiny(config), LatentSpec(4, 4, "point"), ORIGIN)


def of_diffusers(name: str, **config: Any) -> DiffusersCodec:
    import diffusers

    return DiffusersCodec(getattr(diffusers, name)(**config).eval(), ORIGIN)


def flux2() -> DiffusersCodec:
    codec = of_diffusers(
        "AutoencoderKLFlux2", block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    codec.module.bn.running_var.uniform_(0.5, 2)
    return codec


CODECS: dict[str, Callable[[], TiledCodec]] = {
    "kl": kl,
    "kl with more attention": lambda: kl(attention=(2, 4), widths=(8, 8, 16)),
    "kl without attention and quant convs": lambda: kl(mid_attention=False, quant_convs=False),
    "plain autoencoder": lambda: kl(variational=False, layers=2, widths=(8, 12)),
    "tiny": tiny,
    "taef2": lambda: Taef2Codec(Taef2(), ORIGIN),
    "AutoencoderKL": lambda: of_diffusers(
        "AutoencoderKL", block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), use_post_quant_conv=False),
    "AutoencoderKLFlux2": flux2,
    "AutoencoderTiny": lambda: of_diffusers(
        "AutoencoderTiny", encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
}


def parts(latent: Latent) -> list[Tensor]:
    return [latent.mean, latent.logvar] if isinstance(latent, DiagonalGaussian) else [latent.mode()]


def enliven(module: nn.Module) -> None:
    """Norms start as the identity and pictures around zero, where the clamp hides most of them."""
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(std=0.3)
    last = [layer for layer in module.decoder.modules() if isinstance(layer, nn.Conv2d)][-1]
    last.weight.data.mul_(3)
    last.bias.data.fill_(0.4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """The segments that were run."""
    ran: list[Segment] = []
    original = engine.run_segment
    monkeypatch.setattr(engine, "run_segment", lambda segment, *rest: (ran.append(segment), original(segment, *rest)))
    return ran


@pytest.mark.parametrize(("name", "size", "room"), [
    *((name, (70, 67), None) for name in CODECS),
    *((name, (46, 98), 1) for name in ("kl with more attention", "tiny", "taef2", "AutoencoderKLFlux2")),
])
def test_tiled_is_whole(
    name: str, size: tuple[int, int], room: int | None, counted: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where rounding explains nothing; but what `decode` returns is float32, and so is a part of a KL
    codec's whole run (blocks.py). With as much room as a plan takes by itself, and with as little as there can be."""
    torch.manual_seed(1)
    codec = CODECS[name]()
    tile, rounding = 32, 2e-7 if "tiny" in name.lower() or name == "taef2" else 1e-6
    if name == "taef2":  # 64 channels throughout take their time
        size, tile = (size[0] // 2, size[1] // 2), 16
    if room is not None:
        monkeypatch.setattr(codec, "_room", lambda: room)
    enliven(codec.module)
    codec.to(dtype=torch.float64)
    images = torch.rand(2, 3, *size)
    codec.tile = None
    latent = codec.encode(images)
    decoded = codec.decode(latent)
    assert not counted
    codec.tile = tile
    tiled = codec.encode(images)
    assert max(segment.tiles for segment in counted) >= 4
    for ours, whole in zip(parts(tiled), parts(latent), strict=True):
        assert ours.shape == whole.shape and ours.dtype == whole.dtype
        torch.testing.assert_close(ours, whole, atol=rounding, rtol=0)
    counted.clear()
    again = codec.decode(latent)
    assert max(segment.tiles for segment in counted) >= 4
    assert again.shape == images.shape and decoded.std() > 0.01
    torch.testing.assert_close(again, decoded, atol=rounding, rtol=0)


@pytest.mark.parametrize("name", ["AutoencoderKL", "kl with more attention"])
def test_tiled_is_diffusers_in_every_digit(name: str) -> None:
    torch.manual_seed(1)
    codec = CODECS[name]()
    enliven(codec.module)
    codec.to(dtype=torch.float64)
    codec.tile = 32
    images = torch.rand(1, 3, 72, 76, dtype=torch.float64)
    vae: Any = codec.module
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
        decoded = vae.decode(posterior.mean).sample / 2 + 0.5
    latent = codec.encode(images)
    assert isinstance(latent, DiagonalGaussian)
    torch.testing.assert_close(latent.mean, posterior.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(latent.logvar, posterior.logvar, atol=1e-10, rtol=0)
    torch.testing.assert_close(codec.decode(latent).double(), decoded.clamp(0, 1), atol=1e-7, rtol=0)


def test_bytes_and_a_tile_as_large_as_the_downsampling() -> None:
    codec = kl()
    images = torch.randint(0, 256, (1, 3, 21, 30), dtype=torch.uint8)
    codec.tile = 4
    tiled = codec.reconstruct(images)
    codec.tile = None
    torch.testing.assert_close(tiled, codec.reconstruct(images), atol=1e-5, rtol=0)


def test_narrow_types_agree_as_far_as_they_go() -> None:
    """float32 within a tenth of an 8-bit step; in bfloat16 both round, at other places, and neither more."""
    torch.manual_seed(0)
    codec = kl()
    enliven(codec.module)
    images = torch.rand(1, 3, 70, 70)
    codec.tile = None
    exact = codec.reconstruct(images)
    codec.tile = 32
    assert (codec.reconstruct(images) - exact).abs().max() < 0.1 / 255
    codec.tile = None
    codec.to(dtype=torch.bfloat16)
    whole = codec.reconstruct(images)
    codec.tile = 32
    assert (codec.reconstruct(images) - whole).abs().mean() < 2 * (whole - exact).abs().mean()


@pytest.mark.parametrize(("pixels", "tiles"), [(64 * 64, 0), (64 * 65, 1)])
def test_tiles_begin_above_four_tiles(pixels: int, tiles: int, counted: list[Segment]) -> None:
    codec = tiny()
    codec.tile = 32
    codec.reconstruct(torch.rand(1, 3, 64, pixels // 64))
    assert bool(counted) == bool(tiles)


@pytest.mark.parametrize("tile", [0, -8, 30])
def test_a_tile_that_does_not_fit_the_latent_is_refused(tile: int) -> None:
    codec = tiny()
    codec.tile = tile
    with pytest.raises(ValueError, match=rf"the tile of model is {tile} pixels; it must be a positive multiple of its "
                                         "downsampling, 4, or None"):
        codec.encode(torch.rand(1, 3, 8, 8))


def test_the_module_is_left_as_it_was() -> None:
    codec = kl(attention=(2,))
    images = torch.rand(1, 3, 70, 70)
    codec.tile = None
    before, state = codec.reconstruct(images), {k: v.clone() for k, v in codec.module.state_dict().items()}
    codec.tile = 32
    with torch.enable_grad():
        assert not codec.reconstruct(images).requires_grad
    assert all(torch.equal(tensor, state[key]) for key, tensor in codec.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in codec.module.modules())
    codec.tile = None
    assert torch.equal(codec.reconstruct(images), before)


def test_a_failure_in_the_middle_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = kl()
    codec.tile = 32
    images = torch.rand(1, 3, 70, 70)
    expected = codec.reconstruct(images)
    calls = []

    def fails(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("no memory")
        return original(*arguments, **options)

    original = F.conv2d
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            codec.encode(images)
    assert torch.equal(codec.reconstruct(images), expected)


def test_what_is_not_known_as_layers_runs_whole() -> None:
    codec = kl()
    images = torch.rand(1, 3, 70, 70)
    codec.tile = None
    expected = codec.reconstruct(images)
    codec.tile = 32
    codec.module.decoder.conv_act = nn.Softplus()
    codec.module.encoder.conv_in.padding_mode = "reflect"
    with pytest.raises(UnknownLayer, match="Conv2d padded by reflect"):
        conv(codec.module.encoder.conv_in)
    with pytest.raises(UnknownLayer, match="Softplus"):
        sequence([codec.module.decoder.conv_act])
    tiled = codec.reconstruct(images)
    codec.tile = None
    assert torch.equal(tiled, codec.reconstruct(images)) and not torch.equal(tiled, expected)


# -- the engine -------------------------------------------------------------------------------------------------------


def random_layers(dice: random.Random, c: int, depth: int) -> list[Layer]:
    """Layers of `c` channels in and out, with any geometry."""
    layers: list[Layer] = []
    for _ in range(depth):
        kind = dice.choice(["conv", "strided", "norm", "up", "residual", "function"])
        if kind in ("conv", "strided"):
            kernel = dice.choice([1, 2, 3, 5]), dice.choice([1, 3, 4])
            pads = [tuple(dice.randint(0, k - 1) for k in kernel) for _ in range(2)]
            stride = (1, 1) if kind == "conv" else (dice.randint(1, 3), dice.randint(1, 3))
            weight = torch.randn(c, c, *kernel, dtype=torch.float64) / (c * kernel[0] * kernel[1]) ** 0.5
            layers.append(Conv(weight, torch.randn(c, dtype=torch.float64), stride, pads[0], pads[1]))
        elif kind == "norm":
            layers.append(Norm(2, torch.rand(c, dtype=torch.float64), torch.randn(c, dtype=torch.float64), 1e-6))
        elif kind == "up" and not any(isinstance(layer, Upsample) for layer in layers):
            layers.append(Upsample(dice.choice([2, 2, 3])))
        elif kind != "residual":
            layers.append(Pointwise(torch.tanh))
        else:
            def same() -> Conv:
                weight = torch.randn(c, c, 3, 3, dtype=torch.float64) / 3 / c**0.5
                return Conv(weight, None, (1, 1), (1, 1), (1, 1))

            norm = Norm(4, torch.rand(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64), 1e-6)
            layers.append(Residual([norm, Pointwise(F.silu), same(), same()], [same()] if dice.random() < 0.5 else []))
    return layers


def reference(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The same on the whole map, with torch's functions only."""
    for layer in layers:
        if isinstance(layer, Conv):
            (top, left), (bottom, right) = layer.before, layer.after
            x = F.conv2d(F.pad(x, (left, right, top, bottom)), layer.weight, layer.bias, layer.stride)
        elif isinstance(layer, Norm):
            x = F.group_norm(x, layer.groups, layer.weight, layer.bias, layer.eps)
        elif isinstance(layer, Upsample):
            x = x.repeat_interleave(layer.factor, 2).repeat_interleave(layer.factor, 3)
        elif isinstance(layer, Residual):
            x = reference(layer.body, x) + reference(layer.shortcut, x)
        else:
            assert isinstance(layer, Pointwise)
            x = layer.function(x)
    return x


@pytest.mark.parametrize("seed", range(20))
def test_any_network_is_exact(seed: int) -> None:
    """Random kernels, strides, paddings and orders, against plain torch in float64."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    blocks: list[Any] = [random_layers(dice, 4, dice.randint(1, 3)) for _ in range(3)]
    size = dice.randint(15, 40), dice.randint(15, 40)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    expected = x
    for block in blocks:
        expected = reference(block, expected)
    out = torch.full_like(expected, torch.nan)
    segments = plan(blocks, 4, size, dice.randint(12, 40), itemsize=8, limit=dice.choice([None, 1]))
    run_tiled(segments, Picture(x, size, lambda part: part), out)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)


def test_statistics_of_a_map_far_from_zero() -> None:
    """Sums of squares in float32 would leave nothing of a variance of 1 around a mean of 100,000."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, 40, 30) + 1e5
    x[:, :, 20:] += 7  # tiles with other means than the whole
    statistics = Statistics(6)
    for rows in x.split(15, 2):
        for core in rows.split(15, 3):
            statistics.add(core, 3)
    mean, variance = statistics.moments()
    grouped = x.double().view(3, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(1), atol=0.01, rtol=0)
    torch.testing.assert_close(variance.double(), grouped.var(1, correction=0), rtol=1e-3, atol=0)
    naive = (grouped.float() ** 2).mean(1) - grouped.float().mean(1) ** 2
    assert not torch.allclose(naive.double(), grouped.var(1, correction=0), rtol=0.5)


def test_rows_are_freed_once_they_are_done() -> None:
    kept = KeptMap((10, 4), 3)
    x = torch.arange(40.0).view(1, 1, 10, 4)
    for rows in ((0, 4), (4, 10)):
        kept.write(Tile(x[..., rows[0] : rows[1], :], (rows, (0, 4)), (10, 4)))
    assert torch.equal(kept.read(((2, 8), (1, 3))), x[..., 2:8, 1:3])
    kept.drop(5)
    assert [slab is None for slab in kept.slabs] == [True, False, False, False]
    with pytest.raises(AssertionError, match="dropped"):
        kept.read(((0, 4), (0, 4)))
    kept.drop(10)
    assert all(slab is None for slab in kept.slabs)


# -- the plan ---------------------------------------------------------------------------------------------------------


def planned(half: str, side: int, itemsize: int = 4, limit: int | None = None) -> list[Segment]:
    with torch.device("meta"):
        vae = build_vae(recipes.kl_f8().model)
    blocks, c, n = (kl_halves(vae).encoder, 3, side) if half == "encoder" else (kl_halves(vae).decoder, 4, side // 8)
    return plan(blocks, c, (n, n), 512, itemsize, limit)


def work_of(segment: Segment, all_passes: bool = True) -> int:
    """Products of all passes, or of one; halos left out."""
    if segment.whole:
        return 0
    runs, work = segment.passes, 0
    c = next(layer.weight.shape[1] for layer in flat(segment.layers) if isinstance(layer, Conv))
    for step in steps(segment.layers, c, segment.size):
        work += step.work * (runs if all_passes else 1)
        runs -= step.norm if segment.tiles > 1 else 0
    return work


def flat(layers: Sequence[Layer]) -> list[Layer]:
    return [inner for layer in layers for inner in (flat(layer.body) if isinstance(layer, Residual) else [layer])]


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_plan_of_kl_f8_at_2048(half: str) -> None:
    """Stable Diffusion's autoencoder: a fifth of a whole run's peak, three maps of the largest, for twice the work."""
    segments = planned(half, 2048)
    largest = (128 if half == "encoder" else 256) * 2048**2 * 4
    assert max(segment.kept + segment.working for segment in segments) <= 0.6 * largest
    assert all(segment.out_channels <= 128 for segment in segments if segment.out_size[0] == 2048)
    assert sum(work_of(segment) for segment in segments) < 2 * sum(work_of(segment, False) for segment in segments)
    whole = [segment for segment in segments if segment.whole]
    assert len(whole) == 1 and whole[0].size == (256, 256)
    norms = sum(len(segment.norms) for segment in segments)
    assert norms == {"encoder": 2 * 10 + 1, "decoder": 2 * 14 + 1}[half]
    assert all(segment.passes == (len(segment.norms) + 1 if segment.tiles > 1 else 1) for segment in segments)


def test_8192_within_24_gigabytes() -> None:
    for half in ("encoder", "decoder"):
        segments = planned(half, 8192, itemsize=2)
        assert max(segment.kept + segment.working for segment in segments) + 3 * 8192**2 * 4 < 20e9
        assert sum(segment.passes for segment in segments) < 60


def test_less_memory_takes_more_passes() -> None:
    roomy, tight = planned("decoder", 4096, 2), planned("decoder", 4096, 2, limit=2 * 10**9)
    peaks = [max(segment.kept + segment.working for segment in segments) for segments in (roomy, tight)]
    assert peaks[1] <= 2 * 10**9 < peaks[0]
    assert max(segment.passes for segment in tight) > max(segment.passes for segment in roomy)


class Counting(Picture):
    """A picture that counts how often its pixels are read."""

    reads: list[Box]

    def read(self, box: Box) -> Tensor:
        self.reads.append(box)
        return super().read(box)


def test_one_pass_more_than_norms_and_no_more_memory_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(width: int = 4) -> list[Layer]:
        weights = torch.randn(width, 4, 3, 3) / 6
        return [Norm(2, torch.ones(4), torch.zeros(4), 1e-6), Conv(weights, None, (1, 1), (1, 1), (1, 1))]

    blocks = [block(), [*block(), *block()], block(), [Upsample(), *block(1)]]
    x = torch.randn(1, 4, 64, 64)
    source = Counting(x, (64, 64), lambda part: part)
    object.__setattr__(source, "reads", [])
    segments = plan(blocks, 4, (64, 64), 16, limit=1)
    assert segments[0].tiles > 1 and max(len(segment.norms) for segment in segments) >= 2
    live: list[int] = []
    original = engine.run_segment

    def watched(segment: Segment, origin: Any, sink: Any) -> None:
        write = sink.write

        def note(tile: Any) -> None:
            write(tile)
            held = [m for m in (origin, sink) if isinstance(m, KeptMap)]
            held_bytes = sum(slab.numel() * 4 for m in held for slab in m.slabs if slab is not None)
            slack = sum(2 * 4 * 4 * m.slab * m.size[1] for m in held)  # two slabs that are partly done
            live.append(held_bytes - segment.kept - slack)

        if isinstance(sink, KeptMap):
            sink.write = note
        original(segment, origin, sink)

    monkeypatch.setattr(engine, "run_segment", watched)
    run_tiled(segments, source, torch.empty(1, 1, 128, 128))
    assert len(source.reads) == segments[0].tiles * (len(segments[0].norms) + 1)
    assert live and max(live) <= 0


def test_attention_gets_its_whole_map() -> None:
    seen: list[torch.Size] = []

    def mix(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x + x.mean((2, 3), keepdim=True)

    weight = torch.randn(2, 2, 3, 3)
    x, out = torch.randn(1, 2, 40, 40), torch.empty(1, 2, 40, 40)
    same = Conv(weight, None, (1, 1), (1, 1), (1, 1))
    segments = plan([[same], Whole(mix), [same]], 2, (40, 40), 8)
    run_tiled(segments, Picture(x, (40, 40), lambda part: part), out)
    assert seen == [torch.Size((1, 2, 40, 40))]
    middle = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(out, F.conv2d(middle + middle.mean((2, 3), keepdim=True), weight, padding=1))


def test_sizes_and_channels_follow_the_layers() -> None:
    layers = [Conv(torch.empty(6, 3, 3, 3), None, (2, 2), (0, 0), (1, 1)), Upsample(3)]
    assert sizes(layers, (9, 8)) == (12, 12) and channels(layers, 3) == 6
