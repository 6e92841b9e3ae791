"""Text token by token over remembered keys.

- `Writer`: what writes. `decoder_for`: a decoder for a prefix that was read, which gives the next token's logits.
- `GrowingDecoder`: its memory grows. `CachedDecoder`: on a GPU, over buffers for the prefix and all of the text behind it, which is
  recorded and replayed, and serves again for another prefix of the same form.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..nn.replay import Replayed
from ..nn.transformer import Keys
from .backbone import LayerMemory
from .hooks import HookKeys, Voice
from .source import Source
from .text import TextModality

MOST_DECODERS = 4  # that a model keeps; each holds the keys of a prefix and of a text

_kept: WeakKeyDictionary[Writer, dict[Hashable, CachedDecoder]] = WeakKeyDictionary()


class Writer(Protocol):
    """What writes text: the model."""

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
        self.prefix = k.shape[2]
        self.slot = torch.zeros(1, dtype=torch.int64, device=k.device)
        self.valid = torch.zeros(len(k), self.prefix + most, dtype=torch.bool, device=k.device)
        self.model = ref(model)  # what is kept for a model must not keep it
        self.memory = [self._with_slots(layer, most) for layer in memory]
        self.step = Replayed(self._step)
        self.begin(memory)

    def _with_slots(self, layer: LayerMemory, most: int) -> LayerMemory:
        k, v = (t.new_zeros(*t.shape[:2], self.prefix + most, t.shape[3]) for t in layer.prefix[:2])
        hooks = tuple(HookKeys(*map(torch.empty_like, hook)) for hook in layer.hooks)
        voices = tuple(Voice(*map(torch.empty_like, voice)) for voice in layer.voices)
        return LayerMemory(Keys(k, v, self.valid), hooks, slot=self.slot, voices=voices)

    def begin(self, memory: list[LayerMemory]) -> None:
        """Another prefix of the same form."""
        valid = memory[0].prefix.valid
        self.valid[:, : self.prefix] = True if valid is None else valid
        self.valid[:, self.prefix :] = False
        own, new = [], []
        torch._foreach_zero_([t[:, :, self.prefix :] for layer in self.memory for t in layer.prefix[:2]])  # NaN would go through the mask
        for kept, layer in zip(self.memory, memory, strict=True):
            own += [t[:, :, : self.prefix] for t in kept.prefix[:2]] + _of_hooks(kept)
            new += [*layer.prefix[:2], *_of_hooks(layer)]
        torch._foreach_copy_(own, new)

    def next(self, x: Tensor, position: int) -> Tensor:
        """What comes at a position, as a vector `(b, 1, dim)` → logits of what follows it `(b, vocabulary)`, float32."""
        self.slot.fill_(self.prefix + position)
        return self.step(None, {"x": x})["logits"]

    def _step(self, key: Hashable, data: dict[str, Tensor]) -> dict[str, Tensor]:
        kind = self.slot.device.type
        # weights that autocast keeps in their short form would be gone when a recording looks for them
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            self.valid.index_fill_(1, self.slot, True)
            model = self.model()
            assert model is not None
            x, _ = model.write_on(self.memory, data["x"], self.slot - self.prefix)
            return {"logits": model.text_part().logits(x)[:, 0].float()}


@contextmanager
def decoder_for(model: Writer, source: Source, most: int) -> Iterator[CachedDecoder | GrowingDecoder]:
    """A decoder that goes on from what was read, for as long as the context lasts."""
    if not source.latent.is_cuda:
        yield GrowingDecoder(model, source.memory)
        return
    form = tuple((tuple(t.shape), t.dtype) for layer in source.memory for t in (*layer.prefix[:2], *_of_hooks(layer)))
    weights = tuple(p.data_ptr() for p in model.parameters())
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    key = (most, form, weights, autocast, torch.is_inference_mode_enabled())
    kept = _kept.setdefault(model, {})
    if (decoder := kept.pop(key, None)) is None:
        decoder = CachedDecoder(model, source.memory, most)
    else:
        decoder.begin(source.memory)
    yield decoder
    kept[key] = decoder  # the last that was used stands last
    while len(kept) > MOST_DECODERS:
        kept.pop(next(iter(kept))).step.close()


def _of_hooks(layer: LayerMemory) -> list[Tensor]:
    """Their keys and voices."""
    return [t for part in (*layer.hooks, *layer.voices) for t in part]
