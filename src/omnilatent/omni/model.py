"""The any-to-any model: any of its modalities in, one or several at once, any out.

    model = OmniLatentModel(OmniLatentConfig())
    model("image", images, "text")["output"]                     # logits (b, positions, vocabulary)
    model("text", ids, "image")["output"]                        # pictures (b, 3, 224, 224)
    model.forward_multimodal({"text": ids, "image": images}, ["audio"])["audio"]["output"]
    model.generate("image", images, max_len=64)                  # token ids

Pictures and videos are RGB in [0, 1], mel spectrograms are scaled to it (data/mel.py); values outside are accepted.

- `OmniLatentModel`: the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from ..codec import Codec
from ..nn.transformer import LayerConfig
from ..training.config import is_whole
from . import modalities
from .backbone import Backbone, Hooks, LayerMemory
from .config import OmniModelConfig
from .decoding import check_writing, greedy_logits, write
from .flow import TimeFeatures, flow
from .hooks import CONTENT, LatentHookConfig, LatentNeuralHook
from .latents import name_of, open_codecs
from .patches import AXES, PatchModality, Size
from .source import Prefix, Source
from .text import TextModality
from .tokens import PositionFeatures, Tokens, sequence


class OmniLatentModel(nn.Module):
    """
    Args:
        config: widths, modalities, the names of codecs.
        codecs: `image`, `video` or both → the loaded codec whose latents are that modality's tokens, in place of one that `config`
            names. It stays as it is, and no parameter of it is the model's.

    Raises:
        UserError: an unknown modality; a codec that is named cannot be opened, or one cannot give tokens.
    """

    def __init__(self, config: OmniModelConfig = OmniModelConfig(), codecs: Mapping[str, Codec] | None = None) -> None:
        super().__init__()
        dim = config.hidden_dim
        found = open_codecs(config, codecs)
        self.config = config = replace(config, **{f"{name}_codec": name_of(codec) for name, codec in found.items()})
        self.modalities = modalities.build(config, found)
        self.source_tokens = nn.ParameterDict({name: nn.Parameter(torch.randn(dim) * 0.5) for name in config.modalities})
        self.nothing = nn.Parameter(torch.randn(dim) * 0.5)
        self.places = PositionFeatures(dim)
        self.time = TimeFeatures(dim)
        self.backbone = Backbone(LayerConfig(dim, config.num_heads), config.num_layers, config.gradient_checkpointing)
        self.hooks = nn.ModuleDict()
        self._hooks_on = True

    # -- sources -----------------------------------------------------------------------------------------------

    def part(self, name: str) -> nn.Module:
        """A modality's encoder and decoder.

        Raises:
            ValueError: the model has no such modality.
        """
        if name not in self.modalities:
            raise ValueError(f"there is no modality {name!r}; this model has {', '.join(self.modalities)}")
        return self.modalities[name]

    def prefix(self, inputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None) -> Prefix:
        """One or several modalities of the same examples as the tokens of one prefix.

        Args:
            inputs: modality → its batch.
            vectors: hook → vectors `(b, n, dim)` that it takes along.

        Raises:
            ValueError: nothing given, an unknown modality, a batch of another form, or more tokens than max_tokens.
        """
        if not inputs:
            raise ValueError(f"there is no input; give one of {', '.join(self.modalities)} at least")
        for name, data in inputs.items():
            self._check(name, data)
        batch = {name: len(data) for name, data in inputs.items()}
        if len(set(batch.values())) > 1:
            raise ValueError(f"all inputs are of the same examples; got batches of {batch}")
        tokens = [self._source(name, inputs[name]) for name in self.modalities if name in inputs]
        every = tokens[0]
        for more in tokens[1:]:
            every = every.then(more)
        self._check_budget(every.x.shape[1])
        return Prefix(every, self._active(len(every.x), vectors or {}), tuple(inputs))

    def read(self, inputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None, keep: bool = False) -> Source:
        """Read a prefix.

        Args:
            inputs, vectors: as for `prefix`, which also says what is refused.
            keep: remember the states of all layers, for `probe`.
        """
        return self._read(self.prefix(inputs, vectors), keep)

    def blank(self, batch: int, hooks: Hooks | None = None) -> Prefix:
        """A prefix of `batch` examples that says nothing: one token for all sources, and hooks, by default the model's."""
        positions = torch.zeros(1, 3, dtype=torch.int64, device=self.nothing.device)
        x = self._placed(self.nothing.expand(batch, 1, -1), positions)
        return Prefix(Tokens(x, positions), self._active(batch, {}) if hooks is None else hooks)

    def _read(self, prefix: Prefix, keep: bool = False) -> Source:
        read = self.backbone.read(prefix.embedded, prefix.hooks, keep)
        if read.valid is None:
            latent = read.x.mean(1)
        else:
            share = read.valid[..., None].to(read.x.dtype)
            latent = (read.x * share).sum(1) / share.sum(1)
        return Source(prefix, read, latent)

    def _source(self, name: str, data: Tensor) -> Tokens:
        """A modality's tokens after the one that says which it is."""
        tokens = self.modalities[name].encode(data)
        x = self._placed(tokens.x, tokens.positions)
        own = self.source_tokens[name].to(x.dtype).expand(len(x), 1, -1)
        first = Tokens(own, tokens.positions.new_zeros(1, 3), None)
        return first.then(Tokens(x, tokens.positions, tokens.valid))

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors with their coordinates, in the dtype of linear layers, which autocast decides."""
        places = self.places(positions)
        return x.to(places.dtype) + places

    def _active(self, batch: int, vectors: Mapping[str, Tensor]) -> Hooks:
        unknown = [name for name in vectors if name not in self.hooks]
        if unknown:
            raise ValueError(f"there is no hook {unknown[0]!r} to give vectors to; there are {', '.join(self.hooks) or 'none'}")
        if not self._hooks_on:
            return []
        return [(hook, hook.begin(batch, vectors.get(name))) for name, hook in self.hooks.items()]

    def _check(self, name: str, data: Tensor) -> None:
        part = self.part(name)
        if not isinstance(data, Tensor):
            raise ValueError(f"{name} is given as a tensor; got {type(data).__name__}")
        part.check(data)

    def _check_budget(self, tokens: int) -> None:
        if tokens > self.config.max_tokens:
            raise ValueError(f"this takes {tokens} tokens and the model's max_tokens is {self.config.max_tokens}: give smaller "
                             "or shorter data, or a configuration with more")

    # -- targets -----------------------------------------------------------------------------------------------

    def text_logits(self, source: Source | Prefix, ids: Tensor) -> Tensor:
        """Logits `(b, n + 1, vocabulary)` for ids `(b, n)` that are known (teacher forcing)."""
        part = self.text_part()
        part.check(ids)
        x = part.shifted(ids)
        self._check_budget(source.tokens + x.shape[1])
        positions = sequence(x.shape[1], x.device)
        return part.logits(self._extend(source, self._placed(x, positions), positions, causal=True))

    def _extend(self, source: Source | Prefix, x: Tensor, positions: Tensor, causal: bool) -> Tensor:
        """A target's tokens → their last states."""
        if isinstance(source, Prefix):
            return self.backbone.together(source.embedded, source.hooks, x, positions, causal)
        return self.backbone.extend(x, positions, source.memory, causal)[0]

    def write_on(self, memory: list[LayerMemory], x: Tensor, start: int | Tensor) -> tuple[Tensor, list[LayerMemory]]:
        """Text vectors `(b, m, dim)`, the first of them the `start`-th → their last states, and the memory with them."""
        positions = sequence(x.shape[1], x.device) + start
        return self.backbone.extend(self._placed(x, positions), positions, memory, causal=True)

    def patches(self, source: Source | Prefix, target: str, size: Size, noisy: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """What the model takes the target's patches for `(b, n, numbers)`, values as `cut` gives them.

        Args:
            source: what was read, for any number of targets; or a prefix that is read along with this only target.
            noisy: patches on their way from noise, at `time` `(b,)` from 0, noise, to 1; without them the regression.
        """
        part = self.patch_part(target)
        positions = part.positions(size, source.device)
        self._check_budget(source.tokens + len(positions))
        x = (part.query + self.places(positions)).to(source.dtype).expand(source.batch, -1, -1)
        if noisy is not None:
            assert time is not None
            x = x + part.noisy(noisy.to(part.noisy.weight.dtype)) + self.time(time)[:, None].to(x.dtype)
        return part.head(self._extend(source, x, positions, causal=False))

    def text_part(self) -> TextModality:
        """What reads and writes text."""
        part = self.part("text")
        assert isinstance(part, TextModality)
        return part

    def patch_part(self, name: str) -> PatchModality:
        """What cuts and joins a modality that is no text."""
        part = self.part(name)
        if not isinstance(part, PatchModality):
            raise ValueError(f"{name} is written token by token: use generate")
        return part

    def answer(self, source: Source, target: str, size: Size | None = None, generator: torch.Generator | None = None,
               steps: int | None = None, guidance: float | None = None) -> Tensor:
        """A target in full: logits of text, or pictures, sound and videos of `size`.

        Args:
            generator: of the flow's noise; by default one with the same seed every time.
            steps: of the flow; 0: the regression. By default the configuration's `copy_steps` where the target is among the
                sources and no guidance is given, else its `flow_steps`.
            guidance: of the flow (Ho & Salimans 2022, arXiv 2207.12598); by default the configuration's; 1: none.
        """
        axes = 1 if target == "text" else len(self.patch_part(target).usual)
        if size is not None and (len(size) != axes or not all(map(is_whole, size)) or min(size) < 1):
            what = "its tokens" if target == "text" else AXES[axes]
            raise ValueError(f"the size of {target} is {what}, none below 1; got {tuple(size)}")
        if target == "text":
            positions = size[0] if size else max(1, source.tokens - 1)
            self._check_budget(source.tokens + positions)
            return greedy_logits(self, source, positions)
        part = self.patch_part(target)
        size = tuple(size or part.usual)
        self._check_budget(source.tokens + part.count(size))
        if steps is None:
            copied = target in source.prefix.names and guidance is None
            steps = self.config.copy_steps if copied else self.config.flow_steps
        guidance = self.config.guidance if guidance is None else guidance
        if not is_whole(steps) or steps < 0 or not 0 <= guidance < math.inf:
            raise ValueError(f"the flow takes whole steps, 0 for the regression, and a guidance from 0 on; got {steps} and {guidance}")
        if steps == 0:
            return part.join(self.patches(source, target, size), size)
        shape = (source.batch, part.count(size), part.patches.numbers)
        generator = generator or torch.Generator(source.device).manual_seed(0)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(source.device, source.dtype)
        nothing = None if guidance == 1 else self._read(self.blank(source.batch, source.prefix.hooks))

        def clean(noisy: Tensor, time: Tensor) -> Tensor:
            told = self.patches(source, target, size, noisy, time)
            return told if nothing is None else self.patches(nothing, target, size, noisy, time).lerp(told, guidance)

        return part.join(flow(clean, noise, steps), size)

    # -- use ---------------------------------------------------------------------------------------------------

    def forward(
        self, source: str, data: Tensor, target: str, *, size: Size | None = None, vectors: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """One modality to one other, or to itself.

        Returns:
            `output`: logits `(b, positions, vocabulary)` of the text that is decoded greedily over as many positions as the
            source has tokens (or `size[0]`), its end not stopping it; or `(b, 3, h, w)`, `(b, bands, frames)`,
            `(b, 3, t, h, w)` of `size`, by default the source's own where it is the target and else the configuration's.
            `latent`: `(b, dim)`, the source's.
        """
        if size is None and source == target and target != "text":
            self._check(source, data)
            size = self.patch_part(source).size_of(data)
        sizes = {} if size is None else {target: size}
        return self.forward_multimodal({source: data}, [target], sizes=sizes, vectors=vectors, generator=generator)[target]

    def forward_multimodal(
        self, inputs: Mapping[str, Tensor], target_modalities: Sequence[str], *, sizes: Mapping[str, Size] | None = None,
        vectors: Mapping[str, Tensor] | None = None, generator: torch.Generator | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Several modalities of the same examples, fused into one prefix, to several targets: target → as `forward`."""
        for target in target_modalities:
            self.part(target)
        more = [name for name in sizes or {} if name not in target_modalities]
        if more or not target_modalities:
            raise ValueError(f"the targets are some of {', '.join(self.modalities)}, and sizes are the targets'; got "
                             f"{', '.join(target_modalities) or 'no target'}{', and a size of ' + more[0] if more else ''}")
        source = self.read(inputs, vectors)
        return {target: {"output": self.answer(source, target, (sizes or {}).get(target), generator), "latent": source.latent}
                for target in target_modalities}

    def reconstruct(self, modality: str, data: Tensor) -> dict[str, Tensor]:
        """A modality to itself."""
        return self(modality, data, modality)

    @torch.no_grad()
    def generate(
        self, source: str | Mapping[str, Tensor], data: Tensor | None = None, max_len: int | None = None, *,
        temperature: float = 0.0, top_p: float = 1.0, beams: int = 1, generator: torch.Generator | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Text from one modality, or from several as a mapping: ids `(b, ≤ max_len)`, padded with 0 after the end.

        Args:
            temperature: 0 takes the likeliest token; above, tokens are drawn.
            top_p: only from the likeliest that together have this probability.
            beams: above 1, the likeliest text that beam search of this width finds (with temperature 0).
            generator: of what is drawn; by default one with the same seed every time.
        """
        inputs = {source: data} if isinstance(source, str) else dict(source)
        if any(value is None for value in inputs.values()):
            raise ValueError(f"generate takes a modality and its data; got no data for {next(iter(inputs))}")
        most = self.config.text_tokens if max_len is None else max_len
        check_writing(most, temperature, top_p, beams)
        read = self.read(inputs, vectors)  # type: ignore[arg-type]
        self._check_budget(read.tokens + most)
        return write(self, read, most, temperature, top_p, beams, generator)

    # -- hooks -------------------------------------------------------------------------------------------------

    def register_hook(self, hook: LatentNeuralHook | LatentHookConfig) -> LatentNeuralHook:  # type: ignore[override]
        """Take a hook into the model, or make one of its configuration; its parameters are the model's from now on.

        Raises:
            ValueError: no hook, a hook of another width, of layers that the model has not, or of a name that is taken.
        """
        if isinstance(hook, LatentHookConfig):
            hook = LatentNeuralHook(**asdict(hook))
        if not isinstance(hook, LatentNeuralHook):
            raise ValueError(f"register_hook takes a LatentNeuralHook or a LatentHookConfig; got {type(hook).__name__}")
        if hook.config.dim != self.config.hidden_dim:
            raise ValueError(f"the hook {hook.name} has dim {hook.config.dim}; the model's hidden_dim is {self.config.hidden_dim}")
        if max(hook.target_layers) >= self.config.num_layers:
            raise ValueError(f"the hook {hook.name} targets layer {max(hook.target_layers)}; the model has the layers 0 to "
                             f"{self.config.num_layers - 1}")
        if hook.name in self.hooks:
            raise ValueError(f"there is a hook {hook.name} already; remove it first")
        self.hooks[hook.name] = hook = hook.to(self.places.linear.weight)
        return hook

    def remove_hook(self, name: str) -> LatentNeuralHook:
        """Take a hook out again; the model is what it was before."""
        if name not in self.hooks:
            raise ValueError(f"there is no hook {name!r}; there are {', '.join(self.hooks) or 'none'}")
        hook = self.hooks[name]
        del self.hooks[name]
        assert isinstance(hook, LatentNeuralHook)
        return hook

    @contextmanager
    def disable_hooks(self) -> Iterator[None]:
        """As if there were no hooks."""
        before, self._hooks_on = self._hooks_on, False
        try:
            yield
        finally:
            self._hooks_on = before

    def freeze_base(self) -> None:
        """Only hooks learn from now on."""
        self.requires_grad_(False)
        self.hooks.requires_grad_(True)

    def trainable_parameters(self) -> tuple[int, int]:
        """(parameters that learn, all parameters)."""
        counts = [(p.numel() * p.requires_grad, p.numel()) for p in self.parameters()]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)

    @torch.no_grad()
    def probe(self, layer: int, source: str, data: Tensor, vectors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """States after a layer: `content` `(b, n, dim)`, and each hook's by its name `(b, tokens, dim)`."""
        if not is_whole(layer) or not 0 <= layer < self.config.num_layers:
            raise ValueError(f"the model has the layers 0 to {self.config.num_layers - 1}; got {layer}")
        content, hooks = self.read({source: data}, vectors, keep=True).read.layers[layer]
        return {CONTENT: content, **hooks}
