"""A store behind PgBouncer in transaction mode, where neither session settings nor prepared statements last."""

import asyncio
from contextlib import closing

import pytest
from clocks import HandClock
from engines import PostgresEngine
from operations import BODY, attempt, notice, opening
from postgres import NoServerError, OwnServer, PgBouncer

from lmdaemon.store.contract import Claim, NewDelivery, Settlement


async def test_a_store_behind_a_pooler_does_what_it_does_without_one(clock: HandClock) -> None:
    try:
        with OwnServer() as server, PgBouncer(server) as pooler:
            with closing(PostgresEngine(pooler.url, beside=server.url)) as engine:
                await use(engine, clock)
            with closing(PostgresEngine(server.url)) as engine:
                assert len(engine.rows("session")) == 30
    except NoServerError as error:
        pytest.skip(str(error))


async def use(engine: PostgresEngine, clock: HandClock) -> None:
    async with engine.open(clock) as db:
        db.configured, db.sinks_of = frozenset({"acme"}), lambda session: [NewDelivery("http", BODY)]
        names = [f"s{number}" for number in range(30)]
        opened = await asyncio.gather(*(db.open_session(opening(name)) for name in names))
        assert {one.outcome for one in opened} == {"created"}
        for _ in range(20):  # more often than psycopg runs a statement before it prepares it
            assert await db.touch("acme", names) == (30, [], [])
            assert await db.session("acme", "s2") is not None
            assert len((await db.sessions("acme", state=None, player_id=None, limit=5, after=None)).rows) == 5
        assert (await db.open_session(opening("s1"))).outcome == "open"
        assert await db.record(notice("s2")) == "ended"
        ((delivery,),) = await db.claimable([Claim("acme", "http", [], 5)])
        await db.settle(Settlement(delivery, "delivered", 0, 0, attempt(code=0)))
    async with engine.open(clock) as again:
        assert (again.live, again.figures_of("acme").pending) == (29, 0)
