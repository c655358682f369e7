"""The SQLite file itself: its path, its lock, its rights, and its upgrade to the newest schema.

Commands that open the file while the daemon runs use it too. It must not write rows: only `writer` does.
"""

import errno
import fcntl
import os
import re
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lmdaemon import rights
from lmdaemon.log import Log
from lmdaemon.store.contract import DatabaseError, Room
from lmdaemon.trust import user_name

APPLICATION_ID = 0x4C4D6461  # "LMda": marks a file as lmdaemon's
# SQLite's page size. A touch writes the page of its session. 60 touches of random sessions among 200,000 take 1.6 ms
# with pages of 1024 bytes and 2.8 ms with SQLite's default of 4096; 1,000 touches take 21 and 45 ms.
DISK_PAGE_BYTES = 1024
ROOM = 1024 * 1024  # with fewer free bytes, the files that SQLite keeps beside a database may not fit on the disk
BESIDE_TIMEOUT_S = 10.0  # how long a command waits for the daemon, which may be recovering its log after a crash
LOOK_EVERY = 100_000  # steps of SQLite's virtual machine, some milliseconds, after which a statement can be interrupted
COMPANIONS = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database

log = Log("store")


class FileLostError(DatabaseError):
    """Somebody removed or replaced the database or its WAL while the daemon runs."""


class Files:
    """The database and its WAL, as they were when they were opened.

    SQLite does not notice when one of them is removed or replaced. It goes on writing to a file without a name, which
    is gone when the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Kept as text: with a Path, `check` would take twice as long
        self._opened = {file: self._identity(os.stat(file)) for file in (str(path), f"{path}-wal")}  # noqa: PTH116
        self.file_bytes = self.wal_bytes = 0
        self.room: Room | None = None

    @property
    def in_use(self) -> bytes:
        """The content of the lock file while database and WAL are open."""
        return IN_USE + b" %d %d\n" % tuple(inode for _, inode in self._opened.values())

    @staticmethod
    def _identity(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Checks that both files are still there, and reads their sizes. Raises FileLostError."""
        sizes = []
        for file, opened in self._opened.items():
            try:
                found = os.stat(file)  # noqa: PTH116
            except FileNotFoundError as error:
                raise FileLostError(f"{file}: was removed while the daemon was running") from error
            if self._identity(found) != opened:
                raise FileLostError(f"{file}: was replaced while the daemon was running")
            sizes.append(found.st_size)
        self.file_bytes, self.wal_bytes = sizes

    def look_for_room(self) -> None:
        """Reads how much room the file system has. Must run on a thread: a hanging disk may not answer."""
        with suppress(OSError):
            found = os.statvfs(self.path)
            free = found.f_bavail * found.f_frsize
            self.room = Room(free, free + (found.f_blocks - found.f_bfree) * found.f_frsize)


def real_path(path: Path) -> Path:
    """The file that a link leads to. SQLite puts the WAL beside that file, so the lock must be there too.

    A path that is not a link is returned unchanged, so that messages show it as it was written.
    """
    return path.resolve() if os.path.islink(path) else path  # noqa: PTH114 - is_symlink() raises without permission


def lock_file(path: Path) -> int:
    """Locks the database for this process until the returned file descriptor is closed. Raises DatabaseError.

    The lock is on a file beside the database, because POSIX locks on the database itself are SQLite's.
    """
    name = path.with_name(path.name + ".lock")
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        directory = path.absolute().parent
        raise DatabaseError(f"{path}: cannot be opened: the directory {directory} does not exist") from error
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else cause(error, path)
        raise DatabaseError(f"{path}: cannot be opened: {what} ({name})") from error
    found = os.fstat(lock)
    # The lock file is written to, so it must not be a link to another file
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(lock)
        raise DatabaseError(f"{path}: cannot be opened: must be a plain file with one name ({name})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise DatabaseError(f"{path}: is in use by another lmdaemon") from error
    return lock


def check_rights(path: Path) -> None:
    """Raises DatabaseError if root would open a file that others can replace, perhaps by a link to a file of root's."""
    try:
        needed = rights.for_database(path)
    except rights.UnsafeError as error:
        raise DatabaseError(str(error)) from error
    if needed.uid != os.geteuid():
        whose = user_name(needed.uid)
        raise DatabaseError(f"{path}: root must not keep a database where {whose} can exchange it: run as {whose}")


# What the lock file can contain; it is empty after an orderly end
IN_USE = b"in use"  # a daemon runs, or was killed; the inodes of database and WAL follow
RESTORING = b"restoring"  # a restore has begun to move files and has not finished
IMPORTED = b"imported"  # everything was moved into another database, from where it is sent now


def mark(lock: int, content: bytes) -> None:
    """Writes the content of the lock file. A failure, as on a full disk, is ignored: only the mark is missing then."""
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, content, 0)


def look_beside(path: Path, lock: int) -> None:
    """Raises DatabaseError if the WAL of another database is beside this one, or a restore has not finished.

    SQLite would use that WAL: without an error it would mix the content of both databases or, if this database is
    missing, delete the WAL. Also logs an error when a daemon was killed and its WAL is missing, because the WAL had
    committed rows in it.
    """
    left, wal = os.pread(lock, 100, 0), Path(f"{path}-wal")
    if left.startswith(RESTORING):
        raise DatabaseError(f"{path}: a restore did not finish; run `lmdaemon restore` again")
    if left.startswith(IMPORTED) and path.exists():
        raise DatabaseError(
            f"{path}: was moved into a PostgreSQL database by `lmdaemon import`; its notices are sent from there"
        )
    if wal.exists():
        problem = _is_strange(path, wal, left) if wal.stat().st_size else None
        if problem:
            raise DatabaseError(
                f"{path}: {problem}, but {wal.name} of another file is beside it, and SQLite would use both; put a "
                f"backup in place with `lmdaemon restore`, or move {wal.name} away"
            )
    elif left.startswith(IN_USE) and path.exists():
        # The WAL is also missing if another program has opened the database since: its SQLite has then copied the WAL
        # into the file and removed it, and nothing is lost
        log.error("store.wal_missing", path=path, note="what was committed shortly before the last end may be lost")
    elif left.startswith(IN_USE):
        log.error("store.file_missing", path=path, note="a new one is made; everything before is lost")


def _is_strange(path: Path, wal: Path, left: bytes) -> str | None:
    """The reason why the WAL cannot be the database's, in words, or None."""
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
    """A connection in autocommit mode, for a command that runs beside the daemon. Raises sqlite3.Error.

    `mode=ro` never creates a database. Missing -wal and -shm files are created by SQLite with the owner and mode of the
    database, even for root (unixOpen, robustFchown in its source). A pipe in the place of a file is refused: SQLite
    would wait for it for ever and could not be interrupted.
    """
    for suffix in ("", *COMPANIONS):
        file = path.with_name(path.name + suffix)
        with suppress(OSError):  # opening will fail in the same way and be reported then
            if not stat.S_ISREG(file.stat().st_mode):
                raise sqlite3.OperationalError(f"{file} is no plain file")
    connection = sqlite3.connect(f"{path.as_uri()}?{how}", uri=True, isolation_level=None, timeout=BESIDE_TIMEOUT_S)
    # During a long statement, signals are handled when SQLite calls this function; an exception then ends the statement
    connection.set_progress_handler(lambda: 0, LOOK_EVERY)
    return connection


def cause(error: Exception, *paths: Path) -> str:
    """The words of SQLite or the system for an error. If the disk of one of the paths is full, they say so.

    SQLite alone does not always say so: if there is no room for a -shm file, it says "disk I/O error".
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
    """The statements of a script. (executescript() would commit the transaction first.)"""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


def check_is_ours(sql: sqlite3.Connection, path: Path, known: int) -> int:
    """The schema version of the file, 0 for an empty one. Raises DatabaseError if it is not lmdaemon's, or too new."""
    (version,) = sql.execute("PRAGMA user_version").fetchone()
    (application,) = sql.execute("PRAGMA application_id").fetchone()
    (tables,) = sql.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if (version or tables) and application != APPLICATION_ID:
        raise DatabaseError(f"{path}: is a database of another program (application_id {application:#x})")
    if version > known:
        raise DatabaseError(f"{path}: was written by a newer lmdaemon (schema {version}; this one knows {known})")
    found: int = version
    return found


def _check_copy(connection: sqlite3.Connection, path: Path) -> None:
    """Raises DatabaseError if a copy that no daemon has opened yet is damaged. Only a copy has another mode than WAL.

    It is read as a whole, because the change to WAL writes to the file, and a damaged one must stay as it was found.
    """
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != "wal":
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise DatabaseError(f"{path}: is damaged: {' '.join(verdict.split())}")


# Entry n upgrades a file from version n to n + 1. Never edit an entry that was released: add another one.
MIGRATIONS: Sequence[str] = tuple(
    Path(__file__).with_name(script).read_text("utf-8")
    for script in ("schema.sql", "schema_2.sql", "schema_3.sql", "schema_4.sql", "schema_5.sql")
)


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Upgrades the file to the newest version in one transaction. Raises DatabaseError before it changes anything."""
    version = check_is_ours(connection, path, len(migrations))
    if version:
        _check_copy(connection, path)
    # Before the first table is created, because the page size cannot be changed later
    connection.execute(f"PRAGMA page_size = {DISK_PAGE_BYTES}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # Deleted content, such as a token, is overwritten with zeros; FAST would leave it in pages that become free
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
        if connection.in_transaction:  # on a full disk SQLite has already rolled back
            connection.execute("ROLLBACK")
        raise
    event = "store.migrated" if version else "store.created"
    log.info(event, path=path, schema=len(migrations), before=version or None)
