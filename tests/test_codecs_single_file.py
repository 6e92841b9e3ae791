"""One .safetensors file through `omnilatent.load`: every naming in the wild, inside a checkpoint or alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import omnilatent
from omnilatent import UserError
from omnilatent.autoencoders import single_file

diffusers = pytest.importorskip("diffusers")
Tensors = dict[str, Tensor]

KL = dict(block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 3,
          up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1)
SD1_REST = {"cond_stage_model.transformer.x": torch.zeros(2), "model.diffusion_model.out.2.weight": torch.zeros(3)}
SDXL_REST = {"conditioner.embedders.1.model.x": torch.zeros(2), "model.diffusion_model.out.2.weight": torch.zeros(3)}


def random_model(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**config).eval()
    for key, tensor in vae.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.copy_(torch.empty_like(tensor).uniform_(0.5, 1.5))
    return vae


def kl(**config: Any) -> Any:
    return random_model("AutoencoderKL", **{**KL, "latent_channels": 4, **config})


def ldm(vae: Any) -> Tensors:
    """diffusers' names → latent-diffusion's, the attention's matrices as 1×1 convolutions."""
    top = len(vae.config.block_out_channels) - 1
    result = {}
    for key, tensor in vae.state_dict().items():
        if ".attentions." in key:
            parts = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            for new, old in parts.items():
                key = key.replace(f".{new}.", f".{old}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for i in range(top + 1):
            key = key.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{top - i}.")
        key = key.replace("samplers.0.", "sample.").replace("conv_shortcut", "nin_shortcut")
        key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        result[key.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")] = tensor.clone()
    return result


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


@torch.no_grad()
def assert_same(codec: Any, vae: Any, size: int = 16) -> None:
    """The codec's module is the model, bit for bit, and so is what it computes."""
    assert {k: v.shape for k, v in codec.module.state_dict().items()} == {
        k: v.shape for k, v in vae.state_dict().items()}
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in codec.module.state_dict().items()
               if not k.endswith("num_batches_tracked"))
    assert not any(t.is_meta for t in [*codec.module.parameters(), *codec.module.buffers()])
    assert type(codec.module) is type(vae)
    x = torch.rand(1, 3, size, size) * 2 - 1
    x = x.unsqueeze(2) if "Qwen" in type(vae).__name__ else x
    theirs, ours = vae.encode(x), codec.module.encode(x)
    latent = theirs.latents if hasattr(theirs, "latents") else theirs.latent_dist.mode()
    assert torch.equal(latent, ours.latents if hasattr(ours, "latents") else ours.latent_dist.mode())
    assert torch.equal(vae.decode(latent).sample, codec.module.decode(latent).sample)


def test_ldm_names_as_diffusers_converts_them() -> None:
    """The oracle: the reversed names of this file go through diffusers' converter and come back."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = kl()
    back = convert_ldm_vae_checkpoint(prefixed(ldm(vae), "first_stage_model."), vae.config)
    assert back.keys() == vae.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in vae.state_dict().items())


@pytest.mark.parametrize(
    ("rest", "prefix", "scale"),
    [(SD1_REST, "first_stage_model.", 0.18215), (SDXL_REST, "first_stage_model.", 0.13025),
     (SD1_REST, "vae.", 0.18215), ({}, "", 0.18215)],
)
def test_ldm_names(tmp_path: Path, rest: Tensors, prefix: str, scale: float) -> None:
    vae = kl()
    save_file({**rest, **prefixed(ldm(vae), prefix)}, tmp_path / "model.safetensors")
    codec = omnilatent.load(tmp_path / "model.safetensors")
    assert_same(codec, vae)
    assert codec.spec.scale == (scale,) and codec.spec.downsampling == 4 and codec.spec.kind == "gaussian"
    assert codec.reconstruct(torch.rand(1, 3, 37, 53)).shape == (1, 3, 37, 53)


@pytest.mark.parametrize("prefix", ["", "vae."])
@pytest.mark.parametrize("old_attention", [False, True])
def test_diffusers_names(tmp_path: Path, prefix: str, old_attention: bool) -> None:
    vae = kl(use_quant_conv=False, use_post_quant_conv=False, latent_channels=16)
    tensors = dict(vae.state_dict())
    if old_attention:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
    save_file(prefixed(tensors, prefix), tmp_path / "ae.safetensors")
    codec = omnilatent.load(tmp_path / "ae.safetensors")
    assert_same(codec, vae)
    assert (codec.spec.shift, codec.spec.scale) == ((0.1159,), (0.3611,))
    assert "FLUX.1" in codec.provenance.card and "assumed" in codec.provenance.card


def test_attention_at_a_level_and_none_in_the_middle(tmp_path: Path) -> None:
    vae = kl(down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
             up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"))
    save_file(ldm(vae), tmp_path / "f.safetensors")
    assert_same(omnilatent.load(tmp_path / "f.safetensors"), vae)
    vae = kl(mid_block_add_attention=False, layers_per_block=2)
    save_file(ldm(vae), tmp_path / "g.safetensors")
    assert_same(omnilatent.load(tmp_path / "g.safetensors"), vae)


@pytest.mark.parametrize(
    ("file", "channels", "rest", "shift", "scale"),
    [("sdxl_vae", 4, {}, 0.0, 0.13025), ("vae", 4, {}, 0.0, 0.18215), ("sdxl_vae", 4, SD1_REST, 0.0, 0.18215),
     ("sd3.5", 16, {}, 0.0609, 1.5305), ("vae", 16, {"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, 0.0609,
                                         1.5305),
     ("vae", 16, {"double_blocks.0.x": torch.zeros(1)}, 0.1159, 0.3611), ("vae", 5, {}, 0.0, 1.0)],
)
def test_which_normalisation(
    tmp_path: Path, file: str, channels: int, rest: Tensors, shift: float, scale: float
) -> None:
    path = tmp_path / f"{file}.safetensors"
    save_file({**rest, **prefixed(ldm(kl(latent_channels=channels)), "first_stage_model." if rest else "")}, path)
    codec = omnilatent.load(path)
    assert (codec.spec.shift, codec.spec.scale) == ((shift,), (scale,)), codec.provenance.card
    assert ("not normalised" in codec.provenance.card) == (channels == 5)


def test_channel_moments_in_the_file(tmp_path: Path) -> None:
    moments = {"edm_mean": torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), "edm_std": torch.full((1, 4, 1, 1), 2.0)}
    save_file({**SDXL_REST, **moments, **prefixed(ldm(kl()), "first_stage_model.")}, tmp_path / "p.safetensors")
    spec = omnilatent.load(tmp_path / "p.safetensors").spec
    assert spec.shift == (1.0, 2.0, 3.0, 4.0) and spec.scale == (0.25,) * 4


def test_flux2(tmp_path: Path) -> None:
    vae = random_model("AutoencoderKLFlux2", **KL, latent_channels=8)
    tensors = {re.sub("^quant_conv", "encoder.quant_conv", re.sub("^post_quant", "decoder.post_quant", key)): tensor
               for key, tensor in ldm(vae).items() if not key.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "flux2-vae.safetensors")
    codec = omnilatent.load(tmp_path / "flux2-vae.safetensors")
    assert_same(codec, vae)
    assert codec.spec.channels == 32 and codec.spec.downsampling == 8


def wan(vae: Any) -> Tensors:
    """diffusers' names → the original Wan's, two blocks a level and three in the decoder."""
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}
    result = {}
    for key, tensor in vae.state_dict().items():
        key = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", key))
        key = key.replace("coder.conv_in", "coder.conv1").replace("norm_out", "head.0").replace("conv_out", "head.2")
        key = key.replace("mid_block.resnets.0", "middle.0").replace("mid_block.resnets.1", "middle.2")
        key = key.replace("mid_block.attentions.0", "middle.1").replace("encoder.down_blocks", "encoder.downsamples")
        key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", key)
        if ".conv1." not in key[:15]:
            key = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda m: f".{parts[m[1]]}.", key)
        result[key] = tensor
    return result


@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_qwen_image(tmp_path: Path, names: str) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = random_model("AutoencoderKLQwenImage", base_dim=4, dim_mult=[1, 2, 4, 4])
    tensors = wan(vae) if names == "wan" else vae.state_dict()
    assert convert_wan_vae_to_diffusers(wan(vae)).keys() == vae.state_dict().keys()  # the oracle of the names above
    save_file(tensors, tmp_path / "qwen_image_vae.safetensors")
    codec = omnilatent.load(tmp_path / "qwen_image_vae.safetensors")
    assert_same(codec, vae)
    assert codec.spec.shift == tuple(vae.config.latents_mean) and codec.spec.downsampling == 8


@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_hunyuan_image(tmp_path: Path, names: str) -> None:
    vae = random_model("AutoencoderKLHunyuanImage", in_channels=3, out_channels=3, latent_channels=4,
                       block_out_channels=(32, 64, 64), layers_per_block=2, spatial_compression_ratio=4, sample_size=32)
    levels = {"down": {0: "0.block.0", 1: "0.block.1", 2: "0.downsample", 3: "1.block.0", 4: "1.block.1",
                       5: "1.downsample", 6: "2.block.0", 7: "2.block.1"},
              "up": {0: "0.block.0", 1: "0.block.1", 2: "0.block.2", 3: "0.upsample", 4: "1.block.0", 5: "1.block.1",
                     6: "1.block.2", 7: "1.upsample", 8: "2.block.0", 9: "2.block.1", 10: "2.block.2"}}
    tensors = vae.state_dict()
    if names == "original":
        tensors = {re.sub(r"\.(up|down)_blocks\.(\d+)\.", lambda m: f".{m[1]}.{levels[m[1]][int(m[2])]}.", key): t
                   for key, t in tensors.items()}
        for new, old in ((".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".proj.", ".proj_out."),
                         ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                         ("mid_block.attentions.0", "mid.attn_1")):
            tensors = {key.replace(new, old): t for key, t in tensors.items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    codec = omnilatent.load(tmp_path / "vae.safetensors")
    assert_same(codec, vae)
    assert codec.spec.downsampling == 4


@pytest.mark.parametrize("names", ["diffusers", "original", "pair"])
def test_taesd(tmp_path: Path, names: str) -> None:
    vae = random_model("AutoencoderTiny", latent_channels=16, encoder_block_out_channels=(16,) * 4,
                       decoder_block_out_channels=(16,) * 4, num_encoder_blocks=(1, 2, 2, 2))
    tensors = vae.state_dict()
    if names != "diffusers":
        tensors = {re.sub(r"decoder\.layers\.(\d+)", lambda m: f"decoder.{int(m[1]) + 1}", key)
                   .replace("encoder.layers.", "encoder."): t for key, t in tensors.items()}
    if names == "pair":
        for half in ("encoder", "decoder"):
            save_file({k.removeprefix(f"{half}."): t for k, t in tensors.items() if k.startswith(half)},
                      tmp_path / f"taef1_{half}.safetensors")
        path = tmp_path / "taef1_decoder.safetensors"
    else:
        path = tmp_path / "taef1.safetensors"
        save_file(tensors, path)
    codec = omnilatent.load(path)
    assert_same(codec, vae)
    assert codec.spec == omnilatent.LatentSpec(16, 8, "point")
    if names == "pair":
        (tmp_path / "taef1_encoder.safetensors").unlink()
        with pytest.raises(UserError, match="one half of an autoencoder: put taef1_encoder.safetensors beside it"):
            omnilatent.load(path)


def test_only_the_autoencoder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.safetensors"
    save_file({**SD1_REST, **prefixed(ldm(kl()), "first_stage_model.")}, path)
    read: list[str] = []
    original = single_file.open_safetensors

    class Recorder:
        def __init__(self, file: Path) -> None:
            self.handle = original(file)

        def __enter__(self) -> "Recorder":
            self.handle.__enter__()
            return self

        def __exit__(self, *failure: object) -> None:
            self.handle.__exit__(*failure)

        def get_tensor(self, key: str) -> Tensor:
            read.append(key)
            return self.handle.get_tensor(key)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

    monkeypatch.setattr(single_file, "open_safetensors", Recorder)
    omnilatent.load(path)
    assert read and all(key.startswith("first_stage_model.") for key in read)


def test_half_precision_and_mixed_types(tmp_path: Path) -> None:
    vae = kl()
    save_file({k: v.half() for k, v in ldm(vae).items()}, tmp_path / "h.safetensors")
    codec = omnilatent.load(tmp_path / "h.safetensors")
    assert codec.dtype == torch.float32
    assert torch.equal(codec.module.decoder.conv_in.weight, vae.decoder.conv_in.weight.half().float())
    mixed = {k: v.half() if "encoder" in k else v for k, v in ldm(vae).items()}
    save_file(mixed, tmp_path / "m.safetensors")
    assert {p.dtype for p in omnilatent.load(tmp_path / "m.safetensors").module.parameters()} == {torch.float32}


def test_the_hash_is_the_autoencoders(tmp_path: Path) -> None:
    """The same VAE in two checkpoints has one hash; another VAE another."""
    hashes = []
    more = {**SD1_REST, "x": torch.ones(1)}
    for name, rest, change in (("a", SD1_REST, 0.0), ("b", more, 0.0), ("c", SD1_REST, 1.0)):
        tensors = prefixed(ldm(kl()), "first_stage_model.")
        tensors["first_stage_model.decoder.conv_out.bias"] += change
        save_file({**rest, **tensors}, tmp_path / f"{name}.safetensors")
        hashes.append(omnilatent.load(tmp_path / f"{name}.safetensors").provenance.weights_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    tensors = ldm(kl())
    for key, named in (("decoder.up.2.block.1.conv2.weight", r"decoder\.up_blocks\.0\.resnets\.1\.conv2\.weight"),
                       ("decoder.conv_in.weight", r"decoder\.conv_in\.weight"),
                       ("encoder.down.1.block.0.conv1.weight", r"encoder\.down_blocks\.1\.resnets\.0\.conv1\.weight")):
        save_file({k: v for k, v in tensors.items() if k != key}, path)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))} lacks .*{named}"):
            omnilatent.load(path)
    save_file({k: v for k, v in tensors.items() if k.startswith("decoder")}, path)
    with pytest.raises(UserError, match="holds no autoencoder that we know|lacks"):
        omnilatent.load(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(ldm(kl()), path)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"\x80\x04not safetensors at all"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a readable .safetensors file"):
            omnilatent.load(path)
    for tensors in (SD1_REST, {"0.weight": torch.zeros(1)}, {"transformer.h.0.weight": torch.zeros(1)}):
        save_file(tensors, path)
        with pytest.raises(UserError, match="holds no autoencoder that we know"):
            omnilatent.load(path)


def test_a_file_beside_its_own_configuration(tmp_path: Path) -> None:
    vae = kl(scaling_factor=0.77)
    vae.save_pretrained(tmp_path)
    codec = omnilatent.load(tmp_path / "diffusion_pytorch_model.safetensors")
    assert codec.provenance.kind == "diffusers" and codec.spec.scale == (0.77,)
    vae.half().save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert omnilatent.load(tmp_path / "diffusion_pytorch_model.fp16.safetensors").spec.scale == (0.77,)


def test_configurations_are_complete_and_decisive() -> None:
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in single_file.CONFIGS.glob("*.json")]
    assert len(rows) >= 8
    for row in rows:
        assert row["config"].keys().isdisjoint({"latent_channels", "block_out_channels"})
        rivals = [r for r in rows if (r["class"], r["latent_channels"]) == (row["class"], row["latent_channels"])]
        assert sum(r["assumed"] for r in rivals) == 1
