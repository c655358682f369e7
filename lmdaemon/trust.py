"""Reads a configuration file that was found by its default name, such as `./config.toml`, only if it can be trusted.

That is, if it and its directory belong to the caller or to root, and nobody else can write to them. Open file
descriptors are checked, not names, so that nothing can be exchanged between the check and the reading.
"""

import grp
import os
import pwd
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
# Not blocking, because opening a FIFO that somebody has put there would wait for ever
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class UntrustedError(Exception):
    """Somebody else may have written the file. The text says what is wrong, with the file or with its directory."""


def read(path: Path) -> bytes:
    """The content of the file; links are followed. Raises UntrustedError and OSError."""
    real = Path(os.path.realpath(path))
    with ExitStack() as stack:
        # The directory of the link, and that of the file to which it leads
        for directory in (path.parent, real.parent):
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
    """Whether the group has no member but the owner. Many systems make such a group for each user (pam_umask(8))."""
    with suppress(KeyError):
        owner, group = pwd.getpwuid(uid), grp.getgrgid(gid)
        return owner.pw_gid == gid and group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}
    return False


def user_name(uid: int) -> str:
    """The user's name, or "user NUMBER" where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
