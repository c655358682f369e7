"""Hints: notifications between daemons that there is something new to read in the tables."""

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest
from clocks import HandClock
from engines import PostgresEngine
from operations import opening
from support import until

from lmdaemon.limits import LIMITS
from lmdaemon.store.postgres.hints import Hints
from lmdaemon.store.postgres.paces import PACES
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.thread import Database


async def never(_: Hints) -> None:
    """Replaces the loop that sends hints after commits."""


class Listener:
    def __init__(self, hints: Hints) -> None:
        self.hints, self.hinted = hints, 0


@pytest.fixture
async def mine(postgres_engine: PostgresEngine) -> AsyncIterator[Listener]:
    """A listener for the daemon named `mine`, which has already found that hints arrive."""

    def note() -> None:
        listener.hinted += 1

    database, signals = Database(postgres_engine.url, None, "mine"), Signals()
    reads = Reads(database, {}, LIMITS.store)
    listener = Listener(Hints(database, "mine", reads, signals, PACES))
    listening = asyncio.create_task(listener.hints.listen_for_ever(note))
    await signals.hint.wait()
    send(postgres_engine, "mine")
    await until(lambda: listener.hinted)
    yield listener
    listening.cancel()
    listener.hints.close()
    reads.close()


def send(engine: PostgresEngine, *names: str) -> None:
    """Sends hints in one transaction, so that they arrive together."""
    with psycopg.connect(engine.url) as sql:
        for name in names:
            sql.execute("SELECT pg_notify('lmdaemon', %s)", (name,))


@pytest.mark.parametrize("names", [("other",), ("mine", "other"), ("other", "mine"), ("", "mine")])
async def test_hints_of_others_are_heard_also_beside_its_own(
    mine: Listener, postgres_engine: PostgresEngine, names: tuple[str, ...]
) -> None:
    send(postgres_engine, *names)
    await until(lambda: mine.hinted == 2)


async def test_its_own_hints_are_none(mine: Listener, postgres_engine: PostgresEngine) -> None:
    send(postgres_engine, "mine", "mine")
    send(postgres_engine, "other")
    await until(lambda: mine.hinted > 1)
    assert mine.hinted == 2


async def test_the_first_work_after_a_rest_has_its_hint_in_the_transaction(
    postgres_engine: PostgresEngine, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is killed right after its commit has told the others, which would otherwise look much later."""
    monkeypatch.setattr(Hints, "send_for_ever", never)
    async with postgres_engine.open(clock) as one, postgres_engine.open(clock):
        await one.look()  # finds the other one
        with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
            sql.execute("LISTEN lmdaemon")
            await one.open_session(opening("first"))
            assert len(list(sql.notifies(timeout=5, stop_after=1))) == 1
            await one.open_session(opening("second"))
            assert list(sql.notifies(timeout=0)) == []
