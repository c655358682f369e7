"""The rights with which commands that root runs open files: those of the directory's owner, unless only root can change
the path to it.

Whoever owns a directory can replace a file by a link at any moment, also between two calls. If root followed it, a file
of root's would be overwritten or given away. Open file descriptors do not help, because SQLite opens several files of a
database by name. With the rights of the directory's owner, a link leads nowhere that this owner could not go anyway.

Other users than root always act with their own rights.
"""

import os
import pwd
import shlex
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lmdaemon.trust import user_name

_LINKS_MAX = 40  # most links that are followed, as in the kernel (path_resolution(7))


class UnsafeError(Exception):
    """There is no user with whose rights it would be safe to go on. The text says why, and what would help."""


class Rights(NamedTuple):
    """Effective user, group and supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class _Place(NamedTuple):
    """What following a path has shown, up to the first directory that is not root's."""

    owner: os.stat_result | None  # the first directory on the way that is not root's; None: they are all root's
    file: os.stat_result | None  # what the path names, if it exists and every directory before it is root's
    open_way: Path | None  # a directory on the way in which others can replace entries
    shared: Path | None  # the directory of the file, if others can create files in it


def for_database(path: Path) -> Rights:
    """The rights with which to open a database and the files that SQLite keeps beside it. Raises UnsafeError."""
    if os.geteuid():
        return own()
    place = _walk(path)
    if place.owner is not None:
        return _of(place.owner.st_uid, place.owner.st_gid)
    shared = place.open_way or place.shared
    if shared is None:
        return own()
    # SQLite uses whatever is beside a database under the right name, so root must not open one where others can create
    # files
    if place.file is not None and place.file.st_uid:
        return _of(place.file.st_uid, place.file.st_gid)
    # In a directory such as /tmp everybody has to be able to make files
    is_for_all = shared.stat().st_mode & stat.S_ISVTX
    remedy = "choose a directory of its own" if is_for_all else f"chmod go-w {shlex.quote(str(shared))}"
    raise UnsafeError(
        f"{path}: others can make files in {shared}: root keeps its database where nobody else can; "
        f"{remedy}, or run lmdaemon as another user"
    )


def for_result(path: Path, database: Rights) -> Rights:
    """The rights with which to write a result (a backup, an export) beside `path`.

    They are root's own or those with which the database was read (`database`), and never those of a third user, who
    could then read the result. Raises UnsafeError.
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
    """The rights with which to read a file, and whether others can create files beside it. Raises UnsafeError."""
    if os.geteuid():
        return own(), False
    place = _walk(path)
    if place.owner is not None:
        return _of(place.owner.st_uid, place.owner.st_gid), False
    return own(), (place.open_way or place.shared) is not None


@contextmanager
def acting_with(rights: Rights) -> Iterator[None]:
    """Inside the context every thread of the process has these rights. Raises UnsafeError if they cannot be taken.

    The real user id stays root's, so that the other user can neither kill nor trace this process (credentials(7)).
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
    """Raises UnsafeError for a link that another user has made in a directory that others can write to.

    This is the rule of the kernel's fs.protected_symlinks, applied here also to links that are read and not followed.
    """
    directory, found = link.parent.stat(), link.lstat()
    if stat.S_ISLNK(found.st_mode) and _is_shared(directory) and found.st_uid not in (os.geteuid(), directory.st_uid):
        raise UnsafeError(f"{link}: is a link of {user_name(found.st_uid)} in a directory that others can write to")


def own() -> Rights:
    """The rights that this process has now."""
    return Rights(os.geteuid(), os.getegid(), tuple(os.getgroups()))


def _of(uid: int, gid: int) -> Rights:
    """The rights of a user; `gid` is the group of the directory, which new files there get."""
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
    """Whether others than the owner can create files in it."""
    return bool(directory.st_mode & 0o002 or (directory.st_mode & 0o020 and directory.st_gid))


def _walk(path: Path) -> _Place:
    """Follows the path as the kernel does, as long as every directory is root's. Raises UnsafeError.

    What it returns stays true, because only root can change those directories. Only what comes after `open_way` can be
    changed by others.
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
        except OSError:  # opening the path will fail in the same way and be reported then
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
