"""A module's weights from their file, all or nothing.

- `fill_from`: of a model or of a hook.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import UserError
from ..hub import read_tensors


def fill_from(module: nn.Module, file: Path, described: Path) -> None:
    """Load a safetensors file into a module, in the module's own precision.

    Args:
        described: the file that says what the module is.

    Raises:
        UserError: it is missing, cannot be read, or holds other tensors than the module's, or of other shapes.
    """
    if not file.exists():
        raise UserError(f"{file} is missing: copy it from where it was saved.")
    own, read = module.state_dict(), read_tensors([file])
    other = [name for name in (*own, *read) if name not in own or name not in read or own[name].shape != read[name].shape]
    if other:
        there, wanted = (tuple(found[other[0]].shape) if other[0] in found else "none" for found in (read, own))
        raise UserError(f"{file} holds other weights than {described.name} describes, the first {other[0]} (shape {there}, expected "
                        f"{wanted}): restore both from one save.")
    module.load_state_dict({name: t.to(own[name].dtype) for name, t in read.items()})
