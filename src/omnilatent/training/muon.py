"""Muon: momentum made orthogonal, for the matrices of a network; AdamW for the rest.

K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the learning rate is scaled so that
an update has AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982), so one rate serves both parts.

torch.optim.Muon takes two-dimensional parameters only and steps through them one at a time. This one sees a
convolution as the matrix `(out, in · k · k)`, and iterates all matrices of a shape together: a small network has a
hundred of them, each far too small to fill a GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

LEAST_SIDE = 16  # the first and the last layer and 1×1 convolutions around a latent are left to AdamW
POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: five rounds bring singular values to about 0.7 … 1.2
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """
    Args:
        parameters: all of them; linear layers and convolutions whose two widths are at least `LEAST_SIDE` get Muon.
        lr: for both parts.
        betas: AdamW's momenta.
        weight_decay: decoupled, for both parts.
        momentum: Muon's, Nesterov's way.
        tables: embeddings among the parameters, which get AdamW: their rows are no directions of one map.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 weight_decay: float = 0.0, momentum: float = 0.95, eps: float = 1e-8,
                 tables: Iterable[nn.Parameter] = ()) -> None:
        every, looked_up = list(parameters), {id(p) for p in tables}
        matrices = [p for p in every if is_matrix(p) and id(p) not in looked_up]
        rest = [p for p in every if not is_matrix(p) or id(p) in looked_up]
        groups: list[dict[str, Any]] = [{"params": part, "matrices": kind}
                                        for part, kind in ((matrices, True), (rest, False)) if part]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum,
                                  "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["matrices"] else self._adam)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters]
        momenta = [self._slot(p, "momentum") for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, p in enumerate(parameters):
            shapes[p.shape[0], p[0].numel()].append(number)
        for (rows, columns), numbers in shapes.items():
            matrices = torch.stack([updates[n].reshape(rows, columns) for n in numbers])
            turned = orthogonal(matrices) * (0.2 * math.sqrt(max(rows, columns)))
            steps = [step.reshape(parameters[n].shape) for n, step in zip(numbers, turned, strict=True)]
            torch._foreach_add_([parameters[n] for n in numbers], steps, alpha=-group["lr"])

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        group["steps"] = group.get("steps", 0) + 1
        (beta1, beta2), gradients = group["betas"], [p.grad for p in parameters]
        means = [self._slot(p, "mean") for p in parameters]
        squares = [self._slot(p, "square") for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2 ** group["steps"]))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, means, roots, -group["lr"] / (1 - beta1 ** group["steps"]))

    def _slot(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon, and not AdamW, takes it: not a stack of codebooks, which has three axes and maps nothing to anything."""
    return parameter.ndim in (2, 4) and min(parameter.shape[:2]) >= LEAST_SIDE


def orthogonal(matrices: Tensor) -> Tensor:
    """`(n, rows, columns)` → the nearest semi-orthogonal matrices, roughly: U·Vᵀ of U·S·Vᵀ by a Newton–Schulz
    iteration, in bf16 on a GPU, which changes nothing that matters."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = POLYNOMIAL
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
