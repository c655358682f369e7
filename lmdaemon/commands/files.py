"""Files that the commands read and write: the database beside the daemon, and results that appear whole or not at all.

Called by `backup` and `export`. Everything written has mode 0600.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmdaemon.commands.shared import Failed, reason
from lmdaemon.config.settings import Settings
from lmdaemon.rights import UnsafeError, check_link
from lmdaemon.store.open import COMPANIONS

NICER = 10  # what reads the whole database takes what time the daemon leaves, on a machine with few cores


def check_source(settings: Settings) -> None:
    """For what reads the whole database: raises Failed if there is none, and lets the daemon go first."""
    with suppress(OSError):  # the service's sandbox does not let it
        os.nice(NICER)
    try:
        settings.database.stat()
    except OSError as error:
        raise Failed(f"{settings.database}: no database to read: {reason(error)}{hint(settings)}") from error


def hint(settings: Settings) -> str:
    """What to try when the state is not where the configuration says, as an end of a message; else empty."""
    if settings.database.is_relative_to(settings.file.parent) and not os.environ.get("STATE_DIRECTORY"):
        return "; a relative database.path is looked up in $STATE_DIRECTORY, which the service has and you have not"
    return ""


def followed(named: Path) -> Path:
    """Where a result goes: a link is followed, for what it leads to is what its owner wants to be replaced.

    Raises Failed for a link that somebody else has planted.
    """
    if not named.is_symlink():
        return named
    try:
        check_link(named)
    except UnsafeError as error:
        raise Failed(str(error)) from error
    return named.resolve()


Inode = tuple[int, int]  # device and number


def files_of(database: Path) -> set[Inode]:
    """What must never be replaced by a result: the database and all that belongs to it."""
    found = set()
    for suffix in ("", *COMPANIONS, ".lock"):
        with suppress(OSError):
            file = database.with_name(database.name + suffix).stat()
            found.add((file.st_dev, file.st_ino))
    return found


def check_target(live: set[Inode], target: Path, *, force: bool) -> None:
    """Raises Failed if the target must not be written: it exists, or is one of the live files, which nothing forces."""
    try:
        if target.is_dir():
            raise Failed(f"{target}: is a directory; name a file")
        if not target.exists():
            return
        found = target.stat()
        if (found.st_dev, found.st_ino) in live:
            raise Failed(f"{target}: belongs to the database itself")
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {reason(error)}") from error
    if not force:
        raise Failed(f"{target}: exists; --force replaces it")


@contextmanager
def file_beside(target: Path) -> Iterator[tuple[Path, int]]:
    """An empty file for what the target shall hold, and a handle of it; gone at the end unless it was put in place.

    It lies in a directory of its own beside the target, mode 0700: SQLite looks for a journal beside each file that it
    opens, and where everybody can make files, as in /tmp, somebody may have made one. Raises Failed.
    """
    os.umask(0o077)
    try:
        directory = Path(tempfile.mkdtemp(prefix=".lmdaemon-", dir=target.parent)).absolute()
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {reason(error)}") from error
    file = directory / "copy"
    handle = -1
    # A timer's SIGTERM is a Ctrl-C: what was begun goes away with us
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        yield file, handle
    finally:
        if handle >= 0:
            os.close(handle)
        shutil.rmtree(directory)


def put_in_place(file: Path, target: Path) -> None:
    """Gives a synced file its name, for good."""
    file.rename(target)
    handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
