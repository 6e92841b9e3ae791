"""How a stack on a grid learns, a layer at a time, from forward evaluations.

- `GridConfig`: how many layers and neurons, and how they are looked for.
- `learn_stack`: codes and targets → a `GridStack` and the held-out loss after each layer.

Each layer: a linear readout of what it sees; candidates from pairs of sites where that leaves different errors
(boosting); the neurons among them that explain most of it; a readout of all. It is kept if the held-out loss falls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .grids import GridLayer, GridStack
from .pairs import Affine, draw_pairs, fit_readout, forward_selection
from .teaching import Progress, quiet

Maps = Callable[[slice], Tensor]  # pictures → their maps (b, c, h, w)


@dataclass(frozen=True)
class GridConfig:
    """Layers and their learning.

    Attributes:
        layers: at most; learning ends where the held-out loss stops falling.
        neurons: a layer.
        candidates: drawn a layer.
        sites: that a layer learns from.
        judged: of these, those that the candidates are judged on.
        reach, context: as in `GridStack`.
        steepest, whitening: of the candidates, as in `draw_pairs`.
    """

    layers: int = 3
    neurons: int = 448
    candidates: int = 1536
    sites: int = 60_000
    judged: int = 24_000
    reach: int = 1
    context: int = 32
    steepest: float = 2.0
    whitening: tuple[float, ...] = (0.0, 0.5)
    ridges: tuple[float, ...] = (1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Lesson:
    """`count` pictures with `code(part)` `(b, r, h, w)` and `goal(part)` `(b, k, h, w)` for slices of them."""

    count: int
    code: Maps
    goal: Maps

    def parts(self, size: int = 16) -> list[slice]:
        return [slice(start, min(start + size, self.count)) for start in range(0, self.count, size)]


@torch.no_grad()
def learn_stack(
    lesson: Lesson, exam: Lesson, config: GridConfig, generator: torch.Generator, weighing: Tensor | None = None,
    progress: Progress = quiet,
) -> tuple[GridStack, list[float]]:
    """Learn a stack.

    Args:
        exam: held-out pictures.
        weighing: `(k, q)`; errors are compared as error @ weighing when neurons are chosen; None: as they are.

    Returns:
        The stack, and the held-out mean squared error of the mean and after each layer.

    Raises:
        UserError: not even the first layer helps on held-out pictures.
    """
    stack = GridStack([], config.reach, config.context)
    guesses, exam_guesses, history = None, None, []
    for number in range(1, config.layers + 1):
        x, y = _sites(lesson, stack, guesses, config.sites, generator)
        x_held, y_held = _sites(exam, stack, exam_guesses, config.sites // 3, generator)
        history = history or [float((y_held - y.mean(0)).square().mean())]
        layer, loss = _layer(x, y, x_held, y_held, config, generator, weighing)
        progress(f"layer {number}: held-out loss {loss:.5f}, before {history[-1]:.5f}")
        if loss >= history[-1]:
            break
        history.append(loss)
        if stack.layers:
            stack.layers[-1] = stack.layers[-1].first(config.context)  # nothing else of it is seen any more
        if number < config.layers:
            guesses = _guesses(lesson, stack, layer, guesses)
            exam_guesses = _guesses(exam, stack, layer, exam_guesses)
        stack.layers.append(layer)
    if not stack.layers:
        raise UserError(f"The first layer does no better on held-out pictures than their mean ({loss:.4g} against "
                        f"{history[0]:.4g}): {lesson.count} pictures to learn from are too few, or have nothing in common; "
                        "give more.")
    return stack, history


def _layer(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor, config: GridConfig, generator: torch.Generator,
           weighing: Tensor | None) -> tuple[GridLayer, float]:
    """One layer from rows `(N, d)` and `(N, k)`."""
    judged = slice(0, config.judged)
    linear, _ = fit_readout(x[judged], y[judged], x_held, y_held, config.ridges)
    left = y[judged] - linear(x[judged])
    left = left if weighing is None else left @ weighing
    drawn = draw_pairs(x[judged], left, config.candidates, generator, steepest=config.steepest,
                       whitening=config.whitening)
    features = torch.cat([x[judged], drawn(x[judged])], 1)
    chosen = forward_selection(features, left, config.neurons, forced=x.shape[1]) - x.shape[1]
    hidden = drawn[chosen]
    readout, loss = fit_readout(_with(x, hidden), y, _with(x_held, hidden), y_held, config.ridges)
    return GridLayer(hidden, readout), loss


def _with(x: Tensor, hidden: Affine) -> Tensor:
    return torch.cat([x, hidden(x)], 1)


def _sites(lesson: Lesson, stack: GridStack, guesses: Tensor | None, count: int, generator: torch.Generator
           ) -> tuple[Tensor, Tensor]:
    """What a layer sees and should say at `count` sites spread over the pictures, in random order."""
    xs, ys = [], []
    for part in lesson.parts():
        code, goal = lesson.code(part), lesson.goal(part)
        x = stack.inputs(code, None if guesses is None else guesses[part].float())  # (b, d, sites)
        y, each = goal.flatten(2), -(-count // lesson.count)
        for i in range(len(x)):
            some = torch.randperm(x.shape[2], generator=generator)[:each]
            xs.append(x[i][:, some].mT)
            ys.append(y[i][:, some].mT)
    x, y = torch.cat(xs), torch.cat(ys)
    order = torch.randperm(len(x), generator=generator)
    return x[order], y[order]


def _guesses(lesson: Lesson, stack: GridStack, layer: GridLayer, guesses: Tensor | None) -> Tensor:
    """What the layer says of every picture, as far as the next one sees it: `(N, context, h, w)` float16."""
    found = []
    for part in lesson.parts():
        code = lesson.code(part)
        x = stack.inputs(code, None if guesses is None else guesses[part].float())
        found.append(layer(x)[:, : stack.context].unflatten(2, code.shape[-2:]).half())
    return torch.cat(found)
