"""What a user sees when something is wrong.

- `UserError`: one sentence that names the file or value and the remedy; the command line prints it
  without a traceback and ends with exit code 2.
- `library`: imports a heavy or fragile library where it is used, and turns its failure into such a sentence.
- `is_out_of_memory`, `is_disk_full`: whether a failure means that memory ran out, on any device, or disk space.

This module imports nothing heavy, so that an argument error answers at once.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NoReturn

# What allocators of CPUs, CUDA and MPS say, and cuDNN and cuBLAS when they find no room for a workspace.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence: what is wrong, where, and the remedy."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.split()))


def library(name: str, extra: str | None = None) -> ModuleType:
    """Import the module `name` (dotted names allowed) on use.

    diffusers and transformers import their parts at the first look at them, so those looks are guarded too.

    Args:
        name: the module, for example `"diffusers"` or `"torchmetrics.functional.image"`.
        extra: the extra of this package that brings it, where it is not a plain dependency.

    Raises:
        UserError: the library is missing, or a torchvision that is installed but does not load beside
            this torch stands in its way (diffusers, transformers and torchmetrics import it when present).
    """
    try:
        module = importlib.import_module(name)
    except Exception as failure:  # whatever a foreign import raises, the user gets a sentence or the cause
        _explain(failure, name.split(".")[0], extra)
    return _Lazy(module, extra) if name in ("diffusers", "transformers") else module


class _Lazy(ModuleType):
    """A module whose attributes are imports that can fail."""

    def __init__(self, module: ModuleType, extra: str | None) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module, self._extra = module, extra

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._module, name)
        except Exception as failure:
            _explain(failure, self.__name__, self._extra)


def _explain(failure: Exception, package: str, extra: str | None) -> NoReturn:
    """Raise a sentence about a failed import where there is one, else the failure itself."""
    broken = _broken_torchvision()
    if broken is not None:
        raise UserError(broken) from failure
    if isinstance(failure, ModuleNotFoundError) and (failure.name or "").split(".")[0] == package:
        remedy = f"pip install 'omnilatent[{extra}]'" if extra else f"pip install {package}"
        raise UserError(f"The library {package} is not installed: {remedy}.") from failure
    raise failure


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


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out. PyTorch's error for it is known by its name, so that torch need not be imported."""
    if isinstance(failure, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(failure).__mro__):
        return True
    return isinstance(failure, RuntimeError) and any(text in str(failure) for text in _NO_MEMORY)


def is_disk_full(failure: BaseException) -> bool:
    """Whether an error means that no more bytes could be written (safetensors wraps the operating system's)."""
    if isinstance(failure, OSError):
        return failure.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    text = str(failure)
    return any(f"os error {code}" in text for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(
        sign in text for sign in ("PytorchStreamWriter", "file write failed", "unexpected pos")  # torch.save's
    )
