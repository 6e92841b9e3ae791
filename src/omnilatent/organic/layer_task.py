"""One layer of neurons as a run of the one loop, on minibatches of any number and over any number of processes.

- `LayerTask`: a `Task` (training/task.py) that never calls backward.

    run, fabric = Path("runs/layer"), launch_fabric(RunConfig(device="cpu"))
    task = LayerTask(batches, LearnerConfig(search="stream"), held_out=(inputs, targets))
    train(task, RunConfig(steps=1_000, validate_every=20, device="cpu"), run, fabric, resume=furthest(run))
    neurons = Neurons.load(run / "final" / "model.safetensors")

`batches(position)` returns a minibatch `(n, d)`, `(n, k)`, always the same for a position and of one n for all. Of W
processes (torchrun) each takes one, and the W of them count as one minibatch: see `search.Minibatched`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import UserError, is_out_of_memory
from ..hub import FORMAT
from ..training.task import Logged
from .config import LearnerConfig
from .learner import Chosen, check_held_out, open_stream
from .neurons import check_pairs, squared_errors
from .peers import Peers
from .search import Batches

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Pairs = tuple[Tensor, Tensor]
_OF_THE_RUN = ("steps", "validate_every", "batch_size")  # of LearnerConfig's fields: they do not count here


class LayerTask:
    """Learns the neurons that `config` describes, by `search="stream"` or `"mutation"`, or by the rule classic.

    Held-out loss decides what `best/`, `step-N/` and `final/` hold: the best neurons so far (the latest, before the
    first validation). After `config.patience` validations without better ones the layer is frozen: the steps that
    are left read nothing and change nothing.

    Args:
        batches: the minibatch of a position, a pure function.
        config: its `steps`, `validate_every` and `batch_size` do not count here: the first two are the run's, and
            minibatches are as large as they come.
        held_out: inputs `(m, d)` and targets `(m, k)` that are not fitted, the same in every process, which share them.

    Raises:
        UserError: the held-out shapes do not fit each other, or those targets do not vary.
    """

    monitor = "r2"

    def __init__(self, batches: Batches, config: LearnerConfig, held_out: Pairs) -> None:
        check_pairs(*held_out, names="held-out inputs and targets")
        self.source, self.config, self.held_out = batches, config, held_out
        self.variance = float(held_out[1].double().var(0, correction=0).mean())
        if not self.variance > 0:
            raise UserError("The held-out targets do not vary, or are not finite: hold out other rows.")
        self.figures: dict[str, float] = {}
        self.best_figures: dict[str, float] = {}

    def setup(self, fabric: Fabric) -> None:
        if fabric.device.type == "mps":
            raise UserError("Neurons are learned in float64 partly, which MPS does not have: take --device cpu.")
        torch.set_float32_matmul_precision("highest")  # the loop allows TF32, which would spoil the inputs' small axes
        self.device, self.peers = fabric.device, Peers(fabric)
        if len(self.held_out[0]) < 2 * self.peers.count:
            raise UserError(f"{len(self.held_out[0])} held-out rows are too few for {self.peers.count} processes: hold "
                            f"out at least {2 * self.peers.count}.")
        self.search = open_stream(self._minibatch, self.config, self.peers)
        check_held_out(self.held_out, len(self.search.centre), len(self.search.scale.scale))
        self.chosen = Chosen(self.search.neurons().cpu(), self.config.patience)

    def batches(self, start: int, stop: int) -> Iterator[Pairs | None]:
        """This process's minibatches; None, and nothing is read, once the layer is frozen."""
        for position in range(start, stop):
            yield None if self.chosen.frozen else self.search.minibatch(position)

    def step(self, batch: Pairs | None, position: int) -> Logged:
        try:
            if batch is not None:
                self.search.learn(*batch)
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            raise UserError(f"Out of memory at step {position} with minibatches of {len(batch[0])} rows: make them "
                            "smaller; what was saved before is untouched.") from failure
        return {"loss": self.search.train_loss, "trust": float(self.search.trust.mean()),
                "evaluations": self.search.evaluations}

    def halve(self, batch: Pairs | None) -> None:
        """A minibatch cannot shrink here, since how large it is decides what is found."""

    def validate(self) -> dict[str, float]:
        """`r2`: the share of the held-out targets' variance that the neurons of this moment explain."""
        if not self.chosen.frozen:
            neurons, own = self.search.neurons().cpu(), self.peers.share(len(self.held_out[0]))
            rows = slice(own.start, own.stop)
            total = squared_errors(neurons, self.held_out[0][rows], self.held_out[1][rows]) * len(own)
            loss = float(self.peers.sum(total).mean()) / len(self.held_out[0])
            self.figures = {"r2": 1 - loss / self.variance, "held_out_loss": loss}
            self.chosen.look(neurons, self.figures["r2"])
            if self.chosen.stale == 0:
                self.best_figures = {**self.figures, "best_step": self.search.position}
        return {**self.figures, "best_r2": self.chosen.highest, "frozen": float(self.chosen.frozen)}

    def samples(self) -> None:
        """There is nothing to be seen of a layer."""

    def state(self) -> dict[str, Any]:
        return {"search": self.search.state(), "best": self.chosen.best.state_dict(), "highest": self.chosen.highest,
                "stale": self.chosen.stale, "figures": self.figures, "best_figures": self.best_figures}

    def load_state(self, state: dict[str, Any]) -> None:
        self.search.load_state(state["search"])
        self.chosen.best.load_state_dict(state["best"])
        self.chosen.highest, self.chosen.stale = state["highest"], state["stale"]
        self.figures, self.best_figures = dict(state["figures"]), dict(state["best_figures"])

    def export(self, folder: Path, figures: dict[str, float], step: int) -> None:
        """`model.safetensors` for `Neurons.load`, `config.json` and `README.md`; `figures` are those of its weights."""
        neurons = self.chosen.best if self.best_figures else self.search.neurons().cpu()
        neurons.save(folder / "model.safetensors")
        learner = {name: value for name, value in asdict(self.config).items() if name not in _OF_THE_RUN}
        config = {"omnilatent": {"format": FORMAT, "version": __version__}, "kind": "neurons",
                  "model": {"inputs": neurons.inputs, "outputs": neurons.outputs, "activation": neurons.activation},
                  "learner": learner, "training": {"step": step, **self.best_figures}}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        measured = (f"R² {self.best_figures['r2']:.4f} on {len(self.held_out[0])} held-out rows, at step "
                    f"{self.best_figures['best_step']}" if self.best_figures else "not measured yet")
        (folder / "README.md").write_text(
            f"# {neurons.inputs} → {neurons.outputs} {neurons.activation} neurons\n\nLearned without gradients by "
            f"omnilatent {__version__}; {measured}. `omnilatent.organic.neurons.Neurons.load` opens "
            "`model.safetensors`.\n", encoding="utf-8")

    def _minibatch(self, position: int) -> Pairs:
        inputs, targets = self.source(position)
        return inputs.to(self.device), targets.to(self.device)
