"""Requests that only the daemon that owns an operator can carry out, sent to another daemon."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import psycopg
import pytest
from clocks import HandClock
from engines import SOON, PostgresEngine, own_name
from support import until

from lmdaemon.store import silence
from lmdaemon.store.contract import StoreError, StoreObserver
from lmdaemon.store.postgres.store import Store


class Heard(StoreObserver):
    """Notes the probes that a daemon is asked for. If `answers` is set, it answers each with the number of the
    question.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.answers = True
        self.asked: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def ownership_changed(self, operator: str) -> None:
        if not self._store.owns(operator):
            self._store.let_go(operator)

    def probe_asked(self, number: int, operator: str) -> None:
        self.asked.append(operator)
        if self.answers:
            self.tasks.add(asyncio.create_task(self._store.answer_probe(number, f"msg_{operator}")))


class Pair:
    """Two daemons on one database. `owner` owns the operator acme, and `other` does not."""

    def __init__(self, stores: list[Store], heard: list[Heard], running: list["asyncio.Task[None]"]) -> None:
        at = next(at for at, store in enumerate(stores) if store.owns("acme"))
        self.owner, self.other = stores[at], stores[1 - at]
        self.at_owner, self.at_other = heard[at], heard[1 - at]
        self.owner_runs = running[at]


@pytest.fixture
async def pair(postgres_engine: PostgresEngine, clock: HandClock) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        stores: list[Store] = []
        heard, running = [], []
        for _ in range(2):
            store = await Store.open(postgres_engine.url, clock, name=own_name(), paces=SOON)
            stack.push_async_callback(store.close)
            store.configure(frozenset({"acme"}), lambda _: (), frozenset({"acme"}), grace_ms=1000)
            stores.append(store)
            heard.append(Heard(store))
            store.observe(heard[-1])
            running.append(asyncio.create_task(store.run()))
            stack.callback(running[-1].cancel)
            await store.probe()

        async def settled() -> bool:
            known = [len(await store.daemons()) for store in stores]
            owned = [store.owns("acme") for store in stores]
            return known == [2, 2] and sum(owned) == 1 and all(store.membership.owners.is_settled for store in stores)

        await until(settled)
        yield Pair(stores, heard, running)


async def test_a_probe_is_made_by_the_owner_and_answered_once(pair: Pair, postgres_engine: PostgresEngine) -> None:
    assert await pair.other.ask_owner("acme", "probe", 20) == "msg_acme"
    assert (pair.at_owner.asked, pair.at_other.asked) == (["acme"], [])
    with psycopg.connect(postgres_engine.url) as sql:
        assert sql.execute("SELECT count(*) FROM lmdaemon.asked").fetchone() == (0,)


async def test_an_owner_that_does_not_answer_is_told(pair: Pair, postgres_engine: PostgresEngine) -> None:
    """The owner finds the question at each look until it is withdrawn, but hands it to its observer only once."""
    pair.at_owner.answers = False
    with pytest.raises(StoreError, match="the daemon that owns acme has not answered within 1 s"):
        await pair.other.ask_owner("acme", "probe", 1)
    assert pair.at_owner.asked == ["acme"]
    with psycopg.connect(postgres_engine.url) as sql:
        assert sql.execute("SELECT count(*) FROM lmdaemon.asked").fetchone() == (0,)


async def test_ends_that_wait_are_released_at_any_daemon(pair: Pair) -> None:
    now_ms = pair.owner.service_clock.now_ms()
    pair.owner._pauses["acme"] = silence.Pause(now_ms, silent_ms=5000)
    assert pair.owner.waits_until_ms("acme") == now_ms + silence.PAUSE_MAX_MS
    await pair.owner.look()  # the look tells the other daemons
    assert await pair.other.release_ends("acme")
    assert pair.owner.waits_until_ms("acme") is None
    assert not await pair.other.release_ends("acme")


async def test_a_release_waits_for_no_owner_if_no_ends_wait(pair: Pair) -> None:
    """The owner may be gone, so it must not be asked: in this test, a question would find no answer, and fail."""
    pair.owner_runs.cancel()
    assert not await pair.other.release_ends("acme")
