"""The databases that the store can use, as the contract tests (`tests/store/contract`) use them."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any, Literal

import psycopg
from clocks import HandClock
from support import open_store

from lmdaemon.clock import Clock
from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.store.contract import Archive, Store
from lmdaemon.store.postgres.paces import Paces
from lmdaemon.store.postgres.store import Store as PostgresStore
from lmdaemon.store.sqlite import archive as sqlite_archive

# The daemon does nothing in the database at intervals. So the test's own transactions are the only ones, and the first
# of them meets a wall clock that the test has set back.
NEVER = Paces(beat_s=3600, idle_beat_s=3600)
SOON = Paces(beat_s=0.05, idle_beat_s=0.05, look_s=0.05)  # for tests that wait for what daemons tell each other

Table = Literal["session", "delivery", "operator"]


class Engine(ABC):
    """One database, empty at first. Several stores can be opened on it one after the other."""

    @abstractmethod
    def open(
        self, clock: Clock, *, count_downtime: bool = False, limits: StoreLimits = LIMITS.store
    ) -> AbstractAsyncContextManager[Store]:
        """A store on this database with its writer running, closed in good order at the end."""

    @abstractmethod
    def kill(self) -> None:
        """Does to the database what kill -9 does: nothing that the open store does from now on reaches it, not even
        closing. What was acknowledged before is there at the next `open`.
        """

    async def step_wall(self, clock: HandClock, store: Store, seconds: float) -> None:
        """Sets the wall clock by which the store dates, and waits until the store has noticed."""
        clock.step_wall(seconds)

    @abstractmethod
    def outage(self) -> AbstractContextManager[None]:
        """A context during which every write is refused. Reading may still work."""

    @abstractmethod
    def archive(self) -> AbstractContextManager[Archive]:
        """The ended sessions, as an export reads them while the store is open."""

    @abstractmethod
    def rows(self, table: Table) -> list[dict[str, Any]]:
        """All committed rows, in no order, read over a separate connection. Columns have the names in
        `lmdaemon/store/sqlite/schema.sql`; each delivery also has its session's `session_id`.
        """


class SqliteEngine(Engine):
    """An SQLite file in a directory of one test."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "test.sqlite3"

    @contextlib.asynccontextmanager
    async def open(
        self, clock: Clock, *, count_downtime: bool = False, limits: StoreLimits = LIMITS.store
    ) -> AsyncIterator[Any]:
        async with open_store(self.path, clock, count_downtime=count_downtime, limits=limits) as store:
            yield store

    def kill(self) -> None:
        left = self.path.parent / "left behind"
        left.mkdir()
        # The log is copied first. A page that is moved from the log into the file during the copying is then in both
        # copies, never in none.
        for name in (f"{self.path.name}-wal", self.path.name):
            shutil.copyfile(self.path.with_name(name), left / name)
        self.path = left / self.path.name

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        with self._connection() as blocker:
            blocker.execute("BEGIN IMMEDIATE")
            yield
            blocker.execute("ROLLBACK")

    def archive(self) -> AbstractContextManager[Archive]:
        return sqlite_archive.open_archive(self.path)

    def rows(self, table: Table) -> list[dict[str, Any]]:
        statement = {
            "session": "SELECT * FROM session",
            "delivery": "SELECT d.*, s.session_id FROM delivery d JOIN session s ON s.id = d.session",
            "operator": "SELECT * FROM operator",
        }[table]
        with self._connection() as sql:
            sql.row_factory = sqlite3.Row
            return [dict(row) for row in sql.execute(statement)]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            yield connection


class PostgresEngine(Engine):
    """A PostgreSQL database of one test, made from a template that already has the schema."""

    def __init__(self, url: str, beside: str | None = None) -> None:
        """`beside` is another URL of the same database, for the test's own statements. It is needed if the stores
        connect through something that a test makes fail.
        """
        self.url, self._beside_url = url, beside
        # kept open, because each new connection costs the server a new process
        self._beside: psycopg.Connection[tuple[Any, ...]] | None = None

    def follow(self, clock: HandClock) -> None:
        """Makes the server's clock show the test's clock, on connections that are made from now on."""

        def move(wall_at: float) -> None:
            with self._connection() as sql:
                sql.execute("UPDATE hand.clock SET at = %s", (wall_at,))

        with self._connection() as sql:
            if sql.execute("SELECT to_regnamespace('hand') IS NULL").fetchone() == (True,):
                sql.execute(HAND_CLOCK)
                sql.execute(f"ALTER DATABASE {self.name} SET search_path = hand, pg_catalog")
        move(clock.wall_ms())
        clock.follow = [move]

    async def step_wall(self, clock: HandClock, store: Store, seconds: float) -> None:
        """Sets the server's clock. A store learns the new time with its next exchange with the server."""
        clock.step_wall(seconds)
        await store.probe()

    def close(self) -> None:
        """Closes the test's own connection."""
        if self._beside is not None:
            self._beside.close()

    @property
    def as_url(self) -> str:
        """The database as a URL for `[database] url`."""
        found = psycopg.conninfo.conninfo_to_dict(self.url)
        return f"postgresql://{found['user']}@{found['host']}:{found['port']}/{found['dbname']}"

    @contextlib.asynccontextmanager
    async def open(
        self, clock: Clock, *, count_downtime: bool = False, limits: StoreLimits = LIMITS.store, paces: Paces = NEVER
    ) -> AsyncIterator[Any]:
        if isinstance(clock, HandClock):
            self.follow(clock)
        store = await PostgresStore.open(
            self.url, clock, name=own_name(), count_downtime=count_downtime, limits=limits, paces=paces
        )
        writer = asyncio.create_task(store.run())
        try:
            await store.probe()  # joins
            yield store
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await store.close()

    def kill(self) -> None:
        """Renames the database, so that the old store cannot reach it any more, and marks the old daemon as gone."""
        if self._beside is not None:
            self._beside.close()
            self._beside = None
        old, new = self.name, f"{self.name}_left"
        self.url = psycopg.conninfo.make_conninfo(self.url, dbname=new)
        with psycopg.connect(self.url, dbname="postgres", autocommit=True) as sql:
            sql.execute(f"ALTER DATABASE {old} ALLOW_CONNECTIONS false")
            sql.execute(END_OTHERS.replace("current_database()", f"'{old}'"))
            sql.execute(f"ALTER DATABASE {old} RENAME TO {new}")
            sql.execute(f"ALTER DATABASE {new} ALLOW_CONNECTIONS true")
        with self._connection() as sql:
            sql.execute(
                "UPDATE lmdaemon.clock SET service_ms = m.heard_ms, wall_at = m.wall_at "
                "FROM (SELECT max(heard_ms) AS heard_ms, max(wall_at) AS wall_at FROM lmdaemon.member) m"
            )
            sql.execute("DELETE FROM lmdaemon.member")
            sql.execute("UPDATE lmdaemon.owner SET member = 0")

    @property
    def name(self) -> str:
        return str(psycopg.conninfo.conninfo_to_dict(self.url)["dbname"])

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Makes the database read-only and cuts all connections, as if the server had become a standby."""
        with self._connection() as sql:
            name = sql.info.dbname
            sql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            sql.execute(END_OTHERS)
            yield
            sql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
            sql.execute(END_OTHERS)

    def archive(self) -> AbstractContextManager[Archive]:
        from lmdaemon.store.postgres.archive import open_archive

        return open_archive(self.as_url, None)

    def rows(self, table: Table) -> list[dict[str, Any]]:
        statement = {
            "session": "SELECT * FROM lmdaemon.session",
            "delivery": "SELECT d.*, s.session_id FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session",
            "operator": """
                SELECT coalesce(o.name, f.operator) AS name, coalesce(live, 0)::int AS live,
                       coalesce(pending, 0)::int AS pending, coalesce(dead, 0)::int AS dead, held_at, held_reason,
                       coalesce(held_total_ms, 0) AS held_total_ms, coalesce(failures, 0) AS failures,
                       failing_since_at, coalesce(pause_ms, 0) AS pause_ms, coalesce(probe_at, 0) AS probe_at,
                       coalesce(not_before_at, 0) AS not_before_at, coalesce(paced_until_at, 0) AS paced_until_at
                FROM lmdaemon.operator o FULL JOIN (
                    SELECT operator, sum(live) AS live, sum(pending) AS pending, sum(dead) AS dead
                    FROM lmdaemon.figure GROUP BY operator) f ON f.operator = o.name""",
        }[table]
        with self._connection() as sql:
            cursor = sql.execute(statement)
            names = [column.name for column in cursor.description or ()]
            return [dict(zip(names, map(plain, row), strict=True)) for row in cursor]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        if self._beside is None:
            self._beside = psycopg.connect(self._beside_url or self.url, autocommit=True)
            for setting in BESIDE:  # set one by one, because PgBouncer accepts no `options`
                self._beside.execute(f"SET {setting}")
        yield self._beside


NUMBERS = count()

# Settings of the test's own connection, so that no time-out or outage of the stores applies to it
BESIDE = ("default_transaction_read_only = off", "statement_timeout = 0", "idle_session_timeout = 0")

# A server clock that stands still until the test moves it. Sessions look up names in the schema `hand` first, so that
# it hides the real `clock_timestamp`.
HAND_CLOCK = """
CREATE SCHEMA hand;
CREATE TABLE hand.clock AS SELECT 0::bigint AS at;
CREATE FUNCTION hand.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql
AS 'SELECT pg_catalog.to_timestamp(at / 1000.0) FROM hand.clock'"""


def own_name() -> str:
    """A name for a daemon, of the form host:pid-random."""
    return f"here:{os.getpid()}-{next(NUMBERS):06x}"


END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"""


def plain(value: Any) -> Any:
    """A number from SQL as a Python int or float."""
    if isinstance(value, Decimal):
        return int(value) if value == int(value) else float(value)
    return value
