"""Depth without gradients: layers of tanh neurons grown one by one on what the neurons before leave over.

- `Stack`: hidden layers of tanh neurons and one linear layer that reads the inputs and every hidden neuron.
- `StackConfig`, `grow`: boosting over data-pair candidates.

A candidate (SWIM: Bolager et al. 2023, arXiv 2306.16830) lies between two rows whose residuals differ much for the
distance of their inputs: its weight points from one to the other, and it is −½ at the first and ½ at the second. Of
`candidates` of them the one that takes most off the residual is tried (greedy boosting in the manner of RFRBoost,
Zozoulenko et al. 2025, arXiv 2501.18283). It is made orthogonal to all neurons before (a conjugate direction, see
`directions`), so the losses at two steps along it give each output its own parabola and step, and no earlier weight is
searched for again. It is kept only if the held-out loss falls. A layer ends when it is full or after `patience`
candidates in a row that did not help; the next layer takes this one's neurons as its inputs, and is kept only if one of
its neurons was.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..training.config import check_least
from .neurons import Neurons, check_pairs, squared_errors
from .pairs import draw_pairs
from .probes import fit_linear
from .report import FitReport
from .retina import principal_axes
from .search import generator, vertex

_FORMAT = "omnilatent.organic.stack/1"
_NEW = 1e-2  # share of a neuron's length that what the ones before explain must leave, or the readout loses fp32 digits


@dataclass(frozen=True)
class StackConfig:
    """How a stack grows."""

    layers: int = 1
    """Hidden layers at most."""
    width: int = 256
    """Neurons of a hidden layer at most."""
    candidates: int = 32
    """Data pairs of which the best is tried."""
    patience: int = 20
    """Candidates in a row that did not lower the held-out loss after which a layer ends."""
    search_rows: int = 4096
    """Rows on which candidates are compared; those tried are fitted on all rows."""
    seed: int = 0
    """Of the data pairs."""

    def __post_init__(self) -> None:
        check_least(self, 1, "layers", "width", "candidates", "patience", "search_rows")


class Stack(nn.Module):
    """`hidden`: tanh layers, each on the one before; `readout`: linear, on the inputs and all hidden neurons."""

    def __init__(self, hidden: list[Neurons], readout: Neurons) -> None:
        super().__init__()
        self.hidden, self.readout = nn.ModuleList(hidden), readout

    def forward(self, inputs: Tensor) -> Tensor:
        """`(…, d)` → `(…, k)` in the targets' units."""
        seen, here = [inputs], inputs
        for layer in self.hidden:
            here = layer(here)
            seen.append(here)
        return self.readout(torch.cat(seen, -1))

    def save(self, path: Path) -> None:
        """Write all layers as one safetensors file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        activations = [layer.activation for layer in (*self.hidden, self.readout)]
        save_file(tensors, path, {"format": _FORMAT, "activations": json.dumps(activations)})

    @classmethod
    def load(cls, path: Path) -> Stack:
        """The inverse of `save`.

        Raises:
            UserError: there is no such file, or it holds no stack.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no stack of this version: its format is {header.get('format')!r}, "
                                    f"expected is {_FORMAT!r}.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as failure:
            raise UserError(f"{path} cannot be read as a stack ({failure}).") from failure
        activations = json.loads(header["activations"])
        prefixes = [*(f"hidden.{i}." for i in range(len(activations) - 1)), "readout."]
        layers = [Neurons(activation=activation, **{name.removeprefix(prefix): value for name, value in tensors.items()
                                                    if name.startswith(prefix)})
                  for prefix, activation in zip(prefixes, activations, strict=True)]
        return cls(layers[:-1], layers[-1])


def grow(
    inputs: Tensor, targets: Tensor, config: StackConfig | None = None, *, held_out: tuple[Tensor, Tensor],
) -> tuple[Stack, FitReport]:
    """Grow a stack on rows `(N, d)` and `(N, k)`; the held-out rows decide which neurons are kept.

    Costs N·m numbers of memory for m neurons, and N·m multiplications for each one tried.

    Returns:
        The stack, and its report, whose history has one row for each neuron kept.
    """
    config = config or StackConfig()
    begin = time.perf_counter()
    check_pairs(inputs, targets)
    check_pairs(*held_out, names="held-out inputs and targets")
    growth = _Growth(inputs.float(), targets.float(), held_out, config)
    for number in range(config.layers):
        if not growth.add_layer(number):
            break
    stack = growth.stack()
    losses = squared_errors(stack, inputs, targets)
    return stack, FitReport(
        train_loss=float(losses.mean()), held_out_loss=float(squared_errors(stack, *held_out).mean()),
        neuron_losses=tuple(losses.tolist()), evaluations=growth.evaluations, seconds=time.perf_counter() - begin,
        trust=(), clipped_share=0.0, history=tuple(growth.history))


class _Growth:
    """Residuals on fitted and on held-out rows, `(N, k)` and `(M, k)`, and the orthogonal directions so far.

    The first `count` rows of `made` `(·, N)` have mean square 1 and are orthogonal: the bias, the whitened inputs, then
    each neuron less what the rows before explain of it. `held_made` `(·, M)` are the same functions of held-out rows.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, held_out: tuple[Tensor, Tensor], config: StackConfig) -> None:
        self.config, self.targets = config, targets
        self.inputs, self.held_inputs = inputs, held_out[0].float()
        axes = principal_axes(inputs)
        base, report = fit_linear(inputs, targets, sweeps=2, axes=axes)
        self.evaluations = report.evaluations
        self.residual, self.held_residual = targets - base(inputs), held_out[1].float() - base(self.held_inputs)
        rows = 1 + len(axes.variances) + config.layers * config.width
        self.made, self.held_made = (torch.empty(rows, len(x)) for x in (inputs, self.held_inputs))
        self.count = 1 + len(axes.variances)
        for made, x in ((self.made, inputs), (self.held_made, self.held_inputs)):
            made[0], made[1:self.count] = 1, ((x - axes.mean.float()) @ axes.whitening().float()).mT
        self.hidden: list[Neurons] = []
        self.seen, self.held_seen = inputs, self.held_inputs  # what the next layer takes
        self.values = [inputs]
        self.held_loss = float(self.held_residual.square().mean())
        self.history = [(self.evaluations, float(self.residual.square().mean()), self.held_loss)]

    def add_layer(self, number: int) -> bool:
        """Grow one hidden layer; False, and nothing changed, where no neuron of it helped."""
        kept: list[tuple[Tensor, Tensor]] = []
        values, held_values = [], []
        misses = tried = 0
        while len(kept) < self.config.width and misses < self.config.patience:
            weight, bias = self._candidate(generator("pairs", self.config.seed, number, tried))
            tried += 1
            value, held_value = (torch.tanh(x @ weight + bias) for x in (self.seen, self.held_seen))
            if not self._add(value, held_value):
                misses += 1
                continue
            misses = 0
            kept.append((weight, bias))
            values.append(value)
            held_values.append(held_value)
        if not kept:
            return False
        self.hidden.append(Neurons(torch.stack([w for w, _ in kept]), torch.stack([b for _, b in kept]), "tanh"))
        self.seen, self.held_seen = torch.stack(values, 1), torch.stack(held_values, 1)
        self.values.append(self.seen)
        return True

    def stack(self) -> Stack:
        """What was grown. The steps of all conjugate directions together are one linear layer, fitted here anew."""
        readout, report = fit_linear(torch.cat(self.values, 1), self.targets, sweeps=3)
        self.evaluations += report.evaluations
        return Stack(self.hidden, readout)

    def _candidate(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weight `(d,)` and bias `()` of the data pair that takes most off the residual, on a sample of the rows."""
        n, count = len(self.seen), self.config.candidates
        rows = torch.randint(n, (min(n, self.config.search_rows),), generator=draw)
        x, left = self.seen[rows], self.residual[rows]
        spread = x.std(0).clamp(min=1e-6)  # inputs of different units count alike
        drawn = draw_pairs(x / spread, left, count, draw, steepest=1.0, whitening=(0.0,))
        weights, biases = drawn.weight / spread, drawn.bias  # (c, d), (c,)
        values = torch.tanh(x @ weights.mT + biases)  # (rows, c)
        before = self.made[:self.count, rows]
        new = values - before.mT @ (before @ values / len(rows))
        gain = (left.mT @ new).square().sum(0) / new.square().sum(0).clamp(min=1e-6 * len(rows))
        best = int(gain.argmax())
        return weights[best], biases[best]

    def _add(self, value: Tensor, held_value: Tensor) -> bool:
        """Fit one neuron's outgoing weights to the residual; keep it only if the held-out loss falls."""
        length = value.square().mean().sqrt()
        for _ in range(2):  # once leaves rounding behind
            share = self.made[:self.count] @ value / len(value)
            value = value - share @ self.made[:self.count]
            held_value = held_value - share @ self.held_made[:self.count]
        left = value.square().mean().sqrt()
        if left < _NEW * length:
            return False
        value, held_value = value / left, held_value / left
        h = self.residual.square().mean(0).sqrt()  # (k,): no step can be longer
        here, ahead, behind = ((self.residual - t * value[:, None]).square().mean(0) for t in (0 * h, h, -h))
        step = h * vertex(here, ahead, behind)
        self.evaluations += 3
        held_residual = self.held_residual - held_value[:, None] * step
        held_loss = float(held_residual.square().mean())
        if held_loss >= self.held_loss:
            return False
        self.residual -= value[:, None] * step
        self.held_residual, self.held_loss = held_residual, held_loss
        self.made[self.count], self.held_made[self.count] = value, held_value
        self.count += 1
        self.history.append((self.evaluations, float(self.residual.square().mean()), held_loss))
        return True
