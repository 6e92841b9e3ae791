"""The adversarial part of an autoencoder's loss.

- `PatchDiscriminator`: judges overlapping patches (Isola et al. 2017, arXiv 1611.07004).
- `hinge_loss`: what it minimises (Lim & Ye 2017, arXiv 1705.02894).
- `adaptive_weight`: how much its opinion counts (Esser et al. 2021, arXiv 2012.09841, equation 7).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images `(b, 3, h, w)` in [-1, 1] → logits `(b, 1, h', w')`, one a patch; 70×70 pixels with three layers.

    GroupNorm stands where the paper has BatchNorm: it needs no synchronisation over processes, and real and
    reconstructed images can share a batch without leaking into each other.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"a discriminator of width {width} and {layers} layers: both are at least 1")
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            wider = min(width * 2**layer, 8 * width)
            stride = 2 if layer < layers else 1
            blocks += [nn.Conv2d(channels, wider, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(_groups(wider), wider), nn.LeakyReLU(0.2)]
            channels = wider
        blocks.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.blocks = nn.Sequential(*blocks)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        """N(0, 0.02) for convolutions, as DCGAN and pix2pix."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


def _groups(channels: int) -> int:
    """The most groups, up to 16 and of at least 4 channels each, that divide the channels."""
    return next(groups for groups in range(min(16, max(1, channels // 4)), 0, -1) if channels % groups == 0)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 − D(x)) + mean max(0, 1 + D(x̂))) over all patches."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """λ = ‖∇ L_rec‖ / (‖∇ L_adv‖ + 1e-4), at most 10⁴; both gradients are those of the decoder's last layer."""
    weight = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return weight.clamp(0.0, 1e4).detach()


def last_layer_gradient(features: Tensor, weight_shape: torch.Size, output_gradient: Tensor) -> Tensor:
    """The gradient that a 3×3 convolution's weight receives, from its input and its output's gradient alone.

    It needs no pass through the graph, so the adaptive weight costs two small convolutions.
    """
    return nn.grad.conv2d_weight(features.float(), weight_shape, output_gradient.float(), padding=1)
