"""The KL autoencoder: seed 002's architecture, parity with diffusers, its posterior, its recipes."""

from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any

import pytest
import torch

from omnilatent import hub
from omnilatent.autoencoders import recipes
from omnilatent.autoencoders.config import KLConfig
from omnilatent.autoencoders.kl import KLAutoencoder, KLCodec, build_vae, config_of
from omnilatent.errors import UserError
from omnilatent.codec import Provenance
from omnilatent.latent import DiagonalGaussian, LatentSpec

TINY = KLConfig(widths=(8, 16), layers=1, latent_channels=3, norm_groups=4, attention=(2,))


def vae_of(config: KLConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_vae(config).eval()


@pytest.fixture
def codec() -> KLCodec:
    spec = LatentSpec(3, 2, shift=(0.25,), scale=(1.5,))
    return KLCodec(build_vae(TINY, spec), spec, Provenance("tiny", "kl"))


def test_kl_f8_is_seed_002s_model() -> None:
    with torch.device("meta"):
        vae = build_vae(recipes.kl_f8().model)
        small = build_vae(recipes.kl_f8_small().model)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in small.parameters()) <= 3_500_000
    assert recipes.kl_f8().model.downsampling == 8


def recipe_of(name: str) -> Callable[[], Any]:
    module, function = hub.RECIPES[name].split(":")
    return getattr(import_module(module), function)


@pytest.mark.parametrize("name", [name for name in hub.RECIPES if isinstance(recipe_of(name)().model, KLConfig)])
def test_every_recipe_builds_and_states_itself(name: str) -> None:
    recipe = recipe_of(name)
    config = recipe()
    assert config.recipe == name and f"omnilatent train {name}" in recipe.__doc__
    with torch.device("meta"):
        vae = build_vae(config.model)
    factor = {"f4": 4, "f8": 8, "f16": 16}.get(name.split("-")[1]) if "-" in name else config.model.downsampling
    assert config.model.downsampling == factor
    restored = config_of(vae)
    assert asdict(restored) == asdict(config.model) | {"variational": True}


@pytest.mark.parametrize("latent_channels", [1, 64])
def test_latent_channels(latent_channels: int) -> None:
    config = KLConfig(widths=(8, 8), layers=1, norm_groups=4, latent_channels=latent_channels)
    mean, logvar = KLAutoencoder(vae_of(config)).posterior(torch.rand(1, 3, 8, 8))
    assert mean.shape == logvar.shape == (1, latent_channels, 4, 4)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="--latent-channels is 65; possible are 1 to 64"):
        KLConfig(latent_channels=65)
    with pytest.raises(ValueError, match=r"--attention 3 is no level of this model; its levels are \[1, 2, 4, 8\]"):
        KLConfig(attention=(3,))


def test_attention_stands_where_it_was_asked_for() -> None:
    vae = vae_of(TINY)
    assert [hasattr(b, "attentions") for b in vae.encoder.down_blocks] == [False, True]
    assert [hasattr(b, "attentions") for b in vae.decoder.up_blocks] == [True, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_forward_is_diffusers(checkpointing: bool) -> None:
    vae = vae_of(TINY)
    model = KLAutoencoder(vae, checkpointing).train()
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 8, 8)
    out = model(images, noise)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(out.mean, posterior.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logvar, posterior.logvar, atol=1e-5, rtol=0)
    expected = vae.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(out.images, expected, atol=1e-5, rtol=0)


def test_the_codec_is_diffusers_with_the_normalisation(codec: KLCodec) -> None:
    images = torch.rand(2, 3, 16, 12)
    posterior = codec.module.encode(images * 2 - 1).latent_dist
    latent = codec.encode(images)
    torch.testing.assert_close(latent.mode(), (posterior.mean - 0.25) * 1.5, atol=1e-5, rtol=0)
    expected = (codec.module.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latent), expected, atol=1e-5, rtol=0)
    assert codec.module.config.scaling_factor == 1.5 and codec.module.config.shift_factor == 0.25


def test_a_checkpoint_opens_here_and_in_plain_diffusers(codec: KLCodec, tmp_path) -> None:
    folder = tmp_path / "ours"
    with hub.new_folder(folder) as temporary:
        hub.write_model(temporary, "kl", asdict(TINY), codec.spec, codec.module.state_dict(), "card")
    again = hub.load(folder)
    images = torch.rand(1, 3, 9, 21)
    assert torch.equal(again.reconstruct(images), codec.reconstruct(images))
    from diffusers import AutoencoderKL

    again.to_diffusers().save_pretrained(tmp_path / "theirs")
    plain = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        z = plain.encode(images * 2 - 1).latent_dist.mode()
        assert torch.equal(plain.decode(z).sample, codec.module.decode(z).sample)
    normalised = (z - plain.config.shift_factor) * plain.config.scaling_factor
    torch.testing.assert_close(codec.encode(images).mode(), normalised)


@pytest.mark.parametrize("size", [(37, 53), (1, 1), (155, 100), (40, 24)])
def test_any_size_comes_back(codec: KLCodec, size: tuple[int, int]) -> None:
    latent = codec.encode(torch.rand(1, 3, *size))
    assert latent.mode().shape[-2:] == codec.spec.grid(size)
    assert codec.decode(latent).shape[-2:] == size
    assert codec.decode(latent.mode(), size=size).shape[-2:] == size
    assert codec.decode(latent.sample()).shape[-2:] == tuple(2 * side for side in codec.spec.grid(size))


def test_wrong_tensors_are_refused_with_both_shapes(codec: KLCodec) -> None:
    with pytest.raises(ValueError, match=r"images have shape \(b, 3, h, w\); got \(3, 8, 8\)"):
        codec.encode(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="floats in .0, 1. or uint8 in 0..255; got torch.int64"):
        codec.encode(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"has shape \(b, 3, h, w\); got \(1, 4, 4, 4\)"):
        codec.decode(torch.rand(1, 4, 4, 4))


def test_8_bit_images_are_those_of_1_255(codec: KLCodec) -> None:
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    assert torch.equal(codec.encode(images).mode(), codec.encode(images.float() / 255).mode())


def test_kl_is_that_of_torch_distributions() -> None:
    spec = LatentSpec(4, 8, shift=(3.0,), scale=(0.2,))  # the normalisation must not enter
    q, p = (DiagonalGaussian(torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5), spec) for _ in range(2))
    normal = [torch.distributions.Normal(g.mean, (g.logvar / 2).exp()) for g in (q, p)]
    unit = torch.distributions.Normal(0.0, 1.0)
    oracle = torch.distributions.kl_divergence
    torch.testing.assert_close(q.kl(), oracle(normal[0], unit).flatten(1).sum(1))
    torch.testing.assert_close(q.kl(p), oracle(normal[0], normal[1]).flatten(1).sum(1))
    assert torch.allclose(q.kl(q), torch.zeros(2), atol=1e-4)


def test_samples_follow_the_posterior() -> None:
    spec = LatentSpec(1, 1, shift=(1.0,), scale=(2.0,))
    q = DiagonalGaussian(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -1.0), spec)
    drawn = q.sample(torch.Generator().manual_seed(0))
    assert torch.equal(drawn, q.sample(torch.Generator().manual_seed(0)))
    assert abs(drawn.mean().item() - 4.0) < 0.03
    assert abs(drawn.std().item() - 2 * torch.exp(torch.tensor(-0.5)).item()) < 0.03


def test_a_plain_autoencoder_gives_points() -> None:
    spec = LatentSpec(3, 2, kind="point")
    codec = KLCodec(vae_of(TINY), spec, Provenance("plain", "kl"))
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(codec.encode(images).mode(), codec.module.encode(images * 2 - 1).latent_dist.mean)


@pytest.mark.parametrize("quant_convs", [True, False])
def test_a_plain_autoencoders_export_draws_its_mean(quant_convs: bool, tmp_path) -> None:
    from diffusers import AutoencoderKL

    config = KLConfig(widths=(8, 16), layers=1, latent_channels=3, norm_groups=4, quant_convs=quant_convs)
    codec = KLCodec(vae_of(config), LatentSpec(3, 2, kind="point", scale=(1.5,)), Provenance("plain", "kl"))
    before = {key: tensor.clone() for key, tensor in codec.module.state_dict().items()}
    codec.to_diffusers().save_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in codec.module.state_dict().items())
    assert codec.module.config.scaling_factor == 1.0  # the copy alone states the normalisation
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        drawn = AutoencoderKL.from_pretrained(tmp_path).encode(images).latent_dist
        untrained = codec.module.encode(images).latent_dist
    assert torch.equal(drawn.mean, untrained.mean)
    torch.testing.assert_close(drawn.sample(), drawn.mean, atol=1e-5, rtol=0)
    assert (untrained.sample() - untrained.mean).abs().max() > 0.1  # what the export would have given


def test_what_no_precision_makes_finite_is_a_sentence_on_both_sides() -> None:
    codec = KLCodec(vae_of(TINY), LatentSpec(3, 2), Provenance("tiny", "kl")).to(dtype=torch.float16)
    sentence = "tiny gives infinite values or NaN in float16 and in float32: check its weights and the images"
    codec.reconstruct(torch.rand(1, 3, 8, 8))
    codec.module.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(UserError, match=sentence):
        codec.decode(torch.zeros(1, 3, 4, 4))
    codec.to(dtype=torch.float16).module.encoder.conv_in.bias.fill_(torch.inf)
    with pytest.raises(UserError, match=sentence):
        codec.encode(torch.rand(1, 3, 8, 8))
    images = codec.to(dtype=torch.bfloat16).decode(torch.zeros(1, 3, 4, 4))
    assert bool((images == 1).all())  # in other types the clamp stands alone


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (0, 4), (-1, 8)])
def test_a_size_that_the_latent_does_not_reach_is_refused(codec: KLCodec, size: tuple[int, int]) -> None:
    sentence = rf"a latent of 4×4 decodes to images of at most 8×8; size asks for {size[0]}×{size[1]}"
    with pytest.raises(ValueError, match=sentence):
        codec.decode(torch.zeros(1, 3, 4, 4), size=size)


def test_opening_a_model_draws_no_random_number(codec: KLCodec, tmp_path) -> None:
    hub.write_model(tmp_path, "kl", asdict(TINY), codec.spec, codec.module.state_dict(), "card")
    state = torch.get_rng_state()
    opened = hub.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in opened.module.state_dict().items():
        assert not tensor.is_meta and torch.equal(tensor, codec.module.state_dict()[key])
