"""The devices of this machine, as torch sees them. torch is imported on use, so naming this file costs nothing.

- `choose_device`: what --device means.
- `choose_float64_device`: the same for what needs float64.
- `has_bfloat16`: whether a device computes in bfloat16 itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch


def choose_device(wanted: str) -> str:
    """The torch device to use: for "auto" a GPU where there is one, else the CPU.

    Raises:
        UserError: this torch does not see the device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[wanted]:
        raise UserError(f"--device {wanted}: this torch ({torch.__version__}) sees no such device; use --device cpu, "
                        "or install the torch that was built for it.")
    return wanted


def choose_float64_device(wanted: str) -> str:
    """As `choose_device`, but "auto" passes over MPS, which has no float64."""
    device = choose_device(wanted)
    return "cpu" if device == "mps" and wanted == "auto" else device


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether the device computes bfloat16 itself: CPUs mostly emulate it, slower than float32."""
    import torch

    return str(device).startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
