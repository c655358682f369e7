"""Settings of the role or of the database change nothing that the daemon needs."""

import asyncio
from contextlib import AsyncExitStack

import psycopg
import pytest
from engines import PostgresEngine
from operations import opening
from support import hear

from lmdaemon.clock import Clock
from lmdaemon.store.contract import Store
from lmdaemon.store.postgres.paces import Paces

NEWEST = 170_000  # the first version of PostgreSQL that has transaction_timeout
SETTINGS = {
    "statement_timeout": "1ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms",
    "idle_session_timeout": "20ms",
    "transaction_timeout": "1ms",
    "default_transaction_isolation": "serializable",
    "client_encoding": "LATIN1",
}
IDLE_S = 0.06
CONNECTIONS = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'lmdaemon%'"""


@pytest.mark.parametrize("name", SETTINGS)
async def test_what_a_role_or_database_is_set_to_stops_nothing(postgres_engine: PostgresEngine, name: str) -> None:
    """Two daemons write to the same rows, read, and are idle between that for longer than the setting allows."""
    with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
        if name == "transaction_timeout" and sql.info.server_version < NEWEST:
            pytest.skip("this PostgreSQL has no transaction_timeout")
        sql.execute(f"ALTER DATABASE {sql.info.dbname} SET {name} = '{SETTINGS[name]}'")  # type: ignore[arg-type]
        with hear() as events:
            async with AsyncExitStack() as stack:
                stores = [
                    await stack.enter_async_context(postgres_engine.open(Clock(), paces=Paces())) for _ in range(2)
                ]
                await use(stores, sql)
    assert [event for event in events if event.level not in ("info", "debug")] == []


async def use(stores: list[Store], sql: psycopg.Connection[tuple[object, ...]]) -> None:
    names = [f"s{number}" for number in range(30)]
    for number, one in enumerate(names):
        opened = await stores[number % 2].open_session(opening(one, player_id="Łukasz"))
        assert opened.outcome == "created"
    connections: list[set[object]] = []
    for _ in range(4):
        touched = await asyncio.gather(*(one.touch("acme", names) for one in stores * 3))
        assert touched == [(30, [], [])] * 6
        found = await stores[0].session("acme", "s1")
        assert found is not None
        assert found[0].player_id == "Łukasz"
        page = await stores[1].sessions("acme", state=None, player_id=None, limit=5, after=None)
        assert len(page.rows) == 5
        connections.append({pid for (pid,) in sql.execute(CONNECTIONS)})
        await asyncio.sleep(IDLE_S)
    assert [one.failure for one in stores] == [None, None]
    assert connections[-1] == connections[-2]  # all connections are still the same
    assert len(connections[-1]) >= 2 * 3  # each daemon has a writer, a reader, and a connection that waits for hints
