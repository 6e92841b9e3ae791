"""A hub id → a folder on this machine.

- `fetch`: the configuration and the safetensors of a repository, through the hub's cache.
"""

from __future__ import annotations

from pathlib import Path

from .errors import UserError, is_disk_full


def fetch(repository: str) -> Path:
    """Download a hub repository's config and safetensors (its root's, else its vae/ folder's).

    Returns:
        The folder in the cache that stands for the repository.

    Raises:
        UserError: the hub has no such model, does not give it, or cannot be reached and the cache does not hold it; or
            the disk is full.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError, GatedRepoError, HFValidationError, HTTPError, LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    unreachable: Exception | None = None
    try:
        for folder in ("", "vae/"):
            try:
                huggingface_hub.hf_hub_download(
                    repository, f"{folder}config.json", local_files_only=unreachable is not None)
            except LocalEntryNotFoundError as failure:  # without a network the other folder may still be in the cache
                unreachable = failure
                continue
            except EntryNotFoundError:
                continue
            wanted = [f"{folder}{file}" for file in ("config.json", "*.safetensors", "*.safetensors.index.json")]
            ignored = [f"{folder}{file}" for file in ("*.fp16.safetensors", "*.non_ema.safetensors", "*/*")]
            return Path(huggingface_hub.snapshot_download(
                repository, allow_patterns=[*wanted, "README.md"], ignore_patterns=ignored))
    except GatedRepoError as failure:
        raise UserError(
            f"The hub gives {repository} only to those who accepted its terms: accept them on its page, then "
            "'hf auth login'."
        ) from failure
    except RepositoryNotFoundError as failure:
        raise UserError(
            f"{repository} is no path here, and the hub has no such model or it is private: check the name, or "
            "'hf auth login'."
        ) from failure
    except HFValidationError as failure:
        raise UserError(f"{repository} is neither an existing path nor a hub id ({failure}).") from failure
    except (OSError, HTTPError) as failure:
        if is_disk_full(failure):
            raise UserError(f"The disk is full while downloading {repository}: free space and repeat it.") from failure
        unreachable = failure
    if unreachable is not None:
        raise UserError(
            f"{repository} is no path here, and the hub could not be reached ({type(unreachable).__name__}): fetch its "
            "config.json and diffusion_pytorch_model.safetensors into a folder elsewhere and give that folder's path."
        ) from unreachable
    raise UserError(f"The hub repository {repository} holds no config.json, neither at its root nor in vae/.")
