"""What a user sees when something is wrong.

- `UserError`: one sentence that names the file or value and the remedy; the command line prints it
  without a traceback and ends with exit code 2.
- `library`: imports a heavy or fragile library where it is used, and turns its failure into such a sentence.

This module imports nothing heavy, so that an argument error answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence: what is wrong, where, and the remedy."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.split()))


def library(name: str, extra: str | None = None) -> ModuleType:
    """Import the module `name` (dotted names allowed) on use.

    Args:
        name: the module, for example `"diffusers"` or `"torchmetrics.functional.image"`.
        extra: the extra of this package that brings it, where it is not a plain dependency.

    Raises:
        UserError: the library is missing, or a torchvision that is installed but does not load beside
            this torch stands in its way (diffusers, transformers and torchmetrics import it when present).
    """
    package = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as failure:  # whatever a foreign import raises, the user gets a sentence or the cause
        broken = _broken_torchvision()
        if broken is not None:
            raise UserError(broken) from failure
        if isinstance(failure, ModuleNotFoundError) and (failure.name or "").split(".")[0] == package:
            remedy = f"pip install 'omnilatent[{extra}]'" if extra else f"pip install {package}"
            raise UserError(f"The library {package} is not installed: {remedy}.") from failure
        raise


def _broken_torchvision() -> str | None:
    """A sentence about a torchvision that is installed and does not load, or None."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as failure:
        import torch

        reason = " ".join(str(failure).split())[:120]
        return (
            f"torchvision is installed but does not load beside torch {torch.__version__} ({reason}): "
            "install the torchvision made for this torch, or remove it with 'pip uninstall torchvision' "
            "(omnilatent does not need it)."
        )
    return None
