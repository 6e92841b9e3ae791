"""Named configurations of image autoencoders. Each docstring states metric, hardware, time and command."""

from __future__ import annotations

from dataclasses import replace

from ..training.config import OptimizerConfig, RunConfig
from .config import CropConfig, KLConfig, KLTraining, LossConfig, TinyTraining
from .gaussian_config import GaussianTraining


def kl_f8() -> KLTraining:
    """KL autoencoder of Stable Diffusion: f8, 4 channels, 83.7 M parameters, L1 + LPIPS + KL + PatchGAN.

    Expected on ImageNet val 256²: about 24–27 dB (published, docs/benchmarks.md); not trained to the end by us.
    omnilatent train kl-f8 --data photos/
    """
    return KLTraining(recipe="kl-f8")


def kl_f4() -> KLTraining:
    """KL autoencoder at f4, 3 channels: sharper and four times the latent of f8 (LDM's kl-f4).

    Expected on ImageNet val 256²: about 27.5 dB (published for LDM's); not trained to the end by us.
    omnilatent train kl-f4 --data photos/
    """
    return replace(kl_f8(), recipe="kl-f4", model=KLConfig(widths=(128, 256, 512), latent_channels=3))


def kl_f16() -> KLTraining:
    """KL autoencoder at f16, 16 channels, with attention at a sixteenth (LDM's kl-f16).

    Expected on ImageNet val 256²: about 24 dB (published for LDM's); not trained to the end by us.
    omnilatent train kl-f16 --data photos/
    """
    model = KLConfig(widths=(128, 128, 256, 256, 512), latent_channels=16, attention=(16,))
    return replace(kl_f8(), recipe="kl-f16", model=model)


def ae_f8() -> KLTraining:
    """Plain autoencoder, kl-f8 without KL term and noise: the null that shows what "variational" buys.

    omnilatent train ae-f8 --data photos/
    """
    return _plain(kl_f8(), "ae-f8")


def kl_f8_small() -> KLTraining:
    """KL autoencoder for CPUs: f8, 4 channels, 3.4 M parameters, L1 + 2·L2 + KL, by Muon; bundled.

    Expected on the 100 ImageNet-sample val photos at 256²: 27.1 dB after 6.5 minutes on one H100 (one seed).
    omnilatent train kl-f8-small --data photos/
    """
    return KLTraining(
        recipe="kl-f8-small",
        model=KLConfig(widths=(32, 64, 96, 128), layers=1, norm_groups=8),
        loss=LossConfig(l1=1.0, l2=2.0, perceptual="none", adversarial_weight=0.0),
        optimizer=OptimizerConfig(optimizer="muon", lr=2e-3, warmup=200, ema_decay=0.999),
        crops=CropConfig(min_scale=0.8),
        run=RunConfig(steps=5_200, batch_size=64, save_every=1_000, validate_every=1_000),
    )


def kl_f8_small_gan() -> KLTraining:
    """kl-f8-small with texture: a Laplacian pyramid beside the pixels and, from the middle of the run, a PatchGAN.

    The perceptual term is a pyramid of blurs, no network, and is not called LPIPS; it needs no download. With other
    --steps give --disc-start-step as well.
    Expected: 1.1 dB less than kl-f8-small and 3.5 times its power at high frequencies, as --init kl-f8-small --lr 5e-4
    --disc-start-step 50 reached after 700 steps of 32; not trained from the start.
    omnilatent train kl-f8-small-gan --data photos/
    """
    base = kl_f8_small()
    loss = replace(base.loss, perceptual="laplacian", perceptual_weight=1.0, adversarial_weight=0.5,
                   disc_start_step=base.run.steps // 2)
    return replace(base, recipe="kl-f8-small-gan", loss=loss, optimizer=replace(base.optimizer, disc_lr=2e-4))


def kl_f8_small_c16() -> KLTraining:
    """kl-f8-small with a latent of 16 channels: sharper, and four times the latent.

    Expected on the same photos: 30.8 dB after 1,500 steps of 32, a seventh of the recipe's crops (one seed).
    omnilatent train kl-f8-small-c16 --data photos/
    """
    return _with_channels(16)


def kl_f8_small_c32() -> KLTraining:
    """kl-f8-small with a latent of 32 channels: sharper, and eight times the latent.

    Expected on the same photos: 32.7 dB after 1,500 steps of 32, a seventh of the recipe's crops (one seed).
    omnilatent train kl-f8-small-c32 --data photos/
    """
    return _with_channels(32)


def ae_f8_small() -> KLTraining:
    """Plain autoencoder, kl-f8-small without KL term and noise: the small null.

    omnilatent train ae-f8-small --data photos/
    """
    return _plain(kl_f8_small(), "ae-f8-small")


def tiny_f8() -> TinyTraining:
    """Tiny autoencoder (TAESD's architecture): f8, 4 channels, 2.4 M parameters, deterministic, L1 + 2·L2.

    Expected on the 100 ImageNet-sample val photos at 256²: 26.2 dB after 4,500 steps, 3.3 minutes on one H200.
    omnilatent train tiny-f8 --data photos/
    """
    return TinyTraining(
        recipe="tiny-f8",
        loss=LossConfig(l1=1.0, l2=2.0, kl_weight=0.0, perceptual="none", adversarial_weight=0.0),
        optimizer=OptimizerConfig(lr=1e-3, warmup=200, ema_decay=0.999),
        run=RunConfig(steps=8_500, batch_size=32, save_every=1_000, validate_every=1_000),
    )


def gaussian() -> GaussianTraining:
    """Gaussian autoencoder: 28×28 digits, 32 numbers of latent, filters that are sums of oriented Gaussians, L2.

    Expected on MNIST's test images, from the first 20,000 for training: MSE 0.00476 ± 0.00002 (three seeds; plain
    filters 0.00495 ± 0.00006) after 5 epochs, 42 seconds on one CPU core.
    omnilatent train gaussian --data mnist
    """
    return GaussianTraining(
        recipe="gaussian",
        optimizer=OptimizerConfig(lr=1.2e-2, warmup=100, final_lr=0.0, ema_decay=0.99),
        run=RunConfig(steps=1_000_000, batch_size=64, save_every=1_000, validate_every=1_000),
    )


def debug() -> KLTraining:
    """Everything at once (discriminator, Laplacian pyramid, EMA) at toy size: seconds on a CPU.

    omnilatent train debug --data synthetic
    """
    return KLTraining(
        recipe="debug",
        model=KLConfig(widths=(8, 8), layers=1, norm_groups=4),
        loss=LossConfig(l2=1.0, perceptual="laplacian", perceptual_weight=0.1, disc_start_step=4, disc_width=8,
                        disc_layers=2),
        optimizer=OptimizerConfig(lr=1e-3, warmup=2),
        crops=CropConfig(size=32, validation_images=4),
        run=RunConfig(steps=12, batch_size=4, save_every=4, validate_every=6, log_every=2, workers=0),
    )


def _with_channels(channels: int) -> KLTraining:
    base = kl_f8_small()
    return replace(base, recipe=f"kl-f8-small-c{channels}", model=replace(base.model, latent_channels=channels))


def _plain(config: KLTraining, recipe: str) -> KLTraining:
    """The same training without what makes an autoencoder variational."""
    return replace(config, recipe=recipe, model=replace(config.model, variational=False),
                   loss=replace(config.loss, kl_weight=0.0))
