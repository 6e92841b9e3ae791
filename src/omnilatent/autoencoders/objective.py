"""What an autoencoder's reconstruction and latent are pulled towards.

- `Pull`: the gradients of the reconstruction terms and of the discriminator's opinion, apart from each other.
- `Objective`: computes them, and weighs one against the other by the gradients that the last layer would receive;
  beside them the terms that look at the latent.

The gradients stop at the pixels, so the task sends one combined gradient back through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..latent import DiagonalGaussian, LatentSpec
from ..losses.adversarial import adaptive_weight, last_layer_gradient
from ..losses.reconstruction import pixel_loss
from .architecture import Autoencoder, Reconstruction
from .config import LossConfig
from .regularisers import spectrum_loss

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Pull:
    """One part of a batch: its reconstructed `images` and the gradients by them, all `(b, 3, h, w)` in fp32;
    `adversarial` is None before the discriminator starts. `numbers` are for the log."""

    images: Tensor
    reconstruction: Tensor
    adversarial: Tensor | None
    numbers: dict[str, Tensor]


class Objective:
    """The terms of `LossConfig`.

    Args:
        model: the bare module, whose last layer the adaptive weight looks at.
        perceptual: the perceptual distance, or None for none.
        discriminator: the bare module, or None. It is asked without DDP, which would wait for gradients of it.
    """

    def __init__(self, config: LossConfig, fabric: Fabric, model: Autoencoder,
                 perceptual: Callable[[Tensor, Tensor], Tensor] | None, discriminator: nn.Module | None) -> None:
        self.config, self.fabric, self.model = config, fabric, model
        self.perceptual, self.discriminator = perceptual, discriminator

    @torch.enable_grad()
    def pull(self, reconstructed: Tensor, images: Tensor, adversarial: bool) -> Pull:
        """Both arguments `(b, 3, h, w)` in [-1, 1]."""
        config = self.config
        leaf = reconstructed.detach().float().requires_grad_()
        terms = {"pixel": pixel_loss(leaf, images, config.l1, config.l2).mean()}
        if self.perceptual is not None:  # in fp32: its networks were calibrated so
            terms["perceptual"] = config.perceptual_weight * self.perceptual(leaf / 2 + 0.5, images / 2 + 0.5).mean()
        loss = torch.stack(list(terms.values())).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        numbers = {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
        if not adversarial:
            return Pull(leaf.detach(), gradient, None, numbers)
        assert self.discriminator is not None
        with self.fabric.autocast():
            logits = self.discriminator(leaf).float()
        # The sum is differentiated, not the mean, whose gradients are too small for fp16.
        (opinion,) = torch.autograd.grad(-logits.sum(), leaf)
        numbers["adversarial"] = -logits.detach().mean()
        return Pull(leaf.detach(), gradient, opinion / logits.numel(), numbers)

    def latent_terms(
        self, out: Reconstruction, images: Tensor, variational: bool
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The weighted terms on the latent of `images` `(b, 3, h, w)`, not the transformed one, each with its own
        value for the log: KL in nats an image, a quantizer's losses, the spectrum's squared log ratio."""
        if variational:
            spec = LatentSpec(out.mean.shape[1], images.shape[-1] // out.mean.shape[-1])
            kl = DiagonalGaussian(out.mean, out.logvar, spec).kl().mean()
            yield self.config.kl_weight * kl / images[0].numel(), {"kl": kl.detach()}
        for name, term in (out.losses or {}).items():
            yield term, {name: term.detach()}
        if self.config.spectrum_weight:
            spectrum = spectrum_loss(out.mean, images).mean()
            yield self.config.spectrum_weight * spectrum, {"spectrum": spectrum.detach()}

    def last_layer(self, out: Reconstruction, pull: Pull) -> Tensor:
        """The gradients `(2, …)` that the last layer's weight would receive from either side of the pull."""
        assert out.features is not None and pull.adversarial is not None
        shape, gain = self.model.last_layer.shape, self.model.output_gain
        features, sides = out.features.detach(), (pull.reconstruction, pull.adversarial)
        return torch.stack([gain * last_layer_gradient(features, shape, side) for side in sides])

    def weight(self, last_layer: Tensor) -> Tensor:
        """The adversarial weight, from the last layer's gradients of this process's whole batch."""
        everywhere = self.fabric.all_reduce(last_layer, reduce_op="mean")
        return self.config.adversarial_weight * adaptive_weight(*everywhere)
