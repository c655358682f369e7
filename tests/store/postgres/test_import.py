"""Moving a stopped daemon's file into an empty database: nothing is lost, and nothing is sent twice."""

import dataclasses
import sqlite3
from pathlib import Path

import pytest
from clocks import HandClock
from commands import run
from engines import PostgresEngine, SqliteEngine
from operations import BODY, attempt, one_delivery, opening
from support import live
from terminals import Terminal

from lmdaemon.clock import Clock
from lmdaemon.store.contract import DatabaseError, Moved, NewDelivery, Settlement
from lmdaemon.store.postgres import importing
from lmdaemon.store.sqlite.whole import open_whole


async def fill(engine: SqliteEngine, clock: Clock) -> None:
    """Writes sessions and deliveries in every state, an operator that is held, and a session that has been idle for
    seven of its ten seconds.
    """
    async with engine.open(clock) as db:
        db.configured = frozenset({"acme", "other"})
        db.sinks_of = lambda session: [NewDelivery("http", BODY), NewDelivery("plugin:x", b"")]
        for number in range(30):
            await db.open_session(
                opening(f"s{number}", token=f"tok-{number} ü\U0001f3b2", attributes='{"a":"\\u0000"}')
            )
        for number in range(10):
            await db.end("acme", f"s{number}")
        delivery = await one_delivery(db, "delivered")
        await db.settle(Settlement(delivery, "delivered", 0, 0, attempt(code=0)))
        delivery = await one_delivery(db, "dead")
        await db.settle(Settlement(delivery, "dead", 0, 9, attempt(status=500, code=99.5)))
        await db.set_gate("acme", lambda gate: dataclasses.replace(gate, held_at=5, held_reason="by_hand"))
        live(clock, db, 7)
        await db.probe()


def move(file: Path, engine: PostgresEngine) -> Moved:
    with open_whole(file) as whole:
        return importing.move(engine.url, None, whole, 1)


@pytest.fixture
async def filled(sqlite_engine: SqliteEngine, clock: HandClock) -> SqliteEngine:
    await fill(sqlite_engine, clock)
    return sqlite_engine


async def test_everything_carries_over_and_goes_on_from_there(
    filled: SqliteEngine, postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    moved = move(filled.path, postgres_engine)
    assert moved.counts == {
        "sessions active": 20,
        "sessions ended": 12,
        "deliveries pending": 22,
        "deliveries delivered": 1,
        "deliveries dead": 1,
    }
    for table in ("session", "delivery"):
        old, new = ({row["id"]: row for row in one.rows(table)} for one in (filled, postgres_engine))  # type: ignore[arg-type]
        assert new == old
    async with postgres_engine.open(clock) as db:
        db.configured, db.sinks_of = frozenset({"acme"}), lambda session: [NewDelivery("http", BODY)]
        assert (db.service_clock.now_ms(), db.live, db.gate("acme").held_reason) == (7000, 20, "by_hand")
        live(clock, db, 2.9)
        assert (await db.end_due(idle=True)).ended == 0
        live(clock, db, 0.2)
        assert (await db.end_due(idle=True)).ended == 20
        assert (await db.open_session(opening("new"))).session.id > max(row["id"] for row in filled.rows("session"))


async def test_an_interrupted_import_goes_on_where_it_was(
    filled: SqliteEngine, postgres_engine: PostgresEngine, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "ROWS", 7)

    def interrupt(done: int, of: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_whole(filled.path) as whole:
        importing.move(postgres_engine.url, None, whole, 1, interrupt)
    with pytest.raises(DatabaseError, match="an import has not finished"):
        async with postgres_engine.open(clock):
            pass
    moved = move(filled.path, postgres_engine)
    assert (moved.before, sum(moved.counts.values())) == (False, 56)
    assert len(postgres_engine.rows("delivery")) == 24


async def test_a_file_that_was_moved_serves_no_daemon_any_more(
    filled: SqliteEngine, postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    """If a daemon could still use the file, the pending deliveries would be sent twice: from the file and from the
    database.
    """
    move(filled.path, postgres_engine)
    with pytest.raises(DatabaseError, match="was moved into a PostgreSQL database"):
        async with filled.open(clock):
            pass
    assert move(filled.path, postgres_engine).before


async def test_only_an_empty_database_is_filled(
    filled: SqliteEngine, postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    async with postgres_engine.open(clock) as db:
        with pytest.raises(DatabaseError, match="is in use by an lmdaemon"):
            move(filled.path, postgres_engine)
        await db.open_session(opening())
    with pytest.raises(DatabaseError, match="has other sessions"):
        move(filled.path, postgres_engine)
    async with filled.open(clock) as still:  # the file is still usable
        assert still.live == 20


async def test_a_file_in_use_is_not_moved(
    sqlite_engine: SqliteEngine, postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    async with sqlite_engine.open(clock):
        with pytest.raises(DatabaseError, match="is in use by another lmdaemon"):
            move(sqlite_engine.path, postgres_engine)


async def test_the_command_moves_prints_both_sides_and_says_when_it_is_done(
    filled: SqliteEngine, postgres_engine: PostgresEngine, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[database]\nurl = "{postgres_engine.as_url}"\n')
    command = ("--config", str(config), "import", str(filled.path))
    first, second = run(*command, cwd=tmp_path), run(*command, cwd=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "sessions active: 20 in the file, 20 in the database\n" in first.stdout
    assert "already" in second.stdout
    strange = tmp_path / "strange"
    sqlite3.connect(strange).execute("CREATE TABLE x (y)").connection.close()
    refused = run("--config", str(config), "import", str(strange), cwd=tmp_path)
    assert (refused.returncode, "another program" in refused.stderr) == (1, True)
    terminal = Terminal(tmp_path, "--config", config, "import", strange, only_messages=True)
    assert terminal.ended() == 1
    shown = [line.rpartition("\r")[2] for line in terminal.text.replace("\r\n", "\n").split("\n")]
    assert shown == [refused.stderr.rstrip(), ""]  # nothing is left of the progress, and no empty line
