"""All of a stopped daemon's SQLite file, read in order, to be moved into another database."""

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import DatabaseError, Figures
from lmdaemon.store.sqlite.batch import GATE
from lmdaemon.store.sqlite.file import (
    IMPORTED,
    MIGRATIONS,
    cause,
    check_is_ours,
    lock_file,
    mark,
    open_beside,
    real_path,
)
from lmdaemon.store.sqlite.rows import DELIVERY, SESSION

# Sessions with their deadlines, in the order of their ids, after a given id.
_SESSIONS = f"SELECT {SESSION}, due_ms FROM session WHERE id > ? ORDER BY id LIMIT ?"
# Deliveries in the order of their ids, after a given id.
_DELIVERIES = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session WHERE d.id > ? ORDER BY d.id LIMIT ?"""
# Figures and gate of every operator.
_OPERATORS = f"SELECT name, live, pending, dead, {', '.join(GATE)} FROM operator"
# Numbers of sessions and deliveries by state.
_COUNTS = """
SELECT 'sessions active', count(*) FROM session WHERE reason IS NULL
UNION ALL SELECT 'sessions ended', count(*) FROM session WHERE reason IS NOT NULL
UNION ALL SELECT 'deliveries ' || state, count(*) FROM delivery GROUP BY state"""
# The service clock, and the wall time at which it was stored.
_CLOCK = "SELECT service_ms, wall_at FROM clock"
# Identifies the content of this file: a copy that was written to since has another last transaction.
_SOURCE = "SELECT (SELECT count(*) FROM session), (SELECT max(id) FROM delivery), service_ms, wall_at FROM clock"


class Whole:
    """An open file that is being imported. Its methods raise sqlite3.Error, of which `open_whole` makes a
    DatabaseError.
    """

    def __init__(self, sql: sqlite3.Connection) -> None:
        self._sql = sql
        self.source = "/".join(str(part) for part in sql.execute(_SOURCE).fetchone())

    def counts(self) -> dict[str, int]:
        return dict(self._sql.execute(_COUNTS))

    def clock(self) -> tuple[int, int]:
        service_ms, wall_at = self._sql.execute(_CLOCK).fetchone()
        return service_ms, wall_at

    def operators(self) -> Mapping[str, tuple[Figures, Gate]]:
        return {
            name: (Figures(live, pending, dead), Gate(*gate))
            for name, live, pending, dead, *gate in self._sql.execute(_OPERATORS)
        }

    def sessions(self, after: int, rows: int) -> list[tuple[Session, int]]:
        return [(Session(*row), due_ms) for *row, due_ms in self._sql.execute(_SESSIONS, (after, rows))]

    def deliveries(self, after: int, rows: int) -> list[Delivery]:
        return [Delivery(*row)._replace(token=None) for row in self._sql.execute(_DELIVERIES, (after, rows))]


@contextmanager
def open_whole(path: Path) -> Iterator[Whole]:
    """Opens the file, and locks it against every daemon while it is read. If nothing fails inside the context, the file
    stays unusable for daemons for good, because otherwise pending deliveries could be sent from both databases. Raises
    DatabaseError, which names the file, also for errors inside the context.
    """
    path = real_path(path.absolute())
    if not path.exists():
        raise DatabaseError(f"{path}: no such file")
    lock = lock_file(path)
    try:
        with closing(open_beside(path)) as sql:
            if not check_is_ours(sql, path, len(MIGRATIONS)):
                raise DatabaseError(f"{path}: is empty")
            yield Whole(sql)
        mark(lock, IMPORTED)
        os.fsync(lock)
    except sqlite3.Error as error:
        raise DatabaseError(f"{path}: cannot be read: {cause(error, path)}") from error
    finally:
        os.close(lock)
