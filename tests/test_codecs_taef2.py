"""TAEF2 against its published figures, and the identity codec."""

from pathlib import Path

import pytest
import torch

import omnilatent
from omnilatent import UserError

DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="module")
def taef2() -> omnilatent.Codec:
    if not (DATA / "taef2").exists():
        pytest.skip(f"the TAEF2 weights are not in {DATA / 'taef2'}")
    return omnilatent.load(DATA / "taef2")


def test_psnr_of_a_kodak_photo_at_full_size(taef2: omnilatent.Codec) -> None:
    """The figure of the weights' own description: 31.43 dB on kodim02 (8-bit output)."""
    import numpy as np
    from PIL import Image

    file = DATA / "kodak" / "kodim02.webp"
    if not file.exists():
        pytest.skip(f"the Kodak photo is not at {file}")
    with Image.open(file) as photo:
        image = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    latent = taef2.encode(image)
    output = (taef2.decode(latent) * 255).round() / 255
    psnr = -10 * torch.log10(((output - image) ** 2).mean()).item()
    assert psnr == pytest.approx(31.43, abs=0.01)
    assert latent.mode().shape == (1, 32, image.shape[-2] // 8, image.shape[-1] // 8)
    assert abs(latent.mode().mean()) < 0.2 and 0.5 < latent.mode().std() < 1.2  # normalised as it comes


def test_the_description_is_kept(taef2: omnilatent.Codec) -> None:
    assert taef2.provenance.licence == "MIT, (c) 2023 Ollin Boer Bohan"
    assert taef2.spec == omnilatent.LatentSpec(channels=32, downsampling=8, kind="point")
    assert taef2.parameter_count() == 1_338_528 + 1_338_499
    assert not any(p.is_meta or p.requires_grad for p in taef2.module.parameters())


def test_every_size_comes_back(taef2: omnilatent.Codec) -> None:
    for size in ((37, 53), (1, 1)):
        assert taef2.reconstruct(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_one_of_the_two_files_opens_the_folder(taef2: omnilatent.Codec) -> None:
    codec = omnilatent.load(DATA / "taef2" / "taef2_encoder.safetensors")
    assert codec.provenance.weights_hash == taef2.provenance.weights_hash


def test_foreign_and_truncated_weights(taef2: omnilatent.Codec, tmp_path: Path) -> None:
    for part in ("encoder", "decoder"):
        file = f"taef2_{part}.safetensors"
        (tmp_path / file).write_bytes((DATA / "taef2" / file).read_bytes())
    decoder = tmp_path / "taef2_decoder.safetensors"
    whole = decoder.read_bytes()
    decoder.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="taef2_decoder.safetensors is not a readable .safetensors file"):
        omnilatent.load(tmp_path)
    decoder.write_bytes((tmp_path / "taef2_encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match="taef2_decoder.safetensors is not TAEF2's"):
        omnilatent.load(tmp_path)


def test_pixels_is_the_identity() -> None:
    codec = omnilatent.load("pixels")
    images = torch.rand(2, 3, 37, 53)
    latent = codec.encode(images)
    assert torch.equal(latent.mode(), (images - 0.5) * 2)
    assert (codec.decode(latent) - images).abs().max() <= 2**-23  # one rounding on either side
    assert codec.parameter_count() == 0 and codec.spec.downsampling == 1 and codec.spec.bits_per_pixel() == 48
    assert codec.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert codec.encode(images).mode().dtype == torch.float32  # the normalisation is never rounded to a narrow type
    assert omnilatent.load("Null:pixels").label == "Null"
