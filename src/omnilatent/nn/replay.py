"""Work that a GPU does again and again, recorded once as a CUDA graph: small kernels cost less than launching them does.

- `Replayed`: a function of tensors, recorded for each kind of call and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors
    touched: frozenset[int]


class Replayed:
    """Calls `function(key, tensors)`. On a GPU, once a kind of call (the key, and the tensors' names, shapes and dtypes) was seen
    `eager` times, it is recorded; from then on its tensors are copied to where the recording reads them, and what it gives are
    the same tensors every time, overwritten by the next call of its kind. On a CPU every call is a plain call.

    Args:
        function: launches the same kernels for the same kind, and waits for none. Gradients that it adds to those of
            `parameters` are added in every call, into the same tensors.
        parameters: whose gradients it adds to.
        eager: plain calls before recording, at least 1: what is compiled or chosen at the first call must be settled.

    Attributes:
        touched: positions of the parameters whose gradients were added to since `clear`.
    """

    def __init__(self, function: Callable[[Hashable, Tensors], Tensors], parameters: Iterable[nn.Parameter] = (), eager: int = 1) -> None:
        self.function, self.parameters, self.eager = function, list(parameters), eager
        self.touched: set[int] = set()
        self._seen: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None
        self._gradients: list[Tensor] = []

    def clear(self) -> None:
        """Gradients to zero."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self.parameters]
            for number, p in enumerate(self.parameters):
                p.register_post_accumulate_grad_hook(lambda _, number=number: self.touched.add(number))
        elif self.touched:
            torch._foreach_zero_([self._gradients[number] for number in self.touched])
        self.touched.clear()
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient

    def drop_untouched(self) -> None:
        """No gradient, instead of one of zeros, where none was added: an optimizer then leaves these parameters alone."""
        for number, p in enumerate(self.parameters):
            if number not in self.touched:
                p.grad = None

    def __call__(self, key: Hashable, tensors: Mapping[str, Tensor]) -> Tensors:
        given = dict(tensors)
        if not next(iter(given.values())).is_cuda:
            return self.function(key, given)
        kind = (key, *((name, tuple(t.shape), t.dtype) for name, t in given.items()))
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        if (recording := self._recordings.get(kind)) is None:
            # on the stream that recordings are made on, where the autograd nodes that add to gradients then live
            with _After(self._stream):
                if self._seen.get(kind, 0) < self.eager:
                    self._seen[kind] = self._seen.get(kind, 0) + 1
                    return self.function(key, given)
                recording = self._recordings[kind] = self._record(key, given)
        torch._foreach_copy_(list(recording.inputs.values()), list(given.values()))
        recording.graph.replay()
        self.touched |= recording.touched
        return dict(recording.outputs)

    def _record(self, key: Hashable, tensors: Tensors) -> _Recording:
        inputs = {name: t.clone() for name, t in tensors.items()}
        before, self.touched = self.touched, set()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = self.function(key, inputs)
        touched, self.touched = frozenset(self.touched), before
        return _Recording(graph, inputs, outputs, touched)


class _After:
    """Work on another stream, after what was asked for before and before what is asked for afterwards."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.inner = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        self.inner.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.inner.__exit__(*problem)  # type: ignore[arg-type]
        torch.cuda.current_stream().wait_stream(self.stream)
