"""An any-to-any model on held-out data: the seed's figures by name, and what they leave out.

- `psnr`, `written_exactly`: of each example. `present`: the modalities that can be measured.
- `reconstruction`: each modality to itself. `translation`: eight pairs. `latents`: whether the modalities of one example lie together.

Validity, mean and spread (the seed's figures of a translation) say nothing about its meaning; beside them stands how far an output
moves when the source is another example's, over its spread: 0 means that the source is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from .model import OmniLatentModel
from .patches import PatchModality
from .text import PAD

PAIRS = (("image", "text"), ("text", "image"), ("image", "audio"), ("audio", "image"), ("audio", "video"), ("video", "audio"),
         ("video", "text"), ("text", "video"))
Figures = dict[str, dict[str, float]]
BATCH = 32


def psnr(made: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each example `(b,)`, of pictures, sounds or videos `(b, …)` in [0, 1] as they are, not
    rounded to 8 bits (`metrics.pixel` does that); at most 100."""
    return -10 * (made - true).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def written_exactly(wrote: Tensor, wanted: Tensor) -> Tensor:
    """Whether each text of ids `(b, n)` is the one of `(b, m)`, but for padding at the right: bool `(b,)`."""
    longest = max(wrote.shape[1], wanted.shape[1])
    a, b = (pad(ids, (0, longest - ids.shape[1]), value=PAD) for ids in (wrote, wanted))
    return (a == b).all(1)


def present(model: OmniLatentModel, data: Mapping[str, Tensor]) -> list[str]:
    """The model's modalities that the data has."""
    return [name for name in model.modalities if name in data]


@torch.no_grad()
def reconstruction(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """Text: the share of tokens that are right with those before them known, and of texts that are written exactly. Others, by the
    model's own way of making them: mean squared error, PSNR in dB, cosine."""
    found: Figures = {}
    for name in present(model, data):
        part, whole = model.part(name), data[name]
        if not isinstance(part, PatchModality):
            rights, exact = [], []
            for batch in whole.split(BATCH):
                labels = part.labels(batch)
                right = (model.text_logits(model.read({name: batch}), batch).argmax(-1) == labels)[labels >= 0]
                rights.append(right)
                wrote = model.generate(name, batch, max_len=batch.shape[1] + 1)
                exact.append(written_exactly(wrote, batch))
            found[name] = {"token_accuracy": torch.cat(rights).float().mean().item(),
                           "exact": torch.cat(exact).float().mean().item()}
            continue
        made = torch.cat([model.reconstruct(name, batch)["output"].float().clamp(0, 1) for batch in whole.split(BATCH)])
        found[name] = {"mse": (made - whole).square().mean().item(), "psnr": psnr(made, whole).mean().item(),
                       "cosine": cosine_similarity(made.flatten(1), whole.flatten(1)).mean().item()}
    return found


@torch.no_grad()
def translation(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """Of each pair: `valid`, the share of examples whose output is finite throughout; `mean_absolute` and `standard_deviation` of
    the outputs; `moves`: the root mean square difference to the output for another example's source, from the same noise, over the
    standard deviation."""
    found: Figures = {}
    names = present(model, data)
    for source, target in PAIRS:
        if source not in names or target not in names:
            continue
        size = None if target == "text" else model.patch_part(target).size_of(data[target])
        sizes = {} if size is None else {target: size}
        out, other = (torch.cat([model.forward_multimodal({source: batch}, [target], sizes=sizes)[target]["output"].float()
                                 for batch in given.split(BATCH)]) for given in (data[source], data[source].roll(1, 0)))
        spread = out.std().item()
        found[f"{source}→{target}"] = {
            "valid": out.isfinite().flatten(1).all(1).float().mean().item(), "mean_absolute": out.abs().mean().item(),
            "standard_deviation": spread, "moves": (out - other).square().mean().sqrt().item() / max(spread, 1e-9)}
    return found


@torch.no_grad()
def latents(model: OmniLatentModel, data: Mapping[str, Tensor]) -> Figures:
    """Of each pair of modalities: `cosine` of the pooled latents of one example, `cosine_of_others` of different ones (the null),
    `recall_at_1` the share of examples whose partner is the nearest of all, both ways, with its `chance`. Of each modality: mean and
    standard deviation of the latents' norms."""
    names = present(model, data)
    pooled = {name: torch.cat([model.read({name: batch}).latent.float() for batch in data[name].split(BATCH)]) for name in names}
    found: Figures = {name: {"norm": z.norm(dim=1).mean().item(), "norm_spread": z.norm(dim=1).std().item()}
                      for name, z in pooled.items()}
    for a, b in combinations(names, 2):
        similar = normalize(pooled[a], dim=1) @ normalize(pooled[b], dim=1).T
        wanted, count = torch.arange(len(similar), device=similar.device), len(similar)
        recall = [(s.argmax(1) == wanted).float().mean().item() for s in (similar, similar.T)]
        others = (similar.sum() - similar.diagonal().sum()) / max(1, count * (count - 1))
        found[f"{a}↔{b}"] = {"cosine": similar.diagonal().mean().item(), "cosine_of_others": others.item(),
                             "recall_at_1": sum(recall) / 2, "chance": 1 / count}
    return found
