"""The neurons that this family learns: one affine map, linear or with tanh, in the units of its targets.

- `Neurons`: forward only; saved as one safetensors file with the scale of its targets.
- `squared_errors`: the loss of each output neuron, which is what every rule here selects by.
- `TargetScale`, `scale_targets`: targets brought into tanh's range, and the share that tanh cannot reach.
- `check_pairs`: inputs and targets that do not fit together give one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError

Activation = Literal["linear", "tanh"]
ACTIVATIONS = ("linear", "tanh")
_FORMAT = "omnilatent.organic.neurons/1"
_CHUNK = 1 << 22  # numbers a chunk of rows holds, so that what is made from it stays in a cache or close to it


class Neurons(nn.Module):
    """y = scale · φ(W x + b) + shift, with φ the identity or tanh. Nothing in it is trained by gradients.

    Args:
        weight: `(k, d)`.
        bias: `(k,)`.
        activation: φ.
        scale, shift: `(k,)` each, what takes φ's range to the targets' units; None: 1 and 0.

    Raises:
        UserError: the shapes do not fit each other.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation = "linear", scale: Tensor | None = None,
                 shift: Tensor | None = None) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"The activation is {activation!r}; possible are {' and '.join(ACTIVATIONS)}.")
        if weight.dim() != 2:
            raise UserError(f"Dimension mismatch: the weight has shape {tuple(weight.shape)}, expected is (k, d).")
        k = weight.shape[0]
        one = weight.new_ones(k)
        parts = {"bias": bias, "scale": one if scale is None else scale, "shift": one * 0 if shift is None else shift}
        for name, value in parts.items():
            if value.shape != (k,):
                raise UserError(f"Dimension mismatch: the weight has shape {tuple(weight.shape)}, so {name} must be "
                                f"({k},), but it is {tuple(value.shape)}.")
        self.activation = activation
        for name, value in {"weight": weight, **parts}.items():
            self.register_buffer(name, value.detach().clone())

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """`(…, d)` → `(…, k)` in the targets' units."""
        if inputs.shape[-1] != self.inputs:
            raise UserError(f"Dimension mismatch: the neurons take (…, {self.inputs}), the input has shape "
                            f"{tuple(inputs.shape)}.")
        out = inputs @ self.weight.mT + self.bias
        if self.activation == "tanh":
            out = torch.tanh(out)
        return out * self.scale + self.shift

    def save(self, path: Path) -> None:
        """Write weight, bias, scale and shift as one safetensors file; the activation is in its header."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, {"format": _FORMAT, "activation": self.activation})

    @classmethod
    def load(cls, path: Path) -> Neurons:
        """The inverse of `save`.

        Raises:
            UserError: there is no such file, or it is no file of neurons.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no neurons of this version: its format is "
                                    f"{header.get('format')!r}, expected is {_FORMAT!r}.")
                tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "scale", "shift")}
        except (OSError, SafetensorError) as failure:
            raise UserError(f"{path} cannot be read as neurons ({failure}).") from failure
        return cls(activation=header["activation"], **tensors)


@dataclass(frozen=True)
class TargetScale:
    """What takes φ's range to the targets' units, `(k,)` each, and what of the targets lies beyond."""

    scale: Tensor
    shift: Tensor
    clipped_share: float
    """Share of the target values that lie outside ±`scale` around `shift`, which tanh cannot reach."""


def scale_targets(targets: Tensor, activation: Activation, headroom: float = 3.0) -> TargetScale:
    """The range of each output neuron: mean ± `headroom` standard deviations for tanh, the plain units for linear.

    The loss counts a value beyond tanh's range at its true distance; nothing is cut off in what is reported.
    """
    k = targets.shape[1]
    if activation == "linear":
        return TargetScale(torch.ones(k), torch.zeros(k), 0.0)
    total, squares = torch.zeros(2, k, dtype=torch.float64)
    shift = torch.zeros(k, dtype=torch.float64)
    for rows in chunks(targets):
        shift += targets[rows].sum(0, dtype=torch.float64)
    shift = (shift / len(targets)).float()
    for rows in chunks(targets):
        squares += (targets[rows].float() - shift).square().sum(0, dtype=torch.float64)
    scale = ((squares / len(targets)).sqrt() * headroom).float()
    scale = torch.where(scale > 0, scale, 1.0)
    for rows in chunks(targets):
        total += ((targets[rows].float() - shift).abs() > scale).sum(0)
    return TargetScale(scale, shift, float(total.sum() / targets.numel()))


def squared_errors(layer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each output neuron: its squared error in the targets' units, averaged over the rows; `(k,)` fp64."""
    check_pairs(inputs, targets)
    total = torch.zeros(targets.shape[1], dtype=torch.float64)
    for rows in chunks(inputs, targets):
        total += (layer(inputs[rows].float()) - targets[rows].float()).square().sum(0, dtype=torch.float64)
    return total / len(inputs)


def check_pairs(inputs: Tensor, targets: Tensor, names: str = "inputs and targets") -> None:
    """Raise a sentence with both shapes where `inputs` is not `(N, d)` or `targets` not `(N, k)`, N at least 2."""
    if inputs.dim() != 2 or targets.dim() != 2 or len(inputs) != len(targets) or len(inputs) < 2:
        raise UserError(f"Dimension mismatch: {names} have shapes {tuple(inputs.shape)} and {tuple(targets.shape)}; "
                        "expected are (N, d) and (N, k) with the same N of at least 2.")


def chunks(*tensors: Tensor) -> list[slice]:
    """Slices over the rows of tensors of equal length, each a few megabytes."""
    rows = max(256, _CHUNK // max(tensor.shape[1] for tensor in tensors))
    return [slice(start, start + rows) for start in range(0, len(tensors[0]), rows)]
