"""Loads the part of the configuration that a command needs. Errors elsewhere in the file are printed as warnings and do
not stop the command.

After a failed reload the daemon still runs with the previous file, and its administrators must still be able to use the
commands.
"""

import argparse
from collections.abc import Iterable

from lmdaemon.commands.shared import say
from lmdaemon.config import reader
from lmdaemon.config.findings import ContentError, suggestion
from lmdaemon.config.settings import Settings

TOLD_MAX = 3  # most findings that are printed; check-config prints all

ADMINISTRATION = ("api", "database")  # tables that say where the daemon listens and who owns its database


def configured(args: argparse.Namespace, *needs: str) -> Settings:
    """The settings of the file that `args` names. Raises ConfigError if a table in `needs` cannot be used."""
    settings = reader.of_command(args.config, secrets="optional", needs=needs)
    for finding in settings.unusable[:TOLD_MAX]:
        say(f"{settings.file}: warning: {finding}", "WARNING")
    more = len(settings.unusable) - TOLD_MAX
    if more > 0:
        say(f"{settings.file}: warning: {more} more; lmdaemon check-config prints them", "WARNING")
    return settings


def administered(args: argparse.Namespace) -> Settings:
    """The settings with which a command finds the running daemon. Raises ConfigError, which says how the daemon is
    found while the file is broken.
    """
    try:
        return configured(args, *ADMINISTRATION)
    except ContentError as error:
        hint = (
            "lmdaemon: until it is mended, name another file beside it, with the [api] and [database] tables that the "
            "daemon was started with: --config FILE"
        )
        raise ContentError([*error.findings, hint]) from error


def tell_unknown(operator: str | None, known: Iterable[str]) -> None:
    """Warns on stderr if no such operator is configured. For results that are empty, perhaps because of a misspelt
    name.

    It is no error, because rows of an operator that has left the file are kept.
    """
    if operator is not None and operator not in (names := set(known)):
        say(f"lmdaemon: {unknown(operator, names)}", "WARNING")


def unknown(operator: str, known: Iterable[str]) -> str:
    """The message that no operator has this name, with the name that was probably meant."""
    return f"no operator of this name is configured (got {operator!r}){suggestion(operator, known)}"
