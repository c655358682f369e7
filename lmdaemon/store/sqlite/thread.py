"""A connection to the SQLite file on a thread of its own. Only this module uses aiosqlite's internals."""

import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

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


async def connect(path: Path | str, stack: AsyncExitStack, busy_timeout_s: float) -> Thread:
    """Opens a connection on a thread of its own, which `stack` closes. `path` may be a URI, as a string. Statements
    wait for locks of other connections for `busy_timeout_s`.
    """

    def connect() -> sqlite3.Connection:
        is_uri = isinstance(path, str)
        connection = sqlite3.connect(path, isolation_level=None, timeout=busy_timeout_s, uri=is_uri)
        # SQLite makes no checkpoints by itself; `writer` makes them
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        return connection

    opened = Thread(connect, 64)
    await opened
    stack.push_async_callback(opened.close)
    return opened


async def connect_to_read(path: Path, stack: AsyncExitStack, busy_timeout_s: float) -> Thread:
    """Opens a connection that can only read."""
    reader = await connect(path, stack, busy_timeout_s)
    await reader.run(execute, "PRAGMA query_only = ON")
    # Creates the WAL if there is none, because `Files` needs it
    await reader.run(execute, "SELECT count(*) FROM sqlite_schema")
    return reader


def execute(connection: sqlite3.Connection, statement: str) -> None:
    """Runs a statement to its end."""
    connection.execute(statement).fetchall()
