"""Deliveries with several daemons: only the daemon that owns an operator delivers for it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web
from clocks import HandClock
from support import LISTEN, ScriptedOperator, SlowStore, load, open_store, operator_table, scripted_operator

from lmdaemon import retry
from lmdaemon.config.settings import Settings
from lmdaemon.delivery.dispatcher import Dispatcher
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.sinks import sinks_of
from lmdaemon.store.contract import Opening
from lmdaemon.store.sqlite.store import Store
from lmdaemon.sweeper import Sweeper


class Seen:
    """A store as one of several daemons uses it. The daemon owns the operators in `owned`."""

    def __init__(self, store: Store, owned: set[str]) -> None:
        self._store = store
        self.owned = owned
        self.is_sure = True
        self.find_out: Callable[[], None] | None = None
        self.let_gone: list[str] = []
        self.other: Dispatcher
        self.answer: asyncio.Future[str]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def probe(self) -> None:
        await self._store.probe()
        self.is_sure = True
        if self.find_out is not None:
            self.find_out()

    def owns(self, operator: str) -> bool:
        return operator in self.owned

    def let_go(self, operator: str) -> None:
        self.let_gone.append(operator)

    async def ask_owner(self, operator: str, wish: str, within_s: float) -> str:
        assert wish == "probe"
        asked: Any = self.other._store
        asked.answer = asyncio.get_running_loop().create_future()
        self.other.probe_asked(1, operator)
        async with asyncio.timeout(within_s):
            return await asked.answer

    async def answer_probe(self, number: int, webhook_id: str) -> None:
        self.answer.set_result(webhook_id)


class Daemons:
    """Two dispatchers on one store, as of two daemons."""

    def __init__(self, store: SlowStore, settings: Settings, senders: list[Sender], clock: HandClock) -> None:
        self.store = store
        self.seen = [Seen(store, {"acme"}), Seen(store, set())]
        self.both = [
            Dispatcher(seen, clock, sender, Random(7))  # type: ignore[arg-type]
            for seen, sender in zip(self.seen, senders, strict=True)
        ]
        for one, seen in zip(self.both, reversed(self.seen), strict=True):
            one.configure(settings, {})
            seen.other = one

    def hand_over(self, to: int) -> None:
        for seen, dispatcher in zip(self.seen, self.both, strict=True):
            seen.owned = {"acme"} if seen is self.seen[to] else set()
            dispatcher.ownership_changed("acme")

    async def end(self, session_id: str) -> None:
        await self.store.open_session(Opening("acme", session_id, "p", "tok-3n", None, 10_000, 0))
        await self.store.end("acme", session_id)

    async def rounds(self) -> None:
        """Runs rounds of both dispatchers until no attempt is under way."""
        for one in self.both:
            await one.once()
        while any(one.in_flight for one in self.both):
            await asyncio.gather(*(one.drain(60) for one in self.both))
            for one in self.both:
                await one.once()


@contextlib.asynccontextmanager
async def daemons(tmp_path: Path, clock: HandClock, operator: ScriptedOperator) -> AsyncIterator[Daemons]:
    settings = load(tmp_path / "config.toml", LISTEN + operator_table("acme", operator.url, concurrency=1))
    async with open_store(tmp_path / "test.sqlite3", clock, kind=SlowStore) as store:
        store.configure(frozenset({"acme"}), partial(sinks_of, settings))
        senders = [Sender(clock), Sender(clock)]
        both = Daemons(store, settings, senders, clock)
        try:
            yield both
        finally:
            for dispatcher, sender in zip(both.both, senders, strict=True):
                await dispatcher.drain(0)
                await sender.close()


async def test_what_another_daemon_owns_is_not_sent(tmp_path: Path, clock: HandClock) -> None:
    async with scripted_operator() as operator, daemons(tmp_path, clock, operator) as both:
        other = both.both[1]
        await both.end("s")
        other.wake()
        other.gate_changed("acme")
        other.wall_clock_set_back()
        assert await other.once() is None
        assert (other.in_flight, other.lanes.overdue_s) == (0, {("acme", "http"): 0.0})
        assert operator.received == []
        await both.rounds()
        assert len(operator.received) == 1


async def test_what_was_made_unknown_is_sent_once_the_tables_are_read_again(tmp_path: Path, clock: HandClock) -> None:
    """As when the answer to a commit was lost and the commit turns out to be stored."""
    async with scripted_operator() as operator, daemons(tmp_path, clock, operator) as both:
        await both.end("a")
        await both.rounds()
        observers, both.store.observers = both.store.observers, ()
        await both.end("b")
        both.store.observers = observers
        await both.rounds()
        assert len(operator.received) == 1
        for observer in observers:
            observer.read_again()
        await both.rounds()
        assert len(operator.received) == 2


async def test_a_new_owner_sends_what_waits_and_the_old_one_nothing(tmp_path: Path, clock: HandClock) -> None:
    """When the operator gets another owner, one attempt is under way and further rows have been read ahead. When it
    comes back, those rows are not sent from memory either.
    """
    answered = asyncio.Event()

    async def slow(_: web.Request) -> dict[str, int]:
        await answered.wait()
        return {"error": 0}

    async with scripted_operator(slow) as operator, daemons(tmp_path, clock, operator) as both:
        for number in range(5):
            await both.end(f"s{number}")
        await both.both[0].once()
        await operator.wait_for(1)
        both.hand_over(1)
        answered.set()
        while both.both[0].in_flight:
            await both.both[0].drain(60)
        await both.rounds()
        both.hand_over(0)
        await both.rounds()
        ids = [received.headers["webhook-id"] for received in operator.received]
        assert len(ids) == len(set(ids)) == 5
        assert both.store.figures_of("acme").pending == 0


@pytest.mark.parametrize("asked", ["the end of an attempt", "a round", "a probe"])
async def test_one_that_was_expelled_unawares_starts_nothing(tmp_path: Path, clock: HandClock, asked: str) -> None:
    """The daemon was stopped while it was expelled. It still has rows that it has read ahead, and a free slot."""
    answered = asyncio.Event()

    async def slow(_: web.Request) -> dict[str, int]:
        await answered.wait()
        return {"error": 0}

    async with scripted_operator(slow) as operator, daemons(tmp_path, clock, operator) as both:
        for number in range(5):
            await both.end(f"s{number}")
        one, other = both.both
        await one.once()
        await operator.wait_for(1)  # one attempt is under way, and two more rows have been read ahead
        both.seen[0].is_sure, both.seen[0].find_out = False, lambda: both.hand_over(1)
        both.seen[1].owned = {"acme"}
        other.ownership_changed("acme")
        answered.set()
        if asked == "a round":
            one.wake()
            await one.once()
        elif asked == "a probe":
            both.seen[0].owned = {"acme"}
            assert await one.probe("acme") is None
        while one.in_flight:
            await one.drain(60)
        assert len(operator.received) == 1
        await both.rounds()
        ids = [received.headers["webhook-id"] for received in operator.received]
        assert len(ids) == len(set(ids)) == 5
        assert both.store.figures_of("acme").pending == 0


async def test_an_operator_is_let_go_when_nothing_is_under_way(tmp_path: Path, clock: HandClock) -> None:
    """A daemon that takes the operator over repeats no attempt that is under way, and never exceeds the concurrency."""
    answered = asyncio.Event()

    async def slow(_: web.Request) -> dict[str, int]:
        await answered.wait()
        return {"error": 0}

    async with scripted_operator(slow) as operator, daemons(tmp_path, clock, operator) as both:
        first, second = both.seen
        both.hand_over(1)
        assert first.let_gone == ["acme"]
        both.hand_over(0)
        assert second.let_gone == ["acme"]
        await both.end("s")
        await both.both[0].once()
        await operator.wait_for(1)
        both.hand_over(1)
        assert first.let_gone == ["acme"]
        answered.set()
        await both.both[0].drain(10)
        assert first.let_gone == ["acme", "acme"]
        assert both.store.figures_of("acme").pending == 0


async def test_rows_that_were_read_under_an_earlier_term_are_not_sent(tmp_path: Path, clock: HandClock) -> None:
    """While a daemon reads rows, the operator goes to another daemon, which may deliver them, and comes back."""
    async with scripted_operator() as operator, daemons(tmp_path, clock, operator) as both:

        async def the_other_delivers() -> None:
            both.store.after_reading = None
            both.hand_over(1)
            await both.both[1].once()
            await both.both[1].drain(10)
            both.hand_over(0)

        await both.end("s")
        both.store.after_reading = the_other_delivers
        await both.rounds()
        assert len(operator.received) == 1


async def test_the_breaker_goes_with_the_operator(tmp_path: Path, clock: HandClock) -> None:
    """The new owner sends one probe, after the pause that the failures under the old owner have caused."""
    probed = asyncio.Event()

    async def when_probed(_: web.Request) -> dict[str, int]:
        await probed.wait()
        return {"error": 0}

    answers = [*[{"error": 100}] * 5, when_probed]
    async with scripted_operator(*answers) as operator, daemons(tmp_path, clock, operator) as both:
        for number in range(6):
            await both.end(f"s{number}")
        await both.rounds()
        assert len(operator.received) == 5
        assert retry.breaker(both.store.gate("acme"), clock.wall_ms()) == "open"
        both.hand_over(1)
        await both.rounds()
        assert len(operator.received) == 5
        clock.advance(5.001)
        await both.both[1].once()
        assert both.both[1].in_flight == 1
        probed.set()
        await both.rounds()
        assert retry.breaker(both.store.gate("acme"), clock.wall_ms()) == "closed"


async def test_a_probe_asked_of_any_daemon_is_made_by_the_owner(tmp_path: Path, clock: HandClock) -> None:
    """The owner makes the probe even while the operator is held."""
    async with scripted_operator() as operator, daemons(tmp_path, clock, operator) as both:
        await both.end("s")
        await both.store.set_gate("acme", lambda gate: retry.hold(gate, clock.wall_ms(), "by_hand"))
        owner, other = both.both
        found = await other.probe("acme")
        assert found == operator.received[0].headers["webhook-id"]
        assert await other.probe("acme") is None
        assert await other.probe("nobody") is None
        assert (owner.in_flight, other.in_flight, len(operator.received)) == (0, 0, 1)


async def test_only_the_owner_tells_that_touches_have_stopped(tmp_path: Path, clock: HandClock) -> None:
    async with open_store(tmp_path / "test.sqlite3", clock) as store:
        store.configure(frozenset({"acme"}), lambda _: ())
        seen = Seen(store, set())
        sweeper = Sweeper(seen, clock, 0.0)  # type: ignore[arg-type]
        sweeper.configure({"acme": 10.0})
        for number in range(100):
            await store.open_session(Opening("acme", f"s{number}", "p", "t", None, 10_000, 0))
        await store.touch("acme", ["s0"])
        for _ in range(8):
            clock.advance(1)
            await sweeper.once()
        assert sweeper.touch_alarm.silent == {}
        seen.owned = {"acme"}
        sweeper.ownership_changed("acme")
        clock.advance(1)
        await sweeper.once()
        assert sweeper.touch_alarm.silent.keys() == {"acme"}
        seen.owned = set()
        sweeper.ownership_changed("acme")
        clock.advance(0.5)
        await sweeper.once()
        clock.advance(0.6)
        await sweeper.once()
        assert sweeper.touch_alarm.silent == {}
