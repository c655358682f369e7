"""Reads ended sessions from the SQLite file, page by page, in another process than the daemon's."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lmdaemon.clock import Clock
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import DatabaseError, Ended, Wanted
from lmdaemon.store.sqlite.batch import GATE
from lmdaemon.store.sqlite.file import MIGRATIONS, cause, check_is_ours, open_beside, real_path
from lmdaemon.store.sqlite.rows import DELIVERY, ENDED_BEFORE, SESSION, as_rows, fetch, ids_of, to_json

EXPORT_ROWS = 500  # sessions in one read


def _ended_of(column: str) -> str:
    """A statement like ENDED_BEFORE, but only for sessions with a given id in this column. The `+` makes SQLite use the
    index of that column.
    """
    return f"""
SELECT {as_rows("id, ended_at")}
FROM (SELECT id, ended_at FROM session
      WHERE operator IN (SELECT name FROM operator) AND {column} = ? AND player_id = coalesce(?, player_id)
            AND +ended_at < ? AND (+ended_at, +id) > (?, ?)
      ORDER BY +ended_at, +id LIMIT ?)"""


_ENDED_OF_PLAYER = _ended_of("player_id")
_ENDED_OF_ID = _ended_of("session_id")
# Sessions by their ids, of one operator or of all.
_SESSIONS_OF = f"""
SELECT {SESSION} FROM session WHERE id IN (SELECT value FROM json_each(?)) AND operator = coalesce(?, operator)"""
# All deliveries of some sessions, oldest first.
_DELIVERIES_OF_ALL = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session
WHERE d.session IN (SELECT value FROM json_each(?)) ORDER BY d.id"""


class Archive:
    """An open file. Its methods raise sqlite3.Error, which `open_archive` turns into a DatabaseError."""

    def __init__(self, sql: sqlite3.Connection) -> None:
        self._sql = sql

    def ended(self, wanted: Wanted, after: tuple[int, int], before_at: int, rows: int = EXPORT_ROWS) -> Ended:
        """A page of sessions that ended before `before_at`, beginning after `after` (ended_at, id).

        A page is read in one short transaction; a longer one would keep the WAL from starting over.
        """
        sql = self._sql
        sql.execute("BEGIN")
        try:
            if wanted.few:
                statement = _ENDED_OF_PLAYER if wanted.session_id is None else _ENDED_OF_ID
                given = wanted.player_id if wanted.session_id is None else wanted.session_id
                keys = fetch(sql, statement, given, wanted.player_id, before_at, *after, rows)
            else:
                keys = fetch(sql, ENDED_BEFORE, before_at, *after, rows)
            sessions = {row[0]: Session(*row) for row in sql.execute(_SESSIONS_OF, (ids_of(keys), wanted.operator))}
            found: dict[int, list[Delivery]] = {session: [] for session in sessions}
            for row in sql.execute(_DELIVERIES_OF_ALL, (to_json(list(sessions)),)):
                delivery = Delivery(*row)
                found[delivery.session].append(delivery)
        finally:
            sql.execute("COMMIT")
        page = [(sessions[key], found[key]) for key, _ in keys if key in sessions]
        return Ended(page, (keys[-1][1], keys[-1][0]) if len(keys) == rows else None)

    def gates(self) -> dict[str, Gate]:
        """The gate of each operator."""
        return {name: Gate(*gate) for name, *gate in self._sql.execute(f"SELECT name, {', '.join(GATE)} FROM operator")}

    def committed_at(self) -> int:
        """Wall time of the last transaction in the file (Archive)."""
        found: int = self._sql.execute("SELECT wall_at FROM clock").fetchone()[0]
        return found

    def now_at(self) -> int:
        """Wall time of this machine (Archive)."""
        return Clock().wall_ms()


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Opens the file for reading. Raises DatabaseError, which names the file, also for errors inside the context."""
    try:
        with closing(open_beside(real_path(path.absolute()))) as sql:
            version = check_is_ours(sql, path, len(MIGRATIONS))
            if version < len(MIGRATIONS):
                rule = f"was written by an older lmdaemon (schema {version}; this one reads {len(MIGRATIONS)})"
                raise DatabaseError(f"{path}: {rule}: start the daemon on it once, which upgrades it")
            yield Archive(sql)
    except sqlite3.Error as error:
        raise DatabaseError(f"{path}: cannot be read: {cause(error, path)}") from error
