"""One direction after the other, by nothing but the losses of the layer at perturbed weights.

- `Directions`: the search for one layer on fixed data, a sweep over all directions at a time.

One direction v is probed for all output neurons together: the losses at +h v and −h v and the one before give each
neuron its own parabola and step. Activations X v that are orthogonal to those of earlier directions make the parabolas
of a linear neuron independent of each other, so 2 r + 1 evaluations along r directions and the bias end at the least
squares optimum, however many output neurons there are. That is Powell's method of conjugate directions (1964), not a
new kind of evolution. A tanh neuron takes a step only if its loss really falls there, a third evaluation. Every
evaluation updates the sums of all rows by h X v instead of multiplying by the whole weight again; the numbers are the
same.

`whiten=True` takes the retina's axes. Otherwise random directions are made conjugate by Gram and Schmidt on their
activations, without any eigenvector, at the price of keeping all activations: N·d numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .neurons import Activation, check_pairs, scale_targets
from .retina import Axes, principal_axes
from .search import Search, generator

_CLOSE = 0.03  # how far a tanh neuron's sum is probed, in whitened units
_ROUNDING = 1e-5  # length of an activation, as a share of what it was, below which nothing but rounding is left


class Directions(Search):
    """The search for one layer on fixed data. `sweeps` counts those done."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, activation: Activation = "linear", *, whiten: bool = True,
        headroom: float = 3.0, axes: Axes | None = None, trust: float = 0.5, trust_up: float = 0.01,
        trust_down: float = 0.005, seed: int = 0,
    ) -> None:
        check_pairs(inputs, targets)
        centre = inputs.float().mean(0)
        super().__init__(inputs.shape[1], scale_targets(targets, activation, headroom), activation, centre, trust)
        if not bool(centre.isfinite().all() and self.scale.shift.isfinite().all()):
            raise UserError("The inputs or targets hold values that are not finite: mend or leave out those rows.")
        self.inputs, self.goals, self.seed = inputs.float() - centre, self.goals_of(targets), seed
        self.trust_up, self.trust_down = trust_up, trust_down
        self.sweeps = 0
        self._white = (axes or principal_axes(inputs)).whitening().float() if whiten else None  # (d, r)
        if activation == "tanh":
            self.start_from_inverse()

    def step(self) -> None:
        """One sweep: the bias, then every direction."""
        sums = torch.addmm(self.bias, self.inputs, self.weight.mT)  # (N, k)
        loss = self.losses(sums, self.goals)
        self.evaluations += 1
        directions, activations = self._directions()
        loss = self._probe(sums, loss, sums.new_ones(len(sums)), None)
        for j in range(directions.shape[1]):
            loss = self._probe(sums, loss, activations[j], directions[:, j])
        self.sweeps += 1
        self.train_loss = self.in_units(self.losses(sums, self.goals))

    def _directions(self) -> tuple[Tensor, Tensor]:
        """`(d, r)` directions and their activations `(r, N)` of mean square 1, orthogonal to each other."""
        if self._white is not None:
            return self._white, (self.inputs @ self._white).mT.contiguous()
        d = self.inputs.shape[1]
        made = torch.randn(d, d, generator=generator("directions", self.seed, self.sweeps)).to(self.inputs.device)
        raw, kept = (self.inputs @ made).mT.contiguous(), 0  # (d, N); the first `kept` rows and columns are done
        for j in range(d):
            vector, activation = made[:, j].clone(), raw[j].clone()
            whole = activation.square().mean().sqrt()
            for _ in range(2):  # once leaves rounding behind
                share = raw[:kept] @ activation / len(activation)
                activation -= share @ raw[:kept]
                vector -= made[:, :kept] @ share
            length = activation.square().mean().sqrt()
            if length > _ROUNDING * whole:
                raw[kept], made[:, kept] = activation / length, vector / length
                kept += 1
        return made[:, :kept], raw[:kept]

    def _probe(self, sums: Tensor, loss: Tensor, activation: Tensor, direction: Tensor | None) -> Tensor:
        """Probe both ways along a direction (None: the bias), take the steps that help, and return the losses there.

        A linear neuron is probed at the size of its error, where its parabola stands out of fp32 rounding most, and a
        tanh neuron close by, where its loss is nearly a parabola; its step is at most 1.
        """
        a, linear = activation[:, None], self.activation == "linear"  # (N, 1)
        h = loss.sqrt().float().clamp(min=1e-6) if linear else sums.new_full(loss.shape, _CLOSE)  # (k,)
        ahead, behind = (self.losses(torch.addcmul(sums, a, t), self.goals) for t in (h, -h))
        self.evaluations += 2
        bend = (ahead + behind - 2 * loss) / 2
        step = h * (behind - ahead) / (4 * bend.clamp(min=1e-30))
        if linear:  # the vertex of an exact parabola needs no look
            there = loss - bend * (step / h).square()
            taken = torch.where(bend > 0, step, 0.0).float()
        else:
            step = torch.where(bend > 0, step, torch.sign(behind - ahead) * 0.3).clamp(-1, 1).float()
            there = self.losses(torch.addcmul(sums, a, step), self.goals)
            self.evaluations += 1
            taken = torch.where(there < loss, step, 0.0)
        moved = taken != 0
        sums.addcmul_(a, taken)
        if direction is None:
            self.bias += taken
        else:
            self.weight += taken[:, None] * direction
        self.trust = (self.trust + torch.where(moved, self.trust_up, -self.trust_down)).clamp(0, 1)
        return torch.where(moved, there, loss)
