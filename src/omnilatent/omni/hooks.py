"""Latent Neural Hooks: learnable tokens in the self-attention of chosen layers of a model that stays as it is.

    hook = LatentNeuralHook("style", num_tokens=8, dim=768, target_layers=[0, 1, 2])
    model.register_hook(hook)                      # its parameters are now the model's
    with model.disable_hooks(): ...                # as if it were not there, bit by bit
    hook.save("style/"); LatentNeuralHook.load("style/")

At each of its layers a hook's tokens attend to the prefix, to themselves and to other hooks, with the layer's own weights,
and the prefix and every target attend to them. What that adds to attention is multiplied by a learned gate, one a layer,
which begins nearly closed (σ(−4) ≈ 0.018). Its state goes on from layer to layer.

Tokens only choose among what the layers can say already. A hook with a `voice` also adds to every target's last states, so that
a model can be taught what it never said, such as letters that it never wrote.

- `LatentNeuralHook`, `LatentHookConfig`: the hook.
- `HookKeys`: what others attend to at one layer. `Voice`: what is added after the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from .. import hub
from ..errors import UserError
from ..training.config import is_whole
from .weight_file import fill_from

CONTENT = "content"  # what `probe` calls the states that are no hook's


class HookKeys(NamedTuple):
    """One hook at one layer: its gate (a scalar in 0 … 1), keys and values `(b, heads, tokens, d)`."""

    gate: Tensor
    k: Tensor
    v: Tensor


class Voice(NamedTuple):
    """A hook's gate for it (a scalar in 0 … 1) and two matrices, `(voice, dim)` and `(dim, voice)`."""

    gate: Tensor
    down: Tensor
    up: Tensor

    def added_to(self, x: Tensor) -> Tensor:
        """Last states `(b, m, dim)`, normalised → the same with the voice."""
        return x + self.gate.to(x.dtype) * linear(silu(linear(x, self.down)), self.up)


@dataclass(frozen=True)
class LatentHookConfig:
    """A hook's shape."""

    name: str
    num_tokens: int = 8
    """Learned tokens; vectors that are given at call time come after them."""
    dim: int = 768
    """Width, that of the model."""
    target_layers: tuple[int, ...] = (0,)
    """Layers that it takes part in, from 0."""
    gate_bias_init: float = -4.0
    """Where the gates begin, before the sigmoid."""
    use_transform: bool = True
    """Whether a small perceptron changes the state between layers."""
    voice: int = 0
    """Inner width of what is added to the targets' last states; 0: nothing is."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name or "/" in self.name:
            raise ValueError(f"a hook's name is a word without dot and slash; got {self.name!r}")
        if self.name == CONTENT:
            raise ValueError(f"probe gives the model's own states as {CONTENT!r}: give the hook another name")
        if hasattr(nn.ModuleDict(), self.name):  # in which models keep their hooks by name
            raise ValueError(f"PyTorch's modules use the name {self.name!r} themselves: give the hook another")
        layers, counts = self.target_layers, (self.num_tokens, self.dim, self.voice)
        whole = isinstance(layers, tuple) and all(map(is_whole, (*counts, *layers)))
        if not whole or min(counts) < 0 or self.dim < 1 or not layers or min(layers) < 0:
            raise ValueError("a hook has whole numbers num_tokens >= 0, dim >= 1, target_layers from 0 on and voice >= 0; got "
                             f"{self.num_tokens}, {self.dim}, {list(layers) if isinstance(layers, tuple) else layers}, {self.voice}")
        if not isinstance(self.gate_bias_init, (int, float)) or not math.isfinite(self.gate_bias_init):
            raise ValueError(f"gate_bias_init is a finite number; got {self.gate_bias_init!r}")


class LatentNeuralHook(nn.Module):
    """Args: as `LatentHookConfig`."""

    def __init__(self, name: str, num_tokens: int = 8, dim: int = 768, target_layers: Sequence[int] = (0,),
                 gate_bias_init: float = -4.0, use_transform: bool = True, voice: int = 0) -> None:
        super().__init__()
        layers = tuple(target_layers) if isinstance(target_layers, Iterable) else target_layers
        if isinstance(layers, tuple) and all(map(is_whole, layers)):  # else the configuration refuses them
            layers = tuple(sorted(set(layers)))
        self.config = LatentHookConfig(name, num_tokens, dim, layers, gate_bias_init, use_transform, voice)
        self.name, self.target_layers = name, layers
        self.tokens = nn.Parameter(torch.randn(num_tokens, dim) * 0.5)
        gates = len(layers) + bool(voice)  # the voice's is the last
        self.gate_bias = nn.Parameter(torch.full((gates,), gate_bias_init))
        self.transform = nn.Sequential(nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, dim // 4), nn.SiLU(),
                                       nn.Linear(dim // 4, dim)) if use_transform else None
        if self.transform is not None:
            nn.init.zeros_(self.transform[-1].weight)  # at first the state goes on unchanged
            nn.init.zeros_(self.transform[-1].bias)
        self.down = nn.Parameter(torch.randn(voice, dim) * dim**-0.5) if voice else None
        self.up = nn.Parameter(torch.zeros(dim, voice)) if voice else None  # at first it says nothing

    def begin(self, batch: int, vectors: Tensor | None = None) -> Tensor:
        """The state before the first layer `(batch, tokens, dim)`: the learned tokens, then the vectors given.

        Raises:
            ValueError: vectors that are no floating point tensor `(batch, n, dim)`, or neither learned tokens nor vectors nor a voice.
        """
        state = self.tokens.expand(batch, -1, -1)
        if vectors is None:
            if not len(self.tokens) and not self.config.voice:
                raise ValueError(f"the hook {self.name} has no tokens of its own: give it vectors (b, n, {self.config.dim})")
            return state
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            got = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ValueError(f"the hook {self.name} takes vectors as a floating point tensor; got {got}")
        if vectors.ndim != 3 or vectors.shape[0] != batch or vectors.shape[2] != self.config.dim:
            raise ValueError(f"the hook {self.name} takes vectors ({batch}, n, {self.config.dim}); got {tuple(vectors.shape)}")
        return torch.cat((state, vectors.to(state)), 1)

    def gate(self, layer: int) -> Tensor:
        """Its gate at one of its layers, a scalar in 0 … 1."""
        return self.gate_bias[self.target_layers.index(layer)].sigmoid()

    @property
    def voice(self) -> Voice | None:
        """What it adds to the last states of targets, if anything."""
        return None if self.down is None or self.up is None else Voice(self.gate_bias[-1].sigmoid(), self.down, self.up)

    def evolve(self, state: Tensor) -> Tensor:
        """The state between two layers."""
        return state if self.transform is None else state + self.transform(state)

    def save(self, folder: str | Path) -> None:
        """The hook alone: `hook.safetensors` and `hook.json`, in place of a hook that is there.

        Raises:
            UserError: the folder holds something else.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if folder.exists() and not (folder / "hook.json").exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} is there and holds no hook: give a new folder.")
        with hub.new_folder(folder) as new:
            save_file({name: t.contiguous() for name, t in self.state_dict().items()}, new / "hook.safetensors")
            (new / "hook.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> LatentNeuralHook:
        """The inverse of `save`.

        Raises:
            UserError: the folder holds no hook, or its files are damaged or no pair.
        """
        file = Path(folder) / "hook.json"
        if not file.exists():
            raise UserError(f"{folder} holds no hook: give a folder with hook.json and hook.safetensors.")
        described = hub.read_json(file)
        try:
            hook = cls(**described)
        except (TypeError, ValueError) as failure:
            raise UserError(f"{file} describes no hook that this version knows ({failure}): restore it from where the hook was saved, or "
                            "upgrade omnilatent.") from failure
        fill_from(hook, file.with_name("hook.safetensors"), file)
        return hook
