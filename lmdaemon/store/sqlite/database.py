"""An open SQLite file: its connections for writing, checkpoints and reads, opened and closed in a safe order."""

import asyncio
import os
import sqlite3
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Generic, Self, TypeVar
from urllib.parse import quote

from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.store.contract import DatabaseError, Room, StoreError
from lmdaemon.store.sqlite import file
from lmdaemon.store.sqlite.reads import Reads
from lmdaemon.store.sqlite.thread import Thread, connect, connect_to_read, execute
from lmdaemon.store.sqlite.writer import Disk, Work
from lmdaemon.store.writer import Owner, Writer

_Work = TypeVar("_Work", bound=Work)


class Database(Generic[_Work]):
    """An open file. Nothing that is queued with `writer.write` is written unless `run` is running.

    `close` must be called in any case: an aiosqlite connection that stays open keeps the process from exiting.
    """

    def __init__(
        self,
        owner: Owner[_Work],
        files: file.Files,
        keeper: Thread,
        disk: Disk,
        readers: tuple[Thread, Thread],
        lock: int,
        limits: StoreLimits,
    ) -> None:
        self._files = files
        # The last connection to be closed copies the WAL into the file and removes it. This one can only read, so while
        # it is open, a file that turns out to be damaged stays as it was found, with its WAL.
        self._keeper = keeper
        self.disk = disk
        self._lock = lock
        self.writer = Writer(owner, disk, limits)
        self.reads = Reads(*readers, self.writer.refused, disk.database, limits)

    @classmethod
    async def open(
        cls,
        path: Path,
        owner: Owner[_Work],
        migrations: Sequence[str] | None = None,
        setup: Sequence[str] = (),
        limits: StoreLimits = LIMITS.store,
    ) -> Self:
        """Opens, creates (mode 0600) or upgrades the file. Raises DatabaseError, which names the file, if that fails.

        `setup` are statements to run on the writing connection, for temporary views and triggers.
        """
        file.check_rights(path)
        path = file.real_path(path)
        lock = file.lock_file(path)
        wait_s = limits.busy_timeout_s
        try:
            file.look_beside(path, lock)
            file.create(path)
            async with AsyncExitStack() as stack:
                keeper = await connect(f"file://{quote(os.fsencode(path.absolute()))}?mode=ro", stack, wait_s)
                await keeper.run(execute, "SELECT count(*) FROM sqlite_schema")
                writer = await connect(path, stack, wait_s)
                await writer.run(file.migrate, path, migrations or file.MIGRATIONS)
                for statement in setup:
                    await writer.run(execute, statement)
                readers = (await connect_to_read(path, stack, wait_s), await connect_to_read(path, stack, wait_s))
                checkpointer = await connect(path, stack, wait_s)
                await checkpointer.run(execute, "PRAGMA busy_timeout = 0")  # checkpoints never wait for a lock
                files = file.Files(path)
                stack.pop_all()  # opened: from here on `close` closes them
        except (sqlite3.Error, OSError) as error:
            os.close(lock)
            raise DatabaseError(f"{path}: cannot be opened as a database: {file.cause(error, path)}") from error
        except BaseException:
            os.close(lock)
            raise
        file.mark(lock, files.in_use)
        return cls(owner, files, keeper, Disk(files, writer, checkpointer, limits), readers, lock, limits)

    async def accept(self) -> None:
        """Is called when the start has read the file without errors. From now on, closing removes the WAL."""
        await self._keeper.close()

    async def run(self) -> None:
        """Runs the writer, the checkpoints, and the task that empties the WAL, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.writer.run())
            group.create_task(self.disk.checkpoint_for_ever(self.writer.committed_something))
            group.create_task(self.disk.empty_wal_when_idle(self.writer.changed))

    async def close(self) -> None:
        """Refuses what is queued, and closes all connections."""
        self.writer.stop_taking(StoreError("the store is closed"))
        if not self.disk.lost:
            # Must be done before the last connection removes the WAL: if the process is killed in between, the next
            # start must not report a lost WAL
            file.mark(self._lock, b"")
        await self.disk.close_checkpointer()
        await self.reads.close()
        await self.disk.close()
        await self._keeper.close()
        os.close(self._lock)

    @property
    def path(self) -> Path:
        """The database file, with links resolved."""
        return self._files.path

    @property
    def room(self) -> Room | None:
        """The space on the file system at the last transaction."""
        return self._files.room

    @property
    def wal_bytes(self) -> int:
        """Size of the WAL at the last transaction."""
        return self._files.wal_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file at the last transaction."""
        return self._files.file_bytes
