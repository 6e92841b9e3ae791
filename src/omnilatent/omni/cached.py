"""Text token by token over remembered keys.

- `Writer`: what writes. `decoder_for`: a decoder for a prefix that was read, which gives the next token's logits.
- `GrowingDecoder`: its memory grows. `CachedDecoder`: on a GPU, over buffers as long as the text may become, which is recorded
  and replayed, and serves again for another prefix of the same form.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..nn.replay import Replayed
from ..nn.transformer import Keys
from .backbone import Backbone, LayerMemory
from .hooks import HookKeys, Voice
from .source import Source
from .text import TextModality

MOST_DECODERS = 4  # that a model keeps; each holds the keys of a prefix and of a text

_kept: WeakKeyDictionary[Writer, dict[Hashable, CachedDecoder]] = WeakKeyDictionary()


class Writer(Protocol):
    """What writes text: the model."""

    backbone: Backbone

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""

    def text_part(self) -> TextModality:
        """Its embedding and logits."""

    def write_on(self, memory: list[LayerMemory], x: Tensor, start: int | Tensor) -> tuple[Tensor, list[LayerMemory]]:
        """Vectors `(b, m, dim)`, the first of them the `start`-th of the text → their last states, and the memory with them."""


class GrowingDecoder:
    """
    Args:
        model: what writes.
        memory: keys of a prefix.
    """

    def __init__(self, model: Writer, memory: list[LayerMemory]) -> None:
        self.model, self.memory = model, memory

    def next(self, x: Tensor, position: int) -> Tensor:
        """As of `CachedDecoder`."""
        x, self.memory = self.model.write_on(self.memory, x, position)
        return self.model.text_part().logits(x)[:, 0].float()


class CachedDecoder:
    """
    Args:
        model: what writes.
        memory: keys of a prefix, which are copied.
        most: tokens that can be written.
    """

    def __init__(self, model: Writer, memory: list[LayerMemory], most: int) -> None:
        k = memory[0].prefix.k
        self.slot = torch.zeros(1, dtype=torch.int64, device=k.device)
        self.valid = torch.zeros(len(k), most, dtype=torch.bool, device=k.device)
        self.model = ref(model)  # what is kept for a model must not keep it
        self.memory = [self._with_slots(_copied(layer), most) for layer in memory]
        self.step = Replayed(self._step)

    def _with_slots(self, layer: LayerMemory, most: int) -> LayerMemory:
        k, v = (t.new_zeros(*t.shape[:2], most, t.shape[3]) for t in (layer.prefix.k, layer.prefix.v))
        return replace(layer, written=Keys(k, v, self.valid), slot=self.slot)

    def begin(self, memory: list[LayerMemory]) -> None:
        """Another prefix of the same form."""
        self.valid.zero_()
        own, new = ([t for layer in layers for t in _tensors(layer)] for layers in (self.memory, memory))
        torch._foreach_copy_(own, new)
        torch._foreach_zero_([t for layer in self.memory if layer.written for t in layer.written[:2]])

    def next(self, x: Tensor, position: int) -> Tensor:
        """What comes at a position, as a vector `(b, 1, dim)` → logits of what follows it `(b, vocabulary)`, float32."""
        self.slot.fill_(position)
        return self.step(None, {"x": x})["logits"]

    def _step(self, key: Hashable, data: dict[str, Tensor]) -> dict[str, Tensor]:
        kind = self.slot.device.type
        # weights that autocast keeps in their short form would be gone when a recording looks for them
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            self.valid.index_fill_(1, self.slot, True)
            model = self.model()
            assert model is not None
            x, _ = model.write_on(self.memory, data["x"], self.slot)
            return {"logits": model.text_part().logits(x)[:, 0].float()}


@contextmanager
def decoder_for(model: Writer, source: Source, most: int) -> Iterator[CachedDecoder | GrowingDecoder]:
    """A decoder that goes on from what was read, for as long as the context lasts."""
    if not source.latent.is_cuda:
        yield GrowingDecoder(model, source.memory)
        return
    form = tuple((tuple(t.shape), t.dtype) for layer in source.memory for t in _tensors(layer))
    weights = tuple(p.data_ptr() for p in model.parameters())
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    key = (most, form, weights, autocast, model.backbone.compiled, torch.is_inference_mode_enabled())
    kept = _kept.setdefault(model, {})
    if (decoder := kept.pop(key, None)) is None:
        decoder = CachedDecoder(model, source.memory, most)
    else:
        decoder.begin(source.memory)
    yield decoder
    kept[key] = decoder  # the last that was used stands last
    while len(kept) > MOST_DECODERS:
        kept.pop(next(iter(kept))).step.close()


def _copied(layer: LayerMemory) -> LayerMemory:
    prefix = Keys(*(None if t is None else t.clone() for t in layer.prefix))
    hooks = tuple(HookKeys(*(t.clone() for t in hook)) for hook in layer.hooks)
    return LayerMemory(prefix, hooks, voices=tuple(Voice(*(t.clone() for t in voice)) for voice in layer.voices))


def _tensors(layer: LayerMemory) -> list[Tensor]:
    """Those of the prefix and the hooks."""
    return [t for keys in (layer.prefix, *layer.hooks, *layer.voices) for t in keys if t is not None]
