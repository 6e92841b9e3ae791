"""`omnilatent push NAME owner/repo`: upload a model to the hub.

- `PushOptions`, `main`: the command.
- `push`: create the repository if need be and upload the checkpoint folder in one commit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from .. import hub
from ..errors import UserError
from .parse import parse

# What belongs to a model; a run's training state, logs and pictures stay at home.
UPLOADED = ["*.safetensors", "*.safetensors.index.json", "config.json", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class PushOptions:
    """Upload a codec's folder to the hub; others then load it by the repository's name."""

    name: tyro.conf.Positional[str]
    """A run, a checkpoint, a diffusers folder or a bundled model."""
    repository: tyro.conf.Positional[str]
    """Where to: owner/repo. It is created if it does not exist."""
    private: bool = False
    """Create it as a private repository. One that exists and is public is refused."""
    endpoint: str | None = None
    """Another hub than https://huggingface.co."""


def main(argv: list[str]) -> None:
    options = parse(PushOptions, "push", argv)
    url = push(options.name, options.repository, options.private, options.endpoint)
    print(f"pushed to {url}")


def push(name: str, repository: str, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a model's folder in one commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: NAME is no folder, nobody is logged in, the repository is public and was to be private, or the hub
            refuses or cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository} is not a hub repository: write owner/repo.")
    folder = folder_of(name)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    token = huggingface_hub.get_token()
    if token is None:
        raise UserError("Nobody is logged in to the hub: run 'hf auth login', or set HF_TOKEN, and repeat the command.")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:  # it was there before: creating it changed nothing
            raise UserError(f"{repository} exists on the hub and is public: make it private in its settings, give "
                            "another name, or leave out --private.")
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=UPLOADED, ignore_patterns=["*/*"],
            commit_message=f"Upload {name} with omnilatent",
        )
    except HfHubHTTPError as failure:
        status = failure.response.status_code if failure.response is not None else 0
        remedy = {401: "log in with 'hf auth login'", 403: "use a token that may write there"}.get(status, "try again")
        raise UserError(f"The hub refused the upload to {repository} (HTTP {status}): {remedy}.") from failure
    except UserError:
        raise
    except ValueError as failure:  # what the hub says of the card's head
        reason = str(failure).splitlines()[-1].strip()
        raise UserError(f"The hub refused the README.md of {folder} ({reason}): mend its head, most often the line "
                        "license:, and repeat the command.") from failure
    except (OSError, HTTPError) as failure:  # offline mode is a ConnectionError
        reason = type(failure).__name__
        raise UserError(f"The hub {api.endpoint} could not be reached ({reason}): check the network.") from failure
    return str(commit.commit_url)


def folder_of(name: str) -> Path:
    """The folder that NAME stands for, checked to hold a model that `load` would recognise.

    Raises:
        UserError: there is no folder: NAME is one file, or a codec without weights.
    """
    _, target = hub.split_label(name)
    if target in hub.WEIGHTLESS and not Path(target).exists():
        raise UserError(f"{target} has no weights to upload.")
    path = hub.locate(target)
    if path.is_file():
        raise UserError(f"{path} is one file: make a folder of it with 'omnilatent export {target} --to diffusers "
                        "--out FOLDER' and push that.")
    hub.recognise(path)
    return path if (path / "config.json").exists() or not (path / "vae" / "config.json").exists() else path / "vae"
