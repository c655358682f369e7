"""The versions of the schema, and whether this program may use the one that a database has."""

from collections.abc import Sequence
from pathlib import Path

from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.postgres.thread import Connection

# Entry n brings the schema from version n to n + 1. Never edit one that was released: add the next.
MIGRATIONS: Sequence[str] = tuple(
    Path(__file__).with_name(script).read_text("utf-8")
    for script in ("schema.sql", *(f"schema_{version}.sql" for version in range(2, 8)))
)
# A program that knows fewer versions than this must not use the schema. The number is raised only by a migration that
# takes something away, or by one whose rules older programs break: before version 5 a daemon took itself to be alone.
OLDEST = 5

# Whether the schema exists.
IS_THERE = "SELECT to_regclass('lmdaemon.version') IS NOT NULL"
# The version of the schema, and that of the oldest program that may use it.
VERSIONS = "SELECT current, oldest FROM lmdaemon.version"


def current_of(sql: Connection, title: str, known: int) -> int:
    """The version of the schema, 0 if there is none. Raises DatabaseError if a program that knows `known` versions must
    not use it.
    """
    is_there = sql.execute(IS_THERE).fetchone()
    if is_there is None or not is_there[0]:
        return 0
    current: int
    current, oldest = sql.execute(VERSIONS).fetchone() or (0, 0)
    if oldest > known:
        raise newer(title, current, known)
    return min(current, known)


def newer(title: str, current: int, known: int) -> DatabaseError:
    """The error that a newer program has brought the schema to version `current`, which one that knows `known` must not
    use.
    """
    return DatabaseError(f"{title}: was set up by a newer lmdaemon (schema {current}; this one knows {known})")
