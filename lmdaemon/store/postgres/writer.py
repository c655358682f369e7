"""Commits batches to the database, and finds out what became of one whose answer was lost.

The queue in front of it is `store.writer`'s. Every transaction of the daemon carries its number in the daemon's own row
of `member`, and succeeds only behind the one before it. So after a lost connection that row tells whether the last one
was committed, and a number that is used up keeps one that is still on its way from being committed later.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import psycopg

from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.postgres.batch import Batch, FencedOffError, Place
from lmdaemon.store.postgres.errors import meaning, said
from lmdaemon.store.postgres.members import Joined
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Thread
from lmdaemon.store.projection import Loaded

# How long a transaction may take, and as long again to find out what became of it. Whoever waits behind it is told, at
# the latest, when the next attempt has failed as well: within 10 s.
WRITE_S = 2.5

# The number of the daemon's last transaction.
LAST_BATCH = "SELECT batch FROM lmdaemon.member WHERE id = %s"
# Uses up the number of a transaction that may still be on its way. If it is being committed, this waits for it.
USE_UP = "UPDATE lmdaemon.member SET batch = %s WHERE id = %s AND batch IN (%s, %s) RETURNING 1"

_Result = TypeVar("_Result")


class Keeper(Protocol):
    """Who keeps in memory what the tables say."""

    def read(self, sql: Connection) -> Loaded:
        """Reads it, on the connection's thread."""

    def reload(self, found: Loaded) -> None:
        """Takes it over, on the event loop."""

    @property
    def is_short_of_numbers(self) -> bool:
        """Whether the next batch may need more numbers for sessions than are left."""

    def take_numbers(self, sql: Connection) -> None:
        """Takes more, on the connection's thread."""


class OutageError(Exception):
    """The server or the network failed. The operation itself may be right, so it can be repeated."""


class Server:
    """The writing connection. What `store.writer` needs of an engine.

    The keeper reads the tables again when a transaction may have been committed without our knowing.
    """

    def __init__(self, database: Database, thread: Thread, joined: Joined, keeper: Keeper) -> None:
        self._thread = thread
        self._name = joined.name
        self._place = Place(joined.member, joined.batch + 1)
        self._keeper = keeper
        self._is_unsure = False  # what became of the last transaction
        self.database = database.title

    async def check(self) -> None:
        """After an outage: finds out where we stand before anything is decided. Raises OutageError, and DatabaseError
        when the daemon was put out.
        """
        if self._is_unsure:
            try:
                loaded = await self._run(self._resume)
            except OutageError as error:
                if isinstance(error.__cause__, NoAnswerError):
                    raise
                loaded = await self._run(self._resume)  # on a new connection: that one may have been lost long ago
            self._is_unsure = False
            self._keeper.reload(loaded)
        elif self._keeper.is_short_of_numbers:
            await self._run(self._keeper.take_numbers)

    def _resume(self, sql: Connection) -> Loaded:
        member, number = self._place
        if sql.execute(USE_UP, (number, member, number - 1, number)).fetchone() is None:
            raise DatabaseError(f"{self.database}: {self._name} was put out by another lmdaemon")
        self._place = Place(member, number + 1)
        return self._keeper.read(sql)

    async def commit(self, work: Batch) -> list[Any]:
        try:
            answers = await self._run(work.run, self._place)
        except OutageError:
            if not self._is_unsure:
                raise
            answers = await self._run(self._resolve, work)
            self._is_unsure = False
        self._place = self._place._replace(batch=self._place.batch + 1)
        return answers

    def _resolve(self, sql: Connection, work: Batch) -> list[Any]:
        """The connection was lost during this batch: its answers if it was committed, else it is run again."""
        row = sql.execute(LAST_BATCH, (self._place.member,)).fetchone()
        if row is not None and row[0] == self._place.batch:
            return work.resolved(sql)
        return work.run(sql, self._place)

    async def _run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Raises OutageError, and psycopg.Error where the operation is at fault."""
        try:
            return await self._thread.run(function, *arguments, within_s=WRITE_S)
        except (NoAnswerError, FencedOffError) as error:
            self._is_unsure = True
            raise OutageError(said(error)) from error
        except psycopg.Error as error:
            found = meaning(error)
            if found == "poison":
                raise
            self._is_unsure |= found == "lost"
            raise OutageError(said(error)) from error

    @staticmethod
    def is_outage(error: Exception) -> bool:
        return isinstance(error, OutageError | OSError | MemoryError)

    @staticmethod
    def has_room() -> bool:
        """The server's disk cannot be seen from here."""
        return True

    async def give_up(self) -> None:
        """Nothing can be saved that is not in the database."""
