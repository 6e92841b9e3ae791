"""What an any-to-any model is made of and what its parts do: the figures of `omnilatent bench` on such a model.

- `diagnose`: all of them. Each is a table: row → column → number. `ABOUT`: what each says, in a sentence.
- `budget`, `timing`, `ranks`, `contributions`, `scaling`, `sizes`, `loss_shares`, `hook_impact`.

Times are those of the fastest of several calls in turn, which other work on the machine disturbs least; they are given as shares
and ratios, in milliseconds only where there is a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .config import PairConfig
from .evaluation import Figures, latents
from .hooks import LatentNeuralHook
from .learning import OmniLearning
from .model import OmniLatentModel
from .pairs import Job
from .patches import PatchModality
from .tokens import Tokens

ABOUT = {
    "parameters": "how many each part has",
    "time": "what each part takes of all: embedding a modality, reading it (embedding and all layers), making it from itself",
    "effective rank": "how many directions the tokens use as they enter and leave the backbone, and the pooled latents",
    "layers": "how far each layer moves the tokens, as a share of their length, and the cosine of before and after",
    "scaling": "time of reading two and four times the batch, over that of reading it once",
    "sizes": "parameters and time of reading, with untrained weights, over those of the configuration as it is",
    "alignment": "whether the modalities of one example lie together: cosine, that of different examples, retrieval and its chance",
    "loss": "the terms of the loss when every modality is turned into itself",
    "hooks": "how far a hook moves the latents, as a share of their length",
}


def diagnose(model: OmniLatentModel, data: Mapping[str, Tensor], calls: int = 10) -> dict[str, Figures]:
    """Every table, on one batch of examples by modality."""
    with torch.no_grad():
        return {"parameters": budget(model), "time": timing(model, data, calls), "effective rank": ranks(model, data),
                "layers": contributions(model, data), "scaling": scaling(model, data, calls), "sizes": sizes(model, data, calls),
                "alignment": latents(model, data),
                "loss": loss_shares(model, data), "hooks": hook_impact(model, data)}


def budget(model: OmniLatentModel) -> Figures:
    """Parameters of each part and their share."""
    parts = {f"{name} in and out": part for name, part in model.modalities.items()}
    parts |= {"backbone": model.backbone, "positions": model.places, "time of the flow": model.time, "hooks": model.hooks}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["source tokens"] = sum(p.numel() for p in (*model.source_tokens.parameters(), model.nothing))
    total = sum(p.numel() for p in model.parameters())
    assert sum(counts.values()) == total, "a parameter belongs to no part"
    return {name: {"parameters": n, "share": n / total} for name, n in (counts | {"all": total}).items()}


def timing(model: OmniLatentModel, data: Mapping[str, Tensor], calls: int) -> Figures:
    """Of each modality: embedding it, reading it, making it from itself; the shares of their sum, and milliseconds on a GPU."""
    steps: dict[str, Callable[[], object]] = {}
    for name, batch in data.items():
        part, source = model.part(name), model.read({name: batch})
        steps[f"{name}: embed"] = lambda part=part, batch=batch: part.encode(batch)
        steps[f"{name}: read"] = lambda name=name, batch=batch: model.read({name: batch})
        if isinstance(part, PatchModality):
            size = part.size_of(batch)
            steps[f"{name}: make"] = lambda name=name, source=source, size=size: model.patches(source, name, size)
        else:
            steps[f"{name}: write, all at once"] = lambda source=source, batch=batch: model.text_logits(source, batch)
    times = _fastest(steps, calls, next(iter(data.values())).is_cuda)
    total = sum(times.values())
    on_gpu = next(iter(data.values())).is_cuda
    return {name: {"share": t / total, **({"ms": t} if on_gpu else {})} for name, t in times.items()}


def ranks(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007): of all tokens of a modality, padding left out, as
    they enter and as they leave the backbone, and of the pooled latents, each with what it cannot exceed."""
    found: Figures = {}
    for name, batch in data.items():
        source = model.read({name: batch})
        entering, read = model.part(name).encode(batch), source.read
        tables = {"entering": _rows(entering.x, entering.valid), "leaving": _rows(read.x, read.valid), "latents": source.latent}
        found[name] = {}
        for what, rows in tables.items():
            found[name] |= {what: effective_rank(rows), f"{what} at most": min(len(rows) - 1, rows.shape[1])}
    return found


def _rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """`(b, n, d)` → those that are no padding, `(rows, d)`."""
    return x.flatten(0, 1) if valid is None else x[valid]


def effective_rank(rows: Tensor) -> float:
    """Of rows `(n, d)` less their mean."""
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    shares = values / values.sum().clamp_min(1e-12)
    return float(torch.special.entr(shares).sum().exp())


def contributions(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """How far each layer moves the tokens, as a share of their length, and the cosine of before and after, by modality."""
    layers = range(model.config.num_layers)
    found: Figures = {f"layer {number} {what}": {} for what in ("moves", "cosine") for number in layers}
    for name, batch in data.items():
        read = model.read({name: batch}, keep=True).read
        prefix: Tokens = model._source(name, batch)
        states = [_rows(x, prefix.valid) for x in (prefix.x, *(content for content, _ in read.layers))]
        for number, (before, after) in enumerate(zip(states, states[1:])):
            found[f"layer {number} moves"][name] = float(((after - before).norm(dim=-1) / before.norm(dim=-1)).mean())
            found[f"layer {number} cosine"][name] = float(torch.cosine_similarity(before, after, dim=-1).mean())
    return found


def scaling(model: OmniLatentModel, data: Mapping[str, Tensor], calls: int) -> Figures:
    """Time of reading one, two and four copies of the batch, over that of one: 1, 2 and 4 where time goes with size."""
    found: Figures = {}
    for name, batch in data.items():
        steps = {str(copies): (lambda copies=copies: model.read({name: batch.repeat(copies, *[1] * (batch.ndim - 1))}))
                 for copies in (1, 2, 4)}
        times = _fastest(steps, calls, batch.is_cuda)
        found[name] = {f"{copies} times": t / times["1"] for copies, t in times.items()}
    return found


def sizes(model: OmniLatentModel, data: Mapping[str, Tensor], calls: int) -> Figures:
    """Parameters, and time of reading each modality alone, of models with untrained weights and half the width (its heads as wide as
    before) or half the layers; over those of the configuration as it is."""
    config, device = model.config, model.places.linear.weight.device
    changes = {"as it is": {}}
    if config.num_heads > 1:
        heads = config.num_heads // 2
        changes["half the width"] = {"num_heads": heads, "hidden_dim": config.hidden_dim // config.num_heads * heads}
    if config.num_layers > 1:
        changes["half the layers"] = {"num_layers": config.num_layers // 2}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        models = {label: OmniLatentModel(replace(config, **change)).eval().to(device) for label, change in changes.items()}
    steps = {label: (lambda own=own: [own.read({name: batch}) for name, batch in data.items()]) for label, own in models.items()}
    times = _fastest(steps, calls, device.type == "cuda")
    counts = {label: sum(p.numel() for p in own.parameters()) for label, own in models.items()}
    return {label: {"parameters, times": counts[label] / counts["as it is"], "time, times": times[label] / times["as it is"]}
            for label in models}


def loss_shares(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """Every term of every modality's loss when it is turned into itself, and its share of all."""
    learning = OmniLearning(model, PairConfig())
    generator = torch.Generator(next(iter(data.values())).device)
    terms: dict[str, float] = {}
    for name, batch in data.items():
        source = model.read({name: batch})
        for flowing in (False, True) if isinstance(model.part(name), PatchModality) else (False,):
            job = Job((name,), name, flowing)
            terms |= {f"{name} {term}": float(value) for term, value in
                      learning.terms(source, job, learning.needs(job, data, generator.manual_seed(0))).items()}
    total = sum(terms.values())
    return {name: {"loss": value, "share": value / total} for name, value in terms.items()}


def hook_impact(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """How far the latents move, as a share of their length: with the model's own hooks against without, and with a fresh one of
    eight tokens at every layer, its gates as they begin, half open and open."""
    with model.disable_hooks():
        before = {name: model.read({name: batch}).latent for name, batch in data.items()}

    def moved() -> dict[str, float]:
        return {name: float(((model.read({name: batch}).latent - before[name]).norm(dim=-1) / before[name].norm(dim=-1)).mean())
                for name, batch in data.items()}

    found: Figures = {"its own": moved()} if len(model.hooks) else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hook = LatentNeuralHook("diagnosis", 8, model.config.hidden_dim, range(model.config.num_layers))
    model.register_hook(hook)
    try:
        for label, bias in (("fresh, gates at σ(−4)", -4.0), ("fresh, gates at ½", 0.0), ("fresh, gates open", 20.0)):
            hook.gate_bias.fill_(bias)
            found[label] = moved()
    finally:
        model.remove_hook("diagnosis")
    return found


def _fastest(steps: Mapping[str, Callable[[], object]], calls: int, cuda: bool) -> dict[str, float]:
    """Milliseconds of the fastest call of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for call in range(calls + 1):  # the first warms up
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            if call:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(values) for name, values in times.items()}
