"""Faults of the disk, made by real causes, and a system whose lookups answer as a test says."""

import contextlib
import resource
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest


@contextlib.contextmanager
def unreachable(directory: Path) -> Iterator[None]:
    """The kernel refuses every path below the directory with an error (ELOOP); what is open already stays open."""
    away = directory.rename(directory.with_name(f"{directory.name} away"))
    directory.symlink_to(directory)
    try:
        yield
    finally:
        directory.unlink()
        away.rename(directory)


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program holds the database's lock, as an administrator's sqlite3 might: nothing can be written."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def no_room(database: Path) -> Iterator[None]:
    """A disk that is full: no file of this process may grow beyond the present size of the write-ahead log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wal = database.with_name(f"{database.name}-wal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def look_up_by(patch: pytest.MonkeyPatch, getaddrinfo: Callable[..., Any]) -> None:
    """From now on the system asks this function for the addresses of names, and no server of the network's."""
    patch.setattr(socket, "getaddrinfo", getaddrinfo)


def leads_inside(_: object, port: int, *__: Any, **___: Any) -> list[tuple[Any, ...]]:
    """What a lookup answers for a name that leads to this machine."""
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]


def not_found(*_: Any, **__: Any) -> NoReturn:
    """What a lookup answers for a name that does not exist. The machine's own name server may answer otherwise, late or
    never.
    """
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
