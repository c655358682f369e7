"""Hints: by NOTIFY, a daemon tells the others on its database that there is something to look at.

Nothing is lost without hints: a daemon only looks later. A hint is sent after a commit and not inside a
transaction, because a transaction that notifies waits for every other one that does. The only exception is the first
work after a time without any (`Present.hints_as`). Behind PgBouncer in transaction mode no hint arrives; then `works`
is False, and the daemons look often instead.
"""

import asyncio
from collections.abc import Callable

import psycopg

from lmdaemon.store.contract import StoreError
from lmdaemon.store.postgres.paces import Paces
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Thread

WAIT_S = 30.0  # how long to wait for a hint; after that, the connection is tested
ANSWER_S = 5.0  # how long connecting may take, or that test
AGAIN_S = 5.0  # before a lost connection is replaced
SEND_AGAIN_S = 1.0  # before a hint that could not be sent is sent again
SEND_MIN_S = 0.05  # between two hints
# Between two beats, or two looks (see Paces), while nothing is live or pending and hints are known to work
IDLE_S = 30.0

LISTEN = "LISTEN lmdaemon"
IS_ALIVE = "SELECT 1"
# A hint to all daemons, this one included.
HINT = "SELECT pg_notify('lmdaemon', %s)"


class Hints:
    """Waits for hints on a connection of its own, and sends them."""

    def __init__(self, database: Database, name: str, reads: Reads, signals: Signals, paces: Paces) -> None:
        """`name` is this daemon's. Of its own hints only the first on each connection counts, because it shows that
        hints arrive.
        """
        self._name = name
        self._thread = Thread(database)
        self._reads = reads
        self._signals = signals
        self._paces = paces
        self._listening: Connection | None = None
        self.works = False  # whether a hint has arrived on this connection

    @property
    def idle_s(self) -> float:
        """Seconds between two beats, or two looks, while no session is live and no delivery pending."""
        return IDLE_S if self.works else self._paces.idle_beat_s

    async def listen_for_ever(self, hinted: Callable[[], None]) -> None:
        """Calls `hinted` on the event loop when hints have come; once for several that come together. On a new
        connection it has a hint sent, to find out whether hints arrive.
        """
        while True:
            try:
                if await self._thread.run(self._listen, within_s=ANSWER_S):
                    self._signals.hint.set()
                names = await self._thread.run(_wait, within_s=WAIT_S + ANSWER_S)
                if names:
                    is_first, self.works = not self.works, True
                    # The first hint may be this daemon's own: others may have sent theirs before this connection
                    # listened
                    if is_first or names != {self._name}:
                        hinted()
            except (psycopg.Error, NoAnswerError):
                self.works, self._listening = False, None
                await asyncio.sleep(AGAIN_S)

    async def send_for_ever(self) -> None:
        """Sends a hint whenever a part of this daemon has asked for one (`Signals.hint`)."""
        while True:
            await self._signals.hint.wait()
            self._signals.hint.clear()
            try:
                await self._reads.read(send, self._name)
            except StoreError:
                await asyncio.sleep(SEND_AGAIN_S)
            await asyncio.sleep(SEND_MIN_S)

    def _listen(self, sql: Connection) -> bool:
        """Has the connection listen for hints. Returns whether it is a new one."""
        if self._listening is sql:
            return False
        sql.execute(LISTEN)
        self.works, self._listening = False, sql
        return True

    def close(self) -> None:
        """Ends the wait for hints, and closes the connection."""
        self._thread.close()


def _wait(sql: Connection) -> set[str]:
    """Waits for hints, and returns the names of the daemons that have sent them; none if none came within WAIT_S. Hints
    that arrive together are all taken here, because any that is left would be lost.
    """
    names = {notify.payload for notify in sql.notifies(timeout=WAIT_S, stop_after=1)}
    if not names:
        sql.execute(IS_ALIVE)
    return names


def send(sql: Connection, name: str) -> None:
    """Sends a hint to all daemons. `name` is the sender's."""
    sql.execute(HINT, (name,))
