"""Float32 as such.

- `ieee_float32`: no TF32 inside. A GPU rounds the operands of float32 convolutions to 10 bits by default, and
  figures should not depend on the device: SSIM and VIF subtract squares of means from means of squares, which would
  not survive it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
