"""The configurations of the any-to-any model and of its training. Nothing here imports torch.

- `OmniModelConfig`: the model. `OmniLatentConfig`: the same with what a `Trainer` needs, for use in Python.
- `PairConfig`: which modality is turned into which at what part of a run.
- `OmniTraining`: a recipe's whole configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import tyro

from ..errors import UserError
from ..training.config import OptimizerConfig, RunConfig, check_least, check_whole, is_whole

MODALITIES = ("text", "audio", "image", "video")


@dataclass(frozen=True)
class OmniModelConfig:
    """Widths, and what each modality looks like. Sizes are defaults, not limits."""

    hidden_dim: int = 768
    """Width of every token."""
    num_layers: int = 12
    """Transformer layers."""
    num_heads: int = 12
    """Attention heads."""
    modalities: tuple[str, ...] = MODALITIES
    """Rows of the registry that the model knows."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, more time."""
    max_tokens: int = 8192
    """Position budget: tokens of all sources and of one target together."""
    vocab_size: tyro.conf.Suppress[int] = 32_000
    """Token ids of text, 0 for padding, 1 reserved, 2 for the end. No option of a recipe: its tokenizer's count."""
    text_tokens: int = 128
    """Text that is written at most, unless asked for otherwise."""
    mel_bands: int = 128
    """Bands of a mel spectrogram."""
    mel_patch: int = 4
    """Its frames a token."""
    mel_frames: int = 1_000
    """Frames of sound that is made, unless asked for otherwise."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of pictures that are made, unless asked for otherwise."""
    image_patch: int = 16
    """Pixels of a token's side."""
    video_frames: int = 16
    """Frames of videos that are made, unless asked for otherwise."""
    video_size: tuple[int, int] = (112, 112)
    """Height and width of videos that are made, unless asked for otherwise."""
    video_patch: tuple[int, int] = (4, 16)
    """Frames and pixels of a token's sides."""
    image_codec: str = ""
    """NAME of a codec whose latents are the tokens of pictures; without, pixels are."""
    video_codec: str = ""
    """The same of videos, whose frames it sees one by one."""
    latent_patch: int = 2
    """Latent pixels of such a token's side."""
    flow_steps: int = 8
    """Steps of the flow when pictures, sound and videos are made; 0: the regression instead."""
    copy_steps: int = 0
    """The same for what is made of sources that it is among."""
    guidance: float = 1.0
    """How far the flow goes from what it would make of nothing to what the source says, and beyond above 1, at twice the time."""

    def __post_init__(self) -> None:
        for name in ("modalities", "image_size", "video_size", "video_patch"):
            if isinstance(getattr(self, name), list):  # as JSON and people write them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_whole(self, 1, "hidden_dim", "num_layers", "num_heads", "max_tokens", "text_tokens", "mel_bands", "mel_patch", "mel_frames",
                    "image_patch", "video_frames", "latent_patch")
        check_whole(self, 0, "flow_steps", "copy_steps")
        for name in ("image_size", "video_size", "video_patch"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 2 or not all(map(is_whole, value)) or min(value) < 1:
                raise ValueError(f"{name} is a tuple of two whole numbers, each at least 1; got {value!r}")
        if self.hidden_dim % self.num_heads or self.hidden_dim // self.num_heads % 2:
            raise ValueError(f"hidden_dim {self.hidden_dim} does not split into {self.num_heads} heads of an even number of "
                             "channels")
        if not is_whole(self.vocab_size) or self.vocab_size < 4:
            raise ValueError(f"vocab_size is at least 4 (padding, reserved, end, one token); got {self.vocab_size!r}")
        if not isinstance(self.guidance, (int, float)) or not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is a number from 0 on; got {self.guidance!r}")
        self._check_modalities()

    def _check_modalities(self) -> None:
        names = self.modalities
        if not isinstance(names, tuple) or not names:
            raise ValueError(f"modalities is a tuple of names such as {', '.join(MODALITIES)}, one at least; got {names!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"every modality is named once; got {', '.join(names)}")
        for modality, codec in self.codecs.items():
            if modality not in names:
                raise ValueError(f"{codec} is to give the tokens of {modality}, and the modalities are {', '.join(names)}")

    @property
    def codecs(self) -> dict[str, str]:
        """Modality → the NAME of the codec of its tokens."""
        named = {"image": self.image_codec, "video": self.video_codec}
        return {modality: name for modality, name in named.items() if name}


@dataclass(frozen=True)
class OmniLatentConfig(OmniModelConfig):
    """The model's configuration with that of its training by `Trainer`."""

    batch_size: int = 4
    """Examples an optimiser step."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW (betas 0.9, 0.95)."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_steps: int = 100_000
    """Optimiser steps."""
    mixed_precision: bool = True
    """bf16 where the GPU has it, else fp16 with a loss scaler."""


@dataclass(frozen=True)
class PairConfig:
    """Which pairs of source and target are learned from."""

    warmup_share: float = 0.0
    """Share of the run, at its beginning, in which every modality is only turned into itself."""
    reconstruction_share: float = -1.0
    """Share of the pairs after that in which a modality is turned into itself; -1: all pairs are as likely."""
    fused_share: float = 0.2
    """Share of the examples whose source is several modalities at once."""
    jobs: int = 4
    """Pairs a step at most, each for an equal part of the batch."""
    flow_share: float = 0.5
    """Share of the pictures, sounds and videos that are learned by flow matching; the others by regression."""
    unconditional_share: float = 0.0
    """Share of what is learned by flow matching that is learned without a source, which guidance needs."""
    contrastive_weight: float = 0.0
    """Weight of InfoNCE between the pooled latents of source and target."""

    def __post_init__(self) -> None:
        for name in ("warmup_share", "fused_share", "flow_share", "unconditional_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is a share, 0 to 1; got {getattr(self, name)}")
        if self.reconstruction_share != -1 and not 0 <= self.reconstruction_share <= 1:
            raise ValueError(f"--reconstruction-share is a share, 0 to 1, or -1; got {self.reconstruction_share}")
        check_least(self, 1, "jobs")
        check_least(self, 0, "contrastive_weight")


@dataclass(frozen=True)
class OmniTraining:
    """What an `omni` recipe trains, and how."""

    USUAL_DATA: ClassVar[str] = "digits"

    recipe: tyro.conf.Suppress[str] = "omni"
    model: OmniModelConfig = field(default_factory=OmniModelConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tokenizer: str = ""
    """A tokenizer.json of Hugging Face or a sentencepiece .model for text; without, bytes of UTF-8."""
    validation_examples: int = 64
    """Held-out examples that a validation looks at."""
    task: tyro.conf.Suppress[Literal["omnilatent.omni.task:OmniTask"]] = "omnilatent.omni.task:OmniTask"

    @property
    def codecs(self) -> tuple[str, ...]:
        """NAMEs of codecs that the model takes tokens from."""
        return tuple(self.model.codecs.values())

    def __post_init__(self) -> None:
        check_least(self, 1, "validation_examples")

    def check(self, init: str | None) -> None:
        """Refuse what cannot be, before anything is opened."""
        if self.run.accumulate > 1:
            raise UserError("--accumulate is not for omni recipes: take a smaller --batch-size, or --gradient-checkpointing.")
        if self.model.guidance != 1 and not self.pairs.unconditional_share:
            raise UserError(f"--guidance {self.model.guidance:g} needs a part that is learned without a source: give "
                            "--unconditional-share 0.1.")
        if self.tokenizer and init is not None:
            raise UserError(f"--tokenizer {self.tokenizer}: --init {init} has its own, which its weights know; leave one out.")
        if init is not None:  # which has learned both before
            return
        if self.pairs.flow_share == 0 and self.model.flow_steps:
            raise UserError("--flow-share 0 learns no flow: give --flow-steps 0 too.")
        if self.pairs.flow_share == 1 and not self.model.copy_steps:
            raise UserError("--flow-share 1 learns no regression, which makes what is among the sources: give --copy-steps 8 too.")
