"""What an any-to-any model is, for people: the facts that `omnilatent info` prints."""

from __future__ import annotations

from pathlib import Path

from .. import hub
from .latents import LatentModality
from .model import OmniLatentModel
from .patches import AXES, PatchModality
from .saving import KIND, learned_without_source, load
from .tokenizer import ByteTokenizer


def facts(name: str) -> tuple[dict[str, str], str]:
    """(facts by what they are about, the README.md) of the model that a NAME stands for.

    Raises:
        UserError: as `saving.load`.
    """
    place = hub.locate(name)
    model = load(place)
    config, mel = model.config, model.mel
    size = sum(p.numel() for p in model.parameters())
    own = "bytes of UTF-8" if isinstance(model.tokenizer, ByteTokenizer) else type(model.tokenizer).__name__
    found = {
        "kind": f"{KIND} ({', '.join(config.modalities)}: each, or several together, into each)",
        "backbone": f"{config.num_layers} layers of {config.hidden_dim}, {config.num_heads} heads, at most {config.max_tokens:,} "
                    "tokens of sources and a target",
        **{modality: _modality(model, modality) for modality in config.modalities},
        "mel": "none: it neither hears nor makes sound files" if mel is None else
               f"{mel.rate} Hz, {mel.bands} bands of {mel.low:g} to {mel.high:g} Hz, window {mel.n_fft}, hop {mel.hop}, 0 is "
               f"{mel.floor_db:g} dB",
        "tokenizer": f"{own}, {model.tokenizer.vocab_size:,} ids",
        "flow": f"{config.flow_steps} steps, {_guidance(model, place)}" if config.flow_steps else "none: regression",
        "copies": f"flow, {config.copy_steps} steps" if config.copy_steps else "regression",
        "parameters": f"{size:,}",
        "weights": f"sha256 {hub.file_hash(place / 'model.safetensors')}",
        "licence": hub.card_licence(place),
        "path": str(place),
    }
    if "audio" not in config.modalities:
        del found["mel"]
    return found, _card(place)


def _guidance(model: OmniLatentModel, place: Path) -> str:
    if not learned_without_source(place):
        return "no guidance: it learned nothing without a source"
    return f"guidance {model.config.guidance:g}{' (none)' if model.config.guidance == 1 else ''}, unless asked for otherwise"


def _modality(model: OmniLatentModel, name: str) -> str:
    part = model.part(name)
    if not isinstance(part, PatchModality):
        return f"ids 0 to {model.config.vocab_size - 1}, at most {model.config.text_tokens} written, unless asked for otherwise"
    usual = "x".join(map(str, part.usual))
    told = f"any {AXES[len(part.usual)]}; usually {usual}, {part.count(part.usual)} tokens"
    if not isinstance(part, LatentModality):
        return told
    spec, origin = part.codec.spec, part.codec.provenance
    return (f"{told} of latents of {model.config.codecs[name]} (f{spec.downsampling}, {spec.channels} channels; sha256 "
            f"{origin.weights_hash})")


def _card(place: Path) -> str:
    file = place / "README.md"
    return file.read_text(encoding="utf-8") if file.exists() else ""
