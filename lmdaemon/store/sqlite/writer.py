"""Commits batches to the SQLite file with `synchronous=FULL`, and copies the write-ahead log (WAL) into it beside them.

The queue in front of it is `store.writer`'s. A file or WAL that was taken away ends the daemon, for what is committed
afterwards would end with it anyway.
"""

import asyncio
import sqlite3
import time
from contextlib import suppress
from typing import Any, Protocol

from lmdaemon.store.sqlite.file import Files
from lmdaemon.store.sqlite.thread import BUSY_TIMEOUT_S, Thread, execute

CHECKPOINT_S = 1.0  # how often what was committed is copied from the WAL into the file, on a connection of its own
WAL_MAX = 64 * 1024 * 1024  # bytes; beyond that the writer itself empties the WAL between two batches
IDLE_S = 5.0  # without a change, after which the WAL is emptied; twice that at the latest

# What SQLite says when the disk, not the operation, is at fault. Source: sqlite.org/rescode.html
_OUTAGES = {
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOTADB,
}


class Work(Protocol):
    """One batch of operations, made on the event loop."""

    def run(self, connection: sqlite3.Connection) -> list[Any]:
        """Commits the batch, on the connection's thread. Returns an answer for each operation; a StoreError in its
        place is raised to its waiter alone. Raises what went wrong; then nothing is stored.
        """


class Disk:
    """The writing connection, and one for checkpoints beside it. What `store.writer` needs of an engine."""

    def __init__(self, files: Files, writer: Thread, checkpointer: Thread) -> None:
        self._files = files
        self._writer = writer
        self._checkpointer = checkpointer
        self._blocked_until = 0.0  # monotonic time before which the WAL is not worth another try to empty it
        self.lost = False  # whether the file or its WAL was taken away
        self.database = str(files.path)

    async def close_checkpointer(self) -> None:
        """Before the readers, so that the last checkpoint is the closing writer's."""
        await self._checkpointer.close()

    async def close(self) -> None:
        await self._writer.close()

    def check(self) -> None:
        """Looks at the file and its WAL; of open files, so no disk is waited for. Raises FileLostError."""
        self._files.check()

    async def commit(self, work: Work) -> list[Any]:
        return await self._writer.run(self._commit, work)

    def _commit(self, connection: sqlite3.Connection, work: Work) -> list[Any]:
        """Commits a batch on the connection's thread."""
        if connection.in_transaction:  # a rollback that the disk refused is made up for
            connection.execute("ROLLBACK")
        if self._files.wal_bytes > WAL_MAX:
            self._empty_wal(connection)
        return work.run(connection)

    @staticmethod
    def is_outage(error: Exception) -> bool:
        """Whether the disk or the machine refused, and not the operation."""
        if isinstance(error, sqlite3.Error):
            return getattr(error, "sqlite_errorcode", -1) & 0xFF in _OUTAGES
        return isinstance(error, OSError | MemoryError)

    async def give_up(self) -> None:
        """A WAL that was only unlinked is still open: what it holds is copied into the file."""
        self.lost = True
        with suppress(sqlite3.Error):
            await self._writer.run(execute, "PRAGMA wal_checkpoint(TRUNCATE)")

    async def checkpoint_for_ever(self, committed_something: asyncio.Event) -> None:
        """Copies what was committed from the WAL into the file, beside the writer, at most once a CHECKPOINT_S.

        Not inside the writer's commits, where whoever comes at the wrong moment waits for it. A failure is no news: the
        writer meets the same disk, and says so.
        """
        while True:
            await committed_something.wait()
            await asyncio.sleep(CHECKPOINT_S)
            committed_something.clear()
            with suppress(sqlite3.Error):
                await self._checkpointer.run(execute, "PRAGMA wal_checkpoint(PASSIVE)")

    async def empty_wal_when_idle(self, changed: asyncio.Event) -> None:
        """Once after each time of work, for ever: until then, what was deleted from the file, such as a player's token,
        is in the WAL.

        Whoever reads or writes meanwhile is not waited for, and does not wait: it is tried again later.
        """
        while True:
            await changed.wait()
            changed.clear()
            await asyncio.sleep(IDLE_S)
            if not changed.is_set() and not await self._wal_emptied():
                changed.set()

    async def _wal_emptied(self) -> bool:
        with suppress(sqlite3.Error):
            return await self._checkpointer.run(emptied_wal)
        return False

    def _empty_wal(self, connection: sqlite3.Connection) -> None:
        """Under unbroken load the WAL never starts over by itself. What is left to copy is little.

        A reader in the way, such as a long query in an administrator's shell, is not waited for.
        """
        if time.monotonic() < self._blocked_until:
            return
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            (blocked, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        if blocked:
            self._blocked_until = time.monotonic() + CHECKPOINT_S


def emptied_wal(connection: sqlite3.Connection) -> bool:
    """Empties the WAL, unless somebody is in the way. All of it is in the file before the writer is locked out, which
    then is for microseconds.
    """
    _, pages, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if pages != copied:
        return False
    (blocked, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not blocked
