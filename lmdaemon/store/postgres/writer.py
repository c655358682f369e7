"""Commits batches to the database, and finds out what became of one whose answer was lost.

The queue in front of it is `store.writer`'s. Every transaction of the daemon carries its number in the daemon's own row
of `member`, and succeeds only after the one before it. So after a lost connection that row tells whether the last one
was committed, and a number that is used up keeps one that is still on its way from being committed later. A daemon that
was expelled has no such row; it joins again, and commits what it has in hand then.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg

from lmdaemon.store.postgres.batch import Batch, FencedOffError, Place
from lmdaemon.store.postgres.errors import meaning, said
from lmdaemon.store.postgres.keeper import Keeper
from lmdaemon.store.postgres.tables import Found, read
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Thread

# How long a transaction may take, and as long again to find out what became of it. Whoever waits for it is told, at
# the latest, when the next attempt has failed as well: within 10 s.
WRITE_S = 2.5

# The number of the daemon's last transaction. Its row is written and not only read: so this waits for one that is being
# committed, and where a standby has to confirm commits it has confirmed that one, too.
LAST_BATCH = "UPDATE lmdaemon.member SET batch = batch WHERE id = %s RETURNING batch"
# Uses up the number of a transaction that may still be on its way. If it is being committed, this waits for it.
USE_UP = "UPDATE lmdaemon.member SET batch = %s WHERE id = %s AND batch IN (%s, %s) RETURNING 1"

# Takes 1 MiB of the server's disk, and gives it back. A probe of the writer's takes none: on a full disk it succeeds,
# while whatever needs a new page fails.
TAKE_ROOM = """
CREATE TEMPORARY TABLE lmdaemon_room ON COMMIT DROP AS SELECT repeat('x', 1000) FROM generate_series(1, 1000)"""

_Result = TypeVar("_Result")


class OutageError(Exception):
    """The server or the network failed. The operation itself may be right, so it can be repeated."""


class Server:
    """The writing connection. What `store.writer` needs of an engine.

    The keeper reads the tables again when a transaction may have been committed without our knowing.
    """

    def __init__(self, database: Database, thread: Thread, keeper: Keeper) -> None:
        self._thread = thread
        self._place: Place | None = None  # None: it has not joined, or was expelled
        self._keeper = keeper
        self._is_unsure = False  # what became of the last transaction
        self._full: str | None = None  # what the server said when its disk was full
        self.database = database.title

    @property
    def member(self) -> int | None:
        """This daemon's row."""
        return None if self._place is None else self._place.member

    async def check(self) -> None:
        """Joins if that was not done yet. After an outage: finds out where we stand before anything is decided. Raises
        OutageError, and DatabaseError when it may not join.
        """
        if self._full is not None:
            await self._look_for_room(self._full)
        if self._place is not None and self._is_unsure:
            try:
                await self._resume(self._place)
            except OutageError as error:
                if isinstance(error.__cause__, NoAnswerError):
                    raise
                await self._resume(self._place)  # on a new connection: that one may have been lost long ago
        if self._place is None:
            await self._join()
        elif self._keeper.is_short_of_numbers:
            await self._run(self._keeper.take_numbers)

    async def _look_for_room(self, full: str) -> None:
        try:
            await self._run(_find_room)
        except OutageError as error:
            if isinstance(error.__cause__, psycopg.errors.DiskFull):
                raise OutageError(full) from error  # the same words each time, so that the log has them once
            raise
        self._full = None

    async def _join(self) -> None:
        self._place, found = await self._run(self._keeper.joining(self.database))
        self._is_unsure = False
        self._keeper.take_over(found)

    async def _resume(self, place: Place) -> None:
        def resume(sql: Connection) -> Found | None:
            member, number = place
            if sql.execute(USE_UP, (number, member, number - 1, number)).fetchone() is None:
                return None
            return read(sql, member)

        found = await self._run(resume)
        self._is_unsure = False
        if found is None:
            self._place = None
        else:
            self._place = Place(place.member, place.batch + 1)
            self._keeper.take_over(found)

    async def commit(self, work: Batch) -> list[Any]:
        """Commits a batch; as `store.writer.Engine.commit`. After an outage it finds out whether it was committed."""
        assert self._place is not None  # noqa: S101 - for the type checker: `check` has been called
        try:
            answers = await self._run(work.run, self._place)
        except OutageError:
            if not self._is_unsure:
                raise
            answers = await self._resolve(work, self._place)
            self._is_unsure = False
        self._place = self._place._replace(batch=self._place.batch + 1)
        return answers

    async def _resolve(self, work: Batch, place: Place) -> list[Any]:
        """The connection was lost during this batch, or the daemon was expelled: its answers if it was committed, else
        it is run again.
        """

        def resolve(sql: Connection) -> list[Any] | None:
            row = sql.execute(LAST_BATCH, (place.member,)).fetchone()
            if row is None:
                return None
            return work.resolved(sql) if row[0] == place.batch else work.run(sql, place)

        answers = await self._run(resolve)
        if answers is None:  # it was expelled
            self._place = None
            await self._join()
            self._keeper.renew(work)
            answers = await self._run(work.run, self._place)
        return answers

    async def _run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Raises OutageError, and psycopg.Error where the operation is at fault."""
        try:
            return await self._thread.run(function, *arguments, within_s=WRITE_S)
        except asyncio.CancelledError:
            self._is_unsure = True  # the thread goes on, so it may be committed
            raise
        except (NoAnswerError, FencedOffError) as error:
            self._is_unsure = True
            raise OutageError(said(error)) from error
        except psycopg.Error as error:
            found = meaning(error)
            if found == "poison":
                raise
            self._is_unsure |= found == "lost"
            if isinstance(error, psycopg.errors.DiskFull):
                self._full = self._full or said(error)
            raise OutageError(said(error)) from error

    @staticmethod
    def is_outage(error: Exception) -> bool:
        """Whether the server, the network or this machine is at fault, and not the operation."""
        return isinstance(error, OutageError | OSError | MemoryError)

    @staticmethod
    def has_room() -> bool:
        """As far as `check` can see, which has been called."""
        return True

    async def give_up(self) -> None:
        """Nothing can be saved that is not in the database."""


def _find_room(sql: Connection) -> None:
    """Raises psycopg.errors.DiskFull while there is no room on the server's disk."""
    try:
        with sql.transaction(force_rollback=True):
            sql.execute(TAKE_ROOM)
    except psycopg.errors.InsufficientPrivilege:
        pass  # temporary tables are forbidden: it cannot be told
