"""Named configurations of any-to-any models. Each docstring states metric, hardware, time and command."""

from __future__ import annotations

from dataclasses import replace

from ..training.config import OptimizerConfig, RunConfig
from .config import OmniModelConfig, OmniTraining, PairConfig

# what data/digit_world.py makes, stated here since importing that file would import torch
WORLD = {"mel_bands": 64, "mel_frames": 64, "image_size": (32, 32), "image_patch": 4, "video_frames": 8, "video_size": (32, 32),
         "video_patch": (2, 8), "text_tokens": 8, "vocab_size": 259}


def omni() -> OmniTraining:
    """Any-to-any model of the digits world, 6 layers of 384, by Muon.

    On MNIST and FSDD, held out: audio to text 99.8 %, image to text 99.0 %, image to image 33.2 dB by flow and 47.0 by regression;
    what is made of another modality is read as what it should be in 92.8 % (image to audio) to 100 %, one seed. 381 s on one H200.
    omnilatent train omni --data DATA (a folder with mnist/ and fsdd/)
    """
    return OmniTraining(
        model=OmniModelConfig(hidden_dim=384, num_layers=6, num_heads=6, gradient_checkpointing=False, guidance=3.0, **WORLD),
        pairs=PairConfig(reconstruction_share=0.12, flow_share=0.8, unconditional_share=0.1),
        optimizer=OptimizerConfig(optimizer="muon", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup=200),
        run=RunConfig(steps=15_000, batch_size=512, save_every=1_000, validate_every=1_000),
    )


def omni_small() -> OmniTraining:
    """`omni` with 5 layers of 96, 0.8 M parameters: bundled, and the one that examples/demo.py shows.

    On MNIST and FSDD, held out: audio to text 100 %, image to text 98.5 %; what is made of another modality is read as what it should
    be in 79.3 % (video to audio) to 100 %, but for videos, 46 to 65 %, one seed. Ten minutes of one H200 beside other work.
    omnilatent train omni-small --data DATA (a folder with mnist/ and fsdd/)
    """
    recipe = omni()
    return replace(recipe, recipe="omni-small", model=replace(recipe.model, hidden_dim=96, num_layers=5, num_heads=6),
                   run=replace(recipe.run, steps=20_000))


def omni_coco() -> OmniTraining:
    """Pictures and their captions both ways at 224², 12 layers of 768: 15 % of the run reconstruction alone, then 35 % picture →
    text, 35 % text → picture, 30 % reconstruction.

    Not trained to the end by us.
    omnilatent train omni-coco --data DATA (a folder with pictures and COCO's captions_*.json, or tars with .jpg and .txt)
    """
    return OmniTraining(
        recipe="omni-coco",
        model=OmniModelConfig(modalities=("text", "image"), vocab_size=259),
        pairs=PairConfig(warmup_share=0.15, reconstruction_share=0.30, fused_share=0.0, jobs=2),
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup=2_000),
        run=RunConfig(steps=50_000, batch_size=64, save_every=5_000),
    )


def debug_omni() -> OmniTraining:
    """The same at toy size, seconds on a CPU.

    omnilatent train debug-omni
    """
    return OmniTraining(
        recipe="debug-omni",
        model=OmniModelConfig(hidden_dim=32, num_layers=2, num_heads=2, gradient_checkpointing=False, **WORLD),
        pairs=PairConfig(warmup_share=0.2, contrastive_weight=0.1),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), warmup=2),
        run=RunConfig(steps=12, batch_size=8, save_every=4, validate_every=6, log_every=2, workers=0),
        validation_examples=4,
    )
