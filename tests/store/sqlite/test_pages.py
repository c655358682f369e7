"""The lists for people: every filter has an index, the work for a page and its size are limited, and no secret is
read.
"""

import asyncio
import contextlib
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from clocks import HandClock
from support import hear, open_store, until

from lmdaemon.limits import StoreLimits
from lmdaemon.model import Delivery, Session
from lmdaemon.store.contract import Dead, NewDelivery, Opening, Page, Settlement, StoreError
from lmdaemon.store.sqlite import pages
from lmdaemon.store.sqlite.store import Store

STATES = (None, "pending", "delivered", "dead")
MANY = 20_000
# Sessions 1 to MANY of two operators and five players. Three of four have ended, and their deliveries by HTTP succeeded
# long ago. The first few also have deliveries to other sinks.
DELIVERY = "nonce, session, operator, sink, state, created_at, due_at, settled_at, aged_from_at, held_base_ms, body"
FILL = f"""
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {MANY})
INSERT INTO session (id, operator, session_id, player_id, token, idle_ms, opened_at, seen_ms, seen_at, due_ms)
SELECT i, iif(i % 2, 'acme', 'other'), i, 'p' || (i % 5), 'tok-3n', 1000, i, 0, i, 1000 FROM n;
UPDATE session SET ended_at = id, reason = 'closed' WHERE id % 4;
INSERT INTO delivery ({DELIVERY})
SELECT 'x', id, operator, 'http', 'delivered', id, id, id, id, 0, x'' FROM session WHERE reason IS NOT NULL;
INSERT INTO delivery ({DELIVERY})
SELECT 'x', id, operator, 'plugin:old', iif(id % 3, 'dead', 'pending'), id, id, id, id, 0, x'' FROM session
WHERE reason IS NOT NULL AND id < 20;
INSERT INTO operator (name) VALUES ('acme'), ('other');
"""


@pytest.fixture
def limits() -> StoreLimits:
    """A long time limit for reads, so that a busy machine fails no test."""
    return StoreLimits(look_s=60)


@pytest.fixture
async def full(tmp_path: Path, clock: HandClock, limits: StoreLimits) -> AsyncIterator[Store]:
    path = tmp_path / "test.sqlite3"
    async with open_store(path, clock):
        pass
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.executescript(FILL)
    async with open_store(path, clock, limits=limits) as store:
        yield store


@pytest.fixture
async def db(tmp_path: Path, clock: HandClock, limits: StoreLimits) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "test.sqlite3", clock, limits=limits) as store:
        store.sinks_of = lambda session: [NewDelivery("http", b"tok-3n")]
        yield store


async def on_desk(db: Store, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function on the connection for people's reads."""
    return await db.db.reads.look(function, *arguments)


def everything_asked(db: Store) -> list[Callable[[], Any]]:
    """All reads that the API can ask for: every combination of filters, for the first page and for later ones."""
    asked: list[Callable[[], Any]] = [
        lambda: db.shown_session("acme", "1"),
        lambda: db.delivery("msg_1_x"),
        lambda: db.oldest_pending_shown(["acme", "other", "none"]),
        lambda: db.has_sink("plugin:none"),
        lambda: db.retry_dead("none", Dead()),
    ]
    for state, player, after in product((None, "active", "ended"), (None, "p1", "p9"), (None, 500)):
        asked.append(lambda s=state, p=player, a=after: db.sessions("acme", state=s, player_id=p, limit=10, after=a))
    for session, player, after in (("1", None, None), ("1", "p1", 500), (None, "p1", None), (None, "p9", 500)):
        asked.append(
            lambda s=session, p=player, a=after: db.find_sessions(session_id=s, player_id=p, limit=10, after=a)
        )
    for operator, sink, one, after in product(
        (None, "acme", "none"), (None, "http", "plugin:old", "plugin:none"), STATES, (None, 500)
    ):
        asked.append(
            lambda o=operator, k=sink, s=one, a=after: db.deliveries(operator=o, sink=k, state=s, limit=10, after=a)
        )
    return asked


async def test_every_read_for_people_goes_through_an_index(full: Store) -> None:
    statements: set[str] = set()
    await on_desk(full, lambda sql: sql.set_trace_callback(statements.add))
    for ask in everything_asked(full):
        await ask()
    await on_desk(full, lambda sql: sql.set_trace_callback(None))
    asked = [one for one in statements if "FROM" in one]
    assert len(asked) > 50
    with contextlib.closing(sqlite3.connect(full.path)) as sql:
        for statement in asked:
            plan = " | ".join(row[3] for row in sql.execute("EXPLAIN QUERY PLAN " + statement))
            assert not re.search(r"SCAN (session|delivery|operator|d|s|o)\b|TEMP B-TREE|AUTOMATIC", plan), (
                statement,
                plan,
            )


async def test_a_page_takes_work_for_its_rows_however_many_there_are(full: Store) -> None:
    """Work is counted in steps of SQLite's virtual machine. Reading each row of a table would take 100,000."""
    steps = [0]

    def count() -> None:
        steps[0] += 1

    await on_desk(full, lambda sql: sql.set_progress_handler(count, 100))
    for ask in everything_asked(full):
        steps[0] = 0
        await ask()
        assert steps[0] * 100 < 50_000


OF_ONE_PLAYER = 24_000
# As many sessions of one player, all of which have ended.
ONE_PLAYERS = f"""
WITH RECURSIVE n(i) AS (SELECT {MANY + 1} UNION ALL SELECT i + 1 FROM n LIMIT {OF_ONE_PLAYER})
INSERT INTO session
    (id, operator, session_id, player_id, idle_ms, opened_at, seen_ms, seen_at, due_ms, ended_at, reason)
SELECT i, 'acme', i, 'many', 1000, i, 0, i, 1000, i, 'closed' FROM n"""


@pytest.mark.parametrize("state", ["active", "ended"])
async def test_a_player_with_many_sessions_is_looked_through_page_by_page(full: Store, state: str) -> None:
    """A page ends after a number of rows was looked at. Following `next` gives every session, and none twice."""
    with contextlib.closing(sqlite3.connect(full.path, isolation_level=None)) as sql:
        sql.execute(ONE_PLAYERS)
    found: list[int] = []
    after, sizes = None, []
    while True:
        page = await full.sessions("acme", state=state, player_id="many", limit=1500, after=after)
        found += [session.id for session in page.rows]
        sizes.append(len(page.rows))
        if page.next is None:
            break
        after = page.next
    if state == "active":
        assert sizes == [0] * (1 + OF_ONE_PLAYER // pages.PLAYER_ROWS)
    else:
        assert found == list(range(MANY + OF_ONE_PLAYER, MANY, -1))
        assert max(sizes) <= 1500


async def test_a_page_is_read_up_to_its_bytes(db: Store) -> None:
    attributes = '{"a":"' + "x" * 4000 + '"}'
    await asyncio.gather(
        *(db.open_session(Opening("acme", f"{n}", "p", None, attributes, 1000, 0)) for n in range(450))
    )
    names: list[str] = []
    after, sizes = None, []
    while True:
        page = await db.sessions("acme", state=None, player_id=None, limit=1000, after=after)
        names += [session.session_id for session in page.rows]
        sizes.append(len(page.rows))
        if page.next is None:
            break
        after = page.next
    assert sizes == [300, 150]  # the least is what one statement reads
    assert names == [str(number) for number in reversed(range(450))]


# -- reads for people on a connection of their own


def endless(sql: sqlite3.Connection, started: threading.Event | None = None) -> None:
    if started is not None:
        started.set()
    sql.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n").fetchone()


@pytest.mark.parametrize("limits", [StoreLimits(look_s=0.05)])
async def test_a_read_for_people_that_takes_too_long_ends_with_its_reason(db: Store) -> None:
    with hear() as events, pytest.raises(StoreError, match=r"reading took longer than 0\.05 s"):
        await db.db.reads.look(endless)
    assert [(event.name, event.facts["reason"]) for event in events] == [("store.overloaded", "reading_too_slow")]
    assert db.refused["reading_too_slow"] == 1

    async def is_free() -> bool:
        with contextlib.suppress(StoreError):  # a busy machine takes longer
            return await db.delivery("msg_1_x") is None
        return False

    await until(is_free)  # the connection


async def test_the_daemon_reads_while_people_wait(db: Store) -> None:
    started = threading.Event()
    slow = asyncio.ensure_future(db.db.reads.look(endless, started))
    await until(started.is_set)
    waiting = [asyncio.ensure_future(db.delivery("msg_1_x")) for _ in range(10)]
    await asyncio.sleep(0)
    assert await db.claimable([]) == []
    assert await db.oldest_pending(["acme"]) == {"acme": None}
    assert not any(one.done() for one in (slow, *waiting))
    slow.cancel()
    assert await asyncio.gather(*waiting) == [None] * 10


@pytest.mark.parametrize("moment", ["before it begins", "while it runs"])
async def test_a_read_whose_caller_has_gone_ends_and_hits_nobody_else(db: Store, moment: str) -> None:
    for _ in range(50):
        started = threading.Event()
        gone = asyncio.ensure_future(db.db.reads.look(endless, started))
        await asyncio.sleep(0)
        if moment == "while it runs":
            await until(started.is_set)
        next_one = asyncio.ensure_future(db.delivery("msg_1_x"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await next_one is None
    assert db.refused["reading_failed"] == 0


@pytest.mark.parametrize("limits", [StoreLimits(looks_max=3, look_s=60)])
async def test_few_people_wait_at_a_time(db: Store) -> None:
    asked = [asyncio.ensure_future(db.delivery("msg_1_x")) for _ in range(5)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert results[:3] == [None] * 3
    assert [str(result) for result in results[3:]] == ["too many readers are waiting"] * 2


async def test_a_page_is_of_one_moment(db: Store) -> None:
    """A delivery that is settled while a page is read is neither twice on the page nor missing."""
    await db.open_session(Opening("acme", "s", "p", None, None, 1000, 0))
    await db.end("acme", "s")
    (delivery,) = (await db.deliveries(operator="acme", sink=None, state=None, limit=9, after=None)).rows
    stored = await db.session("acme", "s")
    assert stored is not None
    begun, settled = threading.Event(), threading.Event()

    def read(sql: sqlite3.Connection) -> Page[Delivery]:
        assert pages.has_sink(sql, ["acme"], "http")
        begun.set()
        assert settled.wait(10)
        return pages.delivery_page(sql, ["acme"], None, None, 9, pages.BEYOND)

    reading = asyncio.ensure_future(db.db.reads.look(read))
    await until(begun.is_set)
    await db.settle(Settlement(stored[1][0], "delivered", 0, 0, {"at": 1}))
    settled.set()
    assert (await reading).rows == [delivery]
    assert isinstance(stored[0], Session)
