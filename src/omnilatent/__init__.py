"""OmniLatent: learn, measure, compare and use latent spaces.

The public names load on first use, so that `import omnilatent` costs nothing:

    codec = omnilatent.load("kl-f8-small")
    latent = codec.encode(images)          # (b, 3, h, w) in [0, 1], any size
    images = codec.decode(latent)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "hub",
    "Codec": "codec",
    "LatentSpec": "latent",
    "DiagonalGaussian": "latent",
    "Point": "latent",
    "Codes": "latent",
    "LatentStore": "store",
    "GaussianAutoencoder": "autoencoders.gaussian",
    "GaussianConv2d": "nn.gaussian_conv",
    "OrganicEncoder": "organic.pooled",
    "OmniLatentModel": "omni.model",
    "OmniLatentConfig": "omni.config",
    "LatentNeuralHook": "omni.hooks",
    "LatentHookConfig": "omni.hooks",
    "UserError": "errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omnilatent' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
