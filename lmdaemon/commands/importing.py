"""`lmdaemon import`: moves a stopped daemon's SQLite file into an empty PostgreSQL database."""

import argparse

from lmdaemon import rights
from lmdaemon.clock import Clock
from lmdaemon.commands.arguments import JSON, argument, command, file
from lmdaemon.commands.configured import configured
from lmdaemon.commands.progress import progress
from lmdaemon.commands.shared import STOPPED, Failed, Usage, print_json
from lmdaemon.rights import UnsafeError, acting_with
from lmdaemon.store import open as opening
from lmdaemon.store.contract import DatabaseError


@command(argument("file", type=file, metavar="FILE", help="the SQLite file of a stopped daemon"), JSON)
def import_file(args: argparse.Namespace) -> int:
    """Moves sessions, deliveries, holds and idleness. After an interruption, the same command goes on with the rest."""
    settings = configured(args, "database")
    if settings.postgres is None:
        raise Usage("import: database.url must name the database to move the file into")
    try:
        with acting_with(rights.for_database(args.file)), progress("importing", " rows") as tell:
            moved = opening.import_file(settings.postgres, args.file, Clock().wall_ms(), tell)
    except (DatabaseError, UnsafeError) as error:
        raise Failed(str(error)) from error
    name = opening.name_of(settings)
    if args.json:
        print_json({"database": name, "counts": dict(moved.counts), "before": moved.before})
        return STOPPED
    if moved.before:
        print(f"{args.file}: is in {name} already")
        return STOPPED
    for what, count in moved.counts.items():
        print(f"{what}: {count} in the file, {count} in the database")
    return STOPPED
