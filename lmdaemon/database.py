"""The SQLite file: opening and upgrading it, one writer with group commit, one reader. The home of aiosqlite.

Called by `store`, which brings all SQL. Every change is an operation on one queue; the writer takes what is queued,
runs it as one transaction in one call on the connection's thread, commits with `synchronous=FULL`, and only then
answers each waiter. So the order of the queue is the order of the world, and nobody else may ever write.
"""

import asyncio
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from importlib import resources
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import aiosqlite

from lmdaemon.log import Log

APPLICATION_ID = 0x4C4D6461  # "LMda": tells our file from any other SQLite database
BATCH_MAX = 1000  # operations in one transaction: bounds what one commit can delay
QUEUE_MAX = 20_000  # operations waiting; beyond that callers are told to come back
BUSY_TIMEOUT_S = 2.0  # for an administrator's sqlite3 holding the file; another daemon is kept out by the lock file
PROBE_S = 1.0  # between attempts to write while the disk refuses
CHECKPOINT_S = 1.0  # how often what was committed is copied from the WAL into the file, on a connection of its own
WAL_MAX = 64 * 1024 * 1024  # bytes; beyond that the writer itself empties the WAL between two batches

log = Log("store")


class StoreError(Exception):
    """Nothing was stored, and trying again later may help: disk full, locked or failing, or too much queued."""


class DatabaseError(Exception):
    """The file cannot be used at all: another daemon has it, it is damaged, or a newer program made it. Untouched."""


class Transaction(Protocol):
    """What the writer hands to every operation of a batch; made by `begin`, on the event loop."""

    def bind(self, connection: sqlite3.Connection) -> None:
        """Called on the connection's thread when the transaction has begun."""

    def finish(self) -> None:
        """Called on the connection's thread before the commit."""


_Txn = TypeVar("_Txn", bound=Transaction)
_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


class _Operation(NamedTuple):
    run: Callable[[Any, Sequence[Any]], Sequence[Any]]
    argument: Any
    answer: asyncio.Future[Any]


class _Thread(aiosqlite.Connection):
    """aiosqlite's connection with its one missing verb: a whole function on the connection's thread.

    One call per batch instead of one await per statement; every await is a thread hop.
    """

    async def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        result: _Result = await self._execute(function, self._conn, *arguments)  # type: ignore[no-untyped-call]
        return result


class Database(Generic[_Txn]):
    """An open database. `run` must be running for writes to be answered; `close` belongs in an exit stack, for an
    aiosqlite connection left open keeps the process from ending.

    `begin` makes the transaction of each batch, `committed` is told of it after the commit (before the waiters are
    answered), `available` is told when the file stops and starts taking writes again.
    """

    def __init__(self, path: Path, writer: _Thread, reader: _Thread, checkpointer: _Thread, lock: int) -> None:
        self.path = path
        self._writer = writer
        self._reader = reader
        self._checkpointer = checkpointer
        self._lock = lock
        self._wal = Path(f"{path}-wal")
        self._queue: deque[_Operation] = deque()
        self._wake = asyncio.Event()
        self._committed_something = asyncio.Event()
        self._closing = False
        self.begin: Callable[[], _Txn]
        self.committed: Callable[[_Txn], None]
        self.available: Callable[[bool], None] = lambda available: None
        self.failure: str | None = None  # why the last write was refused; None while writes work
        self.writing_since: float | None = None  # loop time at which the running transaction began
        self.commits = 0

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[str] | None = None) -> Self:
        """Opens, creates (mode 0600) or upgrades the file. Raises DatabaseError, naming the file, if it cannot."""
        lock = _lock(path)
        try:
            _create(path)
            async with AsyncExitStack() as stack:
                writer = await _connect(path, stack)
                await writer.run(_migrate, path, migrations or MIGRATIONS)
                reader = await _connect(path, stack)
                await reader.run(_execute, "PRAGMA query_only = ON")
                checkpointer = await _connect(path, stack)
                stack.pop_all()  # open: from here on `close` ends them
        except (sqlite3.Error, OSError) as error:
            os.close(lock)
            raise DatabaseError(f"{path}: cannot be opened as a database: {error}") from error
        except BaseException:
            os.close(lock)
            raise
        return cls(path, writer, reader, checkpointer, lock)

    async def close(self) -> None:
        """Ends the connections; what was queued and not written is refused."""
        self._refuse(list(self._queue), StoreError("the store is closed"))
        self._queue.clear()
        self._closing = True
        await self._checkpointer.close()
        await self._reader.close()
        await self._writer.close()
        os.close(self._lock)

    async def read(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs `function(connection, *arguments)` on the reading connection. Raises StoreError."""
        try:
            return await self._reader.run(function, *arguments)
        except sqlite3.Error as error:
            raise StoreError(f"reading failed: {error}") from error

    async def write(
        self, run: Callable[[_Txn, Sequence[_Argument]], Sequence[_Result]], argument: _Argument
    ) -> _Result:
        """Queues one operation and waits until it is on disk.

        `run(txn, arguments)` gets every neighbouring operation of its kind at once and returns one result for each.
        A waiter that is cancelled does not cancel its operation. Raises StoreError.
        """
        if self._closing or len(self._queue) >= QUEUE_MAX:
            raise StoreError("too many operations are waiting" if not self._closing else "the store is closed")
        answer: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._queue.append(_Operation(run, argument, answer))
        self._wake.set()
        return await answer

    async def run(self) -> None:
        """The writer: takes what is queued, for ever. While the file refuses writes it tries by itself."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), PROBE_S if self.failure else None)
            self._wake.clear()
            while self._queue or self.failure:
                await self.write_batch()
                if self.failure:
                    break

    async def checkpoint_for_ever(self) -> None:
        """Copies what was committed from the WAL into the file, beside the writer, at most once a CHECKPOINT_S.

        Not inside the writer's commits, where whoever comes at the wrong moment waits for it. A failure is no news: the
        writer meets the same disk, and says so.
        """
        while True:
            await self._committed_something.wait()
            await asyncio.sleep(CHECKPOINT_S)
            self._committed_something.clear()
            with suppress(sqlite3.Error):
                await self._checkpointer.run(_execute, "PRAGMA wal_checkpoint(PASSIVE)")

    async def write_batch(self) -> None:
        """Writes one batch of what is queued, also an empty one, and answers its waiters."""
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_MAX))]
        txn = self.begin()
        self.writing_since = asyncio.get_running_loop().time()
        try:
            results = await self._writer.run(_transaction, txn, batch, self._wal)
        except asyncio.CancelledError:
            self._refuse(batch, StoreError("the daemon is stopping"))
            raise
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError | sqlite3.DataError):
                await self._one_by_one(batch, error)
            else:
                self._failed(batch, error)
        except Exception as error:
            await self._one_by_one(batch, error)
        else:
            self._answered(txn, batch, results)
        finally:
            self.writing_since = None

    def _answered(self, txn: _Txn, batch: list[_Operation], results: list[Any]) -> None:
        self.commits += 1
        self._committed_something.set()
        if self.failure is not None:
            log.info("store.recovered", after=self.failure)
            self.failure = None
            self.available(True)
        self.committed(txn)
        for operation, result in zip(batch, results, strict=True):
            if not operation.answer.done():
                operation.answer.set_result(result)

    def _failed(self, batch: list[_Operation], error: Exception) -> None:
        failure = str(error)
        if failure != self.failure:  # the first failure and each change, not every attempt
            log.error("store.failing", reason=failure, refused=len(batch), path=self.path)
        if self.failure is None:
            self.available(False)
        self.failure = failure
        self._refuse(batch, StoreError(f"writing failed: {error}"))

    async def _one_by_one(self, batch: list[_Operation], error: Exception) -> None:
        """One operation broke the batch: each gets a transaction of its own, so that only the broken one fails."""
        if len(batch) == 1:
            log.error("store.operation_failed", operation=batch[0].run.__name__, error=type(error).__name__)
            return self._refuse(batch, error)
        for operation in batch:
            txn = self.begin()
            try:
                results = await self._writer.run(_transaction, txn, [operation], self._wal)
            except sqlite3.OperationalError as outage:
                self._failed([operation], outage)
            except Exception as broken:
                await self._one_by_one([operation], broken)
            else:
                self._answered(txn, [operation], results)
        return None

    @staticmethod
    def _refuse(batch: list[_Operation], error: Exception) -> None:
        for operation in batch:
            if not operation.answer.done():
                operation.answer.set_exception(error)


def _transaction(connection: sqlite3.Connection, txn: Transaction, batch: list[_Operation], wal: Path) -> list[Any]:
    results: list[Any] = []
    if wal.stat().st_size > WAL_MAX:
        # Under unbroken load the WAL never starts over by itself. What is left to copy is little; a reader in the way
        # makes it try again at the next batch.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    try:
        connection.execute("BEGIN IMMEDIATE")
        txn.bind(connection)
        for run, operations in groupby(batch, attrgetter("run")):
            results.extend(run(txn, [operation.argument for operation in operations]))
        txn.finish()
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return results


def _lock(path: Path) -> int:
    """Keeps a second daemon off the file. POSIX locks on the database itself belong to SQLite."""
    name = path.with_name(path.name + ".lock")
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be opened: {error.strerror} ({name})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise DatabaseError(f"{path}: is in use by another lmdaemon") from error
    return lock


def _create(path: Path) -> None:
    """Makes sure the file exists with mode 0600; SQLite gives the same mode to the -wal and -shm files beside it."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)


async def _connect(path: Path, stack: AsyncExitStack) -> _Thread:
    """A connection on a thread of its own, closed by the stack."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint_for_ever
        return connection

    opened = _Thread(connect, 64)
    await opened
    stack.push_async_callback(opened.close)
    return opened


def _execute(connection: sqlite3.Connection, statement: str) -> None:
    connection.execute(statement).fetchall()


def _statements(script: str) -> list[str]:
    """Splits a script, for executescript() would commit before it begins."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


# Entry n brings a file from version n to n + 1. Never edit one that was released: add the next.
MIGRATIONS: Sequence[str] = (resources.files("lmdaemon").joinpath("schema.sql").read_text("utf-8"),)


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Brings the file to the newest version in one transaction. Raises DatabaseError before it changes anything."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if (version or tables) and application != APPLICATION_ID:
        raise DatabaseError(f"{path}: is a database of another program (application_id {application:#x})")
    if version > len(migrations):
        raise DatabaseError(
            f"{path}: was written by a newer lmdaemon (schema {version}; this one knows {len(migrations)})"
        )
    # Before the first table: both are written into the file for good.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if version == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for number, script in enumerate(migrations[version:], version + 1):
            for statement in _statements(script):
                connection.execute(statement)
            log.info("store.migrated", path=path, schema=number)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
