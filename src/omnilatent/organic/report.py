"""What a fit says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FitReport:
    """Losses are mean squared errors in the targets' units, averaged over rows and output neurons."""

    train_loss: float
    held_out_loss: float | None
    """On rows that were not fitted; None where none were given. It, not trust, says when to freeze."""
    neuron_losses: tuple[float, ...]
    """Training loss of each output neuron, `(k,)`."""
    evaluations: int
    """Forward passes of the whole layer: over all fitting data, or over a minibatch where the search takes those."""
    seconds: float
    """Wall-clock time."""
    trust: tuple[float, ...]
    """Of each output neuron, `(k,)`, or of each genome for the classic rule."""
    clipped_share: float
    """Share of the target values that tanh cannot reach; 0 for linear neurons."""
    history: tuple[tuple[int, float, float | None], ...] = field(default=(), repr=False)
    """(evaluations, training loss, held-out loss) after each sweep."""
