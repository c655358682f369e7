"""How the store uses its SQLite file: how many statements a batch takes, and what remains in the file."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from operations import attempt, found, notice, opening
from support import hear, until

from lmdaemon.clock import Clock
from lmdaemon.limits import StoreLimits
from lmdaemon.model import Gate
from lmdaemon.store.contract import Claim, NewDelivery, Settlement, StoreError
from lmdaemon.store.sqlite import batch as batches
from lmdaemon.store.sqlite.file import MIGRATIONS, migrate
from lmdaemon.store.sqlite.store import Store


class TestOneWay:
    """A batch is one statement if no rows must be read first. After a wrong guess, the batch is decided again with the
    rows it needs.
    """

    async def test_touches_of_active_sessions_are_not_looked_at_again(self, db: Store) -> None:
        await asyncio.gather(*(db.open_session(opening(name)) for name in "abc"), db.record(notice("over")))
        statements = await trace(db)
        one, many = await asyncio.gather(db.touch("acme", ["a"]), db.touch("acme", ["b", "c", "b"]))
        assert (one, many) == ((1, [], []), (2, [], []))
        assert [statement.split()[0] for statement in statements] == ["INSERT"]

    @pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), MemoryError()])
    async def test_a_touch_that_cannot_be_looked_up_fails_alone(
        self, db: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """The operations committed with it are answered, because no caller may be told that a stored operation was
        refused.
        """
        await db.open_session(opening("a"))
        monkeypatch.setattr(batches, "fetch", fail_with(error))
        unknown, recorded = await asyncio.gather(
            db.touch("acme", ["a", "none"]), db.record(notice("new")), return_exceptions=True
        )
        monkeypatch.undo()
        assert isinstance(unknown, StoreError)
        assert recorded == "ended"
        assert db.refused["reading_failed"] == 1
        assert (await found(db, "new")).reason == "reported"

    async def test_after_a_wrong_guess_facts_are_read_until_no_session_was_known(self, db: Store) -> None:
        await db.record(notice("s"))
        statements = await trace(db)

        async def ways(name: str) -> list[str]:
            statements.clear()
            await db.record(notice(name))
            return [statement.split()[0] for statement in statements]

        guessed, looked_up = ["INSERT"], ["BEGIN", "SELECT", "INSERT", "COMMIT"]
        assert await ways("1") == guessed
        assert await ways("s") == guessed + looked_up
        assert await ways("s") == looked_up
        assert await ways("2") == looked_up
        assert await ways("3") == guessed
        assert await ways("s") == guessed + looked_up
        statements.clear()
        await db.touch("acme", ["s"])  # a touch needs no guess
        assert [statement.split()[0] for statement in statements] == ["INSERT", "SELECT"]

    @pytest.mark.parametrize(("more", "first"), [(0, "INSERT"), (1, "BEGIN")])
    async def test_at_most_300_operations_are_decided_on_the_event_loop(self, db: Store, more: int, first: str) -> None:
        statements = await trace(db)
        await asyncio.gather(*(db.open_session(opening(str(number))) for number in range(300 + more)))
        assert statements[0].split()[0] == first
        assert db.live == 300 + more


@pytest.mark.parametrize("limits", [StoreLimits(idle_s=0.05)])
async def test_a_delivered_token_is_in_no_file_once_the_daemon_is_idle(db: Store) -> None:
    """The token is neither in the file (free pages included) nor in the write-ahead log nor in the log's index."""
    tokens = ["fSYFZMScpZ01FhR26r59GexREh1xHgEY", "large-" * 600]
    db.sinks_of = lambda session: [NewDelivery("http", f"body with {session.token}".encode())]
    for number, token in enumerate(tokens):
        await db.open_session(opening(str(number), token=token))
        await db.end("acme", str(number))
    files = [Path(f"{db.path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def found() -> list[bool]:
        content = b"".join(file.read_bytes() for file in files)
        return [token[:30].encode() in content for token in tokens]

    (rows,) = await db.claimable([Claim("acme", "http", [], 9)])
    assert found() == [True, True]
    await asyncio.gather(*(db.settle(Settlement(row, "delivered", 0, 0, attempt())) for row in rows))
    await until(lambda: found() == [False, False])


async def trace(db: Store) -> list[str]:
    """A list to which the writer's statements are added from now on."""
    statements: list[str] = []

    def note(statement: str) -> None:
        if statement not in statements[-1:]:  # SQLite reports the statement again for each statement of its trigger
            statements.append(statement)

    await db.db.disk._writer.run(lambda sql: sql.set_trace_callback(note))
    return statements


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


async def test_a_file_of_schema_2_is_upgraded_with_its_gates_and_deliveries(tmp_path: Path) -> None:
    """What the older version did not store of a gate or a delivery is empty. All else is unchanged."""
    path = tmp_path / "old.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as sql:
        migrate(sql, path, MIGRATIONS[:2])
        sql.execute("INSERT INTO operator (name, pending, failures, probe_at) VALUES ('acme', 1, 7, 5)")
        sql.execute(
            "INSERT INTO session VALUES (1, 'acme', 's', 'p', 'tok', NULL, NULL, 1, 1, 1, 1, 2, NULL, 1, 'closed')"
        )
        sql.execute(
            "INSERT INTO delivery (id, nonce, session, operator, sink, state, created_at, due_at, aged_from_at, "
            "held_base_ms, body) VALUES (1, 'abababababababababab', 1, 'acme', 'http', 'pending', 1, 1, 1, 0, x'7b7d')"
        )
    with hear() as events:
        store = await Store.open(path, Clock())
    ((name, facts),) = [(event.name, event.facts) for event in events if event.name.startswith("store.")]
    assert (name, facts["before"], facts["schema"]) == ("store.migrated", 2, len(MIGRATIONS))
    try:
        assert store.gate("acme") == Gate(failures=7, probe_at=5)
        ((claimed,),) = await store.claimable([Claim("acme", "http", [], 9)])
        assert (claimed.body, claimed.body_digest, claimed.webhook_id) == (b"{}", None, "msg_1_abababababababababab")
    finally:
        await store.close()


async def test_a_first_start_says_that_it_made_a_database_and_no_more(tmp_path: Path) -> None:
    with hear() as events:
        store = await Store.open(tmp_path / "new.sqlite3", Clock())
        await store.close()
        store = await Store.open(tmp_path / "new.sqlite3", Clock())
        await store.close()
    assert [(event.name, event.facts["schema"], event.facts["before"]) for event in events] == [
        ("store.created", len(MIGRATIONS), None)
    ]
