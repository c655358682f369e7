"""The SQLite file: modes, upgrades, refusals, group commit, and the effects of an outage or of a caller that is
cancelled.
"""

import asyncio
import contextlib
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faults import unreachable
from support import hear, until

from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.store import writer
from lmdaemon.store.contract import BATCH_ROWS, DatabaseError, Operation, StoreError
from lmdaemon.store.sqlite import file, thread
from lmdaemon.store.sqlite import writer as disk
from lmdaemon.store.sqlite.database import Database


class Do(Operation[Any], frozen=True):
    """An operation that calls a function on the connection's thread. `size` is the number of rows that it counts
    for.
    """

    do: Callable[[sqlite3.Connection], Any]
    size: int = 1

    @property
    def rows(self) -> int:
        return self.size


class Work:
    """A batch that does one operation after the other in one transaction. Each answer is the number of operations."""

    def __init__(self, operations: Sequence[Operation[Any]]) -> None:
        self._operations = cast("Sequence[Do]", operations)

    def run(self, connection: sqlite3.Connection) -> list[Any]:
        try:
            connection.execute("BEGIN IMMEDIATE")
            for operation in self._operations:
                operation.do(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return [len(self._operations)] * len(self._operations)


def insert(value: object, rows: int = 1) -> Do:
    return Do(lambda sql: sql.execute("INSERT INTO note VALUES (?)", (value,)), rows)


def insert_unless_bad(value: object) -> Do:
    def refuse(sql: sqlite3.Connection) -> None:
        raise ValueError("bad value")

    return Do(refuse) if value == "bad" else insert(value)


NOTES = ("CREATE TABLE note (text TEXT);",)


class Owner:
    """The owner of the writer. It notes what the writer tells it."""

    def __init__(self) -> None:
        self.availability: list[bool] = []
        self.on_commit: Callable[[], object] = lambda: None

    def begin(self, operations: Sequence[Operation[Any]]) -> Work:
        return Work(operations)

    def committed(self, work: Work) -> None:
        self.on_commit()

    def available(self, available: bool) -> None:
        self.availability.append(available)

    def measured(self, operations: int, took_s: float) -> None:
        pass


async def open_notes(path: Path, migrations: Sequence[str] = NOTES) -> Database[Work]:
    return await Database.open(path, Owner(), migrations)


@pytest.fixture
def limits() -> StoreLimits:
    return LIMITS.store


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
async def db(tmp_path: Path, owner: Owner, limits: StoreLimits):
    opened = await Database.open(tmp_path / "notes.sqlite3", owner, NOTES, limits=limits)
    await opened.accept()
    yield opened
    await opened.close()


def notes(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as sql:
        return [row[0] for row in sql.execute("SELECT text FROM note ORDER BY rowid")]


async def done(db: Database[Work], operation: Do) -> None:
    """One operation, written and acknowledged."""
    queued = asyncio.ensure_future(db.writer.write(operation))
    await asyncio.sleep(0)
    await db.writer.write_batch()
    await queued


async def stored(db: Database[Work], text: str) -> None:
    """One note, written and acknowledged."""
    await done(db, insert(text))


async def test_the_file_and_its_companions_are_readable_by_their_owner_alone(db: Database[Work]) -> None:
    await stored(db, "x")
    files = list(db.path.parent.iterdir())
    assert {file.suffix for file in files} == {".sqlite3", ".sqlite3-wal", ".sqlite3-shm", ".lock"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_a_file_with_a_looser_mode_is_tightened(tmp_path: Path) -> None:
    path = tmp_path / "loose.sqlite3"
    path.touch(0o644)
    await (await open_notes(path, NOTES)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_commits_are_synchronous_and_in_wal_mode(db: Database[Work]) -> None:
    found: list[Any] = []

    def pragmas(sql: sqlite3.Connection) -> None:
        found.extend(sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))

    asked = asyncio.ensure_future(db.writer.write(Do(pragmas)))
    await asyncio.sleep(0)
    await db.writer.write_batch()
    await asked
    assert found == ["wal", 2]  # 2 means FULL


async def test_an_old_file_is_upgraded_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    first = await open_notes(path, NOTES)
    queued = asyncio.ensure_future(first.writer.write(insert("kept")))
    await asyncio.sleep(0)
    await first.writer.write_batch()
    await queued
    await first.close()
    second = await open_notes(path, (*NOTES, "ALTER TABLE note ADD COLUMN size INTEGER DEFAULT 7;"))
    assert await second.reads.read(lambda sql: sql.execute("SELECT text, size FROM note").fetchall()) == [("kept", 7)]
    assert await second.reads.read(lambda sql: sql.execute("PRAGMA user_version").fetchone()) == (2,)
    await second.close()


async def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    await (await open_notes(path, NOTES)).close()
    before = path.read_bytes()
    broken = (*NOTES, "CREATE TABLE more (x);\nINSERT INTO nowhere VALUES (1);")
    with pytest.raises(DatabaseError, match="nowhere"):
        await open_notes(path, broken)
    with contextlib.closing(sqlite3.connect(path)) as sql:
        assert sql.execute("PRAGMA user_version").fetchone() == (1,)
        assert sql.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'more'").fetchone() == (0,)
    assert path.read_bytes() == before


async def test_a_newer_file_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite3"
    await (await open_notes(path, (*NOTES, "CREATE TABLE more (x);"))).close()
    before = path.read_bytes()
    with pytest.raises(
        DatabaseError, match=r"new\.sqlite3: was written by a newer lmdaemon \(schema 2; this one knows 1\)"
    ):
        await open_notes(path, NOTES)
    assert path.read_bytes() == before


async def test_another_programs_database_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="another program"):
        await open_notes(path, NOTES)
    assert path.read_bytes() == before


async def test_a_damaged_file_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "damaged.sqlite3"
    path.write_bytes(b"this is no database, but long enough to be read as one" * 100)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"damaged\.sqlite3: cannot be opened as a database"):
        await open_notes(path, NOTES)
    assert path.read_bytes() == before


async def test_a_second_daemon_is_kept_off_the_file(db: Database[Work]) -> None:
    with pytest.raises(DatabaseError, match="in use by another lmdaemon"):
        await open_notes(db.path, NOTES)


async def test_a_missing_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("none/x.sqlite3"), tmp_path / "none/x.sqlite3"):
        with pytest.raises(DatabaseError) as caught:
            await open_notes(path, NOTES)
        assert str(caught.value) == f"{path}: cannot be opened: the directory {tmp_path}/none does not exist"


async def test_what_waits_together_is_committed_together_and_in_order(db: Database[Work]) -> None:
    waiting = [asyncio.ensure_future(db.writer.write(insert(str(number)))) for number in range(100)]
    await asyncio.sleep(0)
    await db.writer.write_batch()
    assert await asyncio.gather(*waiting) == [100] * 100
    assert db.writer.commits == 1
    assert notes(db.path) == [str(number) for number in range(100)]


@pytest.mark.parametrize(("many", "together"), [(1, 2), (writer.JOIN_MAX - 1, writer.JOIN_MAX), (writer.JOIN_MAX, 1)])
async def test_a_small_batch_lets_the_next_join_and_a_large_one_does_not(
    db: Database[Work], many: int, together: int
) -> None:
    running = asyncio.create_task(db.writer.run())
    first = [db.writer.write(insert(str(number))) for number in range(many)]
    for _ in range(writer.JOIN_TURNS):
        await asyncio.sleep(0)
    assert await db.writer.write(insert("next")) == together
    assert await asyncio.gather(*first) == [many if together == 1 else together] * many
    running.cancel()


async def test_a_waiter_is_answered_only_after_the_commit(db: Database[Work], owner: Owner) -> None:
    seen: list[list[str]] = []
    owner.on_commit = lambda: seen.append(notes(db.path))
    queued = asyncio.ensure_future(db.writer.write(insert("x")))
    await asyncio.sleep(0)
    assert not queued.done()
    await db.writer.write_batch()
    assert await queued == 1
    assert seen == [["x"]]


async def test_a_cancelled_waiter_does_not_cancel_its_operation(db: Database[Work]) -> None:
    waiting = [asyncio.ensure_future(db.writer.write(insert(str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await db.writer.write_batch()
    assert notes(db.path) == ["0", "1", "2"]
    assert [await waiting[0], await waiting[2]] == [3, 3]


async def test_one_broken_operation_fails_alone(db: Database[Work]) -> None:
    values = ["a", "bad", "b"]
    waiting = [asyncio.ensure_future(db.writer.write(insert_unless_bad(value))) for value in values]
    await asyncio.sleep(0)
    await db.writer.write_batch()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [results[0], results[2]] == [1, 1]
    assert isinstance(results[1], ValueError)
    assert notes(db.path) == ["a", "b"]


async def test_an_outage_refuses_says_so_once_and_work_resumes_by_itself(db: Database[Work], owner: Owner) -> None:
    told = owner.availability
    blocker = sqlite3.connect(db.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    running = asyncio.create_task(db.writer.run())
    with pytest.raises(StoreError, match="database is locked"):
        await db.writer.write(insert("refused"))
    assert db.writer.failure == "database is locked"
    blocker.execute("ROLLBACK")
    blocker.close()
    async with asyncio.timeout(10):
        while db.writer.failure:  # the writer tries by itself; no caller writes
            await asyncio.sleep(0.01)
    assert await db.writer.write(insert("stored")) == 1
    assert told == [False, True]
    assert notes(db.path) == ["stored"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("limits", [StoreLimits(queue_max=2)])
async def test_a_full_queue_refuses_instead_of_growing(db: Database[Work]) -> None:
    waiting = [asyncio.ensure_future(db.writer.write(insert(str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    await db.writer.write_batch()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[:2] == [2, 2]
    assert isinstance(results[2], StoreError)


@pytest.mark.parametrize("limits", [StoreLimits(reads_max=2)])
async def test_so_many_readers_wait_and_no_more(db: Database[Work]) -> None:
    go_on = threading.Event()
    reading = [asyncio.ensure_future(db.reads.read(lambda sql: go_on.wait(20))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(StoreError, match="too many"):
        await db.reads.read(lambda sql: True)
    go_on.set()
    assert await asyncio.gather(*reading) == [True, True]
    assert await db.reads.read(lambda sql: True)


@pytest.mark.parametrize("limits", [StoreLimits(queue_rows=BATCH_ROWS * 5 // 2)])
async def test_many_rows_of_few_operations_are_bounded_too(db: Database[Work]) -> None:
    """A thousand bulk touches do not become one transaction of ten million rows, and do not fill the memory."""
    waiting = [asyncio.ensure_future(db.writer.write(insert(str(number), rows=BATCH_ROWS // 2))) for number in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(StoreError, match="too many"):
        await waiting[5]
    for stored in (2, 4, 5):
        await db.writer.write_batch()
        assert len(notes(db.path)) == stored
    assert await asyncio.gather(*waiting[:5]) == [2, 2, 2, 2, 1]
    await done(db, insert("again", rows=BATCH_ROWS * 5 // 2))  # a single operation is written whatever its size


async def test_an_operation_that_sqlite_refuses_is_no_outage(db: Database[Work], owner: Owner) -> None:
    """The operation would fail again at every try. If it counted as an outage, service time would stop for all again
    and again.
    """

    def poison(sql: sqlite3.Connection) -> None:
        sql.execute("SELECT json_each.value FROM json_each('no json')").fetchall()

    told = owner.availability
    waiting = [asyncio.ensure_future(db.writer.write(one)) for one in (insert("x"), Do(poison), insert("x"))]
    await asyncio.sleep(0)
    await db.writer.write_batch()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [results[0], results[2]] == [1, 1]
    assert isinstance(results[1], sqlite3.OperationalError)
    assert (told, db.writer.failure) == ([], None)


async def test_a_rollback_that_failed_is_made_up_for(db: Database[Work]) -> None:
    await db.disk._writer.run(thread.execute, "BEGIN IMMEDIATE")
    await db.disk._writer.run(thread.execute, "INSERT INTO note VALUES ('half')")
    queued = asyncio.ensure_future(db.writer.write(insert("whole")))
    await asyncio.sleep(0)
    await db.writer.write_batch()
    assert await queued == 1
    assert notes(db.path) == ["whole"]


async def test_a_file_system_that_refuses_to_look_is_an_outage(tmp_path: Path, db: Database[Work]) -> None:
    with unreachable(tmp_path):
        with pytest.raises(StoreError, match="Too many levels of symbolic links"):
            await stored(db, "x")
        assert db.writer.failure is not None
    await stored(db, "y")
    assert (notes(db.path), db.writer.failure) == (["y"], None)


async def test_a_writer_stopped_among_single_operations_answers_all_who_wait(db: Database[Work]) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(sql: sqlite3.Connection) -> None:
        started.set()
        go_on.wait(20)

    operations = (insert_unless_bad("bad"), Do(slow), insert("b"))
    waiting = [asyncio.ensure_future(db.writer.write(one)) for one in operations]
    writing = asyncio.create_task(db.writer.write_batch())
    await until(started.is_set)  # the first one ended the batch of all three
    writing.cancel()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    go_on.set()
    assert [type(result) for result in results] == [ValueError, StoreError, StoreError]


@pytest.mark.parametrize("name", ["link.sqlite3", "a b?c#d%41ü.sqlite3", "two slashes"])
async def test_a_linked_file_and_odd_names_can_be_used(tmp_path: Path, name: str) -> None:
    if name == "two slashes":
        tmp_path = Path(f"/{tmp_path}")
    if name.startswith("link"):
        (tmp_path / name).symlink_to(tmp_path / "real.sqlite3")
    for text in ("one", "two"):
        opened = await open_notes(tmp_path / name, NOTES)
        await opened.accept()
        await stored(opened, text)
        with pytest.raises(DatabaseError, match="in use"):
            await open_notes(opened.path, NOTES)
        await opened.close()
    assert notes(tmp_path / name) == ["one", "two"]


async def test_a_file_that_is_gone_after_a_crash_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite3"
    path.with_name(path.name + ".lock").write_bytes(file.IN_USE + b" 1 2\n")
    with hear() as events:
        await (await open_notes(path, NOTES)).close()
    assert "store.file_missing" in [event.name for event in events]


@pytest.mark.parametrize("limits", [StoreLimits(hung_s=0.01)])
async def test_a_write_that_hangs_is_told_while_it_hangs(db: Database[Work], owner: Owner) -> None:
    told = owner.availability
    hold = threading.Event()

    queued = asyncio.ensure_future(db.writer.write(Do(lambda sql: hold.wait(10))))
    await asyncio.sleep(0)
    with hear() as events:
        writing = asyncio.create_task(db.writer.write_batch())
        await until(lambda: told)
        assert told == [False]
        assert [event.name for event in events] == ["store.hanging"]
        hold.set()
        await writing
    assert await queued == 1
    assert told == [False, True]


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_taken_away_ends_the_writer_and_says_which(
    db: Database[Work], suffix: str, replaced: bool
) -> None:
    """SQLite would go on writing to a file that has no name any more, and its data would be gone when the process
    ends.
    """
    await stored(db, "before")
    gone = Path(f"{db.path}{suffix}")
    kept = gone.rename(gone.with_name("kept"))
    if replaced:
        gone.write_bytes(kept.read_bytes())
    running = asyncio.create_task(db.writer.run())
    with pytest.raises(StoreError, match="while the daemon was running"):
        await db.writer.write(insert("after"))
    with pytest.raises(file.FileLostError, match=gone.name):
        await running
    with pytest.raises(StoreError, match="closed"):
        await db.writer.write(insert("later"))
    if suffix:  # the rows in the write-ahead log have been saved
        assert notes(db.path) == ["before"]
    gone.unlink(missing_ok=True)


@pytest.mark.parametrize("in_order", [True, False])
async def test_a_wal_that_is_missing_after_a_crash_is_told(tmp_path: Path, in_order: bool) -> None:
    path = tmp_path / "notes.sqlite3"
    first = await open_notes(path, NOTES)
    await stored(first, "x")
    crashed = tmp_path / "crashed"
    if not in_order:
        shutil.copytree(tmp_path, crashed)  # as kill -9 leaves the directory
        (crashed / "notes.sqlite3-wal").unlink()
    await first.close()
    with hear() as events:
        second = await open_notes(path if in_order else crashed / path.name, NOTES)
        await second.close()
    assert ("store.wal_missing" in [event.name for event in events]) is not in_order


@pytest.mark.parametrize("limits", [StoreLimits(wal_max=100_000, checkpoint_s=3600)])
async def test_a_long_reader_does_not_hold_up_the_writer(db: Database[Work]) -> None:
    """As when an administrator's shell is in the middle of a query: the write-ahead log grows, and no write waits for
    the shell.
    """
    statements: list[str] = []
    await done(db, Do(lambda sql: sql.set_trace_callback(statements.append)))
    await stored(db, "x" * 200_000)
    with contextlib.closing(sqlite3.connect(db.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM note").fetchone()
        began = time.monotonic()
        for text in "yz":
            await stored(db, text)
        assert time.monotonic() - began < LIMITS.store.busy_timeout_s
    tries = [statement for statement in statements if "wal_checkpoint" in statement]
    assert len(tries) == 1  # the copying is not tried again at every batch


@pytest.mark.parametrize("limits", [StoreLimits(wal_max=100_000, checkpoint_s=0)])
async def test_a_wal_that_a_reader_has_kept_is_emptied_when_he_has_gone(db: Database[Work]) -> None:
    await stored(db, "x" * 200_000)
    with contextlib.closing(sqlite3.connect(db.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM note").fetchone()
        await stored(db, "y")
    await stored(db, "w")
    assert db.wal_bytes > 100_000  # the size that was found last
    await stored(db, "w")
    assert db.wal_bytes < 100_000


async def test_a_stopped_writer_answers_those_who_wait(db: Database[Work]) -> None:
    counting = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000) SELECT max(i) FROM n"

    running = asyncio.create_task(db.writer.run())
    waiting = asyncio.ensure_future(db.writer.write(Do(lambda sql: sql.execute(counting))))
    while db.writer.writing_since is None:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(StoreError, match="stopping"):
        await waiting


async def test_reading_cannot_write(db: Database[Work]) -> None:
    with pytest.raises(StoreError, match="readonly"):
        await db.reads.read(lambda sql: sql.execute("INSERT INTO note VALUES ('x')"))


@pytest.mark.parametrize("limits", [StoreLimits(wal_max=100_000)])
async def test_the_wal_is_bounded_under_unbroken_load(db: Database[Work]) -> None:
    wal = Path(f"{db.path}-wal")
    largest = 0
    for _ in range(100):
        await stored(db, "x" * 10_000)
        largest = max(largest, wal.stat().st_size)
    assert 100_000 < largest < 250_000
    assert len(notes(db.path)) == 100


@pytest.mark.parametrize("limits", [StoreLimits(wal_max=1_000_000)])
async def test_a_full_wal_is_written_over_and_keeps_its_size(db: Database[Work]) -> None:
    """Making a file longer costs more at each commit than overwriting it."""
    wal = Path(f"{db.path}-wal")
    sizes = []
    for number in range(200):
        await stored(db, f"{number}" + "x" * 10_000)
        sizes.append(wal.stat().st_size)
    assert sizes == sorted(sizes)  # the log was not emptied in between
    assert sizes[-1] < 900_000
    assert len(notes(db.path)) == 200


@pytest.mark.parametrize("limits", [StoreLimits(checkpoint_s=0.01)])
async def test_what_was_committed_is_copied_into_the_file_beside_the_writer(db: Database[Work]) -> None:
    running = [
        asyncio.create_task(db.writer.run()),
        asyncio.create_task(db.disk.checkpoint_for_ever(db.writer.committed_something)),
    ]
    await db.writer.write(insert("copied"))
    async with asyncio.timeout(10):
        while b"copied" not in db.path.read_bytes():
            await asyncio.sleep(0.01)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


SOON_IDLE = StoreLimits(idle_s=0.02)


@pytest.fixture
async def idling(db: Database[Work]):
    """A database that counts as idle after a short time, with its loops running."""
    running = [
        asyncio.create_task(db.writer.run()),
        asyncio.create_task(db.disk.empty_wal_when_idle(db.writer.changed)),
    ]
    yield db
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize("limits", [SOON_IDLE])
async def test_an_idle_wal_is_emptied(idling: Database[Work]) -> None:
    wal = Path(f"{idling.path}-wal")
    for text in ("first", "second"):
        await idling.writer.write(insert(text))
        await until(lambda: wal.stat().st_size == 0)
    assert notes(idling.path) == ["first", "second"]


@pytest.mark.parametrize("limits", [SOON_IDLE])
async def test_a_reader_keeps_the_wal_and_nobody_from_writing(
    idling: Database[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emptying the log is tried again until the reader has gone."""
    tries: list[bool] = []
    emptied = disk.emptied_wal

    def note(connection: sqlite3.Connection) -> bool:
        tries.append(emptied(connection))
        return tries[-1]

    monkeypatch.setattr(disk, "emptied_wal", note)
    with contextlib.closing(sqlite3.connect(idling.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM note").fetchall()
        for number in range(3):
            tries.clear()
            await idling.writer.write(insert(str(number)))
            await until(lambda: len(tries) >= 2)
            assert not any(tries)
        assert idling.writer.refused == dict.fromkeys(writer.REFUSALS, 0)
    await until(lambda: Path(f"{idling.path}-wal").stat().st_size == 0)
    assert notes(idling.path) == ["0", "1", "2"]


async def test_what_changes_nothing_does_not_count_as_work(db: Database[Work]) -> None:
    """For example, a monitor that asks for `/health` every second makes the daemon write its clock each time."""

    await done(db, Do(lambda sql: None, size=0))
    assert not db.writer.changed.is_set()
    await stored(db, "x")
    assert db.writer.changed.is_set()


async def test_a_writer_is_not_locked_out_while_the_wal_is_copied(db: Database[Work]) -> None:
    """The log is copied into the file without locking out writers. The lock is taken only to cut off a log that is
    copied already.
    """
    statements: list[str] = []
    await stored(db, "x" * 100_000)
    await db.disk._checkpointer.run(lambda sql: sql.set_trace_callback(statements.append))
    with contextlib.closing(sqlite3.connect(db.path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO note VALUES ('y')")
        assert not await db.disk.empty_wal()  # the emptying fails at once and does not wait for the writer
        writer.execute("COMMIT")
    assert await db.disk.empty_wal()
    assert statements == ["PRAGMA wal_checkpoint(PASSIVE)", "PRAGMA wal_checkpoint(TRUNCATE)"] * 2


async def test_on_a_full_disk_a_small_write_that_fits_is_no_recovery(
    db: Database[Work], owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small probe write of `/health` fits on the disk, but a session does not. Otherwise the daemon would switch
    between failing and recovered.
    """
    free = 0
    real = os.statvfs(db.path)

    def statvfs(path: object) -> SimpleNamespace:
        return SimpleNamespace(
            f_bavail=free // real.f_frsize, f_frsize=real.f_frsize, f_blocks=real.f_blocks, f_bfree=real.f_bfree
        )

    def full(sql: sqlite3.Connection) -> None:
        raise OSError(28, "No space left on device")

    def nothing(sql: sqlite3.Connection) -> None:
        pass

    monkeypatch.setattr(file.os, "statvfs", statvfs)
    with hear() as events:
        with pytest.raises(StoreError):
            await done(db, Do(full))
        await done(db, Do(nothing, size=0))
        assert db.writer.failure is not None
        free = disk.ROOM_BYTES + real.f_frsize
        await done(db, Do(nothing, size=0))
        assert db.writer.failure is None
        free = 0
        with pytest.raises(StoreError):
            await done(db, Do(full))
        await done(db, insert("fits"))
        assert db.writer.failure is None
    assert [event.name for event in events] == ["store.failing", "store.recovered"] * 2
    assert owner.availability == [False, True] * 2
    assert notes(db.path) == ["fits"]
