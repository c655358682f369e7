"""A store on a real database. When a test has ended, the store's figures are compared with a count of its rows."""

import dataclasses
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest
from clocks import HandClock
from engines import Engine, PostgresEngine, SqliteEngine
from operations import BODY
from pair import PairEngine
from postgres import NoServerError, server

from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.store.contract import NewDelivery, Store
from lmdaemon.store.postgres.migrations import migrate


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> SqliteEngine:
    return SqliteEngine(tmp_path)


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[tuple[str, str]]:
    """The name of a database that has the schema and no rows, and the URL of another database of the same server. Skips
    the test where there is no server.
    """
    try:
        with server() as url:
            name = f"lmdaemon_template_{os.getpid()}"
            with psycopg.connect(url, autocommit=True) as sql:
                sql.execute(f"CREATE DATABASE {name}")
                with psycopg.connect(url, dbname=name, autocommit=True) as inside:
                    migrate(inside, name)
                yield url, name
                sql.execute(f"DROP DATABASE {name}")
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def postgres_engine(postgres_template: tuple[str, str]) -> Iterator[PostgresEngine]:
    with an_engine(PostgresEngine, *postgres_template) as engine:
        yield engine


@pytest.fixture
def pair_engine(postgres_template: tuple[str, str]) -> Iterator[PostgresEngine]:
    with an_engine(PairEngine, *postgres_template) as engine:
        yield engine


@contextmanager
def an_engine(kind: type[PostgresEngine], url: str, template: str) -> Iterator[PostgresEngine]:
    """An engine with a new database, which is dropped afterwards."""
    name = f"lmdaemon_test_{os.getpid()}_{next(NUMBERS)}"
    with psycopg.connect(url, autocommit=True) as sql:
        # Copies the files instead of logging all of them in the WAL
        copied = "STRATEGY = FILE_COPY" if sql.info.server_version >= 150_000 else ""
        sql.execute(f"CREATE DATABASE {name} TEMPLATE {template} {copied}")
        with closing(kind(psycopg.conninfo.make_conninfo(url, dbname=name))) as engine:
            yield engine
        sql.execute(f"DROP DATABASE {engine.name} WITH (FORCE)")


NUMBERS = count()


@pytest.fixture
def engine(sqlite_engine: SqliteEngine) -> Engine:
    """SQLite. In the directory `contract`, this fixture gives every engine."""
    return sqlite_engine


@pytest.fixture
def limits() -> StoreLimits:
    return LIMITS.store


@pytest.fixture
async def db(engine: Engine, clock: HandClock, limits: StoreLimits) -> AsyncIterator[Store]:
    """A store with the operators acme and other. Every end has one delivery, by HTTP."""
    async with engine.open(clock, limits=limits) as opened:
        opened.configure(frozenset({"acme", "other"}), lambda session: [NewDelivery("http", BODY)])
        # Ends nothing; but with several daemons, the store takes both operators by this
        await opened.end_due(idle=True)
        yield opened
        assert_figures_are_true(engine, opened)


def assert_figures_are_true(engine: Engine, db: Store) -> None:
    """The figures that every transaction updates equal a count of the rows, in memory and in the database."""
    live = Counter(row["operator"] for row in engine.rows("session") if row["reason"] is None)
    counted = [row for row in engine.rows("delivery") if row["discarded"] is None]
    states = Counter((row["operator"], row["state"]) for row in counted)
    stored = {row["name"]: (row["live"], row["pending"], row["dead"]) for row in engine.rows("operator")}
    assert stored == {name: (live[name], states[name, "pending"], states[name, "dead"]) for name in stored}
    assert stored.keys() >= live.keys() | {operator for operator, _ in states}
    assert {name: dataclasses.astuple(figures) for name, figures in db.figures.items()} == stored
