"""From what `Codec.encode` returns to the disk, behind the encoder's back.

- `rows_of`: a latent → the named tensors of a store's rows, still on the device.
- `to_host`, `packed`: from the device without waiting; codes as bits.
- `ResultThread`: the thread that waits for results and writes them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ..latent import Codes, DiagonalGaussian, Latent, LatentSpec
from .packing import pack
from .writer import StoreWriter

_AHEAD = 4  # batches that may wait to be written


def rows_of(
    latent: Latent, count: int, logvar: bool, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The first `count` rows of a latent.

    Returns:
        name → `(count, …)`: "codes" of `Codes`, else "mean" (normalised) and on request "logvar" (of the un-normalised
        posterior); and the shapes that a reader needs besides.
    """
    if isinstance(latent, Codes):
        codes = latent.indices[:count]
        return {"codes": codes.to(torch.int32)}, {"codes_shape": tuple(codes.shape[1:])}
    tensors = {"mean": latent.mode()[:count].to(dtype)}
    if logvar:
        assert isinstance(latent, DiagonalGaussian)  # refused before, by the codec's kind
        tensors["logvar"] = latent.logvar[:count].to(dtype)
    return tensors, {}


def to_host(tensor: Tensor) -> Tensor:
    """A copy in memory of the CPU; from CUDA it is there once the device comes to it (`DeviceClock.wait`)."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def packed(tensors: Mapping[str, Tensor], spec: LatentSpec) -> dict[str, np.ndarray]:
    """As a store keeps them: codes as bits, everything else as it is; copies, so that pinned memory is free again."""
    arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    if "codes" in arrays:
        assert spec.codebook_size is not None
        arrays["codes"] = pack(arrays["codes"].reshape(len(arrays["codes"]), -1), spec.codebook_size)
    return arrays


class ResultThread:
    """Runs jobs on a writer, one after the other, in a thread of its own. Leaving the block waits for all of them."""

    def __init__(
        self, writer: StoreWriter, progress: Callable[[int], None] | None = None
    ) -> None:
        """
        Args:
            progress: told what each job returns, a number of images.
        """
        self._writer, self._progress = writer, progress
        self._jobs: queue.Queue[Callable[[StoreWriter], int] | None] = queue.Queue(_AHEAD)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="omnilatent-writer", daemon=True)

    def put(self, job: Callable[[StoreWriter], int]) -> None:
        """Hand a job over; raises what an earlier one raised."""
        if self._failure is not None:
            raise self._failure
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._failure is not None:
                continue  # the main thread learns of it with its next job
            try:
                done = job(self._writer)
                if self._progress is not None:
                    self._progress(done)
            except BaseException as failure:
                self._failure = failure

    def __enter__(self) -> ResultThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        self._thread.join()
        if self._failure is not None and failure is None:
            raise self._failure
