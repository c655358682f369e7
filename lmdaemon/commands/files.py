"""Files that commands read and write: the database, while the daemon runs, and results that appear whole or not at all.

Everything written has mode 0600.
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

NICER = 10  # added to the nice value of a command that reads the whole database, so that the daemon goes first


def check_source(settings: Settings) -> None:
    """Begins a command that reads the whole database: lowers its priority. Raises Failed if there is no database."""
    with suppress(OSError):  # the service's sandbox does not allow it
        os.nice(NICER)
    if settings.postgres is not None:
        return
    try:
        settings.database.stat()
    except OSError as error:
        raise Failed(f"{settings.database}: no database to read: {reason(error)}{hint(settings)}") from error


def hint(settings: Settings) -> str:
    """The end of a message about a missing database: where a relative path is looked up. Empty if that is not the
    cause.
    """
    if settings.database.is_relative_to(settings.file.parent) and not os.environ.get("STATE_DIRECTORY"):
        return "; a relative database.path is looked up in $STATE_DIRECTORY, which the service has and you have not"
    return ""


def followed(named: Path) -> Path:
    """The file that a result replaces: where `named` is a link, the file that it leads to.

    Raises Failed for a link that another user has made in a directory that others can write to.
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
    """The database and its companions, which a result must never replace."""
    found = set()
    for suffix in ("", *COMPANIONS, ".lock"):
        with suppress(OSError):
            file = database.with_name(database.name + suffix).stat()
            found.add((file.st_dev, file.st_ino))
    return found


def check_target(live: set[Inode], target: Path, *, force: bool) -> None:
    """Raises Failed if the target is one of the `live` files, or if it exists and `force` is not set."""
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
    """An empty file for the content that the target will get, and a descriptor of it. The file is deleted at the end
    unless it was renamed.

    It is in a new directory of mode 0700 beside the target, because SQLite looks for a journal beside each file that it
    opens, and in a directory like /tmp anybody could have put one there. Raises Failed.
    """
    os.umask(0o077)
    try:
        directory = Path(tempfile.mkdtemp(prefix=".lmdaemon-", dir=target.parent)).absolute()
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {reason(error)}") from error
    file = directory / "copy"
    handle = -1
    # SIGTERM, as systemd sends it, acts like Ctrl-C, so that the directory is removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        yield file, handle
    finally:
        if handle >= 0:
            os.close(handle)
        shutil.rmtree(directory)


def put_in_place(file: Path, target: Path) -> None:
    """Renames a synced file to the target and syncs the directory, so that the new name survives a power cut."""
    file.rename(target)
    handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
