"""What only one of several processes may decide: names from its clock, and what to tidy up.

- `as_rank_zero`: the first process decides for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Decision = TypeVar("Decision")


def as_rank_zero(fabric: Fabric, decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns or refuses in the process of rank 0, in every process."""
    decision: Any = None
    if fabric.is_global_zero:
        try:
            decision = decide()
        except UserError as refusal:  # sent too, or the others would wait for ever
            decision = refusal
    decision = fabric.broadcast(decision)
    if isinstance(decision, UserError):
        raise decision
    return decision
