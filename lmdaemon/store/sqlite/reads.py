"""Reads of the SQLite file: those of the daemon itself and those for people, each on a connection of its own."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lmdaemon.limits import StoreLimits
from lmdaemon.log import Log
from lmdaemon.store.contract import StoreError
from lmdaemon.store.sqlite.thread import Result, Thread

INTERRUPT_EVERY_S = 0.05  # between interrupts of a read that nobody waits for any more

log = Log("store")


class Reads:
    """The two connections for reads.

    `refused` counts refused reads by reason; `database` is the file, for log lines.
    """

    def __init__(
        self, reader: Thread, looker: Thread, refused: dict[str, int], database: str, limits: StoreLimits
    ) -> None:
        self._reader = reader
        self.desk = _Desk(looker, limits.look_s)
        self._limits = limits
        self._refused = refused
        self._database = database
        self._reading = 0

    async def close(self) -> None:
        """Closes both connections."""
        await self.desk.close()
        await self._reader.close()

    async def read(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `function(connection, *arguments)` for the daemon itself. Reads for people do not delay it.

        Raises StoreError.
        """
        if self._reading >= self._limits.reads_max:
            raise self._too_many_readers(self._reading)
        self._reading += 1
        try:
            return await self._reader.run(function, *arguments)
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error
        finally:
            self._reading -= 1

    async def look(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `function(connection, *arguments)` in a read transaction, for people: one at a time, each for `look_s`.

        If the call is cancelled, the read is interrupted. Raises StoreError.
        """
        if self.desk.waiting >= self._limits.looks_max:
            raise self._too_many_readers(self.desk.waiting)
        try:
            return await self.desk.read(function, *arguments)
        except TimeoutError:
            self._refused["reading_too_slow"] += 1
            log.warning("store.overloaded", reason="reading_too_slow", waiting=self.desk.waiting)
            raise StoreError(f"reading took longer than {self._limits.look_s:g} s") from None
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error

    def _too_many_readers(self, waiting: int) -> StoreError:
        self._refused["readers_full"] += 1
        log.warning("store.overloaded", reason="readers_full", waiting=waiting)
        return StoreError("too many readers are waiting")

    def _reading_failed(self, error: sqlite3.Error) -> StoreError:
        self._refused["reading_failed"] += 1
        log.error("store.reading_failed", reason=str(error), database=self._database)
        return StoreError(f"reading failed: {error}")


class _Desk:
    """The connection for people's reads. It runs one read at a time, and interrupts it when its time is over or its
    caller was cancelled.
    """

    def __init__(self, thread: Thread, look_s: float) -> None:
        self._thread = thread
        self._look_s = look_s
        self._turn = asyncio.Lock()
        self.waiting = 0  # reads, the running one included

    async def read(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs one read when its turn comes. Raises sqlite3.Error, and TimeoutError after `look_s`."""
        self.waiting += 1
        try:
            async with asyncio.timeout(self._look_s):
                await self._turn.acquire()
                reading = asyncio.ensure_future(self._thread.run(_in_one_transaction, function, *arguments))
                reading.add_done_callback(lambda _: self._turn.release())
                try:
                    return await asyncio.shield(reading)
                finally:
                    self._interrupt(reading)
        finally:
            self.waiting -= 1

    def _interrupt(self, reading: "asyncio.Future[Any]") -> None:
        """Interrupts a read until it has ended.

        The next read begins only then, so that it is not interrupted by mistake. The interrupt is repeated, because one
        that comes between two statements has no effect.
        """
        if not reading.done():
            self._thread.end_statement()
            asyncio.get_running_loop().call_later(INTERRUPT_EVERY_S, self._interrupt, reading)

    async def close(self) -> None:
        await self._thread.close()


def _in_one_transaction(connection: sqlite3.Connection, function: Callable[..., Result], *arguments: Any) -> Result:
    """Runs the function in a read transaction, so that all its statements see the same state of the tables."""
    connection.execute("BEGIN")
    try:
        return function(connection, *arguments)
    finally:
        while connection.in_transaction:  # the ROLLBACK may be interrupted as well
            with suppress(sqlite3.OperationalError):
                connection.execute("ROLLBACK")
