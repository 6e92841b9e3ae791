"""A model on disk: weights, configuration, tokenizer, and what its mel spectrograms are.

- `save`, `load`: a folder, or a run's, or a bundled model's name.
- `learned_without_source`: whether guidance means anything to a saved model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..codec import Codec
from ..data.mel import MelSpec
from ..errors import UserError
from ..training.config import from_json
from .config import OmniModelConfig
from .latents import LatentModality, open_codecs
from .modalities import refuse_unknown
from .model import OmniLatentModel
from .tokenizer import Tokenizer, open_tokenizer
from .weight_file import fill_from

KIND = "omni"


def save(folder: Path, model: OmniLatentModel, tokenizer: Tokenizer | None, mel: MelSpec | None, card: str, **more: Any) -> None:
    """Write a model into an existing folder, which is opened when it has a tokenizer. Hooks are saved by themselves
    (`LatentNeuralHook.save`), codecs by name."""
    fields = {name: value for name, value in asdict(model.config).items() if name in OmniModelConfig.__dataclass_fields__}
    tensors = {name: t for name, t in model.state_dict().items() if not name.startswith("hooks.")}
    codecs = {name: part.codec.provenance.weights_hash for name, part in model.modalities.items()
              if isinstance(part, LatentModality)}
    hub.write_model(folder, KIND, fields, None, tensors, card, mel=None if mel is None else asdict(mel), codecs=codecs, **more)
    if tokenizer is not None:
        tokenizer.save(folder)


def load(name: str | Path, device: str | torch.device = "cpu", codecs: Mapping[str, Codec] | None = None) -> OmniLatentModel:
    """Open a model for use: `model.tokenizer` and `model.mel` come with it.

    Args:
        codecs: modality → the loaded codec of its tokens, in place of the one that the model names.

    Raises:
        UserError: there is no such model, it is of another kind, a file of it is missing or damaged or does not go with the others,
            or a codec of its tokens is missing or another than it learned with.
    """
    place = hub.locate(hub.split_label(str(name))[1])
    if not (place / "config.json").exists():
        raise UserError(f"{name} is no any-to-any model: give a run of an omni recipe.")
    saved = hub.read_config(place)
    if saved.get("kind") != KIND:
        raise UserError(f"{name} is a model of the kind {saved.get('kind')!r}, which turns no modality into another: give a run "
                        "of an omni recipe.")
    tokenizer = open_tokenizer(place)
    config, mel, hashes = _parts(saved, place / "config.json")
    if "text" in config.modalities and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{place}: its tokenizer has {tokenizer.vocab_size} ids and its config.json {config.vocab_size}: copy both from "
                        "where the model was saved.")
    found = open_codecs(config, codecs, str(place / "config.json"))
    _refuse_other_weights(name, found, hashes)
    model = OmniLatentModel(config, found)
    fill_from(model, place / "model.safetensors", place / "config.json")
    model.tokenizer, model.mel = tokenizer, mel
    return model.eval().to(device)


def _parts(saved: Mapping[str, Any], file: Path) -> tuple[OmniModelConfig, MelSpec | None, dict[str, str]]:
    """What a config.json says of the model, its mel spectrograms and the weights of its codecs."""
    try:
        unknown = set(saved["model"]) - set(OmniModelConfig.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        mel = None if saved.get("mel") is None else MelSpec(**saved["mel"])
        config = from_json(OmniModelConfig, saved["model"])
        refuse_unknown(config.modalities)
        return config, mel, dict(saved.get("codecs", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise UserError(f"{file} describes no model that this version knows ({failure}): restore it from where the model was saved, or "
                        "upgrade omnilatent.") from failure


def learned_without_source(name: str | Path) -> bool:
    """Whether a saved model was also trained to make things of nothing, by `PairConfig.unconditional_share`, as guidance needs."""
    training = hub.read_config(hub.locate(hub.split_label(str(name))[1])).get("training") or {}
    return bool(training.get("unconditional_share"))


def _refuse_other_weights(name: str | Path, codecs: Mapping[str, Codec], hashes: Mapping[str, str]) -> None:
    """Latents of another codec, or of the same after more training, would mean something else."""
    for modality, codec in codecs.items():
        now, then = codec.provenance.weights_hash, hashes.get(modality)
        if now != then:
            raise UserError(f"{name} takes the tokens of {modality} from a codec with the weights {then}, and {codec.label} has "
                            f"{now}: give the one that it learned with.")
