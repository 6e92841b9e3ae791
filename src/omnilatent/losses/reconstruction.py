"""How far a reconstruction is from its image, one number an image."""

from __future__ import annotations

from torch import Tensor


def pixel_loss(reconstruction: Tensor, images: Tensor, l1: float, l2: float) -> Tensor:
    """`l1` · mean |x̂ − x| + `l2` · mean (x̂ − x)², `(b, c, h, w)` in [-1, 1] → `(b,)`."""
    difference = (reconstruction - images).float()
    loss = difference.new_zeros(len(images))
    if l1:
        loss = loss + l1 * difference.abs().flatten(1).mean(1)
    if l2:
        loss = loss + l2 * difference.square().flatten(1).mean(1)
    return loss
