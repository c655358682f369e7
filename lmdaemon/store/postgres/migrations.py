"""Checks the server when a database is opened, and brings its schema to the newest version."""

import time
from collections.abc import Callable, Sequence

import psycopg

from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.log import Log
from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.postgres.errors import said
from lmdaemon.store.postgres.members import refuse_old
from lmdaemon.store.postgres.strains import UNSAFE, unsafe_commit
from lmdaemon.store.postgres.thread import Connection, Database, in_ms
from lmdaemon.store.postgres.versions import MIGRATIONS, OLDEST, current_of

SERVER_MIN = 140000  # PostgreSQL 14

TRIES = 8  # times that the upgrade is tried while others read and write

# Settings of the server that are checked.
SETTINGS = """
SELECT current_setting('server_version_num')::int, current_setting('synchronous_commit'),
       pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on'"""
# An advisory lock, so that programs that start at the same time upgrade one after the other. It is no lock of a row,
# because the tables may not exist yet.
ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('lmdaemon.migrate'))"
# Removes the time limits: making an index of a large table may take minutes, and so may waiting for another program
# that makes one.
TAKE_YOUR_TIME = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"
# The longest wait for the lock of a table: programs that write into the table have to wait behind this one.
LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %s, true)"
# Makes daemons that write wait until the upgrade is committed. Daemons lock these two tables before any other. A script
# that had locked another table first could wait for a daemon that waits for the script.
KEEP_OUT = "SELECT 1 FROM version FOR UPDATE; LOCK TABLE member IN EXCLUSIVE MODE"
# Stores the new version. The row is updated and not replaced, because other programs may be waiting for its lock.
PUT_VERSION = """
INSERT INTO version (current, oldest) VALUES (%s, %s)
ON CONFLICT (one) DO UPDATE SET current = excluded.current, oldest = excluded.oldest"""
# Creates the schema.
CREATE = "CREATE SCHEMA IF NOT EXISTS lmdaemon"

Progress = Callable[[int, int], None]  # is called with the number of steps done so far, and the number of all steps

log = Log("store")


class UnsafeSettingError(Exception):
    """A setting of the server could lose commits that it has acknowledged."""


def check_server(sql: Connection, title: str) -> None:
    """Checks the server's version and settings. Raises DatabaseError, and UnsafeSettingError for synchronous_commit."""
    row = sql.execute(SETTINGS).fetchone()
    version, synchronous_commit, read_only = row or (0, "", True)
    if version < SERVER_MIN:
        raise DatabaseError(f"{title}: is PostgreSQL {version // 10000}; 14 or newer is needed")
    if synchronous_commit in UNSAFE:
        raise UnsafeSettingError(f"its {unsafe_commit(synchronous_commit)}")
    if read_only:
        raise DatabaseError(f"{title}: is read-only: it is a standby, or default_transaction_read_only is on")


def migrate(
    sql: Connection,
    title: str,
    migrations: Sequence[str] = MIGRATIONS,
    *,
    allowed: bool = True,
    limits: StoreLimits = LIMITS.store,
    progress: Progress = lambda done, of: None,
) -> list[int]:
    """Brings the schema to the newest version, in one transaction. Returns the versions that were added. Raises
    DatabaseError before it changes anything, also where there is something to do and it is not `allowed`.
    """
    try:
        current = current_of(sql, title, len(migrations))
        if current == len(migrations):
            return []
        if 0 < current < OLDEST:
            refuse_old(sql, title, limits)
        if not allowed:
            what = "has no schema of lmdaemon" if not current else f"has schema {current} of {len(migrations)}"
            raise DatabaseError(f"{title}: {what}; run `lmdaemon migrate`, because database.migrate is false")
        current = _upgrade_when_free(sql, title, migrations, limits, progress)
    except psycopg.Error as error:
        raise DatabaseError(f"{title}: cannot be set up: {said(error)}") from error
    added = list(range(current + 1, len(migrations) + 1))
    if added:
        event = "store.migrated" if current else "store.created"
        log.info(event, path=title, schema=added[-1], before=current or None)
    return added


def _upgrade_when_free(
    sql: Connection, title: str, migrations: Sequence[str], limits: StoreLimits, progress: Progress
) -> int:
    """Repeats the upgrade while somebody else has locked what it needs. Returns the version that there was."""
    for _ in range(TRIES - 1):
        try:
            return _upgrade(sql, title, migrations, limits.lock_s, progress)
        except (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable):
            time.sleep(limits.upgrade_again_s)
    return _upgrade(sql, title, migrations, limits.lock_s, progress)


def _upgrade(sql: Connection, title: str, migrations: Sequence[str], lock_s: float, progress: Progress) -> int:
    with sql.transaction():
        sql.execute(TAKE_YOUR_TIME)
        sql.execute(ONE_AT_A_TIME)
        sql.execute(LOCK_TIMEOUT, (in_ms(lock_s),))
        sql.execute(CREATE)
        current = current_of(sql, title, len(migrations))
        if current < len(migrations):  # no other program has upgraded it meanwhile
            sql.execute("SET LOCAL search_path TO lmdaemon")
            scripts = migrations[current:]
            progress(0, len(scripts))
            if current:
                sql.execute(KEEP_OUT)
            for number, script in enumerate(scripts, 1):
                sql.execute(script)
                progress(number, len(scripts))
            sql.execute(PUT_VERSION, (len(migrations), min(OLDEST, len(migrations))))
    return current


def migrate_database(url: str, password: str | None, progress: Progress) -> list[int]:
    """Brings the schema to the newest version for a command, on a connection of its own. Returns the versions that were
    added. Raises DatabaseError.
    """
    database = Database(url, password, "migrate")
    try:
        with database.connect(prepares=True) as sql:
            check_server(sql, database.title)
            return migrate(sql, database.title, progress=progress)
    except UnsafeSettingError as error:
        raise DatabaseError(f"{database.title}: {error}") from error
    except psycopg.Error as error:
        raise DatabaseError(f"{database.title}: cannot be used: {said(error)}") from error
