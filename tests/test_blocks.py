"""The KL blocks for the channels-last layout are diffusers', also on the way that only a compiler takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omnilatent.autoencoders import blocks
from omnilatent.autoencoders.config import KLConfig
from omnilatent.autoencoders.kl import KLCodec, build_vae
from omnilatent.codec import Provenance
from omnilatent.latent import LatentSpec

CONFIG = KLConfig(widths=(8, 16), layers=1, latent_channels=3, norm_groups=4, attention=(2,))


def traced(function):
    """As a compiler sees it, without generating code: `torch.compiler.is_compiling()` is true inside."""
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_the_compiled_norm_is_group_norm(mean: float) -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(4, 16)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 16, 9, 7) + mean
    exact = F.group_norm(x.double(), 4, layer.weight.double(), layer.bias.double(), layer.eps).float()
    torch.testing.assert_close(traced(blocks.norm)(layer, x), exact, rtol=1e-4, atol=1e-3)  # E[x²] − E[x]² would be off by 0.06
    assert torch.equal(blocks.norm(layer, x), layer(x))


def test_upsampling_and_its_convolution_are_one() -> None:
    torch.manual_seed(0)
    block = nn.Module()
    block.conv = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(blocks.upsample(block, x), block.conv(F.interpolate(x, scale_factor=2.0)))


def test_attention_is_the_same_written_out_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = build_vae(CONFIG).eval().encoder.mid_block.attentions[0]
    x = torch.randn(2, 16, 5, 3)
    with torch.no_grad():
        theirs, dense = block(x), blocks.attention(block, x)
        monkeypatch.setattr(blocks, "DENSE_TOKENS", 0)
        torch.testing.assert_close(blocks.attention(block, x), theirs)
    torch.testing.assert_close(dense, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_halves_and_their_gradients_are_diffusers(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    vae = build_vae(CONFIG).to(memory_format=layout)
    images = (torch.rand(2, 3, 16, 12) * 2 - 1).contiguous(memory_format=layout)
    theirs = vae.quant_conv(vae.encoder(images))
    shown = vae.decoder(vae.post_quant_conv(theirs[:, :3]))
    wanted = torch.autograd.grad(shown.square().mean(), list(vae.parameters()))

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = blocks.encode(vae, x)
        return moments, blocks.decode(vae, moments[:, :3])

    ours, again = traced(both)(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, shown, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(again.square().mean(), list(vae.parameters()))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_a_codecs_halves_are_one_graph_each() -> None:
    spec = LatentSpec(3, 2, shift=(0.25,), scale=(1.5,))
    torch.manual_seed(0)
    codec = KLCodec(build_vae(CONFIG, spec), spec, Provenance("tiny", "kl"))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    latent, shown = codec.encode(images), codec.reconstruct(images)
    codec._encode, codec._decode = traced(codec._encode), traced(codec._decode)
    torch.testing.assert_close(codec.encode(images).mean, latent.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.reconstruct(images), shown, rtol=1e-4, atol=1e-4)


def test_compiling_for_a_cpu_changes_nothing() -> None:
    spec = LatentSpec(3, 2)
    codec = KLCodec(build_vae(CONFIG, spec), spec, Provenance("tiny", "kl"))
    before = codec._encode
    assert codec.compile() is codec and codec._encode == before


def test_a_model_of_other_blocks_is_not_taken_for_these() -> None:
    vae = build_vae(CONFIG)
    assert blocks.fits(vae)
    vae.register_to_config(act_fn="mish")
    assert not blocks.fits(vae)
