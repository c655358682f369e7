"""`lmdaemon backup`: a consistent copy of the database while the daemon runs. Called by `cli`."""

import argparse
import os
import sqlite3
import tempfile
from pathlib import Path

from lmdaemon import config
from lmdaemon.command import STOPPED, Failed, print_json, reason
from lmdaemon.config import Settings

BUSY_TIMEOUT_S = 10.0  # while the daemon recovers its log after a crash


def backup(args: argparse.Namespace) -> int:
    settings = config.load(config.find(args.config), secrets="optional")
    database, target = settings.database.absolute(), args.file
    _check_source(settings)
    _check_target(database, target, force=args.force)
    size = _copy(database, target)
    if args.json:
        print_json({"file": str(target), "bytes": size})
    else:
        print(f"{target}: {size} bytes, integrity ok")
    return STOPPED


def _check_source(settings: Settings) -> None:
    try:
        settings.database.stat()
    except OSError as error:
        hint = ""
        if settings.database.is_relative_to(settings.file.parent) and not os.environ.get("STATE_DIRECTORY"):
            hint = "; a relative database.path is looked up in $STATE_DIRECTORY, which the service has and you have not"
        raise Failed(f"{settings.database}: no database to copy: {reason(error)}{hint}") from error


def _check_target(database: Path, target: Path, *, force: bool) -> None:
    try:
        if target.is_dir():
            raise Failed(f"{target}: is a directory; name a file")
        if not target.exists():
            return
        for suffix in ("", "-wal", "-shm", "-journal", ".lock"):  # replacing one of these destroys the database
            live = database.with_name(database.name + suffix)
            if live.exists() and target.samefile(live):
                raise Failed(f"{target}: belongs to the database itself")
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {reason(error)}") from error
    if not force:
        raise Failed(f"{target}: exists; --force replaces it")


def _copy(database: Path, target: Path) -> int:
    """Copies into a file beside the target, checks it, and puts it in place. Returns its size. Raises Failed."""
    os.umask(0o077)
    try:
        handle, name = tempfile.mkstemp(prefix=".lmdaemon-backup-", dir=target.parent)  # mode 0600, whatever the umask
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {reason(error)}") from error
    copy = Path(name).absolute()
    try:
        _vacuum_into(database, copy)
        _check_integrity(copy)
        os.fsync(handle)
        size = os.fstat(handle).st_size
        copy.rename(target)
        sync_directory(target.parent)
    except (sqlite3.Error, OSError) as error:
        raise Failed(f"{target}: cannot copy {database}: {reason(error)}") from error
    finally:
        os.close(handle)
        copy.unlink(missing_ok=True)
    return size


def _vacuum_into(database: Path, copy: Path) -> None:
    """One read transaction: the daemon writes on meanwhile. Page by page, its every commit would start it again.

    `mode=ro` never creates a database. The -wal and -shm files beside it, should they be missing, SQLite makes with the
    owner and mode of the database, also as root (unixOpen, robustFchown).
    """
    source = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        source.execute("VACUUM INTO ?", (str(copy),))
    finally:
        source.close()


def _check_integrity(copy: Path) -> None:
    # Not read-only, though nothing is written: SQLite leaves out CHECK constraints then
    opened = sqlite3.connect(f"{copy.as_uri()}?mode=rw", uri=True)
    try:
        (verdict,) = opened.execute("PRAGMA integrity_check(1)").fetchone()
    finally:
        opened.close()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"the copy is damaged: {verdict}")


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
