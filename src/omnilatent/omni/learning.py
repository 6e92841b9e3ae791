"""The module that trains: the model, the losses of its jobs, and the weights of these losses.

- `OmniLearning`: jobs and batches in, one loss and its parts out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import PairConfig
from .flow import on_the_way
from .losses import LearnedWeights, flow_terms, info_nce, text_terms
from .model import OmniLatentModel
from .pairs import Job
from .patches import PatchModality
from .source import Source


class OmniLearning(nn.Module):
    """Args: the model; which of its pairs are learned from."""

    def __init__(self, model: OmniLatentModel, config: PairConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        patched = [name for name, part in model.modalities.items() if isinstance(part, PatchModality)]
        flowing = [f"{name} flow" for name in patched] if config.flow_share else []
        regressed = patched if config.flow_share < 1 else []
        self.weights = LearnedWeights([*(["text"] if "text" in model.modalities else []), *regressed, *flowing])

    def forward(
        self, jobs: Sequence[Job], data: Sequence[Mapping[str, Tensor]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Each job with its part of the batch → `loss`, then every term by the job it is of, for the log."""
        losses: dict[str, list[Tensor]] = {}
        numbers: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.parameters()).device)
        for job, batch in zip(jobs, data, strict=True):
            source = self.model.read({name: batch[name] for name in job.sources})
            terms = self.terms(source, job, batch[job.target], generator)
            name = f"{job.target} flow" if job.flowing else job.target
            losses.setdefault(name, []).append(torch.stack(list(terms.values())).sum())
            numbers |= {f"{'+'.join(job.sources)}→{job.target} {term}": value.detach() for term, value in terms.items()}
            if self.config.contrastive_weight and job.sources != (job.target,):
                other = self.model.read({job.target: batch[job.target]})
                aligned = info_nce(source.latent, other.latent)
                numbers["contrastive"] = aligned.detach()
                total = total + self.config.contrastive_weight * aligned / len(jobs)
        means = {name: torch.stack(values).mean() for name, values in losses.items()}
        return {"loss": total + self.weights(means) / len(means), **numbers}

    def terms(self, source: Source, job: Job, wanted: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of one target, by name."""
        part = self.model.part(job.target)
        part.check(wanted)
        if not isinstance(part, PatchModality):
            return text_terms(self.model.text_logits(source, wanted), part.labels(wanted))
        size = part.size_of(wanted)
        if job.flowing:
            clean = part.cut(wanted)
            noisy, time = on_the_way(clean, generator)
            return flow_terms(self.model.patches(source, job.target, size, noisy, time), clean, time)
        return part.losses(self.model.patches(source, job.target, size), part.goal(wanted))
