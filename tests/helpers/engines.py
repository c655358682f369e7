"""The databases that the store can live in, as the contract suite (`tests/store/contract`) sees them."""

import contextlib
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from support import open_store

from lmdaemon.clock import Clock
from lmdaemon.store.contract import Store

Table = Literal["session", "delivery", "operator"]


class Engine(ABC):
    """One database, empty at first. It outlives the stores that are opened on it one after the other."""

    @abstractmethod
    def open(self, clock: Clock, *, count_downtime: bool = False) -> AbstractAsyncContextManager[Store]:
        """A store on this database with its writer running, closed in good order at the end."""

    @abstractmethod
    def kill(self) -> None:
        """What kill -9 leaves behind: nothing that the open store does from now on reaches this database, its closing
        included. What was acknowledged before is there for the next `open`.
        """

    @abstractmethod
    def outage(self) -> AbstractContextManager[None]:
        """While it lasts, nothing can be written and every write is refused; reading may work."""

    @abstractmethod
    def rows(self, table: Table) -> list[dict[str, Any]]:
        """What is committed, read through a connection of its own, in no order: the columns by the names that
        `lmdaemon/store/sqlite/schema.sql` documents, and each delivery with the `session_id` of its session.
        """


class SqliteEngine(Engine):
    """A file in a directory that belongs to one test."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "test.sqlite3"

    @contextlib.asynccontextmanager
    async def open(self, clock: Clock, *, count_downtime: bool = False) -> AsyncIterator[Any]:
        async with open_store(self.path, clock, count_downtime=count_downtime) as store:
            yield store

    def kill(self) -> None:
        left = self.path.parent / "left behind"
        left.mkdir()
        # The log first: a page that is copied from it into the file meanwhile is in both, never in none
        for name in (f"{self.path.name}-wal", self.path.name):
            shutil.copyfile(self.path.with_name(name), left / name)
        self.path = left / self.path.name

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        with self._connection() as blocker:
            blocker.execute("BEGIN IMMEDIATE")
            yield
            blocker.execute("ROLLBACK")

    def rows(self, table: Table) -> list[dict[str, Any]]:
        statement = {
            "session": "SELECT * FROM session",
            "delivery": "SELECT d.*, s.session_id FROM delivery d JOIN session s ON s.id = d.session",
            "operator": "SELECT * FROM operator",
        }[table]
        with self._connection() as sql:
            sql.row_factory = sqlite3.Row
            return [dict(row) for row in sql.execute(statement)]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            yield connection
