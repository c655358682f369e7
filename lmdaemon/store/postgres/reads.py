"""Reads of the database: those of the daemon itself and those for people, each on a connection of its own, so that
neither waits for the other.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg

from lmdaemon.limits import StoreLimits
from lmdaemon.log import Log
from lmdaemon.store.contract import StoreError
from lmdaemon.store.postgres.errors import meaning, said
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Result, Thread

# The longest time that a read of the daemon itself may take; twice that, if the connection was lost and is made again
READ_S = 4.0

log = Log("store")


class Reads:
    """The two connections for reads. `refused` counts refused reads by reason."""

    def __init__(self, database: Database, refused: dict[str, int], limits: StoreLimits) -> None:
        self._database = database
        self._limits = limits
        self._refused = refused
        self._reader, self._looker = Thread(database), Thread(database)
        self._turn = asyncio.Lock()
        self._reading = self._looking = 0

    def close(self) -> None:
        """Closes both connections, also while they wait for an answer."""
        self._reader.close()
        self._looker.close()

    async def read(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `function(connection, *arguments)` for the daemon itself, on a connection of its own, so that it does
        not wait for reads for people. Raises StoreError.
        """
        if self._reading >= self._limits.reads_max:
            raise self._too_many_readers(self._reading)
        self._reading += 1
        try:
            return await self._twice(self._reader, READ_S, function, *arguments)
        except (psycopg.Error, NoAnswerError) as error:
            raise self._reading_failed(error) from error
        finally:
            self._reading -= 1

    async def look(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `function(connection, *arguments)` in a read transaction, for people: one at a time, each for `look_s`
        at most. If the call is cancelled, the read is ended. Raises StoreError.
        """
        if self._looking >= self._limits.looks_max:
            raise self._too_many_readers(self._looking)
        self._looking += 1
        try:
            async with asyncio.timeout(self._limits.look_s), self._turn:
                return await self._twice(self._looker, self._limits.look_s, _in_one_transaction, function, *arguments)
        except (TimeoutError, NoAnswerError):
            self._refused["reading_too_slow"] += 1
            log.warning("store.overloaded", reason="reading_too_slow", waiting=self._looking)
            raise StoreError(f"reading took longer than {self._limits.look_s:g} s") from None
        except psycopg.Error as error:
            raise self._reading_failed(error) from error
        finally:
            self._looking -= 1

    @staticmethod
    async def _twice(thread: Thread, within_s: float, function: Callable[..., Result], *arguments: Any) -> Result:
        """Repeats a read on a new connection if the connection turns out to be lost, perhaps since long ago."""
        try:
            return await thread.run(function, *arguments, within_s=within_s)
        except psycopg.Error as error:
            if meaning(error) != "lost":
                raise
        return await thread.run(function, *arguments, within_s=within_s)

    def _too_many_readers(self, waiting: int) -> StoreError:
        self._refused["readers_full"] += 1
        log.warning("store.overloaded", reason="readers_full", waiting=waiting)
        return StoreError("too many readers are waiting")

    def _reading_failed(self, error: Exception) -> StoreError:
        self._refused["reading_failed"] += 1
        log.error("store.reading_failed", reason=said(error), database=self._database.title)
        return StoreError(f"reading failed: {said(error)}")


def _in_one_transaction(sql: Connection, function: Callable[..., Result], *arguments: Any) -> Result:
    """Runs the function in a read transaction, so that all its statements see the same state of the tables."""
    sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    try:
        return function(sql, *arguments)
    finally:
        if not sql.closed:
            sql.execute("ROLLBACK")
