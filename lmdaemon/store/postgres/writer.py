"""Commits batches to the database, and finds out what became of one whose answer was lost.

The queue in front of it is `store.writer`'s. Each transaction of a daemon stores its number in the daemon's own row of
`member`, and fails unless the row has the number of the transaction before. So after a lost connection the row tells
whether the last transaction was committed. If it may still be on its way, using up its number keeps it from being
committed later. A daemon that was expelled has no row any more: it joins again, and then commits the batch that it was
about to commit.
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

# The number of the daemon's last transaction. The row is updated, and not only read, so that this waits for a
# transaction that is being committed. Where a standby has to confirm commits, it has then confirmed that one, too.
LAST_BATCH = "UPDATE lmdaemon.member SET batch = batch WHERE id = %s RETURNING batch"
# Uses up the number of a transaction that may still be on its way. If it is being committed, this waits for it.
USE_UP = "UPDATE lmdaemon.member SET batch = %s WHERE id = %s AND batch IN (%s, %s) RETURNING 1"

# Takes 1 MiB of the server's disk, and gives it back. A probe write takes none: on a full disk it succeeds, while a
# write that needs a new page fails.
TAKE_ROOM = """
CREATE TEMPORARY TABLE lmdaemon_room ON COMMIT DROP AS SELECT repeat('x', 1000) FROM generate_series(1, 1000)"""

_Result = TypeVar("_Result")


class OutageError(Exception):
    """The server or the network failed. The operation itself may be right and can be repeated."""


class Server:
    """The writing connection: the engine of `store.writer`.

    If a transaction may have been committed without this daemon's knowing, it reads the tables again and gives them to
    the keeper.
    """

    def __init__(self, database: Database, thread: Thread, keeper: Keeper, write_s: float) -> None:
        """A transaction may take `write_s`, and twice that if its outcome has to be found out."""
        self._thread = thread
        self._write_s = write_s
        self._place: Place | None = None  # None: this daemon has not joined, or was expelled
        self._keeper = keeper
        self._is_unsure = False  # whether it is unknown what became of the last transaction
        self._full: str | None = None  # what the server said when its disk was full
        self.database = database.title

    @property
    def member(self) -> int | None:
        """The number of this daemon's row; None without one."""
        return None if self._place is None else self._place.member

    async def check(self) -> None:
        """Joins if this daemon has not joined yet. After an outage, finds out what became of the last transaction
        before anything is decided. Raises OutageError, and DatabaseError when it may not join.
        """
        if self._full is not None:
            await self._look_for_room(self._full)
        if self._place is not None and self._is_unsure:
            try:
                await self._resume(self._place)
            except OutageError as error:
                if isinstance(error.__cause__, NoAnswerError):
                    raise
                await self._resume(self._place)  # again on a new connection: the old one may have been lost long ago
        if self._place is None:
            await self._join()
        elif self._keeper.is_short_of_numbers:
            await self._run(self._keeper.take_numbers)

    async def _look_for_room(self, full: str) -> None:
        try:
            await self._run(_find_room)
        except OutageError as error:
            if isinstance(error.__cause__, psycopg.errors.DiskFull):
                raise OutageError(full) from error  # the same text each time, so that it is logged once
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
        """Commits a batch; as `store.writer.Engine.commit`. If the connection was lost, it finds out whether the batch
        was committed.
        """
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
        """Is called when the connection was lost during a batch, or the daemon was expelled. Returns the answers if the
        batch was committed, else it runs the batch again.
        """

        def resolve(sql: Connection) -> list[Any] | None:
            row = sql.execute(LAST_BATCH, (place.member,)).fetchone()
            if row is None:
                return None
            return work.resolved(sql) if row[0] == place.batch else work.run(sql, place)

        answers = await self._run(resolve)
        if answers is None:  # the daemon was expelled
            self._place = None
            await self._join()
            self._keeper.renew(work)
            answers = await self._run(work.run, self._place)
        return answers

    async def _run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs a function on the connection's thread. Raises OutageError, and psycopg.Error if the operation is at
        fault.
        """
        try:
            return await self._thread.run(function, *arguments, within_s=self._write_s)
        except asyncio.CancelledError:
            self._is_unsure = True  # the thread goes on, so the batch may be committed
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
        """True, because `check`, which runs before each batch, raises while the disk is full."""
        return True

    async def give_up(self) -> None:
        """Does nothing: there is nothing to save outside the database."""


def _find_room(sql: Connection) -> None:
    """Raises psycopg.errors.DiskFull while there is no room on the server's disk."""
    try:
        with sql.transaction(force_rollback=True):
            sql.execute(TAKE_ROOM)
    except psycopg.errors.InsufficientPrivilege:
        pass  # temporary tables are forbidden, so whether there is room cannot be found out
