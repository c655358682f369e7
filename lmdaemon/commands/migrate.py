"""`lmdaemon migrate`: brings the schema of a PostgreSQL database to the newest version, as the start of a daemon
does.
"""

import argparse

from lmdaemon.commands.arguments import JSON, command
from lmdaemon.commands.configured import configured
from lmdaemon.commands.progress import progress
from lmdaemon.commands.shared import STOPPED, Failed, Usage, print_json
from lmdaemon.store import open as opening
from lmdaemon.store.contract import DatabaseError


@command(JSON)
def migrate(args: argparse.Namespace) -> int:
    """Adds what the schema lacks. It can be repeated, and daemons of the version before may go on running."""
    settings = configured(args, "database")
    if settings.postgres is None:
        raise Usage("migrate: the database is a file (database.path), which the daemon upgrades when it starts")
    try:
        with progress("migrating", " steps", scale=False) as tell:
            added = opening.migrate(settings.postgres, tell)
    except DatabaseError as error:
        raise Failed(str(error)) from error
    name = opening.name_of(settings)
    if args.json:
        print_json({"database": name, "added": added})
    else:
        print(f"{name}: {f'schema {added[-1]}' if added else 'nothing to do'}")
    return STOPPED
