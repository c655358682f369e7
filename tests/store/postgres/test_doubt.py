"""A connection that is lost during a commit: the store finds out whether the batch was stored, and does nothing
twice.
"""

import asyncio
from collections.abc import AsyncIterator
from threading import Event

import pytest
from clocks import HandClock
from engines import PostgresEngine
from operations import BODY, attempt, counted, notice, one_delivery, opening
from proxy import Mode, Proxy
from support import until

from lmdaemon.limits import StoreLimits
from lmdaemon.store.contract import NewDelivery, Settlement, Store, StoreError
from lmdaemon.store.postgres import beats, hints, looks, shared
from lmdaemon.store.postgres.thread import Connection, Database, Thread

IMPATIENT = StoreLimits(write_s=1.0)
CUTS: tuple[Mode, ...] = ("cut requests", "cut answers")


async def nothing(*_: object) -> None:
    """Replaces a loop with one that does nothing."""


@pytest.fixture
async def db(
    proxied: tuple[PostgresEngine, Proxy], clock: HandClock, limits: StoreLimits, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Store]:
    """A store without beats, looks and hints, so that only the test's own transactions can be lost."""
    monkeypatch.setattr(beats.Beats, "run", nothing)
    monkeypatch.setattr(looks.Looks, "run", nothing)
    monkeypatch.setattr(hints.Hints, "listen_for_ever", nothing)
    monkeypatch.setattr(hints.Hints, "send_for_ever", nothing)
    monkeypatch.setattr(shared.Shared, "look_for_strains", nothing)
    async with proxied[0].open(clock, limits=limits) as opened:
        opened.configure(frozenset({"acme"}), lambda session: [NewDelivery("http", BODY)])
        await opened.end_due(idle=True)  # takes the operator
        yield opened


@pytest.fixture
def proxy(proxied: tuple[PostgresEngine, Proxy]) -> Proxy:
    return proxied[1]


def counts(engine: PostgresEngine) -> tuple[int, int, list[tuple[int, int, int]]]:
    figures = [(row["live"], row["pending"], row["dead"]) for row in engine.rows("operator")]
    return len(engine.rows("session")), len(engine.rows("delivery")), figures


@pytest.mark.parametrize("cut", CUTS)
class TestCut:
    """The connection is cut before the statement reaches the server, or before its answer comes back."""

    async def test_a_session_is_opened_once_and_answered_so(
        self, db: Store, proxy: Proxy, postgres_engine: PostgresEngine, cut: Mode
    ) -> None:
        proxy.mode = cut
        assert (await db.open_session(opening())).outcome == "created"
        assert proxy.cuts == 1
        assert counts(postgres_engine) == (1, 0, [(1, 0, 0)])
        assert db.figures_of("acme").live == 1

    async def test_an_end_is_one_end_with_one_set_of_deliveries(
        self, db: Store, proxy: Proxy, postgres_engine: PostgresEngine, cut: Mode
    ) -> None:
        await db.open_session(opening())
        proxy.mode = cut
        assert await db.record(notice("s")) == "ended"
        assert counts(postgres_engine) == (1, 1, [(0, 1, 0)])
        assert await db.record(notice("s")) == "repeated"
        assert (db.figures_of("acme").live, db.figures_of("acme").pending) == (0, 1)

    async def test_a_failed_attempt_counts_once(self, db: Store, proxy: Proxy, cut: Mode) -> None:
        delivery = await one_delivery(db)
        proxy.mode = cut
        settled = await db.settle(
            Settlement(delivery, "pending", 5000, 1, attempt(status=500), gate=counted(failed=True))
        )
        assert settled.after.failures == 1
        known = await db.session("acme", delivery.session_id)
        assert known is not None
        assert known[1][0].attempts == 1
        assert db.gate("acme").failures == 1
        # The next failure is counted from there
        await db.settle(Settlement(known[1][0], "pending", 5000, 2, attempt(status=500), gate=counted(failed=True)))
        assert db.gate("acme").failures == 2

    async def test_touches_are_answered_by_what_became_of_their_sessions(
        self, db: Store, proxy: Proxy, cut: Mode
    ) -> None:
        await db.open_session(opening("a"))
        await db.record(notice("over"))
        proxy.mode = cut
        assert await db.touch("acme", ["a", "over", "none"]) == (1, ["none"], ["over"])


@pytest.mark.parametrize("limits", [IMPATIENT])
async def test_everything_swallowed_is_refused_in_time_and_resumes_by_itself(
    db: Store, proxy: Proxy, clock: HandClock
) -> None:
    """There is neither an answer nor a reset, as with a broken middlebox. The service clock stands still in the
    meantime.
    """
    await db.open_session(opening())
    proxy.mode = "swallow"
    with pytest.raises(StoreError, match="no answer within"):
        await db.touch("acme", ["s"])
    frozen_ms = db.service_clock.now_ms()
    clock.advance(1)
    assert db.service_clock.now_ms() == frozen_ms
    proxy.mode = "pass"
    async with asyncio.timeout(20):
        while db.failure:
            await asyncio.sleep(0.05)
    assert await db.touch("acme", ["s"]) == (1, [], [])


@pytest.mark.parametrize("limits", [IMPATIENT])
async def test_what_was_committed_behind_a_refusal_is_known_afterwards(
    db: Store, proxy: Proxy, postgres_engine: PostgresEngine
) -> None:
    """The commit's answer is lost, and so is the question whether it was stored. So the caller is refused. Later the
    store reads the tables again.
    """
    proxy.mode = "swallow answers"
    with pytest.raises(StoreError):
        await db.open_session(opening())
    await until(lambda: counts(postgres_engine)[0] == 1)  # a slow server may commit after the caller was refused
    proxy.mode = "pass"
    async with asyncio.timeout(20):
        while db.failure:
            await asyncio.sleep(0.05)
    assert db.live == 1
    assert (await db.open_session(opening())).outcome == "open"


async def test_the_job_after_one_that_was_cut_with_its_answer_works(
    postgres_engine: PostgresEngine,
) -> None:
    """A daemon that stops while it writes would otherwise not leave, and the others would take it for gone."""
    thread, has_answer, goes_on = Thread(Database(postgres_engine.url, None, "cut")), Event(), Event()

    def asks(sql: Connection) -> None:
        sql.execute("SELECT 1")
        has_answer.set()
        goes_on.wait()

    job = asyncio.ensure_future(thread.run(asks, within_s=60))
    await asyncio.to_thread(has_answer.wait)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    goes_on.set()
    found = await thread.run(lambda sql: sql.execute("SELECT 2").fetchone(), within_s=60)
    thread.close()
    assert found == (2,)
