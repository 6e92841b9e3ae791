"""What an encoding is asked for, and what a store then says of its rows.

- `EncodeConfig`: how images become rows.
- `usual_load`: batch size and workers where nothing is said.
- `describe`: the `store.json` of a store that a codec fills so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import __version__ as pillow_version

from ..data.images import MAX_PIXELS
from ..data.workers import own_cores
from ..errors import UserError
from ..codec import Codec
from .description import Description
from .packing import bits_for
from .writer import ROWS


# Images. Compiling takes half a minute and saves up to a millisecond of each: 0.7 for kl-f8 at 256² on an H200.
WORTH_COMPILING = 30_000
MOST_WORKERS = 32


@dataclass(frozen=True)
class EncodeConfig:
    """How images become rows."""

    size: int | None = 256
    """Side of the centre square in pixels; None: every image in its own size."""
    batch_size: int = 32
    """Images that the codec sees at a time."""
    logvar: bool = False
    """Keep the posterior's log-variance too."""
    store_dtype: Literal["float16", "float32"] = "float16"
    """What latents are stored as."""
    workers: int = 0
    """Processes that read and decode; 0: none."""
    compile: bool = False
    """Compile the codec on a GPU if `size` is fixed and there are `WORTH_COMPILING` images to encode."""
    rows_per_shard: int = ROWS
    """Rows of a shard at most."""
    max_pixels: int = MAX_PIXELS
    """What the source was opened with: a larger limit gives files that were too large another try."""
    moved: bool = False
    """The source is what the store was made of, at another place: files that changed since replace their rows."""
    part: int = 0
    """Which of `parts` shares of the images to encode."""
    parts: int = 1

    def __post_init__(self) -> None:
        if (self.size is not None and self.size < 1) or self.batch_size < 1 or self.workers < 0:
            raise ValueError(f"size {self.size}, batch_size {self.batch_size}, workers {self.workers}: expected at "
                             "least 1, 1 and 0")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part {self.part} of {self.parts}: expected 0 to parts - 1")

    @property
    def reader(self) -> str:
        return f"Pillow {pillow_version}, at most {self.max_pixels} pixels"


def usual_load(device: str) -> tuple[int, int]:
    """Batch size and workers for a device. On a CPU the codec needs the cores."""
    cores = own_cores()
    return (8, max(1, cores // 8)) if device == "cpu" else (64, max(1, min(MOST_WORKERS, cores - 1)))


def describe(codec: Codec, config: EncodeConfig) -> Description:
    """What all rows that `codec` makes under `config` have in common.

    Raises:
        UserError: the log-variance of a codec that has none is asked for, or it takes no colour images.
    """
    spec, origin = codec.spec, codec.provenance
    if config.logvar and spec.kind != "gaussian":
        raise UserError(f"{codec.label} makes no posterior, so there is no log-variance to store: leave out --logvar.")
    if spec.image_channels != 3:
        raise UserError(f"{codec.label} takes images of {spec.image_channels} channels; 'encode' reads RGB images.")
    if spec.kind == "codes":
        assert spec.codebook_size is not None  # a tokenizer states it
        tensors = {"codes": f"{bits_for(spec.codebook_size)} bits"}
    else:
        tensors = dict.fromkeys(("mean", "logvar") if config.logvar else ("mean",), config.store_dtype)
    square = {"resize": "short side, bicubic, antialiased (ADM)", "crop": "centre square", "size": config.size}
    eye = {} if codec.retina is None else {"retina": codec.retina}
    path = Path(origin.name).expanduser()  # of a hub id or a bundled model the name is enough
    return Description(
        "latents",
        {"weights": origin.weights_hash, "codec": origin.kind, "spec": spec.to_json(),
         "preprocessing": square if config.size else {"resize": "none", "crop": "none", "size": "native"},
         "dtype": str(codec.dtype).removeprefix("torch."), "tensors": tensors, **eye},
        {"name": origin.name, "label": codec.label, "path": str(path.resolve()) if path.exists() else None,
         "licence": origin.licence},
    )
