"""A connection to the SQLite file on a thread of its own. The only module that knows aiosqlite from inside."""

import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

BUSY_TIMEOUT_S = 2.0  # for an administrator's sqlite3 holding the file; another daemon is kept out by the lock file

Result = TypeVar("Result")


class Thread(aiosqlite.Connection):
    """aiosqlite's connection with its one missing verb: a whole function on the connection's thread.

    One call per batch instead of one await per statement; every await is a thread hop.
    """

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `function(connection, *arguments)`. Raises what it raises."""
        result: Result = await self._execute(function, self._conn, *arguments)  # type: ignore[no-untyped-call]
        return result

    def end_statement(self) -> None:
        """Interrupts the statement that is running on the thread, if there is one."""
        self._conn.interrupt()


async def connect(path: Path | str, stack: AsyncExitStack) -> Thread:
    """A connection on a thread of its own, closed by the stack. A string is a URI."""

    def connect() -> sqlite3.Connection:
        is_uri = isinstance(path, str)
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S, uri=is_uri)
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # the writer's own checkpoints take its place
        return connection

    opened = Thread(connect, 64)
    await opened
    stack.push_async_callback(opened.close)
    return opened


async def connect_to_read(path: Path, stack: AsyncExitStack) -> Thread:
    """A connection that can only read."""
    reader = await connect(path, stack)
    await reader.run(execute, "PRAGMA query_only = ON")
    await reader.run(execute, "SELECT count(*) FROM sqlite_schema")  # makes the WAL where there is none
    return reader


def execute(connection: sqlite3.Connection, statement: str) -> None:
    """Runs a statement to its end."""
    connection.execute(statement).fetchall()
