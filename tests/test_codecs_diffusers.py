"""diffusers folders through `omnilatent.load`: every class equals diffusers' own encode and decode, and the
normalisation is its pipeline's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnilatent
from omnilatent import UserError
from omnilatent.autoencoders.diffusers_codecs import FAMILIES

diffusers = pytest.importorskip("diffusers")

MEAN, STD = [0.3, -0.7, 0.1, 0.4], [1.5, 0.6, 2.0, 0.9]
# class → the smallest configuration that has every kind of layer, and its pixels for one latent row
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "AutoencoderKL": (dict(
        block_out_channels=(32, 64), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159), 2),
    "AutoencoderTiny": (dict(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=4, scaling_factor=0.9, shift_factor=0.1), 4),
    "AutoencoderDC": (dict(
        latent_channels=8, attention_head_dim=8, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.41407), 2),
    "AutoencoderKLFlux2": (dict(
        block_out_channels=(32, 64), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4), 4),
    "AutoencoderKLQwenImage": (dict(
        base_dim=16, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], latents_mean=MEAN,
        latents_std=STD), 2),
    "AutoencoderKLHunyuanImage": (dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=32, scaling_factor=0.75289), 4),
}


def flux2_forward(vae: Any, raw: Tensor) -> Tensor:
    packed = diffusers.Flux2Pipeline._patchify_latents(raw)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    return (packed - mean) / torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)


def flux2_backward(vae: Any, latents: Tensor) -> Tensor:
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return diffusers.Flux2Pipeline._unpatchify_latents(latents * deviation + vae.bn.running_mean.view(1, -1, 1, 1))


def per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


# class → (raw latent to what the pipeline's denoiser sees, and back), written as the pipelines write it
PIPELINES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "AutoencoderKL": (lambda v, z: (z - 0.1159) * 0.3611, lambda v, z: z / 0.3611 + 0.1159),
    "AutoencoderTiny": (lambda v, z: (z - 0.1) * 0.9, lambda v, z: z / 0.9 + 0.1),
    "AutoencoderDC": (lambda v, z: z * 0.41407, lambda v, z: z / 0.41407),
    "AutoencoderKLFlux2": (flux2_forward, flux2_backward),
    "AutoencoderKLQwenImage": (lambda v, z: (z - per_channel(MEAN)) / per_channel(STD),
                               lambda v, z: z * per_channel(STD) + per_channel(MEAN)),
    "AutoencoderKLHunyuanImage": (lambda v, z: z * 0.75289, lambda v, z: z / 0.75289),
}


def tiny(class_name: str) -> Any:
    """A random model; its one-dimensional tensors (norm gains, running statistics) are away from 0 and 1."""
    torch.manual_seed(0)
    vae = getattr(diffusers, class_name)(**TINY[class_name][0]).eval()
    for name, tensor in vae.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            low = 0.5 if name.endswith(("weight", "var", "gamma")) else -0.5
            tensor.copy_(torch.empty_like(tensor).uniform_(low, low + 1))
    return vae


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    vae = tiny(request.param)
    vae.save_pretrained(folder)
    return folder, vae


@torch.no_grad()
def test_equals_diffusers_with_the_pipelines_normalisation(saved: tuple[Path, Any]) -> None:
    folder, vae = saved
    name = type(vae).__name__
    forward, backward = PIPELINES[name]
    codec = omnilatent.load(folder)
    assert codec.spec.downsampling == TINY[name][1]
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    video = name == "AutoencoderKLQwenImage"
    given = (images * 2 - 1).unsqueeze(2) if video else images * 2 - 1
    output = vae.encode(given)
    raw = next(getattr(output, k) for k in ("latents", "latent", "latent_dist") if hasattr(output, k))
    raw = raw.mode() if hasattr(raw, "mode") and not isinstance(raw, Tensor) else raw
    raw = raw.squeeze(2) if video else raw
    latent = codec.encode(images)
    assert (latent.mode() - forward(vae, raw)).abs().max() <= 1e-5
    assert tuple(latent.mode().shape) == (2, codec.spec.channels, *codec.spec.grid((24, 40)))
    z = forward(vae, raw)
    back = backward(vae, z)
    expected = vae.decode(back.unsqueeze(2) if video else back).sample
    expected = expected.squeeze(2) if video else expected
    assert (codec.decode(z) - (expected / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-5
    assert expected.std() > 1e-3  # the comparison is not between two constants


def test_every_size_comes_back(saved: tuple[Path, Any]) -> None:
    codec = omnilatent.load(saved[0])
    for size in ((37, 53), (1, 1), (5, 64)):
        assert codec.reconstruct(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_posterior_of_a_packed_latent_is_packed(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKLFlux2")
    vae.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    latent = omnilatent.load(tmp_path).encode(images)
    with torch.no_grad():
        expected = vae.encode(images * 2 - 1).latent_dist.kl()  # summed over all positions: packing cannot change it
    assert torch.allclose(latent.kl(), expected, rtol=1e-4)


def test_pipeline_folder_licence_and_hash(tmp_path: Path) -> None:
    tiny("AutoencoderTiny").save_pretrained(tmp_path / "vae")
    (tmp_path / "README.md").write_text("---\nlicense: openrail\n---\nA card.\n", encoding="utf-8")
    codec = omnilatent.load(f"Mine:{tmp_path}")
    assert codec.label == "Mine" and codec.provenance.licence == "openrail" and "A card." in codec.provenance.card
    assert codec.provenance.weights_hash == omnilatent.hub.file_hash(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors")


def test_sharded_weights(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKL")
    vae.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = (vae.decode(z / 0.3611 + 0.1159).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(omnilatent.load(tmp_path).decode(z), expected)
    next(tmp_path.glob("*-00001-*.safetensors")).unlink()
    with pytest.raises(UserError, match="lacks diffusion_pytorch_model-00001-of"):
        omnilatent.load(tmp_path)


def test_half_precision_weights_are_used_in_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny("AutoencoderTiny").half().save_pretrained(tmp_path)
    assert omnilatent.load(tmp_path).dtype == torch.float32
    assert omnilatent.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    codec = omnilatent.load(tmp_path, dtype=torch.float16)
    codec.module.decoder.layers[0].bias.fill_(6e4)  # overflows two layers on
    assert codec.decode(torch.ones(1, 4, 2, 2)).isfinite().all()
    assert codec.dtype == torch.float32  # redone (test_half_precision.py)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_incomplete_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    vae = tiny("AutoencoderTiny")
    vae.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("decoder.layers.0.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of the \d+ tensors.*decoder\.layers\.0\.weight"):
        omnilatent.load(tmp_path)
    vae.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update(surplus=torch.zeros(1)))
    with pytest.raises(UserError, match="no place for, the first being surplus"):
        omnilatent.load(tmp_path)
    vae.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"decoder.layers.0.bias": torch.zeros(5)}))
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.bias of shape \(5,\).*needs \(16,\)"):
        omnilatent.load(tmp_path)


def test_pickled_missing_and_truncated_weights(tmp_path: Path) -> None:
    tiny("AutoencoderTiny").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable .safetensors file"):
        omnilatent.load(tmp_path)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"only as a pickle \(diffusion_pytorch_model\.bin\)"):
        omnilatent.load(tmp_path)
    file.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match="has a config.json but no weights"):
        omnilatent.load(tmp_path)


def test_unknown_class_and_impossible_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}), encoding="utf-8")
    with pytest.raises(UserError, match="VQModel, which is not supported: AutoencoderKL, AutoencoderTiny"):
        omnilatent.load(tmp_path)
    tiny("AutoencoderKL").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_num_groups": 7}), encoding="utf-8")
    with pytest.raises(UserError, match="diffusers cannot build the AutoencoderKL"):
        omnilatent.load(tmp_path)
