"""The transformer that all modalities share: a prefix is read once, any number of targets extend it.

- `Backbone.read`: source tokens through all layers, with the hooks among them; what targets may attend to.
- `Backbone.extend`: target tokens through all layers, attending to what was read, to what was written before, to themselves.
- `Backbone.together`: both at once, for training, where each prefix has one target.
- `Memory`: both kinds of keys, a layer at a time.

Hooks take part as tokens of their own (`hooks.py`). What a layer's attention gives with a hook less what it gives without,
times the hook's gate, is added to what it gives without: a closed gate therefore leaves every bit as it was. After the last
layer's norm hooks with a voice add it to targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.rotary import Rotary
from ..nn.transformer import Keys, Layer, LayerConfig, Norm, attend
from .hooks import HookKeys, LatentNeuralHook, Voice
from .tokens import Tokens


@dataclass(frozen=True)
class LayerMemory:
    """One layer's keys of the prefix, of each hook there, and of what was written so far; at the last layer, hooks' voices.

    What is written grows, unless there is a slot: the prefix's keys then go on with places for a text, and `slot` `(1,)` says
    which of them the next token takes.
    """

    prefix: Keys
    hooks: tuple[HookKeys, ...] = ()
    written: Keys | None = None
    slot: Tensor | None = None
    voices: tuple[Voice, ...] = ()

    def grown(self, k: Tensor, v: Tensor) -> LayerMemory:
        """With more that was written."""
        if self.slot is None:
            return replace(self, written=Keys(k, v) if self.written is None else self.written.then(k, v))
        self.prefix.k.index_copy_(2, self.slot, k)
        self.prefix.v.index_copy_(2, self.slot, v)
        return self


@dataclass(frozen=True)
class Read:
    """What reading a prefix gives: its last states `(b, n, dim)`, normalised; the memory of each layer; every hook's last
    state; and, if asked for, the content and the hooks' states after each layer."""

    x: Tensor
    valid: Tensor | None
    memory: list[LayerMemory]
    hooks: dict[str, Tensor]
    layers: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)


Hooks = Sequence[tuple[LatentNeuralHook, Tensor]]


class Backbone(nn.Module):
    """`count` layers and a last norm."""

    def __init__(self, config: LayerConfig, count: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(count))
        self.norm = Norm(config.dim)
        self.rotary = Rotary(config.dim // config.heads)
        self.checkpointing = checkpointing
        for name, weight in self.named_parameters():  # residual branches begin small, the deeper the network the smaller
            if weight.ndim == 2:
                scale = (2 * count) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        for layer in self.layers:  # queries begin as keys: what is alike, and at the same place, attends to each other
            with torch.no_grad():
                layer.qkv.weight[config.dim : 2 * config.dim] = layer.qkv.weight[: config.dim]

    def compile_layers(self, fast: bool = True) -> None:
        """Compile what every layer does between its matrix products and attention, which are libraries' own kernels; or no more."""
        for module in self.modules():
            if isinstance(module, (Layer, Norm)):
                module.fast = fast

    def read(self, tokens: Tokens, hooks: Hooks = (), keep: bool = False) -> Read:
        """Read a prefix.

        Args:
            hooks: each with the state that it begins with, `(b, tokens, dim)`.
            keep: also return the states after each layer.
        """
        x, turn, memory, kept = tokens.x, self.rotary(tokens.positions, tokens.x.dtype), [], []
        states = {hook.name: state for hook, state in hooks}
        for index, layer in enumerate(self.layers):
            there, own, gates = _there(hooks, states, index)
            x, keys, changed = self._call(_read_layer, layer, x, turn, tokens.valid, own, gates)
            states |= {hook.name: hook.evolve(state) for hook, state in zip(there, changed, strict=True)}
            memory.append(keys)
            if keep:
                kept.append((x, dict(states)))
        memory[-1] = replace(memory[-1], voices=_voices(hooks))
        return Read(self.norm(x), tokens.valid, memory, states, kept)

    def together(self, tokens: Tokens, hooks: Hooks, x: Tensor, positions: Tensor, causal: bool) -> Tensor:
        """What `read` and then `extend` give for a target, in one pass through the layers: half as many kernels, each for more."""
        n, x = tokens.x.shape[1], torch.cat((tokens.x, x.to(tokens.x.dtype)), 1)
        turn = self.rotary(torch.cat((tokens.positions, positions)), x.dtype)
        states = {hook.name: state for hook, state in hooks}
        for index, layer in enumerate(self.layers):
            there, own, gates = _there(hooks, states, index)
            x, changed = self._call(_both_layer, layer, x, n, turn, tokens.valid, own, gates, causal)
            states |= {hook.name: hook.evolve(state) for hook, state in zip(there, changed, strict=True)}
        return _voiced(self.norm(x[:, n:]), _voices(hooks))

    def extend(
        self, x: Tensor, positions: Tensor, memory: list[LayerMemory], causal: bool
    ) -> tuple[Tensor, list[LayerMemory]]:
        """Target tokens `(b, m, dim)` at `positions` `(m, 3)` → their last states, normalised, with hooks' voices, and the memory."""
        turn, grown = self.rotary(positions, x.dtype), []
        for layer, before in zip(self.layers, memory, strict=True):
            x, after = self._call(_extend_layer, layer, x, turn, before, causal)
            grown.append(after)
        return _voiced(self.norm(x), memory[-1].voices), grown

    def _call(self, function, *arguments):  # noqa: ANN001, ANN002, ANN202
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing there is drawn
        return function(*arguments)


def _there(hooks: Hooks, states: dict[str, Tensor], index: int) -> tuple[list[LatentNeuralHook], list[Tensor], list[Tensor]]:
    """The hooks of a layer, their states and their gates."""
    there = [hook for hook, _ in hooks if index in hook.target_layers and states[hook.name].shape[1]]
    return there, [states[hook.name] for hook in there], [hook.gate(index) for hook in there]


def _voices(hooks: Hooks) -> tuple[Voice, ...]:
    return tuple(hook.voice for hook, _ in hooks if hook.voice is not None)


def _voiced(x: Tensor, voices: Sequence[Voice]) -> Tensor:
    for voice in voices:
        x = voice.added_to(x)
    return x


def _read_layer(
    layer: Layer, x: Tensor, turn: tuple[Tensor, Tensor], valid: Tensor | None, states: list[Tensor], gates: list[Tensor]
) -> tuple[Tensor, LayerMemory, list[Tensor]]:
    """One layer over a prefix and the hooks that are there."""
    q, k, v = layer.project(x, turn)
    prefix = Keys(k, v, valid)
    hooks, changed = _changed(layer, prefix, states, gates)
    return layer.finish(x, attend_gated(q, prefix, hooks)), LayerMemory(prefix, hooks), changed


def _both_layer(
    layer: Layer, x: Tensor, n: int, turn: tuple[Tensor, Tensor], valid: Tensor | None, states: list[Tensor], gates: list[Tensor],
    causal: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One layer over `n` tokens of a prefix, the hooks that are there, and a target behind them."""
    q, k, v, q_target, k_all, v_all = layer.project(x, turn, n)
    prefix = Keys(k, v, valid)
    hooks, changed = _changed(layer, prefix, states, gates)
    whole = Keys(k_all, v_all, None if valid is None else torch.cat((valid, valid.new_ones(len(x), x.shape[1] - n)), 1))
    target = Keys(k_all[:, :, n:], v_all[:, :, n:])
    return layer.finish(x, attend_gated(q, prefix, hooks), attend_gated(q_target, prefix, hooks, target, causal, whole)), changed


def _changed(layer: Layer, prefix: Keys, states: list[Tensor], gates: list[Tensor]) -> tuple[tuple[HookKeys, ...], list[Tensor]]:
    """What others attend to of each hook, and its state after the layer."""
    projected = [layer.project(state, None) for state in states]
    hooks = tuple(HookKeys(gate, k, v) for gate, (_, k, v) in zip(gates, projected, strict=True))
    return hooks, [layer.finish(state, attend_gated(q, prefix.then(k, v), (*hooks[:i], *hooks[i + 1 :])))
                   for i, (state, (q, k, v)) in enumerate(zip(states, projected, strict=True))]


def _extend_layer(
    layer: Layer, x: Tensor, turn: tuple[Tensor, Tensor], memory: LayerMemory, causal: bool
) -> tuple[Tensor, LayerMemory]:
    """One layer over target tokens."""
    q, k, v = layer.project(x, turn)
    memory = memory.grown(k, v)
    return layer.finish(x, attend_gated(q, memory.prefix, memory.hooks, memory.written, causal)), memory


def attend_gated(
    q: Tensor, keys: Keys, hooks: Sequence[HookKeys], written: Keys | None = None, causal: bool = False, whole: Keys | None = None,
) -> Tensor:
    """Attention over `keys` and `written`, plus each hook's gate times the difference that its tokens make.

    Args:
        whole: `keys` and `written` as one, where they lie so already.
    """
    def over(base: Keys) -> Tensor:
        return attend(q, base if written is None else base.then(*written), causal)

    without = over(keys) if whole is None else attend(q, whole, causal)
    attended = without
    for hook in hooks:
        attended = attended + hook.gate.to(without.dtype) * (over(keys.then(hook.k, hook.v)) - without)
    return attended
