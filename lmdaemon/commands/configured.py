"""The configuration as a command needs it: what is wrong elsewhere in the file is told, and no reason to refuse.

While the daemon runs on the last file that was sound, whoever is called in at night must be able to ask it.
"""

import argparse

from lmdaemon.commands.shared import say
from lmdaemon.config import reader
from lmdaemon.config.settings import Settings

TOLD_MAX = 3  # findings; check-config has them all

ADMINISTRATION = ("api", "database")  # where the daemon listens, and whose its database is


def configured(args: argparse.Namespace, *needs: str) -> Settings:
    """The settings of the file that `args` names. Raises ConfigError when these tables cannot be used."""
    settings = reader.of_command(args.config, secrets="optional", needs=needs)
    for finding in settings.unusable[:TOLD_MAX]:
        say(f"{settings.file}: warning: {finding}", "WARNING")
    more = len(settings.unusable) - TOLD_MAX
    if more > 0:
        say(f"{settings.file}: warning: {more} more, which lmdaemon check-config tells", "WARNING")
    return settings
