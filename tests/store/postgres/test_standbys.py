"""A server whose commits wait for a standby: nothing is acknowledged that no standby has confirmed."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from itertools import count

import psycopg
import pytest
from clocks import HandClock
from engines import PostgresEngine
from operations import opening
from postgres import OwnServer, own_server
from support import until

from lmdaemon.limits import StoreLimits
from lmdaemon.store.contract import Opened, Store, StoreError

# Ends the waiting of all commits that wait for a standby.
WAITING = """
SELECT {what}(pid) FROM pg_stat_activity WHERE application_name LIKE 'lmdaemon%' AND wait_event = 'SyncRep'"""


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_a_commit_whose_wait_for_a_standby_was_ended_is_not_acknowledged(
    server: OwnServer, clock: HandClock, what: str
) -> None:
    """The server has committed the transaction by itself and says so, but a failover would lose it. The outcome is
    found out once a standby is there.
    """

    def standbys(names: str) -> None:
        sql.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")  # type: ignore[arg-type]
        sql.execute("SELECT pg_reload_conf()")

    with (
        psycopg.connect(server.url, autocommit=True, options="-c synchronous_commit=local") as sql,
        closing(PostgresEngine(server.url)) as engine,
    ):
        async with engine.open(clock, limits=StoreLimits(write_s=2.0)) as db:
            standbys("one_that_is_away")
            name, opened = await one_that_hangs(db, what)
            assert await until(lambda: sql.execute(WAITING.format(what=what)).fetchall())  # type: ignore[arg-type]
            with pytest.raises(StoreError):
                await opened
            assert name in [row["session_id"] for row in engine.rows("session")]
            standbys("")
            await until(lambda: db.failure is None, 20)
            assert (await db.open_session(opening(name))).outcome == "open"


async def one_that_hangs(db: Store, prefix: str) -> tuple[str, "asyncio.Future[Opened]"]:
    """Opens sessions until an opening hangs. The server begins to wait for standbys only some time after the setting
    was changed.
    """
    for number in count():
        opened = asyncio.ensure_future(db.open_session(opening(f"{prefix}-{number}")))
        if not (await asyncio.wait({opened}, timeout=0.2))[0]:
            return f"{prefix}-{number}", opened
    raise AssertionError
