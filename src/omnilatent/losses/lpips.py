"""LPIPS with its true networks (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", arXiv 1801.03924, version 0.1 of the linear heads).

- `LPIPS`: the distance of two batches of images, one number a pair; frozen, differentiable in the images.
- `NETWORKS`: the backbones' layers, tapped layers and published weight files.

The backbones are torchvision's VGG16 and AlexNet, written out as plain layers under the same key names so that its
weight files load without torchvision. The linear heads come with torchmetrics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .weight_files import NetworkFile, read_state_dict

NetworkName = Literal["vgg", "alex"]

Layer = tuple[int, int, int, int] | Literal["pool"]  # out channels, kernel, stride, padding; ReLU follows
_PUBLISHED = "https://download.pytorch.org/models/"
# Under the root, so that the gradient stays finite where all features are 0 (as torchmetrics has it).
_EPSILON = 1e-8


@dataclass(frozen=True)
class Network:
    """A backbone: its layers, the indices of the ReLUs that LPIPS compares, the smallest side that it takes."""

    layers: tuple[Layer, ...]
    pool: tuple[int, int]  # kernel, stride
    taps: tuple[int, ...]
    min_side: int
    file: NetworkFile

    def build(self) -> nn.Sequential:
        """The `features` part, up to the last tapped ReLU."""
        layers: list[nn.Module] = []
        channels = 3
        for layer in self.layers:
            if layer == "pool":
                layers.append(nn.MaxPool2d(*self.pool))
                continue
            out, kernel, stride, padding = layer
            layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
            channels = out
        assert len(layers) == self.taps[-1] + 1
        return nn.Sequential(*layers)


def _vgg_layers(plan: Sequence[tuple[int, int]]) -> tuple[Layer, ...]:
    stages: list[list[Layer]] = [[(channels, 3, 1, 1)] * count for channels, count in plan]
    return tuple(stages[0] + [layer for stage in stages[1:] for layer in ("pool", *stage)])


NETWORKS: dict[str, Network] = {
    "vgg": Network(
        layers=_vgg_layers([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]),
        pool=(2, 2), taps=(3, 8, 15, 22, 29), min_side=16,
        file=NetworkFile("vgg16-397923af.pth", _PUBLISHED + "vgg16-397923af.pth", "LPIPS (vgg)"),
    ),
    "alex": Network(
        layers=((64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
        pool=(3, 2), taps=(1, 4, 7, 9, 11), min_side=31,
        file=NetworkFile("alexnet-owt-7be5be79.pth", _PUBLISHED + "alexnet-owt-7be5be79.pth", "LPIPS (alex)"),
    ),
}


class LPIPS(nn.Module):
    """d(x, y) = Σ_layers mean_positions Σ_c w_c (x̂_c − ŷ_c)², on features of unit length along the channels (eq. 1).

    Args:
        net: `"vgg"`, the usual training loss, or `"alex"`, the usual metric.
        weights: the backbone's weight file; by default the published one, found in `$OMNILATENT_WEIGHTS` or in
            torch.hub's checkpoints, and checked against the hash in its name. A path given here is not checked.

    Raises:
        MissingNetwork: the published file is not on this machine.
        UserError: `weights` does not hold this backbone.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: NetworkName, weights: Path | None = None) -> None:
        super().__init__()
        if net not in NETWORKS:
            raise UserError(f"LPIPS has no network {net!r}: choose {' or '.join(NETWORKS)}.")
        self.net = net
        self.network = NETWORKS[net]
        path = self.network.file.path() if weights is None else weights
        self.features = self.network.build()
        _load_backbone(self.features, path)
        self.heads = nn.ParameterList(_read_heads(net))  # (1, c, 1, 1) each, not negative
        # ImageNet's mean and standard deviation for images in [-1, 1], as the published heads were fitted.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images `(b, 3, h, w)` in [0, 1] → distances `(b,)`, 0 for equal images.

        Raises:
            ValueError: the shapes differ or are not those of colour images, or a side is below the network's
                smallest (16 for VGG, 31 for AlexNet).
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError("LPIPS takes two batches of shape (b, 3, h, w); "
                             f"got {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[-2:]) < self.network.min_side:
            raise ValueError(f"LPIPS ({self.net}) needs sides of at least {self.network.min_side} pixels; "
                             f"got {tuple(x.shape[-2:])}")
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for head, fx, fy in zip(self.heads, self._unit_features(x), self._unit_features(y), strict=True):
            distance = distance + (head * (fx - fy) ** 2).sum(1).mean((1, 2))
        return distance

    def _unit_features(self, images: Tensor) -> list[Tensor]:
        """The tapped ReLUs `(b, c, h', w')` in float32, of length 1 along the channels."""
        activation = (2 * images - 1 - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.features):
            activation = layer(activation)
            if index in self.network.taps:
                wide = activation.float()
                found.append(wide / torch.sqrt(_EPSILON + (wide**2).sum(1, keepdim=True)))
        return found


def _load_backbone(features: nn.Sequential, path: Path) -> None:
    """Fill `features` from a file with torchvision's keys; its classifier is left out."""
    state = read_state_dict(path)
    wanted = features.state_dict()
    found = {key: state[f"features.{key}"] for key in wanted if f"features.{key}" in state}
    for key, tensor in wanted.items():
        if key not in found:
            raise UserError(f"{path} has no weight features.{key}: give torchvision's weight file of this network.")
        if found[key].shape != tensor.shape:
            raise UserError(f"{path} holds features.{key} of shape {tuple(found[key].shape)}, expected "
                            f"{tuple(tensor.shape)}: give torchvision's weight file of this network.")
    features.load_state_dict(found)


def _read_heads(net: NetworkName) -> list[nn.Parameter]:
    """The published linear heads, from torchmetrics' folder, without importing it (that takes seconds)."""
    package = importlib.util.find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise UserError("The library torchmetrics is not installed, which brings LPIPS' linear heads: "
                        "pip install torchmetrics.")
    path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    state = read_state_dict(path)
    return [nn.Parameter(state[f"lin{i}.model.1.weight"]) for i in range(len(NETWORKS[net].taps))]
