"""A convolution whose filters are sums of oriented 2-D Gaussians, a drop-in for `nn.Conv2d`.

- `GaussianConv2d`: six numbers a Gaussian (μx, μy, log σx, log σy, θ, amplitude) in place of one a pixel; what they
  mean, and how the filters are kept from aliasing, stands in gaussian_kernels.py.

Structured receptive fields: Jacobsen et al. 2016 (arXiv 1605.02971, a fixed basis of Gaussian derivatives) and Tabernik
et al. 2020 (arXiv 1902.07474, displaced isotropic Gaussians); here each Gaussian is learned whole: place, widths, turn.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gaussian_fit import fit_conv2d
from .gaussian_kernels import Pair, gaussian_kernels

GEOMETRY = ("mu", "log_sigma", "theta")  # the parameters that are no amplitudes; they learn at a rate of their own


class GaussianConv2d(nn.Module):
    """`nn.Conv2d` with filters that are sums of `num_gaussians` oriented Gaussians.

    Parameters `(out, in/groups, k, …)`: `mu`, `log_sigma`, `theta`, `amplitude` (see `gaussian_kernels`), and `bias`
    `(out,)`: 6·k·out·in/groups + out numbers, where Conv2d has height·width·out·in/groups + out.

    At first the centres lie on a ring around the middle, the widths are 0.8 to 1.5 px (for 5×5) and differ by a
    factor of 1.3 to 2 along the two axes, since a round Gaussian has no gradient by its angle; angles are random,
    amplitudes of both signs. Each output's filters are then scaled so that white noise comes out with the
    variance that Conv2d's initialisation gives on average, a third of its own.

    Without gradients in eval mode the filters are computed once and kept until the parameters change.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups, bias: as of `nn.Conv2d`; padding also as
            "same" or "valid".
        num_gaussians: Gaussians a filter.

    Raises:
        ValueError: a size below 1, or channels that do not divide by the groups.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Pair, num_gaussians: int = 3,
                 stride: int | Pair = 1, padding: int | Pair | str = 0, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        height, width = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        least = min(in_channels, out_channels, height, width, num_gaussians, groups)
        if least < 1:
            raise ValueError(f"in_channels {in_channels}, out_channels {out_channels}, kernel_size {kernel_size}, "
                             f"num_gaussians {num_gaussians}, groups {groups}: each is at least 1")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"in_channels {in_channels} and out_channels {out_channels} must divide by groups "
                             f"{groups}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (height, width)
        self.num_gaussians, self.stride, self.padding, self.groups = num_gaussians, stride, padding, groups
        shape = (out_channels, in_channels // groups, num_gaussians)
        self.mu = nn.Parameter(torch.empty(*shape, 2))
        self.log_sigma = nn.Parameter(torch.empty(*shape, 2))
        self.theta = nn.Parameter(torch.empty(shape))
        self.amplitude = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self._kept: tuple[tuple[int, ...], Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's global generator."""
        height, width = self.kernel_size
        shape, k = self.theta.shape, self.num_gaussians
        place = torch.arange(k) * (2 * math.pi / k) + 2 * math.pi * torch.rand(*shape[:2], 1)
        reach = torch.tensor([width - 1, height - 1]) / 4  # half of the way to the border
        ring = torch.empty(shape).uniform_(0.6, 1.2)
        self.mu.copy_((ring * torch.stack([place.cos(), place.sin()])).permute(1, 2, 3, 0) * reach)
        sigma = torch.empty(shape).uniform_(math.log(0.8), math.log(1.5)) + math.log((height + width) / 10)
        stretch = torch.empty(shape).uniform_(math.log(1.3), math.log(2.0)) / 2
        self.log_sigma.copy_(torch.stack([sigma + stretch, sigma - stretch], -1))
        self.theta.uniform_(-math.pi / 2, math.pi / 2)
        signs = 1 - 2.0 * ((torch.arange(k) + torch.randint(2, (*shape[:2], 1))) % 2)
        self.amplitude.copy_(signs * torch.empty(shape).uniform_(0.5, 1.5))
        energy = self._computed().square().sum((1, 2, 3))  # (out,), the variance that white noise gets
        self.amplitude.mul_((3 * energy).rsqrt().view(-1, 1, 1))
        if self.bias is not None:
            bound = 1 / math.sqrt(shape[1] * height * width)
            self.bias.uniform_(-bound, bound)

    def kernel(self) -> Tensor:
        """The filters `(out, in/groups, height, width)`, what `nn.Conv2d` calls its weight."""
        learning = torch.is_grad_enabled() and any(getattr(self, n).requires_grad for n in (*GEOMETRY, "amplitude"))
        if self.training or learning or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self._computed()
        parameters = [getattr(self, name) for name in (*GEOMETRY, "amplitude")]
        if any(p.is_inference() for p in parameters):  # nothing tells whether they have changed
            return self._computed()
        # an optimiser or an average changes them in place, `vector_to_parameters` gives them other memory
        versions = tuple((p._version, p.data_ptr()) for p in parameters)
        if self._kept is None or self._kept[0] != versions:
            self._kept = versions, self._computed()
        return self._kept[1]

    def forward(self, x: Tensor) -> Tensor:
        """`(b, in, h, w)` → `(b, out, h', w')`, sizes as of `nn.Conv2d`."""
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, groups=self.groups)

    def sigmas(self) -> Tensor:
        """The widths in pixels along both axes `(out, in/groups, k, 2)`, without the pixel's window."""
        return self.log_sigma.detach().exp()

    def _computed(self) -> Tensor:
        """The filters, in float32 at least, then in the parameters' dtype."""
        wide = torch.promote_types(self.mu.dtype, torch.float32)
        parts = (getattr(self, name).to(wide) for name in (*GEOMETRY, "amplitude"))
        kind = self.mu.device.type
        rounding = kind in ("cpu", "cuda", "mps") and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if rounding else nullcontext():
            return gaussian_kernels(*parts, self.kernel_size).to(self.mu.dtype)

    def train(self, mode: bool = True) -> GaussianConv2d:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> GaussianConv2d:
        self._kept = None  # another device or dtype
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, num_gaussians="
                f"{self.num_gaussians}, stride={self.stride}, padding={self.padding}, groups={self.groups}, "
                f"bias={self.bias is not None}")

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, num_gaussians: int = 3, steps: int = 300, starts: int = 4
                    ) -> tuple[GaussianConv2d, float]:
        """The Gaussian layer nearest to `conv`; see `gaussian_fit.fit_conv2d`."""
        return fit_conv2d(cls, conv, num_gaussians, steps, starts)
