"""Commits batches to the SQLite file with `synchronous=FULL`, and copies its write-ahead log (WAL) into the file.

If the file or its WAL was taken away, the daemon must end, because further commits would be lost with the process.
"""

import asyncio
import sqlite3
import time
from contextlib import suppress
from typing import Any, Protocol

from lmdaemon.limits import StoreLimits
from lmdaemon.store.sqlite.file import Files
from lmdaemon.store.sqlite.thread import Thread, execute

ROOM_EVERY_S = 0.1  # how often the free space is looked at, unless it is short
ROOM_BYTES = 1024 * 1024  # free space in which a batch fits: 300 operations, most of which write a page or two

# SQLite's result codes when the disk is at fault and not the operation. Source: sqlite.org/rescode.html
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
    """A batch of operations, as the event loop gives it to the writer's thread."""

    def run(self, connection: sqlite3.Connection) -> list[Any]:
        """Commits the batch on the connection's thread and returns an answer for each operation.

        An answer that is a StoreError is raised to the caller of that operation. Raises any exception when nothing was
        stored.
        """


class Disk:
    """The writing connection and the one for checkpoints: the engine of `store.writer`."""

    def __init__(self, files: Files, writer: Thread, checkpointer: Thread, limits: StoreLimits) -> None:
        self._files = files
        self._limits = limits
        self._wal_full = limits.wal_max * 3 // 4  # size (bytes) from which on the WAL is made to start over
        self._writer = writer
        self._checkpointer = checkpointer
        self._blocked_until = 0.0  # monotonic time before which no attempt is made to have the WAL start over
        self._wal_kept = 0  # size (bytes) of the WAL file when it last started over
        self._looked_at = float("-inf")  # monotonic time of the last look at the free space
        self.lost = False  # whether the file or its WAL was taken away
        self.database = str(files.path)

    async def close_checkpointer(self) -> None:
        """Closes the connection for checkpoints. It must be closed first, so that closing the writing connection makes
        the last checkpoint.
        """
        await self._checkpointer.close()

    async def close(self) -> None:
        """Closes the writing connection."""
        await self._writer.close()

    async def check(self) -> None:
        """Checks that the file and its WAL are still there; the kernel answers from memory. Raises FileLostError."""
        self._files.check()

    async def commit(self, work: Work) -> list[Any]:
        """Commits a batch; as `store.writer.Engine.commit`."""
        return await self._writer.run(self._commit, work)

    def _commit(self, connection: sqlite3.Connection, work: Work) -> list[Any]:
        """Commits a batch on the connection's thread."""
        if connection.in_transaction:  # the transaction was left open by a rollback that the disk refused
            connection.execute("ROLLBACK")
        if self._files.wal_bytes > max(self._wal_full, self._wal_kept):
            self._start_wal_over(connection)
        is_stored = False
        try:
            answers = work.run(connection)
            is_stored = True
        finally:
            # The free space is not read after each commit, because the call waits for the interpreter's lock once more
            now = time.monotonic()
            if not is_stored or now - self._looked_at >= ROOM_EVERY_S or not self.has_room():
                self._files.look_for_room()
                self._looked_at = now if is_stored else float("-inf")
        return answers

    def has_room(self) -> bool:
        """Whether the file system has room for a batch; as `store.writer.Engine.has_room`."""
        return self._files.room is None or self._files.room.free >= ROOM_BYTES

    @staticmethod
    def is_outage(error: Exception) -> bool:
        """Whether the disk or the machine is at fault, and not the operation."""
        if isinstance(error, sqlite3.Error):
            return getattr(error, "sqlite_errorcode", -1) & 0xFF in _OUTAGES
        return isinstance(error, OSError | MemoryError)

    async def give_up(self) -> None:
        """Copies the WAL into the file: a WAL that was only unlinked is still open and complete."""
        self.lost = True
        with suppress(sqlite3.Error):
            await self._writer.run(execute, "PRAGMA wal_checkpoint(TRUNCATE)")

    async def checkpoint_for_ever(self, committed_something: asyncio.Event) -> None:
        """Copies commits from the WAL into the file, while the writer goes on, at most once in `checkpoint_s`.

        Copying inside a commit would delay the callers of that commit. Failures are ignored: the writer sees the same
        disk and reports them.
        """
        while True:
            await committed_something.wait()
            await asyncio.sleep(self._limits.checkpoint_s)
            committed_something.clear()
            with suppress(sqlite3.Error):
                await self._checkpointer.run(execute, "PRAGMA wal_checkpoint(PASSIVE)")

    async def empty_wal_when_idle(self, changed: asyncio.Event) -> None:
        """Empties the WAL whenever nothing has changed for `idle_s`, because deleted data, such as tokens, is still in
        it.

        It waits for no reader or writer and delays none. If one is in the way, it tries again later.
        """
        while True:
            await changed.wait()
            changed.clear()
            await asyncio.sleep(self._limits.idle_s)
            if not changed.is_set() and not await self.empty_wal():
                changed.set()

    async def empty_wal(self) -> bool:
        """Empties the WAL unless a reader or writer is in the way, and returns whether it has."""
        with suppress(sqlite3.Error):
            return await self._checkpointer.run(emptied_wal)
        return False

    def _start_wal_over(self, connection: sqlite3.Connection) -> None:
        """Has the WAL start over between two batches; under constant load it never would by itself.

        The file keeps its size, because overwriting takes less time than growing. Each time it may still grow by one
        transaction; beyond `wal_max` it is emptied. Little is left to copy by then, because `checkpoint_for_ever` has
        copied the rest. A reader that is in the way, such as a long query in an administrator's shell, is not waited
        for.
        """
        if time.monotonic() < self._blocked_until:
            return
        size = self._files.wal_bytes
        how = "TRUNCATE" if size > self._limits.wal_max else "RESTART"
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            (blocked, _, _) = connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(self._limits.busy_timeout_s * 1000)}")
        if blocked:
            self._blocked_until = time.monotonic() + self._limits.checkpoint_s
        else:
            self._wal_kept = size if how == "RESTART" else 0


def emptied_wal(connection: sqlite3.Connection) -> bool:
    """Empties the WAL unless a reader or writer is in the way, and returns whether it is empty.

    All of it is copied first, so that the writer is then locked out for microseconds only.
    """
    _, pages, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if pages != copied:
        return False
    (blocked, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not blocked
