"""Checks the server when a database is opened, and brings its schema to the newest version."""

from collections.abc import Sequence
from importlib import resources

import psycopg

from lmdaemon.log import Log
from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.postgres.errors import said
from lmdaemon.store.postgres.members import refuse_old
from lmdaemon.store.postgres.thread import Connection, Database

SERVER_MIN = 140000  # PostgreSQL 14
UNSAFE = ("off", "local")  # values of synchronous_commit with which a commit may be lost after it was acknowledged

# Entry n brings the schema from version n to n + 1. Never edit one that was released: add the next.
MIGRATIONS: Sequence[str] = tuple(
    resources.files(__package__).joinpath(script).read_text("utf-8")
    for script in ("schema.sql", *(f"schema_{version}.sql" for version in range(2, 8)))
)
# An older program that knows fewer must not use the schema. It is raised only by a migration that takes something away,
# or by one that old programs break the rules of: before version 5 a daemon believed to be alone.
OLDEST = 5

# Settings of the server that are checked.
SETTINGS = """
SELECT current_setting('server_version_num')::int, current_setting('synchronous_commit'),
       pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on'"""
# Whether the schema exists.
IS_THERE = "SELECT to_regclass('lmdaemon.version') IS NOT NULL"
# The version of the schema, and that of the oldest program that may use it.
VERSIONS = "SELECT current, oldest FROM lmdaemon.version"
# An advisory lock, so that programs that start at the same time upgrade one after the other. There may be no row yet
# that they could lock.
ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('lmdaemon.migrate'))"
# Creates the schema.
CREATE = "CREATE SCHEMA IF NOT EXISTS lmdaemon"

log = Log("store")


class UnsafeSettingError(Exception):
    """A setting of the server could lose commits that it has acknowledged."""


def check_server(sql: Connection, title: str) -> None:
    """Raises DatabaseError, and UnsafeSettingError for synchronous_commit."""
    row = sql.execute(SETTINGS).fetchone()
    version, synchronous_commit, read_only = row or (0, "", True)
    if version < SERVER_MIN:
        raise DatabaseError(f"{title}: is PostgreSQL {version // 10000}; 14 or newer is needed")
    if synchronous_commit in UNSAFE:
        raise UnsafeSettingError(
            f"its synchronous_commit is {synchronous_commit!r}, so that a crash could lose what was acknowledged; "
            "it must be on, remote_write or remote_apply"
        )
    if read_only:
        raise DatabaseError(f"{title}: is read-only: a standby, or set so")


def migrate(sql: Connection, title: str, migrations: Sequence[str] = MIGRATIONS, *, allowed: bool = True) -> list[int]:
    """Brings the schema to the newest version, in one transaction. Returns the versions that were added. Raises
    DatabaseError before it changes anything, also where there is something to do and it is not `allowed`.
    """
    try:
        current = _current(sql, title, len(migrations))
        if current == len(migrations):
            return []
        if 0 < current < OLDEST:
            refuse_old(sql, title)
        if not allowed:
            what = "has no schema of lmdaemon" if not current else f"has schema {current} of {len(migrations)}"
            raise DatabaseError(f"{title}: {what}; run `lmdaemon migrate`, for database.migrate is false")
        with sql.transaction():
            sql.execute(ONE_AT_A_TIME)
            sql.execute(CREATE)
            current = _current(sql, title, len(migrations))
            sql.execute("SET LOCAL search_path TO lmdaemon")
            for script in migrations[current:]:
                sql.execute(script)
            sql.execute("DELETE FROM version")
            sql.execute(
                "INSERT INTO version (current, oldest) VALUES (%s, %s)", (len(migrations), min(OLDEST, len(migrations)))
            )
    except psycopg.Error as error:
        raise DatabaseError(f"{title}: cannot be set up: {said(error)}") from error
    added = list(range(current + 1, len(migrations) + 1))
    if added:
        event = "store.migrated" if current else "store.created"
        log.info(event, path=title, schema=added[-1], before=current or None)
    return added


def migrate_database(url: str, password: str | None) -> list[int]:
    """The same for a command, on a connection of its own. Raises DatabaseError."""
    database = Database(url, password, "migrate")
    try:
        with database.connect(prepares=True) as sql:
            check_server(sql, database.title)
            return migrate(sql, database.title)
    except UnsafeSettingError as error:
        raise DatabaseError(f"{database.title}: {error}") from error
    except psycopg.Error as error:
        raise DatabaseError(f"{database.title}: cannot be used: {said(error)}") from error


def _current(sql: Connection, title: str, known: int) -> int:
    """The version of the schema, 0 without one. Raises DatabaseError if this program must not use it."""
    is_there = sql.execute(IS_THERE).fetchone()
    if is_there is None or not is_there[0]:
        return 0
    row = sql.execute(VERSIONS).fetchone()
    current, oldest = row or (0, 0)
    if oldest > known:
        raise DatabaseError(f"{title}: was set up by a newer lmdaemon (schema {current}; this one knows {known})")
    return max(current, 0) if current <= known else known
