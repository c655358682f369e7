"""With whose rights root touches a file: with root's own where root alone decides what lies there, else the owner's.

Whoever owns a directory can put a link in the place of a file at any moment, also between two calls, and root that
follows it overwrites or gives away a file of root's. SQLite opens files by name, several to a database, so no handle
helps. With the rights of the directory's owner a link leads no further than that owner could go alone.

Nobody but root changes rights here: everybody else acts as himself, always.
"""

import os
import pwd
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lmdaemon.trust import user_name

_LINKS_MAX = 40  # as the kernel has it (path_resolution(7))


class UnsafeError(Exception):
    """Nobody's rights are safe to act with; the text says why, and what would help."""


class Rights(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]


class _Place(NamedTuple):
    """Where a path leads, as far as root alone decides it."""

    owner: os.stat_result | None  # the first directory on the way that is not root's; None: they are all root's
    file: os.stat_result | None  # what the path names, if it is there and the way to it is root's
    open_way: Path | None  # a directory on the way in which others can exchange what lies there
    shared: Path | None  # the directory that the file lies in, if others can make files there


def for_database(path: Path) -> Rights:
    """To act with on a database and on what SQLite keeps beside it. Raises UnsafeError."""
    if os.geteuid():
        return own()
    place = _walk(path)
    if place.owner is not None:
        return _of(place.owner.st_uid, place.owner.st_gid)
    shared = place.open_way or place.shared
    if shared is None:
        return own()
    # SQLite takes what lies beside a database for its own: where others can put something there, root keeps out
    if place.file is not None and place.file.st_uid:
        return _of(place.file.st_uid, place.file.st_gid)
    raise UnsafeError(f"{path}: others can make files in {shared}: root keeps its database where nobody else can")


def for_result(path: Path, database: Rights) -> Rights:
    """To write with what was read from the database of these rights, in a directory of its own beside the path.

    Raises UnsafeError. Not with anybody else's, for then he could read the result.
    """
    if os.geteuid():
        return own()
    place = _walk(path)
    if place.owner is not None and place.owner.st_uid == database.uid:
        return database
    if place.owner is not None or place.open_way is not None:
        whose = "others" if place.owner is None else user_name(place.owner.st_uid)
        where = place.open_way or path.parent
        raise UnsafeError(f"{path}: {whose} can exchange files in {where}: root writes only where nobody else can")
    return own()


def for_source(path: Path) -> tuple[Rights, bool]:
    """To read a file with, and whether others can put something beside it. Raises UnsafeError."""
    if os.geteuid():
        return own(), False
    place = _walk(path)
    if place.owner is not None:
        return _of(place.owner.st_uid, place.owner.st_gid), False
    return own(), (place.open_way or place.shared) is not None


@contextmanager
def acting_with(rights: Rights) -> Iterator[None]:
    """Everything inside happens with these rights, in all threads. Raises UnsafeError if they cannot be had.

    The real user stays root, so the user whose rights they are can neither kill nor trace this process
    (credentials(7)).
    """
    before = own()
    if rights.uid == before.uid:
        yield
        return
    try:
        _take(rights)
    except OSError as error:
        _take(before)
        raise UnsafeError(f"cannot act as {user_name(rights.uid)}, who owns the directory: {error.strerror}") from error
    try:
        yield
    finally:
        _take(before)


def check_link(link: Path) -> None:
    """Raises UnsafeError for a link that somebody else has put where everybody can: the kernel's fs.protected_symlinks,
    also for links that are read and not followed.
    """
    directory, found = link.parent.stat(), link.lstat()
    if stat.S_ISLNK(found.st_mode) and _is_shared(directory) and found.st_uid not in (os.geteuid(), directory.st_uid):
        raise UnsafeError(f"{link}: is a link of {user_name(found.st_uid)} in a directory that others can write to")


def own() -> Rights:
    """Those that are in force."""
    return Rights(os.geteuid(), os.getegid(), tuple(os.getgroups()))


def _of(uid: int, gid: int) -> Rights:
    """The rights of a user; the group is that of the directory, which new files there are given."""
    try:
        groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        groups = [gid]
    return Rights(uid, gid, tuple(groups))


def _take(rights: Rights) -> None:
    os.seteuid(0)
    os.setgroups(rights.groups)
    os.setegid(rights.gid)
    os.seteuid(rights.uid)


def _is_shared(directory: os.stat_result) -> bool:
    """Whether others than the owner can make files in it."""
    return bool(directory.st_mode & 0o002 or (directory.st_mode & 0o020 and directory.st_gid))


def _walk(path: Path) -> _Place:
    """Follows the path as the kernel does, as long as every directory is root's. Raises UnsafeError.

    What it has seen stays so, for nobody but root can change it, except behind `open_way`.
    """
    here = Path("/")
    parts = deque(path.absolute().parts[1:])
    open_way = shared = file = None
    links = 0
    while parts:
        directory = here.lstat()
        if directory.st_uid:
            return _Place(directory, None, open_way, None)
        shared = here if _is_shared(directory) else None
        if shared and not directory.st_mode & stat.S_ISVTX:
            open_way = open_way or here
        part = parts.popleft()
        if part == "..":
            here = here.parent
            continue
        entry = here / part
        try:
            found = entry.lstat()
        except OSError:  # whoever uses the path meets it too, and says so
            break
        if stat.S_ISLNK(found.st_mode):
            check_link(entry)
            links += 1
            if links > _LINKS_MAX:
                raise UnsafeError(f"{path}: too many links")
            target = entry.readlink()
            parts.extendleft(reversed([part for part in target.parts if part != "/"]))
            here = Path("/") if target.is_absolute() else here
        elif stat.S_ISDIR(found.st_mode):
            here = entry
        else:
            file = found
            break
    return _Place(None, file, open_way, shared)
