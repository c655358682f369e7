"""The SQLite file itself: paths, the lock that keeps others off it, rights, and bringing it to the newest version.

Nothing here writes a row: that is `writer`. The commands that work on a file beside the daemon use it, too.
"""

import errno
import fcntl
import os
import re
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from lmdaemon import rights
from lmdaemon.log import Log
from lmdaemon.store.contract import DatabaseError
from lmdaemon.trust import user_name

APPLICATION_ID = 0x4C4D6461  # "LMda": tells our file from any other SQLite database
# A touch writes the one page where its session is. 60 touches at random among 200,000 take 1.6 ms with a page of 1024,
# 2.8 ms with SQLite's default of 4096; 1,000 take 21 and 45 ms.
DISK_PAGE_BYTES = 1024
ROOM = 1024 * 1024  # bytes; with less, what SQLite keeps beside a database may not fit
BESIDE_TIMEOUT_S = 10.0  # for a command beside the daemon, while that recovers its log after a crash
LOOK_EVERY = 100_000  # steps of SQLite's between two looks at signals, some milliseconds
COMPANIONS = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database

log = Log("store")


class FileLostError(DatabaseError):
    """Somebody removed or replaced the database or its WAL under the running daemon."""


class Files:
    """The database and its WAL as they were opened. SQLite does not notice when somebody takes one of them away: it
    writes on into a file without a name, which ends with the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = {file: self._identity(file.stat()) for file in (path, Path(f"{path}-wal"))}
        self.file_bytes = self.wal_bytes = 0

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


def check_rights(path: Path) -> None:
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


def look_beside(path: Path, lock: int) -> None:
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


def create(path: Path) -> None:
    """Makes sure the file exists with mode 0600; SQLite gives the same mode to the -wal and -shm files beside it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def open_beside(path: Path, how: str = "mode=ro") -> sqlite3.Connection:
    """A connection in autocommit mode, for a command beside the daemon. Raises sqlite3.Error.

    `mode=ro` never creates a database. The -wal and -shm files beside it, should they be missing, SQLite makes with the
    owner and mode of the database, also as root (unixOpen, robustFchown). At a pipe it would wait for ever, deaf to
    signals, and the nightly backup with it.
    """
    for suffix in ("", *COMPANIONS):
        file = path.with_name(path.name + suffix)
        with suppress(OSError):  # SQLite meets it too, and says so
            if not stat.S_ISREG(file.stat().st_mode):
                raise sqlite3.OperationalError(f"{file} is no plain file")
    connection = sqlite3.connect(f"{path.as_uri()}?{how}", uri=True, isolation_level=None, timeout=BESIDE_TIMEOUT_S)
    # A long statement is one call into C; a signal comes through here, and what it raises ends the statement
    connection.set_progress_handler(lambda: 0, LOOK_EVERY)
    return connection


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


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
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
