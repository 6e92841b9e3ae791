"""Float32 as such.

- `ieee_float32`: no TF32 inside. A GPU rounds the operands of float32 convolutions to 10 bits by default, and
  figures should not depend on the device: SSIM and VIF subtract squares of means from means of squares, which would
  not survive it.
- `as_stated`: the same for a codec that is said to run in float32; other types run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """A context, or a decorator, in which float32 convolutions and products keep all their bits."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def as_stated(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Where a codec of this type runs for a figure of quality: what is called float32 is IEEE float32."""
    return ieee_float32() if dtype == torch.float32 else nullcontext()
