"""A connection to the SQLite file on a thread of its own. Only this module uses aiosqlite's internals."""

import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

BUSY_TIMEOUT_S = 2.0  # how long to wait for a lock of another program, such as an administrator's sqlite3 shell

Result = TypeVar("Result")


class Thread(aiosqlite.Connection):
    """aiosqlite's connection, with a method to run a whole function on its thread.

    A batch is then one call to the thread instead of one for each statement.
    """

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `function(connection, *arguments)` on the thread. Raises what it raises."""
        result: Result = await self._execute(function, self._conn, *arguments)  # type: ignore[no-untyped-call]
        return result

    def end_statement(self) -> None:
        """Interrupts the statement that runs on the thread, if there is one."""
        self._conn.interrupt()


async def connect(path: Path | str, stack: AsyncExitStack) -> Thread:
    """Opens a connection on a thread of its own, which `stack` closes. A string is a URI."""

    def connect() -> sqlite3.Connection:
        is_uri = isinstance(path, str)
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S, uri=is_uri)
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # checkpoints are made by `writer`
        return connection

    opened = Thread(connect, 64)
    await opened
    stack.push_async_callback(opened.close)
    return opened


async def connect_to_read(path: Path, stack: AsyncExitStack) -> Thread:
    """Opens a connection that can only read."""
    reader = await connect(path, stack)
    await reader.run(execute, "PRAGMA query_only = ON")
    await reader.run(execute, "SELECT count(*) FROM sqlite_schema")  # creates the WAL if there is none
    return reader


def execute(connection: sqlite3.Connection, statement: str) -> None:
    """Runs a statement to its end."""
    connection.execute(statement).fetchall()
