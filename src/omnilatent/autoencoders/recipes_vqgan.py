"""Named configurations of tokenizers. Each docstring states metric, hardware, time and command.

The four full recipes differ in the quantizer alone, and so do the four small ones.
"""

from __future__ import annotations

from typing import TypeVar

from ..training.config import OptimizerConfig, RunConfig
from .config import CropConfig, LossConfig
from .vqgan_config import (FSQModel, FSQTraining, LGQModel, LGQTraining, SimVQModel, SimVQTraining, VQGANTraining, VQModel,
                           VQTraining)

Training = TypeVar("Training", bound=VQGANTraining)


def lgq() -> LGQTraining:
    """Tokenizer with learnable geometric quantization: f8, 1,024 codes of 8 numbers, L1 + LPIPS + PatchGAN, bf16.

    Not trained to the end by us.
    omnilatent train lgq --data photos/
    """
    return _full(LGQTraining, "lgq")


def simvq() -> SimVQTraining:
    """lgq with SimVQ: a frozen codebook under one learned linear map.

    Not trained to the end by us.
    omnilatent train simvq --data photos/
    """
    return _full(SimVQTraining, "simvq")


def vq() -> VQTraining:
    """lgq with VQ: codes are moving averages of their vectors, dead ones move to vectors of the batch.

    Not trained to the end by us.
    omnilatent train vq --data photos/
    """
    return _full(VQTraining, "vq")


def fsq() -> FSQTraining:
    """lgq with FSQ: four scalars of 8, 5, 5 and 5 levels, 1,000 codes.

    Not trained to the end by us.
    omnilatent train fsq --data photos/
    """
    return _full(FSQTraining, "fsq")


SMALL = {"widths": (32, 64, 96, 128), "layers": 1, "norm_groups": 8, "usual_codes": 8192}


def lgq_small() -> LGQTraining:
    """Tokenizer for CPUs with learnable geometric quantization: f8, 8,192 codes, 3.48 M parameters with these,
    L1 + 2·L2, by Muon.

    Expected on the 100 ImageNet-sample val photos at 256²: 26.25 dB, 8,161 codes used, after ten minutes on one H200 (one
    seed); bundled after a little more on textures (docs/experiments.md).
    omnilatent train lgq-small --data photos/
    """
    return _small(LGQTraining, "lgq-small", LGQModel(**SMALL))


def simvq_small() -> SimVQTraining:
    """lgq-small with SimVQ.

    Not trained to the end by us.
    omnilatent train simvq-small --data photos/
    """
    return _small(SimVQTraining, "simvq-small", SimVQModel(**SMALL))


def vq_small() -> VQTraining:
    """lgq-small with VQ.

    Not trained to the end by us.
    omnilatent train vq-small --data photos/
    """
    return _small(VQTraining, "vq-small", VQModel(**SMALL))


def fsq_small() -> FSQTraining:
    """lgq-small with FSQ: 8 · 8 · 5 · 5 · 5 = 8,000 codes.

    Not trained to the end by us.
    omnilatent train fsq-small --data photos/
    """
    return _small(FSQTraining, "fsq-small", FSQModel(**SMALL))


def debug_lgq() -> LGQTraining:
    """A tokenizer with everything at once (discriminator with ramp, Laplacian pyramid, EMA) at toy size.

    omnilatent train debug-lgq --data synthetic
    """
    return LGQTraining(
        recipe="debug-lgq",
        model=LGQModel(widths=(8, 8), layers=1, norm_groups=4, latent_channels=4, codebook_size=32),
        loss=LossConfig(l2=1.0, kl_weight=0.0, perceptual="laplacian", perceptual_weight=0.1, disc_start_step=4, disc_ramp=4,
                        disc_width=8, disc_layers=2),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.5, 0.9), warmup=2),
        crops=CropConfig(size=32, validation_images=4),
        run=RunConfig(steps=12, batch_size=4, save_every=4, validate_every=6, log_every=2, workers=0),
    )


def _full(training: type[Training], recipe: str) -> Training:
    return training(
        recipe=recipe,
        loss=LossConfig(kl_weight=0.0, disc_start_step=20_000, disc_ramp=5_000),
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.5, 0.9), warmup=1_000),
    )


def _small(training: type[Training], recipe: str, model: LGQModel | SimVQModel | VQModel | FSQModel) -> Training:
    return training(
        recipe=recipe,
        model=model,
        loss=LossConfig(l1=1.0, l2=2.0, kl_weight=0.0, perceptual="none", adversarial_weight=0.0),
        optimizer=OptimizerConfig(optimizer="muon", lr=2e-3, warmup=200, ema_decay=0.999),
        crops=CropConfig(min_scale=0.8),
        run=RunConfig(steps=9_000, batch_size=32, save_every=1_000, validate_every=1_000),
    )
