"""`lmdaemon backup` and `lmdaemon restore`: a consistent copy of the database, and the way back. Called by `cli`.

A copy is made into a file beside its target, checked, synced and renamed: what has the target's name is whole. Nothing
here may ever change the database that is copied, or delete the one that is replaced.
"""

import argparse
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmdaemon import config
from lmdaemon.command import STOPPED, Failed, print_json, reason
from lmdaemon.config import Settings
from lmdaemon.database import (
    MIGRATIONS,
    RESTORING,
    DatabaseError,
    check_is_ours,
    lock_file,
    mark,
    real_path,
)
from lmdaemon.files import (
    COMPANIONS,
    LOOK_EVERY,
    check_source,
    check_target,
    file_beside,
    followed,
    hint,
    open_database,
    put_in_place,
)
from lmdaemon.model import rfc3339

FLUSH_BYTES = 4 * 1024 * 1024


def backup(args: argparse.Namespace) -> int:
    settings = config.of_command(args.config, secrets="optional")
    database, target = real_path(settings.database.absolute()), followed(args.file)
    check_source(settings)
    check_target(database, target, force=args.force)
    # A newer program's is as good to keep, and no less needed
    with _copied(database, target, known=sys.maxsize) as copy:
        size = copy.stat().st_size
        put_in_place(copy, target)
    if args.json:
        print_json({"file": str(args.file), "bytes": size})
    else:
        print(f"{args.file}: {size} bytes, integrity ok")
    return STOPPED


@contextmanager
def _copied(database: Path, target: Path, *, known: int, how: str = "mode=ro") -> Iterator[Path]:
    """A checked and synced copy beside the target, mode 0600, gone at the end unless it was renamed.

    Raises Failed, also for what SQLite or the system refuse inside, and for what is no database of ours, or of a
    version beyond `known`.
    """
    with file_beside(target) as (copy, handle):
        try:
            with closing(open_database(database, how)) as source:
                _check_is_ours(source, database, known)  # VACUUM names its target for a fault of the source
                source.set_progress_handler(_Flush(handle), LOOK_EVERY)
                # One read transaction: the daemon writes on meanwhile. Page by page, its every commit starts it again.
                source.execute("VACUUM INTO ?", (str(copy),))
            _check_integrity(copy)
            os.fsync(handle)
            yield copy
        except (sqlite3.Error, OSError) as error:
            raise Failed(f"{target}: cannot copy {database}: {reason(error)}") from error


def _check_is_ours(sql: sqlite3.Connection, path: Path, known: int) -> None:
    try:
        version = check_is_ours(sql, path, known)
    except DatabaseError as error:
        raise Failed(str(error)) from error
    if not version:
        raise Failed(f"{path}: is empty")


class _Flush:
    """Writes the copy to the disk as it grows. In one piece at the end, the daemon's own syncs would wait behind it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._flushed = 0

    def __call__(self) -> int:
        size = os.fstat(self._handle).st_size
        if size >= self._flushed + FLUSH_BYTES:
            os.fdatasync(self._handle)
            self._flushed = size
        return 0


def _check_integrity(copy: Path) -> None:
    # Not read-only, though nothing is written: SQLite leaves out CHECK constraints then
    with closing(open_database(copy, "mode=rw")) as opened:
        (verdict,) = opened.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"the copy is damaged: {verdict}")


# -- restore


def restore(args: argparse.Namespace) -> int:
    settings = config.of_command(args.config, secrets="optional")
    database, source = real_path(settings.database.absolute()), args.file.absolute()
    _check_restorable(source, database, settings)
    try:
        lock = lock_file(database)
    except DatabaseError as error:
        raise Failed(f"{error}; stop the daemon first" if "in use" in str(error) else str(error)) from error
    try:
        found = _put_in_place(source, database, lock)
    finally:
        os.close(lock)
    if args.json:
        print_json({"file": str(args.file), "database": str(database), **found})
    else:
        print(f"{database}: restored from {args.file}, {found['bytes']} bytes, integrity ok")
        print(f"as of {found['asOf']}, {found['live']} sessions live, {found['pending']} deliveries pending")
        if found["replaced"]:
            print(f"what was there before: {found['replaced']}")
    return STOPPED


def _check_restorable(source: Path, database: Path, settings: Settings) -> None:
    try:
        if not source.is_file():
            source.stat()
            raise Failed(f"{source}: is no file")
        if database.exists() and source.samefile(database):
            raise Failed(f"{source}: is the database itself")
    except OSError as error:
        raise Failed(f"{source}: cannot be read: {reason(error)}") from error
    if not database.parent.is_dir():
        raise Failed(f"{database.parent}: no such directory{hint(settings)}")


def _put_in_place(source: Path, database: Path, lock: int) -> dict[str, Any]:
    """Copies, checks, moves away what is there, and puts the copy in its place. Says what it holds. Raises Failed."""
    with _copied(source, database, known=len(MIGRATIONS), how=_how_to_read(source)) as copy:
        found: dict[str, Any] = {"bytes": copy.stat().st_size, **_contents(copy)}
        _give_to_owner(database.parent, copy, lock)
        # Half of the files moved must not be taken for a database: the daemon refuses to start until this is undone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        mark(lock, RESTORING)
        os.fsync(lock)
        found["replaced"] = _move_away(database)
        put_in_place(copy, database)
        mark(lock, b"")
        os.fsync(lock)
    return found


def _how_to_read(source: Path) -> str:
    """A backup lies still, maybe where nothing can be written: no -wal and -shm are made for it unless one is there."""
    wal = source.with_name(f"{source.name}-wal")
    return "mode=ro" if wal.exists() and wal.stat().st_size else "immutable=1"


def _contents(copy: Path) -> dict[str, Any]:
    """What a restored database would begin with."""
    with closing(open_database(copy)) as sql:
        (wall_at,) = sql.execute("SELECT wall_at FROM clock").fetchone()
        live, pending = sql.execute("SELECT coalesce(sum(live), 0), coalesce(sum(pending), 0) FROM operator").fetchone()
    return {"asOf": rfc3339(wall_at or None), "live": live, "pending": pending}


def _give_to_owner(directory: Path, copy: Path, lock: int) -> None:
    """As root, the service's user must be able to open what was made: its directory says who that is."""
    if os.geteuid() == 0:
        owner = directory.stat()
        os.chown(copy, owner.st_uid, owner.st_gid)
        os.chown(lock, owner.st_uid, owner.st_gid)


def _move_away(database: Path) -> str | None:
    """Renames the database with its companions so that they can still be opened together. Returns the new name."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    away = database.with_name(f"{database.name}.before-restore-{stamp}")
    moved = None
    for suffix in (*COMPANIONS, ""):
        file = database.with_name(database.name + suffix)
        if file.exists():
            file.rename(away.with_name(away.name + suffix))
            moved = str(away)
    return moved
