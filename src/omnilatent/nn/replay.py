"""Work that a GPU does again and again, recorded once as a CUDA graph: small kernels cost less than launching them does.

- `Replayed`: a function of tensors, recorded for each kind of call and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
MOST = 256  # recordings; the one that was not used for longest goes


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors
    touched: frozenset[int]


class Replayed:
    """Calls `function(key, tensors)`. On a GPU, once a kind of call (the key, and the tensors' names, shapes and dtypes) was seen
    `eager` times, it is recorded, and from then on replayed on copies of its tensors. On a CPU every call is a plain call.

    Args:
        function: launches the same kernels for the same kind, and waits for none. Gradients that it adds to those of
            `parameters` are added in every call, into the same tensors.
        parameters: whose gradients it adds to; those that learn nothing are passed over.
        eager: plain calls before recording, at least 1: what is compiled or chosen at the first call must be settled.

    Attributes:
        touched: places, among the parameters that learn, of those whose gradients were added to since `clear`.
    """

    def __init__(self, function: Callable[[Hashable, Tensors], Tensors], parameters: Iterable[nn.Parameter] = (), eager: int = 1) -> None:
        self.function, self.eager = function, eager
        self.parameters = [p for p in parameters if p.requires_grad]
        self.touched: set[int] = set()
        # what the parameters hold is the set alone, so that they keep nothing else alive
        self._hooks = [p.register_post_accumulate_grad_hook(partial(_add, self.touched, place)) for place, p in enumerate(self.parameters)]
        self._seen: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None
        self._gradients: list[Tensor] = []

    def clear(self) -> None:
        """Gradients to zero."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self.parameters]
        elif self.touched:
            torch._foreach_zero_([self._gradients[place] for place in self.touched])
        self.touched.clear()
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient

    def drop_untouched(self) -> None:
        """No gradient, instead of one of zeros, where none was added: an optimizer then leaves these parameters alone."""
        for place, p in enumerate(self.parameters):
            if place not in self.touched:
                p.grad = None

    def close(self) -> None:
        """Forget recordings and gradients, and let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        for p in self.parameters:
            p.grad = None
        self._recordings.clear()
        self._gradients, self._hooks = [], []

    def __call__(self, key: Hashable, tensors: Mapping[str, Tensor]) -> Tensors:
        given = dict(tensors)
        if not next(iter(given.values())).is_cuda:
            return self.function(key, given)
        kind = (key, *((name, tuple(t.shape), t.dtype) for name, t in given.items()))
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        recording = self._recordings.pop(kind, None)
        if recording is None:
            # on the stream that recordings are made on, where the autograd nodes that add to gradients then live
            with _after(self._stream):
                if self._seen.get(kind, 0) < self.eager:
                    self._seen[kind] = self._seen.get(kind, 0) + 1
                    return self.function(key, given)
                recording = self._record(key, given)
        self._recordings[kind] = recording  # the last that was used stands last
        if len(self._recordings) > MOST:
            del self._recordings[next(iter(self._recordings))]
        torch._foreach_copy_(list(recording.inputs.values()), list(given.values()))
        recording.graph.replay()
        self.touched |= recording.touched
        return {name: t.clone() for name, t in recording.outputs.items()}  # whose memory other recordings use too

    def _record(self, key: Hashable, tensors: Tensors) -> _Recording:
        inputs, graph, failure = {name: t.clone() for name, t in tensors.items()}, torch.cuda.CUDAGraph(), None
        before = frozenset(self.touched)
        self.touched.clear()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                try:
                    outputs = self.function(key, inputs)
                except BaseException as reason:
                    failure = reason
                    raise
            return _Recording(graph, inputs, outputs, frozenset(self.touched))
        except BaseException:
            if failure is not None:
                raise failure from None  # and not what ending a broken recording says
            raise
        finally:
            self.touched |= before


def _add(places: set[int], place: int, _: Tensor) -> None:
    places.add(place)


@contextmanager
def _after(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on another stream, after what was asked for before and before what is asked for afterwards."""
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)
