"""Many sessions that are due at the same time: larger sweeps, and observers that hear of them while the next one is
written.
"""

import asyncio
from collections.abc import Sequence

import psycopg
from clocks import HandClock
from engines import PostgresEngine
from operations import BODY, IDLE_MS, opening
from support import live, until

from lmdaemon.limits import LIMITS
from lmdaemon.model import Session
from lmdaemon.store.contract import SWEEP_ROWS, NewDelivery, Store, StoreObserver

CROWD_ROWS = 150
# Observers hear of a crowd only when another batch follows or the store is closed; no wait for a lock ends by itself
NEVER = LIMITS.store._replace(crowd_rows=CROWD_ROWS, told_s=3600.0, write_s=60.0, statement_s=60.0, lock_s=60.0)
SOON = LIMITS.store._replace(crowd_rows=CROWD_ROWS)


class Told(StoreObserver):
    """Notes of which sessions, and how often of new deliveries, a daemon's observers hear."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.deliveries = 0

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        self.ended += [one.session_id for one in sessions]

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        self.deliveries += 1


async def crowd(db: Store, clock: HandClock, size: int) -> tuple[list[str], Told]:
    """Sessions that are due one millisecond after the other, `size` of them, and an observer."""
    db.configure(frozenset({"acme"}), lambda session: [NewDelivery("http", BODY)])
    names = [f"{number:04}" for number in range(size)]
    await asyncio.gather(*(db.open_session(opening(name, idle_ms=IDLE_MS + place)) for place, name in enumerate(names)))
    live(clock, db, IDLE_MS / 1000 + 2)
    told = Told()
    db.observe(told)
    return names, told


async def test_a_crowd_ends_in_larger_sweeps_and_each_is_told_of_once(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    async with postgres_engine.open(clock, limits=NEVER) as db:
        names, told = await crowd(db, clock, SWEEP_ROWS + 2 * CROWD_ROWS + 3)
        swept = [await db.end_due(idle=True, crowd=step > 0) for step in range(4)]
        assert swept == [(size, size) for size in (SWEEP_ROWS, CROWD_ROWS, CROWD_ROWS, 3)]
        assert told.ended == names
        assert told.deliveries == len(swept)
        assert len(postgres_engine.rows("delivery")) == len(names)


async def test_observers_hear_of_a_crowd_while_the_next_sweep_is_written(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    async with postgres_engine.open(clock, limits=NEVER) as db:
        names, told = await crowd(db, clock, 2 * CROWD_ROWS)
        assert await db.end_due(idle=True, crowd=True) == (CROWD_ROWS, CROWD_ROWS)
        with psycopg.connect(postgres_engine.url) as holder:
            holder.execute("SELECT 1 FROM lmdaemon.session WHERE session_id = %s FOR UPDATE", (names[-1],))
            following = asyncio.ensure_future(db.end_due(idle=True, crowd=True))
            await until(lambda: told.ended == names[:CROWD_ROWS])
            assert not following.done()
        assert await following == (CROWD_ROWS, CROWD_ROWS)


async def test_observers_hear_of_a_crowd_if_no_sweep_follows(postgres_engine: PostgresEngine, clock: HandClock) -> None:
    async with postgres_engine.open(clock, limits=SOON) as db:
        names, told = await crowd(db, clock, CROWD_ROWS)
        assert await db.end_due(idle=True, crowd=True) == (CROWD_ROWS, CROWD_ROWS)
        await until(lambda: told.ended == names)


async def test_observers_hear_of_a_crowd_before_what_is_committed_after_it(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    async with postgres_engine.open(clock, limits=NEVER) as db:
        names, told = await crowd(db, clock, CROWD_ROWS)
        await db.open_session(opening("young"))
        assert await db.end_due(idle=True, crowd=True) == (CROWD_ROWS, CROWD_ROWS)
        await db.end("acme", "young")
        assert told.ended == [*names, "young"]


async def test_observers_hear_of_a_crowd_before_the_store_is_closed(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    async with postgres_engine.open(clock, limits=NEVER) as db:
        names, told = await crowd(db, clock, CROWD_ROWS)
        await db.end_due(idle=True, crowd=True)
        assert told.ended == []
    assert told.ended == names
