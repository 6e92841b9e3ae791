"""The frozen configuration of tokenizers and of their training. Nothing here imports torch.

- `VQGANConfig`: the architecture around any quantizer; `LGQModel`, `SimVQModel`, `VQModel`, `FSQModel`, `BinaryModel`: with
  one kind of quantizer each, so that a command line shows the options of its own. `MODELS`: kind → class.
- `LGQTraining`, `SimVQTraining`, `VQTraining`, `FSQTraining`: a recipe's whole configuration.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from ..quantizers.config import BinaryConfig, FSQConfig, Kind, LGQConfig, SimVQConfig, VQConfig, levels_for
from .config import AutoencoderTraining, ConvConfig, KLConfig, LossConfig

MOST_CODES, MOST_BOOKS = 2**18, 16


@dataclass(frozen=True)
class VQGANConfig(ConvConfig):
    """The convolutional encoder and decoder of the KL autoencoder around a quantizer, as in VQGAN (Esser et al. 2021,
    arXiv 2012.09841).

    The downsampling is 2^(len(widths) − 1): each level but the last halves the image.
    """

    latent_channels: int = 8
    """Width of the vectors that are quantized, 1 to 64."""
    kind: tyro.conf.Suppress[Kind] = "lgq"
    codebook_size: Annotated[int | None, arg(name="codes")] = None
    """Codes K of each codebook, 2 to 262144; by default what the recipe has. fsq takes the nearest product below, unless
    --levels says which."""
    num_codebooks: Annotated[int, arg(name="codebooks")] = 1
    """Codebooks that share a vector's width (product quantization), 1 to 16."""
    depth: Annotated[int, arg(name="residual-stages")] = 1
    """Residual stages of lgq, simvq or vq, 1 to 16, each a codebook for what the last left over."""
    usual_codes: tyro.conf.Suppress[int] = 1024
    """The codes where nothing is said: apart from `codebook_size`, so that levels replace the one and contradict the other."""
    quantizer: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= (self.codebook_size or 2) <= MOST_CODES:
            raise ValueError(f"--codes is {self.codebook_size}; possible are 2 to {MOST_CODES}")
        for option, value in (("--codebooks", self.num_codebooks), ("--residual-stages", self.depth)):
            if not 1 <= value <= MOST_BOOKS:
                raise ValueError(f"{option} is {value}; possible are 1 to {MOST_BOOKS}")
        if self.num_codebooks > 1 and self.depth > 1:
            raise ValueError(f"residual stages have one codebook each: --codebooks {self.num_codebooks} and "
                             f"--residual-stages {self.depth} do not go together")
        if self.kind in ("lgq", "simvq", "vq"):
            if self.latent_channels % self.num_codebooks:
                raise ValueError(f"--latent-channels {self.latent_channels} does not split into --codebooks "
                                 f"{self.num_codebooks} of equal width")
        elif self.depth > 1:
            raise ValueError(f"{self.kind} has a fixed grid, which cannot follow shrinking residuals: --residual-stages "
                             f"{self.depth} must be 1")
        if self.kind in ("lfq", "bsq") and self.codes & (self.codes - 1):
            raise ValueError(f"{self.kind} has a power of two of codes; --codes is {self.codes}")

    @property
    def variational(self) -> bool:
        """Never: there is no posterior, so no noise is drawn and there is no KL term."""
        return False

    @property
    def codes(self) -> int:
        """The codes that each codebook really has."""
        return self.codebook_size or self.usual_codes

    @property
    def books(self) -> int:
        """Indices a position."""
        return self.num_codebooks * self.depth

    @property
    def description(self) -> str:
        """The codebooks in words."""
        books = f"{self.books} {'residual stages' if self.depth > 1 else 'codebooks'} of " if self.books > 1 else ""
        return f"{self.kind}, {books}{self.codes} codes"

    def backbone(self) -> KLConfig:
        """Encoder and decoder without the quantizer."""
        return KLConfig(**{entry.name: getattr(self, entry.name) for entry in fields(ConvConfig)}, variational=False)

    def arguments(self) -> dict[str, Any]:
        """What `build_quantizer` takes beside kind and width."""
        return {"codebook_size": self.codes, "num_codebooks": self.num_codebooks, "depth": self.depth, **asdict(self.quantizer)}


@dataclass(frozen=True)
class LGQModel(VQGANConfig):
    """A tokenizer by learnable geometric quantization."""

    kind: tyro.conf.Suppress[Kind] = "lgq"
    quantizer: LGQConfig = field(default_factory=LGQConfig)


@dataclass(frozen=True)
class SimVQModel(VQGANConfig):
    """A tokenizer with a frozen codebook under one learned linear map."""

    kind: tyro.conf.Suppress[Kind] = "simvq"
    quantizer: SimVQConfig = field(default_factory=SimVQConfig)


@dataclass(frozen=True)
class VQModel(VQGANConfig):
    """A tokenizer whose codes are moving averages of their vectors."""

    kind: tyro.conf.Suppress[Kind] = "vq"
    quantizer: VQConfig = field(default_factory=VQConfig)


@dataclass(frozen=True)
class FSQModel(VQGANConfig):
    """A tokenizer that rounds a few bounded scalars."""

    kind: tyro.conf.Suppress[Kind] = "fsq"
    quantizer: FSQConfig = field(default_factory=FSQConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        given, codes = self.quantizer.levels, self.codes
        if given is not None and min(given, default=0) < 2:
            raise ValueError(f"--levels is {' '.join(map(str, given))}; there is at least one, and each is at least 2")
        if given is not None and self.codebook_size not in (None, codes):
            raise ValueError(f"--levels {' '.join(map(str, given))} make {codes} codes; --codes is {self.codebook_size}")
        if codes > MOST_CODES:
            raise ValueError(f"--levels {' '.join(map(str, given or ()))} make {codes} codes; the most are {MOST_CODES}")

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"levels": self.levels}

    @property
    def levels(self) -> tuple[int, ...]:
        return self.quantizer.levels or levels_for(self.codebook_size or self.usual_codes)

    @property
    def codes(self) -> int:
        return math.prod(self.levels)

    @property
    def description(self) -> str:
        wished = super().codes if self.quantizer.levels is None else None
        below = f", the nearest below {wished}" if wished not in (None, self.codes) else ""
        return f"{super().description} ({' × '.join(map(str, self.levels))}{below})"


@dataclass(frozen=True)
class BinaryModel(VQGANConfig):
    """A tokenizer by lookup-free (kind lfq) or binary spherical quantization (bsq)."""

    kind: tyro.conf.Suppress[Kind] = "bsq"
    quantizer: BinaryConfig = field(default_factory=BinaryConfig)


MODELS: dict[Kind, type[VQGANConfig]] = {"lgq": LGQModel, "simvq": SimVQModel, "vq": VQModel, "fsq": FSQModel,
                                         "lfq": BinaryModel, "bsq": BinaryModel}


@dataclass(frozen=True)
class VQGANTraining(AutoencoderTraining):
    """A recipe's resolved configuration: a tokenizer, its loss, its optimiser, its crops and the run."""

    model: VQGANConfig = field(default_factory=LGQModel)
    loss: LossConfig = field(default_factory=lambda: LossConfig(kl_weight=0.0))

    def __post_init__(self) -> None:
        if self.loss.kl_weight:
            raise ValueError(f"--kl-weight is {self.loss.kl_weight:g}, but a tokenizer has no posterior; leave it at 0")
        if self.loss.scale_equivariance or self.loss.rotation_equivariance or self.loss.spectrum_weight:
            raise ValueError("--scale-equivariance, --rotation-equivariance and --spectrum-weight are terms of a continuous "
                             "latent; leave them at 0 for a tokenizer")


@dataclass(frozen=True)
class LGQTraining(VQGANTraining):
    """Learn a tokenizer by learnable geometric quantization."""

    model: LGQModel = field(default_factory=LGQModel)


@dataclass(frozen=True)
class SimVQTraining(VQGANTraining):
    """Learn a tokenizer with a frozen codebook under one learned linear map."""

    model: SimVQModel = field(default_factory=SimVQModel)


@dataclass(frozen=True)
class VQTraining(VQGANTraining):
    """Learn a tokenizer whose codes are moving averages of their vectors."""

    model: VQModel = field(default_factory=VQModel)


@dataclass(frozen=True)
class FSQTraining(VQGANTraining):
    """Learn a tokenizer that rounds a few bounded scalars."""

    model: FSQModel = field(default_factory=FSQModel)
