"""`lmdaemon backup` and `lmdaemon restore`: make a consistent copy of the database, and put one back.

A copy is written to a file beside its target, checked, synced and then renamed, so that a file with the target's name
is always whole. Nothing here may change the database that is copied, or delete the one that is replaced.
"""

import argparse
import os
import signal
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from lmdaemon import rights
from lmdaemon.commands.arguments import FORCE, JSON, argument, command, file
from lmdaemon.commands.configured import configured
from lmdaemon.commands.files import (
    Inode,
    check_source,
    check_target,
    file_beside,
    files_of,
    followed,
    hint,
    put_in_place,
)
from lmdaemon.commands.progress import Tell, progress
from lmdaemon.commands.shared import STOPPED, Failed, Usage, print_json, reason
from lmdaemon.config.settings import Settings
from lmdaemon.model import rfc3339
from lmdaemon.rights import Rights, UnsafeError, acting_with
from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.sqlite.file import (
    COMPANIONS,
    LOOK_EVERY,
    MIGRATIONS,
    RESTORING,
    cause,
    check_is_ours,
    lock_file,
    mark,
    open_beside,
    real_path,
)

FLUSH_BYTES = 4 * 1024 * 1024


def _check_is_file(settings: Settings, command: str, how: str) -> None:
    """Raises Usage if the database is on PostgreSQL, because backup and restore are for files only. `how` names the
    tools of PostgreSQL that do the same.
    """
    if settings.postgres is not None:
        raise Usage(f"{command}: the database is on PostgreSQL (database.url): {how} the copy; see docs/scaling.md")


@command(argument("file", type=file, metavar="FILE", help="the copy, mode 0600"), FORCE, JSON)
def backup(args: argparse.Namespace) -> int:
    """Writes a checked copy of the database, also while the daemon runs."""
    settings = configured(args, "database")
    _check_is_file(settings, "backup", "pg_dump, or a base backup with the write-ahead log, makes")
    try:
        theirs = rights.for_database(settings.database)
        ours = rights.for_result(args.file, theirs)
        with acting_with(theirs):
            check_source(settings)
            database = real_path(settings.database.absolute())
            live = files_of(database)
        with acting_with(ours):
            target = followed(args.file)
            check_target(live, target, force=args.force)
            # The database of a newer lmdaemon may be copied too
            with copied(Source(database, theirs), target, known=sys.maxsize) as copy:
                size = copy.stat().st_size
                put_in_place(copy, target)
    except UnsafeError as error:
        raise Failed(str(error)) from error
    if args.json:
        print_json({"file": str(args.file), "bytes": size})
    else:
        print(f"{args.file}: {size} bytes, integrity ok")
    return STOPPED


class Source(NamedTuple):
    """A database to copy, the rights to open it with, and the mode in which SQLite opens it (its URI parameters)."""

    path: Path
    reading: Rights
    how: str = "mode=ro"


@contextmanager
def copied(source: Source, target: Path, *, known: int) -> Iterator[Path]:
    """A checked and synced copy beside the target, mode 0600. It is deleted at the end unless it was renamed.

    The source is opened and closed with its own rights, everything else is done with the caller's. Raises Failed
    for errors of SQLite and of the system, also inside the context, for a file that is no database of lmdaemon, and for
    one of a version beyond `known`.
    """
    with file_beside(target) as (copy, handle):
        try:
            writing = rights.own()
            with acting_with(source.reading), closing(open_beside(source.path, source.how)) as sql:
                # Checked first, because for a damaged source VACUUM reports an error about its target
                _check_is_ours(sql, source.path, known)
                with progress("copying", "B", _size(sql)) as tell:
                    sql.set_progress_handler(_Flush(handle, tell), LOOK_EVERY)
                    # One read transaction, during which the daemon goes on writing. A copy page by page (SQLite's
                    # backup API) would start again at each of the daemon's commits. The check has opened all files of
                    # the source, so its rights are not needed any more.
                    with acting_with(writing):
                        # A file's name can be any bytes; SQLite expects text
                        sql.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(copy),))
            with progress("checking the copy", "B"):
                _check_integrity(copy)
            os.fsync(handle)
            yield copy
        except (sqlite3.Error, OSError) as error:
            raise Failed(f"{target}: cannot copy {source.path}: {cause(error, target, source.path)}") from error


def _check_is_ours(sql: sqlite3.Connection, path: Path, known: int) -> None:
    try:
        version = check_is_ours(sql, path, known)
    except DatabaseError as error:
        raise Failed(str(error)) from error
    if not version:
        raise Failed(f"{path}: is empty")


class _Flush:
    """Syncs the copy as it grows. If it were synced only at the end, the daemon's own syncs would have to wait for it.

    SQLite calls this object every LOOK_EVERY instructions. The result 0 tells SQLite to go on.
    """

    def __init__(self, handle: int, tell: Tell) -> None:
        self._handle = handle
        self._tell = tell
        self._flushed = 0

    def __call__(self) -> int:
        size = os.fstat(self._handle).st_size
        self._tell(size)
        if size >= self._flushed + FLUSH_BYTES:
            os.fdatasync(self._handle)
            self._flushed = size
        return 0


def _size(sql: sqlite3.Connection) -> int:
    """Bytes that a copy will have: those of the pages in use."""
    pages, free, size = (
        sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _check_integrity(copy: Path) -> None:
    # Opened for writing, though nothing is written: read-only, SQLite would not check the CHECK constraints
    with closing(open_beside(copy, "mode=rw")) as opened:
        (verdict,) = opened.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"the copy is damaged: {verdict}")


# -- restore


@command(argument("file", type=file, metavar="FILE", help="a copy made by backup; it stays as it is"), JSON)
def restore(args: argparse.Namespace) -> int:
    """Puts a copy in the place of the database, while the daemon is stopped; the old files are kept."""
    settings = configured(args, "database")
    _check_is_file(settings, "restore", "pg_restore, or a recovery to a point in time, puts back")
    file = args.file.absolute()
    try:
        reading, shared = rights.for_source(file)
        with acting_with(rights.for_database(settings.database)):
            database = real_path(settings.database.absolute())
            live = files_of(database)
            with acting_with(reading):
                how = _how_to_read(file, live, shared=shared)
            found = _restore(Source(file, reading, how), database, settings)
    except UnsafeError as error:
        raise Failed(str(error)) from error
    if args.json:
        print_json({"file": str(args.file), "database": str(database), **found})
    else:
        print(f"{database}: restored from {args.file}, {found['bytes']} bytes, integrity ok")
        as_of = f"as of {found['asOf']}" if found["asOf"] else "never written to"
        print(f"{as_of}, sessions live: {found['live']}, deliveries pending: {found['pending']}")
        print('what has happened since then is missing: docs/operating.md, "What is different after a restore"')
        if found["replaced"]:
            print(f"what was there before: {found['replaced']}")
    return STOPPED


def _restore(source: Source, database: Path, settings: Settings) -> dict[str, Any]:
    """Copies the source and puts the copy in place. Must run with the rights for the database. Raises Failed."""
    if not database.parent.is_dir():
        raise Failed(f"{database.parent}: no such directory{hint(settings)}")
    try:
        lock = lock_file(database)
    except DatabaseError as error:
        raise Failed(f"{error}; stop the daemon first" if "in use" in str(error) else str(error)) from error
    try:
        with copied(source, database, known=len(MIGRATIONS)) as copy:
            return _put_in_place(copy, database, lock)
    finally:
        os.close(lock)


def _how_to_read(source: Path, live: set[Inode], *, shared: bool) -> str:
    """The mode in which SQLite opens a backup: "immutable" unless a write-ahead log is beside it.

    A backup does not change, and may be where nothing can be written; "immutable" creates no files beside it. Raises
    Failed for a file that cannot be restored.
    """
    wal = source.with_name(f"{source.name}-wal")
    try:
        found = source.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Failed(f"{source}: is no file")
        if (found.st_dev, found.st_ino) in live:
            raise Failed(f"{source}: is the database itself")
        if not (wal.exists() and wal.stat().st_size):
            return "immutable=1"
    except OSError as error:
        raise Failed(f"{source}: cannot be read: {reason(error)}") from error
    # In a directory that others can write to, anybody may have put the log there, and SQLite would create files owned
    # by root
    if shared:
        raise Failed(
            f"{source}: {wal.name} is beside it, where others can make files: "
            "copy both to a directory that only root can change"
        )
    return "mode=ro"


def _put_in_place(copy: Path, database: Path, lock: int) -> dict[str, Any]:
    """Moves the old files away and puts the copy in their place. Returns the facts that are printed about the copy."""
    found: dict[str, Any] = {"bytes": copy.stat().st_size, **_contents(copy)}
    # The daemon refuses to start while the lock file has this mark, so that no half-moved set of files is opened.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    mark(lock, RESTORING)
    os.fsync(lock)
    found["replaced"] = _move_away(database)
    put_in_place(copy, database)
    mark(lock, b"")
    os.fsync(lock)
    return found


def _contents(copy: Path) -> dict[str, Any]:
    """The time of the last write to the copy, and its numbers of live sessions and pending deliveries."""
    with closing(open_beside(copy)) as sql:
        (wall_at,) = sql.execute("SELECT wall_at FROM clock").fetchone()
        live, pending = sql.execute("SELECT coalesce(sum(live), 0), coalesce(sum(pending), 0) FROM operator").fetchone()
    return {"asOf": rfc3339(wall_at or None), "live": live, "pending": pending}


def _move_away(database: Path) -> str | None:
    """Renames the database and its companions, so that they still belong together. Returns the new name."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    away = database.with_name(f"{database.name}.before-restore-{stamp}")
    moved = None
    for suffix in (*COMPANIONS, ""):
        file = database.with_name(database.name + suffix)
        if file.exists():
            file.rename(away.with_name(away.name + suffix))
            moved = str(away)
    return moved
