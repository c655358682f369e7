"""Hints between the daemons on a database that there is something to look at, by NOTIFY.

Nothing depends on them: they only let a daemon look at once that would have looked later. They are sent after a commit
and never in one, because a transaction that notifies waits for every other that does. Behind PgBouncer in transaction
mode none arrive; then `works` is False, and the daemons look often instead.
"""

import asyncio
from collections.abc import Callable

import psycopg

from lmdaemon.store.contract import StoreError
from lmdaemon.store.postgres.paces import Paces
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Thread

WAIT_S = 30.0  # for a hint; then the connection is asked whether it is still there
ANSWER_S = 5.0  # for the connection itself
AGAIN_S = 5.0  # before a connection that was lost is made again
SEND_AGAIN_S = 1.0  # before a hint is sent again that could not be sent
SEND_MIN_S = 0.05  # between two hints
IDLE_S = (
    30.0  # between two beats, or two looks (see Paces), while nothing is live or pending and hints are known to work
)

LISTEN = "LISTEN lmdaemon"
IS_ALIVE = "SELECT 1"
# A hint to all daemons, this one included.
HINT = "SELECT pg_notify('lmdaemon', %s)"


class Hints:
    """Waits for hints on a connection of its own, and sends them."""

    def __init__(self, database: Database, name: str, reads: Reads, signals: Signals, paces: Paces) -> None:
        """`name` is this daemon's: of its own hints only the first on a connection counts, for it shows that they
        arrive.
        """
        self._name = name
        self._thread = Thread(database)
        self._reads = reads
        self._signals = signals
        self._paces = paces
        self._listening: Connection | None = None
        self.works = False  # whether one has arrived on this connection

    @property
    def idle_s(self) -> float:
        """Between two beats, or looks, while nothing is live or pending."""
        return IDLE_S if self.works else self._paces.idle_beat_s

    async def listen_for_ever(self, hinted: Callable[[], None]) -> None:
        """Calls `hinted` on the event loop for each hint, or for several. On a new connection it has one sent: without
        one it is not known whether they arrive.
        """
        while True:
            try:
                if await self._thread.run(self._listen, within_s=ANSWER_S):
                    self._signals.hint.set()
                names = await self._thread.run(_wait, within_s=WAIT_S + ANSWER_S)
                if names:
                    is_first, self.works = not self.works, True
                    if is_first or names != {self._name}:  # the first: others may have hinted before it listened
                        hinted()
            except (psycopg.Error, NoAnswerError):
                self.works, self._listening = False, None
                await asyncio.sleep(AGAIN_S)

    async def send_for_ever(self) -> None:
        """Lets the others know when there is something for them to look at."""
        while True:
            await self._signals.hint.wait()
            self._signals.hint.clear()
            try:
                await self._reads.read(send, self._name)
            except StoreError:
                await asyncio.sleep(SEND_AGAIN_S)
            await asyncio.sleep(SEND_MIN_S)

    def _listen(self, sql: Connection) -> bool:
        """Returns whether it is a new connection."""
        if self._listening is sql:
            return False
        sql.execute(LISTEN)
        self.works, self._listening = False, sql
        return True

    def close(self) -> None:
        """Ends the wait."""
        self._thread.close()


def _wait(sql: Connection) -> set[str]:
    """Whose hints have come. Those of several may come at once; what is not taken then is lost."""
    names = {notify.payload for notify in sql.notifies(timeout=WAIT_S, stop_after=1)}
    if not names:
        sql.execute(IS_ALIVE)
    return names


def send(sql: Connection, name: str) -> None:
    """Hints all daemons; `name` is that of whoever does."""
    sql.execute(HINT, (name,))
