"""Fréchet distances between images and their reconstructions, in the features of the networks that papers name.

- `InceptionFeatures`: the TensorFlow-ported Inception of torch-fidelity, for rFID (Heusel et al. 2017).
- `DinoFeatures`: DINOv2 ViT-L/14, for FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675).
- `inception_available`, `dino_available`: None, or the sentence that says what to install or fetch.

A Fréchet distance over N images is biased upwards, the more so the fewer they are, and is compared only at equal N.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, library
from ..hub import read_json
from ..losses.weight_files import VARIABLE, MissingNetwork, NetworkFile, folders, read_state_dict

INCEPTION = NetworkFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "rFID (Inception)",
)
DINO = "facebook/dinov2-large"
DINO_SIDE = 224
# ImageNet's mean and standard deviation, as DINOv2 was trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inception_available() -> str | None:
    """None where Inception can be had, else the sentence that says what to install or fetch."""
    missing = INCEPTION.missing()
    if all(importlib.util.find_spec(name) for name in ("torch_fidelity", "torchvision")):  # it imports the other
        return missing
    needs = "rFID (Inception) needs the library torch-fidelity: pip install 'omnilatent[perceptual]'"
    return f"{needs}." if missing is None else f"{needs}, and fetch {INCEPTION.url} into {folders()[0]}."


class InceptionFeatures(nn.Module):
    """Images → the 2048 pooled features of the Inception that FID is defined with.

    torch-fidelity's own port, its TensorFlow-like resize to 299² included, on 8-bit values.

    Args:
        weights: the converted weight file; by default the published one in the search path, its hash checked.

    Raises:
        MissingNetwork: the published file or the library is not on this machine.
    """

    dim = 2048

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        if weights is None:
            sentence = inception_available()
            if sentence is not None:
                raise MissingNetwork(sentence)
            weights = INCEPTION.path()
        # torch-fidelity unpickles whatever file it is given; what we hand it is our own copy of plain tensors.
        plain = io.BytesIO()
        torch.save(read_state_dict(weights), plain)
        plain.seek(0)
        module = library("torch_fidelity.feature_extractor_inceptionv3", extra="perceptual")
        self.inception = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], plain)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """`(b, 3, h, w)` in [0, 1] → `(b, 2048)`."""
        return self.inception((images.float().clamp(0, 1) * 255).round().to(torch.uint8))[0]


def dino_available() -> str | None:
    """None where DINOv2 ViT-L/14 can be had, else the sentence that says what to install or fetch."""
    if importlib.util.find_spec("transformers") is None:
        return "FD-DINOv2 needs the library transformers: pip install 'omnilatent[perceptual]'."
    if _dino_folder() is not None:
        return None
    return (f"FD-DINOv2 needs {DINO}: run 'hf download {DINO} config.json model.safetensors', or fetch these two files "
            f"from https://huggingface.co/{DINO} into a folder dinov2-large inside one that {VARIABLE} names.")


class DinoFeatures(nn.Module):
    """Images → the normalised class token of DINOv2 ViT-L/14, 1024 features, at 224² (bicubic, antialiased).

    Args:
        folder: a folder with config.json and model.safetensors of a DINOv2; by default `dinov2-large` in the search
            path or in the hub's cache, which has to be the ViT-L. Nothing is downloaded.

    Raises:
        MissingNetwork: it is not on this machine.
        UserError: the folder found holds another model than ViT-L/14, or cannot be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        if folder is None:
            sentence = dino_available()
            if sentence is not None:
                raise MissingNetwork(sentence)
            folder = _dino_folder()
            assert folder is not None
            _check_large(folder)
        module = library("transformers.models.dinov2.modeling_dinov2", extra="perceptual")
        try:
            self.dino = module.Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                                           dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as failure:
            reason = " ".join(str(failure).split())[:200]
            raise UserError(f"{folder} cannot be loaded as a DINOv2 ({reason}): fetch {DINO} again.") from failure
        self.dim: int = self.dino.config.hidden_size
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """`(b, 3, h, w)` in [0, 1] → `(b, dim)`."""
        square = F.interpolate(images.float(), (DINO_SIDE, DINO_SIDE), mode="bicubic", antialias=True)
        square = (square.clamp(0, 1) * 255).round() / 255  # the reference resizes pictures, which are 8-bit
        return self.dino(pixel_values=(square - self.mean) / self.std).last_hidden_state[:, 0].float()


def _dino_folder() -> Path | None:
    """Where DINOv2's two files lie together: the search path first, then the hub's cache."""
    for folder in folders():
        if all((folder / "dinov2-large" / file).is_file() for file in ("config.json", "model.safetensors")):
            return folder / "dinov2-large"
    cached = [library("huggingface_hub").try_to_load_from_cache(DINO, file)
              for file in ("config.json", "model.safetensors")]
    return Path(cached[0]).parent if all(isinstance(file, str) for file in cached) else None


def _check_large(folder: Path) -> None:
    """Refuse another model under ViT-L/14's name."""
    config = read_json(folder / "config.json")
    expected = {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
    for key, value in expected.items():
        if config.get(key) != value:
            raise UserError(f"{folder} is not {DINO}: its config.json has {key} {config.get(key)!r}, expected "
                            f"{value!r}: fetch {DINO} into it.")
