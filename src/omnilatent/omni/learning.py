"""The module that trains: the model, the losses of a job, and the weights of these losses.

- `OmniLearning`: one job and its examples in, one loss and its parts out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import PairConfig
from .flow import draw, on_the_way
from .losses import LearnedWeights, flow_terms, info_nce, text_terms
from .model import OmniLatentModel
from .pairs import Job
from .patches import PatchModality
from .source import Prefix, Source

NOISE, TIME = "noise", "time"


class OmniLearning(nn.Module):
    """Args: the model; which of its pairs are learned from."""

    def __init__(self, model: OmniLatentModel, config: PairConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        patched = [name for name, part in model.modalities.items() if isinstance(part, PatchModality)]
        flowing = [f"{name} flow" for name in patched] if config.flow_share else []
        regressed = patched if config.flow_share < 1 else []
        self._text_terms = text_terms
        self.weights = LearnedWeights([*(["text"] if "text" in model.modalities else []), *regressed, *flowing])

    def use_compiled(self, fast: bool = True) -> None:
        """Compile what stands between the libraries' own kernels; or no more."""
        self.model.backbone.compile_layers(fast)
        self._text_terms = torch.compile(text_terms) if fast else text_terms

    def needs(self, job: Job, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """What `forward` takes for a job: its modalities of a batch, and what is drawn for it."""
        needed = {name: batch[name] for name in (*job.sources, job.target)}
        if job.flowing:
            part, wanted = self.model.patch_part(job.target), batch[job.target]
            part.check(wanted)
            noise, time = draw((len(wanted), part.count(part.size_of(wanted)), part.patches.numbers), generator)
            needed |= {NOISE: noise, TIME: time}
        return needed

    def forward(self, job: Job, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A job with what it `needs` → `loss`, and for the log what it is made of, before its learned weight."""
        inputs = {name: data[name] for name in job.sources}
        aligning = self.config.contrastive_weight > 0 and job.sources not in ((), (job.target,))
        source: Source | Prefix
        if not inputs:
            source = self.model.blank(len(data[job.target]))
        else:
            source = self.model.read(inputs) if aligning else self.model.prefix(inputs)
        terms = self.terms(source, job, data)
        name = f"{job.target} flow" if job.flowing else job.target
        own = torch.stack(list(terms.values())).sum()
        loss, numbers = self.weights(name, own), {name: own.detach()}
        if isinstance(source, Source):
            other = self.model.read({job.target: data[job.target]})
            aligned = info_nce(source.latent, other.latent)
            numbers["contrastive"] = aligned.detach()
            loss = loss + self.config.contrastive_weight * aligned
        return {"loss": loss, **numbers}

    def terms(self, source: Source | Prefix, job: Job, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of one target, by name."""
        part, wanted = self.model.part(job.target), data[job.target]
        part.check(wanted)
        if not isinstance(part, PatchModality):
            return self._text_terms(self.model.text_logits(source, wanted), part.labels(wanted))
        size = part.size_of(wanted)
        if job.flowing:
            clean, time = part.cut(wanted), data[TIME]
            noisy = on_the_way(clean, data[NOISE], time)
            return flow_terms(self.model.patches(source, job.target, size, noisy, time), clean, time)
        return part.losses(self.model.patches(source, job.target, size), part.goal(wanted))
