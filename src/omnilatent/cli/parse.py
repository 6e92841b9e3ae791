"""Arguments of every command: a frozen dataclass becomes a command line, without importing torch."""

from __future__ import annotations

from typing import TypeVar

import tyro

Options = TypeVar("Options")


def parse(options: type[Options], command: str, argv: list[str], default: Options | None = None) -> Options:
    """Fill the dataclass `options` from `argv`.

    Fields annotated `tyro.conf.Positional[...]` are positional; nested dataclasses show their fields without a
    prefix, so `--latent-channels 16` reaches `config.model.latent_channels`. A wrong argument prints what is
    wrong and ends with exit code 2.
    """
    extra = {} if default is None else {"default": default}
    return tyro.cli(
        options, prog=f"omnilatent {command}", args=argv, description=options.__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff), **extra,
    )
