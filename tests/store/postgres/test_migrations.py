"""Migrations that take long, and programs of different versions that prepare one database at the same time."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from commands import poll, run
from engines import PostgresEngine
from processes import wait_for
from terminals import Terminal

from lmdaemon.limits import StoreLimits
from lmdaemon.store.postgres.migrations import migrate
from lmdaemon.store.postgres.thread import Database
from lmdaemon.store.postgres.versions import MIGRATIONS

SLOW = "SELECT pg_sleep(0.6)"
NEXT = f"{SLOW}; CREATE TABLE of_the_next (x int)"
# Finds a row while a migration is in the middle of pg_sleep.
IS_SLEEPING = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
VERSION = "SELECT current, to_regclass('lmdaemon.of_the_next') IS NOT NULL FROM lmdaemon.version"


SHORT = StoreLimits(statement_s=0.3, lock_s=0.3, upgrade_again_s=0.05)


@pytest.fixture
def old(postgres_engine: PostgresEngine) -> PostgresEngine:
    """A database without the last migration."""
    with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
        sql.execute("DROP SCHEMA lmdaemon CASCADE")
        migrate(sql, "it", MIGRATIONS[:-1])
    return postgres_engine


def begun(engine: PostgresEngine, *more: str) -> "Future[list[int]]":
    """Migrates to the newest version and by further migrations, on a thread of its own. Statements and waits for locks
    end after 0.3 s.
    """

    def run() -> list[int]:
        with Database(engine.url, None, "migrate", SHORT).connect(prepares=True) as sql:
            return migrate(sql, "it", (*MIGRATIONS, *more), limits=SHORT)

    return POOL.submit(run)


POOL = ThreadPoolExecutor(4)


def test_a_migration_may_take_longer_than_any_other_statement(old: PostgresEngine) -> None:
    """Making an index of a large table takes long. A second program waits in the meantime, and then finds nothing left
    to do.
    """
    newest = len(MIGRATIONS)
    with psycopg.connect(old.url, autocommit=True) as sql:
        first = begun(old, NEXT)
        wait_for(lambda: sql.execute(IS_SLEEPING).fetchall())
        second = begun(old, NEXT)
        assert first.result(20) == [newest, newest + 1]
        assert second.result(20) == []
        assert sql.execute(VERSION).fetchall() == [(newest + 1, True)]


def test_an_older_program_that_comes_meanwhile_keeps_the_newer_version(old: PostgresEngine) -> None:
    """The older program has found a missing migration, too. It waits, and by then the newer program has made that one
    and a further one.
    """
    newest = len(MIGRATIONS)
    with psycopg.connect(old.url, autocommit=True) as sql:
        newer = begun(old, NEXT)
        wait_for(lambda: sql.execute(IS_SLEEPING).fetchall())
        older = begun(old)
        assert newer.result(20) == [newest, newest + 1]
        assert older.result(20) == []
        assert sql.execute(VERSION).fetchall() == [(newest + 1, True)]


def test_a_table_that_somebody_else_holds_is_not_waited_for(old: PostgresEngine) -> None:
    """The migration waits only briefly for the table, because all touches wait behind it. Then nothing is changed, and
    it can be tried again.
    """
    newest = len(MIGRATIONS)
    with psycopg.connect(old.url) as holder:
        holder.execute("SELECT 1 FROM lmdaemon.session LIMIT 1")
        changed = begun(old, "ALTER TABLE session ADD COLUMN of_the_next int")
        with pytest.raises(Exception, match="cannot be set up: canceling statement due to lock timeout"):
            changed.result(20)
    assert begun(old).result(20) == [newest]


@pytest.mark.parametrize("columns", [80, 0])
def test_migrate_shows_its_steps_on_a_terminal_and_nowhere_else(
    old: PostgresEngine, tmp_path: Path, columns: int
) -> None:
    """The line is there while the migration waits for a table, and is removed at the end."""
    config = tmp_path / "config.toml"
    config.write_text(f'[database]\nurl = "{old.as_url}"\n')
    words = ("--config", str(config), "migrate")
    with psycopg.connect(old.url) as sql:
        sql.execute("LOCK TABLE lmdaemon.member IN ROW EXCLUSIVE MODE")
        terminal = Terminal(tmp_path, *words, columns=columns, only_messages=True)
        poll(lambda: "migrating: " in terminal.read() and "0/1" in terminal.text)
    assert terminal.ended() == 0, terminal.text
    assert terminal.text.rpartition("\r")[2].strip() == ""
    with psycopg.connect(old.url, autocommit=True) as sql:
        sql.execute("DROP SCHEMA lmdaemon CASCADE")
    done = run(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"schema {len(MIGRATIONS)}" in done.stdout
