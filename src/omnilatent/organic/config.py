"""The settings of the learner. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..training.config import check_least


@dataclass(frozen=True)
class LearnerConfig:
    """How one layer of neurons is searched for."""

    rule: Literal["neuron", "classic"] = "neuron"
    """neuron: every output neuron selects, trusts and adapts its step on its own. classic: the seed's rule, kept to
    be shown; it compares a genome with its own past and does not learn."""
    search: Literal["sweeps", "directions", "stream", "mutation"] = "sweeps"
    """Of the rule neuron. sweeps: all directions at once on fixed data, the fastest; directions: one direction after
    the other, nothing but whole-layer losses; stream: sweeps on minibatches, for data that do not fit or repeat;
    mutation: (1+1) evolution on minibatches."""
    activation: Literal["linear", "tanh"] = "tanh"
    """Of the neurons."""
    headroom: float = 3.0
    """Half of tanh's range in standard deviations of each target."""
    ridge: float = 0.0
    """Weight of the sum of squared weights on standardised inputs in each neuron's loss; sweeps only."""
    whiten: bool = True
    """Of directions: the retina's whitened axes; otherwise random ones made conjugate by their activations."""
    steps: int = 20
    """Sweeps, or minibatches, at most. In a run (layer_task) the run's own setting counts, here and in the next."""
    validate_every: int = 1
    """Sweeps, or minibatches, between looks at the held-out loss."""
    patience: int = 3
    """Looks without a lower held-out loss after which the weights are frozen; 0: never."""
    batch_size: int = 4096
    """Rows of a minibatch that is drawn from tensors, for stream, mutation and classic; several times the number of
    inputs."""
    population: int = 40
    """Genomes, over all processes: of classic those that live side by side, of mutation the children tried on each
    minibatch."""
    trust_up: float = 0.01
    """What a success adds to trust."""
    trust_down: float = 0.005
    """What a failure takes from trust."""
    epsilon: float = 0.0
    """Of classic: changes of the loss no larger than this leave trust as it is."""
    trust_start: float = 0.5
    """Trust before the first step."""
    mutate_below: float = 0.3
    """Of classic: genomes of less trust than this mutate."""
    mutation: float = 0.05
    """Standard deviation of a mutation: of classic per weight, of mutation the first step in whitened units."""
    seed: int = 0
    """Of directions, mutations and minibatches."""

    @property
    def minibatched(self) -> bool:
        """Whether the search reads one minibatch after the other, instead of its data again and again."""
        return self.rule == "classic" or self.search in ("stream", "mutation")

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "validate_every", "batch_size", "population")
        check_least(self, 0, "ridge", "patience", "trust_up", "trust_down", "epsilon", "trust_start", "mutate_below")
        for name in ("headroom", "mutation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0")
