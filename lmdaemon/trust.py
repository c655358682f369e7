"""Who can have written a file that nobody named, such as a `config.toml` in the directory one happens to be in.

It is read only if it and its directory belong to the caller or to root, and nobody else can write to them. Everything
is asked of open handles, so that nothing can be exchanged between the look and the reading.
"""

import grp
import os
import pwd
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
# A planted FIFO must not hold us up
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class UntrustedError(Exception):
    """Somebody else may have written the file. The text says what is wrong with which of the two."""


def read(path: Path) -> bytes:
    """The content of the file, links followed. Raises UntrustedError, OSError."""
    real = Path(os.path.realpath(path))
    with ExitStack() as stack:
        for directory in (path.parent, real.parent):  # of the link, and of what it leads to
            handle = os.open(directory, _DIRECTORY)
            stack.callback(os.close, handle)
            _check(os.fstat(handle), f"its directory {directory.absolute()}")
        file = stack.enter_context(os.fdopen(os.open(real.name, _FILE, dir_fd=handle), "rb"))
        _check(os.fstat(file.fileno()), "it")
        return file.read()


def _check(found: os.stat_result, what: str) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (0, os.geteuid()):
        raise UntrustedError(f"{what} belongs to {user_name(found.st_uid)}, neither to root nor to you")
    if mode & stat.S_IWOTH:
        raise UntrustedError(f"others can write to {what} (owner {user_name(found.st_uid)}, mode {mode:o})")
    if mode & stat.S_IWGRP and not _is_private(found.st_gid, found.st_uid):
        raise UntrustedError(f"the group {_group_name(found.st_gid)} can write to {what} (mode {mode:o})")


def _is_private(gid: int, uid: int) -> bool:
    """Whether the group is the owner's alone, as many systems make one for each user (pam_umask(8), usergroups)."""
    with suppress(KeyError):
        owner, group = pwd.getpwuid(uid), grp.getgrgid(gid)
        return owner.pw_gid == gid and group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}
    return False


def user_name(uid: int) -> str:
    """The user's name, or the number of one without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
