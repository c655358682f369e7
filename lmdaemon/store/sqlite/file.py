"""The SQLite file: opening and upgrading it, one writer with group commit, two readers. The home of aiosqlite.

Called by `store`, which brings all SQL. Every change is an operation on one queue; the writer takes what is queued,
runs it as one transaction in one call on the connection's thread, commits with `synchronous=FULL`, and only then
answers each waiter. So the order of the queue is the order of the world, and nobody else may ever write.
"""

import asyncio
import errno
import fcntl
import os
import re
import sqlite3
import stat
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from importlib import resources
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, Self, TypeVar
from urllib.parse import quote

import aiosqlite

from lmdaemon import rights
from lmdaemon.clock import STALL_S
from lmdaemon.log import Log, place
from lmdaemon.store.contract import BATCH_ROWS, Answer, DatabaseError, Operation, StoreError
from lmdaemon.trust import user_name

APPLICATION_ID = 0x4C4D6461  # "LMda": tells our file from any other SQLite database
BATCH_MAX = 1000  # operations in one transaction: bounds what one commit can delay
QUEUE_MAX = 20_000  # operations waiting; beyond that callers are told to come back
QUEUE_ROWS = 200_000  # rows they name together: bounds the memory of what waits
READS_MAX = 1000  # that wait for the daemon's own reading connection
LOOKS_MAX = 100  # that wait for the connection of people's reads
LOOK_S = 2.0  # that such a read may take, its wait included
INTERRUPT_EVERY_S = 0.05  # until a read that nobody waits for any more has ended
REFUSALS = ("queue_full", "readers_full", "reading_too_slow", "writing_failed", "reading_failed", "stopping")
HUNG_S = STALL_S  # a transaction that takes longer: no touch can be acknowledged meanwhile
# A touch writes the one page where its session is. 60 touches at random among 200,000 take 1.6 ms with a page of 1024,
# 2.8 ms with SQLite's default of 4096; 1,000 take 21 and 45 ms.
DISK_PAGE_BYTES = 1024
BUSY_TIMEOUT_S = 2.0  # for an administrator's sqlite3 holding the file; another daemon is kept out by the lock file
PROBE_S = 1.0  # between attempts to write while the disk refuses
CHECKPOINT_S = 1.0  # how often what was committed is copied from the WAL into the file, on a connection of its own
ROOM = 1024 * 1024  # bytes; with less, what SQLite keeps beside a database may not fit
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

log = Log("store")


class Work(Protocol):
    """One batch of operations, made on the event loop."""

    def run(self, connection: sqlite3.Connection) -> list[Any]:
        """Commits the batch, on the connection's thread. Returns an answer for each operation; a StoreError in its
        place is raised to its waiter alone. Raises what went wrong; then nothing is stored.
        """


_Work = TypeVar("_Work", bound=Work)


class Owner(Protocol[_Work]):
    """Whose batches are written; everything is called on the event loop."""

    def begin(self, operations: Sequence[Operation[Any]]) -> _Work:
        """Makes the work of one batch."""

    def committed(self, work: _Work) -> None:
        """The work was committed; its waiters are answered next."""

    def available(self, available: bool) -> None:
        """The file stops taking writes, or takes them again."""

    def measured(self, operations: int, took_s: float) -> None:
        """A transaction of so many operations took so long."""


_Result = TypeVar("_Result")


class Queued(NamedTuple):
    """An operation in the queue: how many rows it names, and who waits for its answer."""

    operation: Operation[Any]
    rows: int
    answer: asyncio.Future[Any]


class _Thread(aiosqlite.Connection):
    """aiosqlite's connection with its one missing verb: a whole function on the connection's thread.

    One call per batch instead of one await per statement; every await is a thread hop.
    """

    async def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        result: _Result = await self._execute(function, self._conn, *arguments)  # type: ignore[no-untyped-call]
        return result

    def end_statement(self) -> None:
        """Interrupts the statement that is running on the thread, if there is one."""
        self._conn.interrupt()


class _Desk:
    """The connection for what people ask: one read at a time, and each ends when its time is over or its caller has
    gone. Nothing else waits for it.
    """

    def __init__(self, thread: _Thread) -> None:
        self._thread = thread
        self._turn = asyncio.Lock()
        self.waiting = 0  # reads, the running one included

    async def read(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Raises sqlite3.Error, and TimeoutError after LOOK_S."""
        self.waiting += 1
        try:
            async with asyncio.timeout(LOOK_S):
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
        """Ends a read that is still running. It has the turn until it is done, so no other one can be hit. Repeated,
        for an interrupt between two statements, or before the first, ends nothing.
        """
        if not reading.done():
            self._thread.end_statement()
            asyncio.get_running_loop().call_later(INTERRUPT_EVERY_S, self._interrupt, reading)

    async def close(self) -> None:
        await self._thread.close()


class Database(Generic[_Work]):
    """An open database. `run` must be running for writes to be answered; `close` belongs in an exit stack, for an
    aiosqlite connection left open keeps the process from ending.

    `refused` counts operations by the reason they were refused for.
    """

    def __init__(
        self,
        owner: Owner[_Work],
        files: "_Files",
        keeper: _Thread,
        writer: _Thread,
        reader: _Thread,
        desk: _Desk,
        checkpointer: _Thread,
        lock: int,
    ) -> None:
        self._owner = owner
        self._files = files
        # The last connection to be closed copies the WAL into the file and removes it. This one can only read, so that
        # a file that turns out to be damaged stays as it was found, its WAL beside it.
        self._keeper = keeper
        self._writer = writer
        self._reader = reader
        self._desk = desk
        self._checkpointer = checkpointer
        self._lock = lock
        self._queue: deque[Queued] = deque()
        self._queued_rows = 0
        self._wake = asyncio.Event()
        self._committed_something = asyncio.Event()
        self._changed = asyncio.Event()  # something, since that was last looked at to empty the WAL
        self._reading = 0
        self._closing = False
        self._lost = False
        self._is_available = True
        self.refused = dict.fromkeys(REFUSALS, 0)
        self.failure: str | None = None  # why the last write was refused; None while writes work
        self.writing_since: float | None = None  # monotonic time at which the running transaction began
        self.commits = 0

    @classmethod
    async def open(
        cls,
        path: Path,
        owner: Owner[_Work],
        migrations: Sequence[str] | None = None,
        setup: Sequence[str] = (),
    ) -> Self:
        """Opens, creates (mode 0600) or upgrades the file. Raises DatabaseError, naming the file, if it cannot.

        `setup` are statements for the writing connection alone, of its own for as long as it is open.
        """
        _check_rights(path)
        path = real_path(path)
        lock = lock_file(path)
        try:
            _look_beside(path, lock)
            _create(path)
            async with AsyncExitStack() as stack:
                keeper = await _connect(f"file://{quote(os.fsencode(path.absolute()))}?mode=ro", stack)
                await keeper.run(_execute, "SELECT count(*) FROM sqlite_schema")
                writer = await _connect(path, stack)
                await writer.run(_migrate, path, migrations or MIGRATIONS)
                for statement in setup:
                    await writer.run(_execute, statement)
                reader, looker = await _connect_to_read(path, stack), await _connect_to_read(path, stack)
                checkpointer = await _connect(path, stack)
                await checkpointer.run(_execute, "PRAGMA busy_timeout = 0")  # it never waits
                files = _Files(path)
                stack.pop_all()  # open: from here on `close` ends them
        except (sqlite3.Error, OSError) as error:
            os.close(lock)
            raise DatabaseError(f"{path}: cannot be opened as a database: {cause(error, path)}") from error
        except BaseException:
            os.close(lock)
            raise
        mark(lock, files.in_use)
        return cls(owner, files, keeper, writer, reader, _Desk(looker), checkpointer, lock)

    async def close(self) -> None:
        """Ends the connections; what was queued and not written is refused."""
        self._stop_taking(StoreError("the store is closed"))
        if not self._lost:
            # Before the last connection removes the WAL: a crash in between must not look like a loss.
            mark(self._lock, b"")
        await self._checkpointer.close()
        await self._desk.close()
        await self._reader.close()
        await self._writer.close()
        await self._keeper.close()
        os.close(self._lock)

    async def accept(self) -> None:
        """The file is sound, as far as it had to be read: from now on a close leaves no WAL behind."""
        await self._keeper.close()

    def _stop_taking(self, error: StoreError) -> None:
        self._closing = True
        self._refuse(list(self._queue), error)
        self._queue.clear()

    @property
    def path(self) -> Path:
        return self._files.path

    @property
    def waiting(self) -> int:
        """Operations that wait for the writer."""
        return len(self._queue)

    @property
    def wal_bytes(self) -> int:
        """Size of the WAL at the last transaction."""
        return self._files.wal_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file at the last transaction."""
        return self._files.file_bytes

    async def read(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs `function(connection, *arguments)` for the daemon itself, on a connection where nobody waits for what
        people ask. Raises StoreError.
        """
        if self._reading >= READS_MAX:
            raise self._too_many_readers(self._reading)
        self._reading += 1
        try:
            return await self._reader.run(function, *arguments)
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error
        finally:
            self._reading -= 1

    async def look(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs `function(connection, *arguments)` in a read transaction, for people: a few at a time, each for LOOK_S
        at most. One that is cancelled ends. Raises StoreError.
        """
        if self._desk.waiting >= LOOKS_MAX:
            raise self._too_many_readers(self._desk.waiting)
        try:
            return await self._desk.read(function, *arguments)
        except TimeoutError:
            self.refused["reading_too_slow"] += 1
            log.warning("store.overloaded", reason="reading_too_slow", waiting=self._desk.waiting)
            raise StoreError(f"reading took longer than {LOOK_S:g} s") from None
        except sqlite3.Error as error:
            raise self._reading_failed(error) from error

    def _too_many_readers(self, waiting: int) -> StoreError:
        self.refused["readers_full"] += 1
        log.warning("store.overloaded", reason="readers_full", waiting=waiting)
        return StoreError("too many readers are waiting")

    def _reading_failed(self, error: sqlite3.Error) -> StoreError:
        self.refused["reading_failed"] += 1
        log.error("store.reading_failed", reason=str(error), path=self.path)
        return StoreError(f"reading failed: {error}")

    def write(self, operation: Operation[Answer]) -> asyncio.Future[Answer]:
        """Queues one operation. Done when it is on disk; raises StoreError. A waiter that is
        cancelled does not cancel its operation.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._closing:
            self.refused["stopping"] += 1
            answer.set_exception(StoreError("the store is closed"))
        elif len(self._queue) >= QUEUE_MAX or self._queued_rows >= QUEUE_ROWS:
            self.refused["queue_full"] += 1
            log.warning("store.overloaded", reason="queue_full", waiting=len(self._queue), ids=self._queued_rows)
            answer.set_exception(StoreError("too many operations are waiting"))
        else:
            self._queue.append(Queued(operation, rows := operation.rows, answer))
            self._queued_rows += rows
            self._wake.set()
        return answer

    async def run(self) -> None:
        """The writer: takes what is queued, for ever. While the file refuses writes it tries by itself."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S if self.failure else None):
                    await self._wake.wait()
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

    async def empty_wal_when_idle(self) -> None:
        """Once after each time of work, for ever: until then, what was deleted from the file, such as a player's token,
        is in the WAL.

        Whoever reads or writes meanwhile is not waited for, and does not wait: it is tried again later.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(IDLE_S)
            if not self._changed.is_set() and not await self._wal_emptied():
                self._changed.set()

    async def _wal_emptied(self) -> bool:
        with suppress(sqlite3.Error):
            return await self._checkpointer.run(_emptied_wal)
        return False

    async def write_batch(self) -> None:
        """Writes one batch of what is queued, also an empty one, and answers its waiters.

        Raises DatabaseError when the file or its WAL has been taken away.
        """
        batch = self._next_batch()
        try:
            await self._write_and_answer(batch)
        except asyncio.CancelledError:
            self._refuse(batch, StoreError("the daemon is stopping"))
            raise

    async def _write_and_answer(self, batch: list[Queued]) -> None:
        try:
            work, results = await self._write(batch)
        except FileLostError as error:
            await self._give_up(batch, error)
        except Exception as error:
            if _is_outage(error):
                self._failed(batch, error)
            else:
                await self._one_by_one(batch, error)
        else:
            self._answered(work, batch, results)

    def _next_batch(self) -> list[Queued]:
        batch: list[Queued] = []
        queue, rows = self._queue, 0
        while queue and len(batch) < BATCH_MAX and (not batch or rows + queue[0].rows <= BATCH_ROWS):
            batch.append(operation := queue.popleft())
            rows += operation.rows
        self._queued_rows -= rows
        return batch

    async def _write(self, batch: list[Queued]) -> tuple[_Work, list[Any]]:
        """One transaction on the connection's thread. Raises what it raised."""
        loop = asyncio.get_running_loop()
        self._files.check()  # here, where nobody else needs the interpreter; of open files, so no disk is waited for
        work = self._owner.begin([queued.operation for queued in batch])
        self.writing_since = time.monotonic()
        hung = loop.call_later(HUNG_S, self._look_if_hung, self.writing_since)
        try:
            results = await self._writer.run(_commit, work, self._files)
            self._owner.measured(len(batch), time.monotonic() - self.writing_since)
            return work, results
        finally:
            hung.cancel()
            self.writing_since = None

    def _answered(self, work: _Work, batch: list[Queued], results: list[Any]) -> None:
        self.commits += 1
        self._committed_something.set()
        if any(operation.rows for operation in batch):
            self._changed.set()
        if not self._is_available:
            log.info("store.recovered", after=self.failure or "a write that hung")
            self.failure = None
            self._set_available(True)
        self._owner.committed(work)
        untold = [result for result in results if isinstance(result, StoreError)]
        if untold:
            self.refused["reading_failed"] += len(untold)
            log.error("store.reading_failed", reason=str(untold[0]), path=self.path)
        for operation, result in zip(batch, results, strict=True):
            if operation.answer.done():
                continue
            if isinstance(result, StoreError):
                operation.answer.set_exception(result)
            else:
                operation.answer.set_result(result)

    def _look_if_hung(self, since: float) -> None:
        # Once more round the loop: if that was what hung, the result is there already.
        asyncio.get_running_loop().call_soon(self._hung, since)

    def _hung(self, since: float) -> None:
        if self.writing_since != since:
            return
        if self._is_available:
            log.error("store.hanging", waited_s=HUNG_S, waiting=len(self._queue), path=self.path)
        self._set_available(False)

    def _failed(self, batch: list[Queued], error: Exception) -> None:
        failure = str(error)
        if failure != self.failure:  # the first failure and each change, not every attempt
            log.error("store.failing", reason=failure, refused=len(batch), path=self.path)
        self._set_available(False)
        self.failure = failure
        self.refused["writing_failed"] += len(batch)
        self._refuse(batch, StoreError(f"writing failed: {error}"))

    def _set_available(self, available: bool) -> None:
        if available != self._is_available:
            self._is_available = available
            self._owner.available(available)

    async def _one_by_one(self, batch: list[Queued], error: Exception) -> None:
        """One operation broke the batch: each gets a transaction of its own, so that only the broken one fails."""
        if len(batch) == 1:
            facts = {"operation": type(batch[0].operation).__name__, "error": type(error).__name__}
            log.error("store.operation_failed", **facts, where=place(error))
            return self._refuse(batch, error)
        for operation in batch:
            try:
                work, results = await self._write([operation])
            except FileLostError as lost:
                await self._give_up(batch, lost)
            except Exception as broken:
                if _is_outage(broken):
                    self._failed([operation], broken)
                else:
                    await self._one_by_one([operation], broken)
            else:
                self._answered(work, [operation], results)
        return None

    async def _give_up(self, batch: list[Queued], lost: "FileLostError") -> NoReturn:
        """What is committed from here on would be gone with this process, so it ends, and a new one starts afresh.

        A WAL that was only unlinked is still open: what it holds is copied into the file before.
        """
        log.error("store.lost_file", reason=str(lost))
        self._lost = True
        self._set_available(False)
        self.failure = str(lost)
        self._refuse(batch, StoreError(self.failure))
        self._stop_taking(StoreError(self.failure))
        with suppress(sqlite3.Error):
            await self._writer.run(_execute, "PRAGMA wal_checkpoint(TRUNCATE)")
        raise lost

    @staticmethod
    def _refuse(batch: list[Queued], error: Exception) -> None:
        for operation in batch:
            if not operation.answer.done():
                operation.answer.set_exception(error)


class FileLostError(DatabaseError):
    """Somebody removed or replaced the database or its WAL under the running daemon."""


class _Files:
    """The database and its WAL as they were opened. SQLite does not notice when somebody takes one of them away: it
    writes on into a file without a name, which ends with the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = {file: self._identity(file.stat()) for file in (path, Path(f"{path}-wal"))}
        self.file_bytes = self.wal_bytes = 0
        self.blocked_until = 0.0  # monotonic time before which the WAL is not worth another try to empty it

    @property
    def in_use(self) -> bytes:
        """What the lock file says while they are."""
        return IN_USE + b" %d %d\n" % tuple(inode for _, inode in self._opened.values())

    @staticmethod
    def _identity(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Looks at both. Raises FileLostError."""
        sizes = []
        for file, opened in self._opened.items():
            try:
                found = file.stat()
            except FileNotFoundError as error:
                raise FileLostError(f"{file}: was removed while the daemon was running") from error
            if self._identity(found) != opened:
                raise FileLostError(f"{file}: was replaced while the daemon was running")
            sizes.append(found.st_size)
        self.file_bytes, self.wal_bytes = sizes


def _is_outage(error: Exception) -> bool:
    """Whether the disk or the machine refused, and not the operation."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", -1) & 0xFF in _OUTAGES
    return isinstance(error, OSError | MemoryError)


def _commit(connection: sqlite3.Connection, work: Work, files: _Files) -> list[Any]:
    """Commits a batch on the connection's thread."""
    if connection.in_transaction:  # a rollback that the disk refused is made up for
        connection.execute("ROLLBACK")
    if files.wal_bytes > WAL_MAX:
        _empty_wal(connection, files)
    return work.run(connection)


def _empty_wal(connection: sqlite3.Connection, files: _Files) -> None:
    """Under unbroken load the WAL never starts over by itself. What is left to copy is little.

    A reader in the way, such as a long query in an administrator's shell, is not waited for.
    """
    if time.monotonic() < files.blocked_until:
        return
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        (blocked, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    if blocked:
        files.blocked_until = time.monotonic() + CHECKPOINT_S


def _emptied_wal(connection: sqlite3.Connection) -> bool:
    """Empties the WAL, unless somebody is in the way. All of it is in the file before the writer is locked out, which
    then is for microseconds.
    """
    _, pages, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if pages != copied:
        return False
    (blocked, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not blocked


def real_path(path: Path) -> Path:
    """The file itself, if it is a link: SQLite puts the WAL beside it, and there the lock belongs too. A relative path
    that is none stays as it is, for the messages.
    """
    return path.resolve() if os.path.islink(path) else path  # noqa: PTH114 - is_symlink() raises without permission


def lock_file(path: Path) -> int:
    """Keeps others off the file until the handle returned is closed. Raises DatabaseError.

    POSIX locks on the database itself belong to SQLite.
    """
    name = path.with_name(path.name + ".lock")
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else cause(error, path)
        raise DatabaseError(f"{path}: cannot be opened: {what} ({name})") from error
    found = os.fstat(lock)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:  # it is written to: nothing else may lose by that
        os.close(lock)
        raise DatabaseError(f"{path}: cannot be opened: must be a plain file with one name ({name})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise DatabaseError(f"{path}: is in use by another lmdaemon") from error
    return lock


def _check_rights(path: Path) -> None:
    """Raises DatabaseError for root where others can exchange files: links in their place would lead it anywhere."""
    try:
        needed = rights.for_database(path)
    except rights.UnsafeError as error:
        raise DatabaseError(str(error)) from error
    if needed.uid != os.geteuid():
        whose = user_name(needed.uid)
        raise DatabaseError(f"{path}: root must not keep a database where {whose} can exchange it: run as {whose}")


# What the lock file may say; nothing after an end in order. Inodes of database and WAL follow the first.
IN_USE = b"in use"  # a daemon runs, or one did not end in order
RESTORING = b"restoring"  # a restore that has begun to move files and has not finished


def mark(lock: int, content: bytes) -> None:
    """Writes the lock file. Best effort: on a full disk the mark is missed, no more."""
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, content, 0)


def _look_beside(path: Path, lock: int) -> None:
    """Refuses a database beside which there is the WAL of another one. Raises DatabaseError.

    SQLite would take it for its own: mix the two or, if the database is missing, delete the WAL, without a word.

    And after a daemon that did not end in order there is a WAL. If there is none, somebody has removed committed rows.
    """
    left, wal = os.pread(lock, 100, 0), Path(f"{path}-wal")
    if left.startswith(RESTORING):
        raise DatabaseError(f"{path}: a restore did not finish; run `lmdaemon restore` again")
    if wal.exists():
        problem = _is_strange(path, wal, left) if wal.stat().st_size else None
        if problem:
            raise DatabaseError(
                f"{path}: {problem}, but {wal.name} of another file is beside it, and SQLite would use both; put a "
                f"backup in place with `lmdaemon restore`, or move {wal.name} away"
            )
    elif left.startswith(IN_USE) and path.exists():
        # Or another program has opened the file meanwhile, and its SQLite has copied the WAL into the file.
        log.error("store.wal_missing", path=path, note="what was committed shortly before the last end may be lost")
    elif left.startswith(IN_USE):
        log.error("store.file_missing", path=path, note="a new one is made; everything before is lost")


def _is_strange(path: Path, wal: Path, left: bytes) -> str | None:
    """Says why the WAL cannot be that of the database, or None."""
    if not path.exists() or not path.stat().st_size:
        return "is missing"
    with path.open("rb") as file:
        header = file.read(20)
    if header.startswith(b"SQLite format 3\0") and header[18] == 1:  # a copy made by VACUUM INTO, never opened since
        return "is a copy"
    inodes = re.fullmatch(IN_USE + rb" (\d+) (\d+)\n", left)
    if inodes and int(inodes[2]) == wal.stat().st_ino and int(inodes[1]) != path.stat().st_ino:
        return "was replaced"
    return None


def _create(path: Path) -> None:
    """Makes sure the file exists with mode 0600; SQLite gives the same mode to the -wal and -shm files beside it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


async def _connect(path: Path | str, stack: AsyncExitStack) -> _Thread:
    """A connection on a thread of its own, closed by the stack. A string is a URI."""

    def connect() -> sqlite3.Connection:
        is_uri = isinstance(path, str)
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S, uri=is_uri)
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint_for_ever
        return connection

    opened = _Thread(connect, 64)
    await opened
    stack.push_async_callback(opened.close)
    return opened


async def _connect_to_read(path: Path, stack: AsyncExitStack) -> _Thread:
    reader = await _connect(path, stack)
    await reader.run(_execute, "PRAGMA query_only = ON")
    await reader.run(_execute, "SELECT count(*) FROM sqlite_schema")  # makes the WAL where there is none
    return reader


def cause(error: Exception, *paths: Path) -> str:
    """Why SQLite or the system refused. A disk without room for one of the paths is named, whatever they call it: where
    a -shm file finds none, SQLite says "disk I/O error".
    """
    text = getattr(error, "strerror", None) or str(error)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    told = code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    maybe = code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
    for directory in (path.absolute().parent for path in paths):
        if (told or maybe) and _has_no_room(directory):
            return f"the disk of {directory} is full ({text})"
    return f"the disk is full ({text})" if told else text


def _has_no_room(directory: Path) -> bool:
    try:
        disk = os.statvfs(directory)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < ROOM or (disk.f_files > 0 and not disk.f_favail)


def _execute(connection: sqlite3.Connection, statement: str) -> None:
    connection.execute(statement).fetchall()


def _in_one_transaction(connection: sqlite3.Connection, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Several statements see the same state of the tables."""
    connection.execute("BEGIN")
    try:
        return function(connection, *arguments)
    finally:
        while connection.in_transaction:  # the end of it may be interrupted, too
            with suppress(sqlite3.OperationalError):
                connection.execute("ROLLBACK")


def _statements(script: str) -> list[str]:
    """Splits a script, for executescript() would commit before it begins."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


def check_is_ours(sql: sqlite3.Connection, path: Path, known: int) -> int:
    """The version of the file, 0 for an empty one. Raises DatabaseError if this program must not use it."""
    (version,) = sql.execute("PRAGMA user_version").fetchone()
    (application,) = sql.execute("PRAGMA application_id").fetchone()
    (tables,) = sql.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if (version or tables) and application != APPLICATION_ID:
        raise DatabaseError(f"{path}: is a database of another program (application_id {application:#x})")
    if version > known:
        raise DatabaseError(f"{path}: was written by a newer lmdaemon (schema {version}; this one knows {known})")
    found: int = version
    return found


# Entry n brings a file from version n to n + 1. Never edit one that was released: add the next.
MIGRATIONS: Sequence[str] = tuple(
    resources.files(__package__).joinpath(script).read_text("utf-8") for script in ("schema.sql", "schema_2.sql")
)


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Brings the file to the newest version in one transaction. Raises DatabaseError before it changes anything."""
    version = check_is_ours(connection, path, len(migrations))
    # Before the first table: all of it is written into the file for good.
    connection.execute(f"PRAGMA page_size = {DISK_PAGE_BYTES}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # What is left of a deleted token is overwritten; FAST would spare pages that become free.
    connection.execute("PRAGMA secure_delete = ON")
    if version == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for script in migrations[version:]:
            for statement in _statements(script):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # on a full disk SQLite has rolled back itself
            connection.execute("ROLLBACK")
        raise
    for number in range(version + 1, len(migrations) + 1):
        log.info("store.migrated", path=path, schema=number)
