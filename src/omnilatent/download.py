"""From the network to this machine.

- `fetch`: a hub id → a folder: the configuration and the safetensors of a repository, through the hub's cache.
- `fetch_file`: one file by its address, checked; `Unreachable` where there is no network.
- `cache_folder`: where what we download ourselves is kept.
"""

from __future__ import annotations

import hashlib
import os
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


class Unreachable(Exception):
    """A server could not be reached or does not have the file; the message is a few words."""


def cache_folder() -> Path:
    """`omnilatent` in the user's cache: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnilatent"


def fetch_file(url: str, path: Path, size: int, sha256: str, timeout: float = 10.0) -> None:
    """Download `url` to `path`, whole or not at all.

    Raises:
        Unreachable: there is no network, no such server, or no such file on it.
        UserError: what came is not the file of this size and SHA-256; or the disk is full.
    """
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=timeout) as answer:
            content = answer.read(size + 1)
    except (OSError, HTTPException) as failure:  # URLError and timeouts are OSErrors
        raise Unreachable(" ".join(str(getattr(failure, "reason", failure)).split())) from failure
    if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
        more = "more than " if len(content) > size else ""
        raise UserError(f"{url} sent {more}{min(len(content), size)} bytes that are not the file expected ({size} "
                        f"bytes, SHA-256 {sha256[:16]}…): repeat the command, or fetch the file elsewhere as {path}.")
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as failure:
        if is_disk_full(failure):
            raise UserError(f"The disk is full while downloading {path}: free space and repeat it.") from failure
        raise
    finally:
        temporary.unlink(missing_ok=True)
