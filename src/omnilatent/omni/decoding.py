"""Text, one token after the other, over remembered keys.

- `greedy_logits`: the logits of a greedy text of a given length.
- `write`: text until its end: the likeliest tokens, drawn ones, or beam search. `check_writing`: what it may be asked for.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..nn.transformer import Keys
from ..training.config import is_whole
from .backbone import LayerMemory
from .cached import Writer, decoder_for
from .hooks import HookKeys
from .source import Source
from .text import END, PAD


def greedy_logits(model: Writer, source: Source, positions: int) -> Tensor:
    """Logits `(b, positions, vocabulary)`, each for the likeliest tokens before it; gradients go through the logits."""
    part = model.text_part()
    x, memory, found = part.begin.to(source.latent).expand(source.batch, 1, -1), source.memory, []
    for position in range(positions):
        x, memory = model.write_on(memory, x, position)
        found.append(part.logits(x))
        x = part.embed(found[-1].detach()[..., PAD + 1 :].argmax(-1) + PAD + 1)  # padding is never written
    return torch.cat(found, 1)


def check_writing(most: int, temperature: float, top_p: float, beams: int) -> None:
    """Raise a ValueError that says what `write` takes and what came."""
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and is_whole(beams) and beams >= 1 and is_whole(most) and most >= 1):
        raise ValueError(f"generate takes temperature >= 0 and finite, 0 < top_p <= 1, and beams >= 1 and max_len >= 1, both whole; got "
                         f"{temperature}, {top_p}, {beams}, {most}")
    if beams > 1 and temperature:
        raise ValueError(f"beam search takes no temperature; got beams {beams} and temperature {temperature}")


def write(
    model: Writer, source: Source, most: int, temperature: float = 0.0, top_p: float = 1.0, beams: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ids `(b, ≤ most)`, the end not among them, padded with 0."""
    if beams > 1:
        return _beam(model, source, most, beams)
    part, generator = model.text_part(), generator or torch.Generator(source.latent.device).manual_seed(0)
    x = part.begin.to(source.latent).expand(source.batch, 1, -1)
    ended, written = torch.zeros(source.batch, dtype=torch.bool, device=x.device), []
    with decoder_for(model, source, most) as decoder:
        for position in range(most):
            ids = _choose(decoder.next(x, position), temperature, top_p, generator)
            ended = ended | (ids == END)
            written.append(ids.masked_fill(ended, PAD))
            if position % 8 == 7 and bool(ended.all()):  # to ask at every token would make a GPU wait at every token
                break
            x = part.embed(ids[:, None])
    return _trimmed(torch.stack(written, 1))


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Logits `(b, vocabulary)` → ids `(b,)`; padding is never written."""
    logits[:, PAD] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the first always stays
    drawn = torch.multinomial(p, 1, generator=generator)
    return order.gather(1, drawn)[:, 0]


def _trimmed(ids: Tensor) -> Tensor:
    """Without the columns at the right that are padding in every row."""
    used = (ids != PAD).any(0).nonzero()
    return ids[:, : int(used[-1]) + 1 if len(used) else 1]


def _beam(model: Writer, source: Source, most: int, beams: int) -> Tensor:
    """The likeliest texts by their mean log-probability a token, the end counted."""
    part, batch, device = model.text_part(), source.batch, source.latent.device
    memory = [_spread(layer, beams) for layer in source.memory]
    x = part.begin.to(source.latent).expand(batch * beams, 1, -1)
    scores = torch.zeros(batch, beams, device=device)
    scores[:, 1:] = -torch.inf  # all beams are alike at first
    ids = torch.zeros(batch, beams, 0, dtype=torch.int64, device=device)
    lengths, ended = torch.zeros(batch, beams, device=device), torch.zeros(batch, beams, dtype=torch.bool, device=device)
    for position in range(most):
        x, memory = model.write_on(memory, x, position)
        logits = part.logits(x)[:, 0].float()
        logits[:, PAD] = -torch.inf
        steps = logits.log_softmax(-1).view(batch, beams, -1)
        steps = steps.masked_fill(ended[..., None], -torch.inf)
        steps[..., PAD] = torch.where(ended, 0.0, -torch.inf)  # an ended text goes on as it is
        totals = scores[..., None] + steps
        grown = lengths + (~ended).float()
        rank = totals / grown[..., None]
        best = rank.flatten(1).topk(beams).indices
        beam, token = best // steps.shape[-1], best % steps.shape[-1]
        scores = totals.flatten(1).gather(1, best)
        lengths, ended = grown.gather(1, beam), ended.gather(1, beam) | (token == END)
        ids = torch.cat((ids.gather(1, beam[..., None].expand(-1, -1, ids.shape[2])), token[..., None]), 2)
        if bool(ended.all()):
            break
        rows = (torch.arange(batch, device=device)[:, None] * beams + beam).flatten()
        memory = [_taken(layer, rows) for layer in memory]
        x = part.embed(token.flatten()[:, None])
    first = (scores / lengths.clamp_min(1)).argmax(1)
    found = ids[torch.arange(batch, device=device), first]
    return _trimmed(found.masked_fill(found == END, PAD))


def _spread(layer: LayerMemory, times: int) -> LayerMemory:
    """Every example so many times, one after the other."""
    count = len(layer.prefix.k)
    return _taken(layer, torch.arange(count, device=layer.prefix.k.device).repeat_interleave(times))


def _taken(layer: LayerMemory, rows: Tensor) -> LayerMemory:
    def of(keys: Keys) -> Keys:
        return Keys(keys.k[rows], keys.v[rows], None if keys.valid is None else keys.valid[rows])

    hooks = tuple(HookKeys(hook.gate, hook.k[rows], hook.v[rows]) for hook in layer.hooks)
    return replace(layer, prefix=of(layer.prefix), hooks=hooks, written=None if layer.written is None else of(layer.written))
