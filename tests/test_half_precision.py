"""float16 that overflows: redone in a wider type, said once, and never NaN; other types hide nothing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from omnilatent.autoencoders.config import KLConfig
from omnilatent.autoencoders.kl import KLCodec, build_vae
from omnilatent.errors import UserError
from omnilatent.codec import Provenance
from omnilatent.latent import DiagonalGaussian, LatentSpec


def overflowing(dtype: torch.dtype = torch.float16) -> KLCodec:
    """A codec whose first maps lie beyond float16's 65504 on both sides, and whose weights do not."""
    torch.manual_seed(0)
    vae = build_vae(KLConfig(widths=(8, 16), layers=1, latent_channels=3, norm_groups=4))
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.weight.data *= 4e4 / conv.weight.data.abs().max()
    return KLCodec(vae, LatentSpec(3, 2), Provenance("loud", "kl")).to(dtype=torch.float16).to(dtype=dtype)


def images(size: int = 40) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tile", [None, 16])
def test_an_overflow_is_redone_and_said_once(tile: int | None, caplog: pytest.LogCaptureFixture) -> None:
    codec, exact = overflowing(), overflowing(torch.float32)
    codec.tile = exact.tile = tile
    raw = codec.module.encoder(images().half())
    assert not raw.isfinite().all()  # what it would have given
    with caplog.at_level(logging.WARNING, logger="omnilatent"):
        latent = codec.encode(images())
        assert codec.dtype == torch.float32  # on a CPU, which computes it faster than bfloat16
        first = codec.decode(latent)
        assert torch.equal(codec.decode(latent), first)
    assert caplog.messages == ["omnilatent: loud overflows in float16; it now runs in float32."]
    assert isinstance(latent, DiagonalGaussian) and latent.mean.isfinite().all() and first.isfinite().all()
    # The images themselves, float32 here, were never rounded to half.
    assert torch.equal(latent.mean, exact.encode(images()).mean)
    assert torch.equal(first, exact.decode(latent)) and first.std() > 0


def test_the_decoder_alone(caplog: pytest.LogCaptureFixture) -> None:
    codec = overflowing()
    with caplog.at_level(logging.WARNING, logger="omnilatent"):
        decoded = codec.decode(torch.ones(1, 3, 8, 8))
    assert decoded.isfinite().all() and len(caplog.messages) == 1


def test_an_infinite_variance_is_an_overflow_too() -> None:
    codec = overflowing()
    codec.module.encoder.conv_in.weight.data.mul_(1e-4)
    with torch.no_grad():
        codec.module.quant_conv.weight[3:] = 0  # log-variances
        codec.module.quant_conv.bias[3:] = torch.nan
    with pytest.raises(UserError, match=r"loud gives infinite values or NaN in float16 and in float32: check its "
                                        r"weights and the images, or load it with --dtype float32\."):
        codec.encode(images())


def test_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnilatent.codec.has_bfloat16", lambda device: True)
    codec = overflowing()
    assert codec.reconstruct(images()).isfinite().all() and codec.dtype == torch.bfloat16


def test_what_float16_holds_stays_in_float16(caplog: pytest.LogCaptureFixture) -> None:
    codec = overflowing()
    for conv in (codec.module.encoder.conv_in, codec.module.decoder.conv_in):
        conv.weight.data.mul_(1e-5)
    assert codec.reconstruct(images()).isfinite().all()
    assert codec.dtype == torch.float16 and not caplog.messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [None, 16])
def test_a_genuine_nan_is_not_hidden(dtype: torch.dtype, tile: int | None, caplog: pytest.LogCaptureFixture) -> None:
    codec = overflowing(dtype)
    codec.tile = tile
    codec.module.decoder.conv_out.bias.fill_(torch.nan)
    decoded = codec.decode(torch.zeros(1, 3, 20, 20))
    assert decoded.isnan().all() and codec.dtype == dtype and not caplog.messages
    broken = images()
    broken[0, 0, 0, 0] = torch.nan
    assert codec.encode(broken).mode()[0].isnan().any()


def test_it_is_one_plain_line_on_a_terminal() -> None:
    script = (
        "import torch\n"
        "from omnilatent.codec import Codec, Provenance\n"
        "from omnilatent.latent import LatentSpec, Point\n"
        "class Loud(Codec):\n"
        "    def _encode(self, images): return Point(self.module(images))\n"
        "net = torch.nn.Conv2d(3, 3, 1)\n"
        "net.weight.data.fill_(3e4)\n"
        "codec = Loud(net, LatentSpec(3, 1, 'point'), Provenance('loud', 'x')).to(dtype=torch.float16)\n"
        "for _ in range(2):\n"
        "    assert codec.encode(torch.ones(1, 3, 2, 2)).mode().isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "omnilatent: loud overflows in float16; it now runs in float32.\n" and not done.stdout


