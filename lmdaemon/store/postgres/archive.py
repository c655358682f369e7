"""Reads ended sessions from the database, page by page, in another process than the daemon's."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg

from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import DatabaseError, Ended, Wanted
from lmdaemon.store.postgres.batch import DELIVERY, GATE, SESSION, delivery_of
from lmdaemon.store.postgres.company import NOW
from lmdaemon.store.postgres.errors import said
from lmdaemon.store.postgres.hints import send
from lmdaemon.store.postgres.thread import Connection, Database

EXPORT_ROWS = 500  # sessions in one read

# Sessions that ended before a time, in the order in which they ended, after a given (ended_at, id).
ENDED_BEFORE = f"""
SELECT {SESSION} FROM lmdaemon.session
WHERE ended_at IS NOT NULL AND ended_at < %s AND (ended_at, id) > (%s, %s) ORDER BY ended_at, id LIMIT %s"""
# Ended sessions of a player or with a session id, of any operator, in the same order. The `+ 0` makes PostgreSQL use
# the index of that id.
_ENDED_OF_FEW = f"""
SELECT {SESSION} FROM lmdaemon.session
WHERE operator IN (SELECT operator FROM lmdaemon.figure) AND {{column}} = %s AND player_id = coalesce(%s, player_id)
      AND ended_at < %s AND (ended_at + 0, id + 0) > (%s, %s) ORDER BY ended_at + 0, id + 0 LIMIT %s"""
ENDED_OF_PLAYER = _ENDED_OF_FEW.format(column="player_id")
ENDED_OF_ID = _ENDED_OF_FEW.format(column="session_id")
# All deliveries of some sessions, oldest first.
DELIVERIES_OF_ALL = f"""
SELECT {DELIVERY} FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session
WHERE d.session = ANY (%s) ORDER BY d.id"""
# The gate of every operator.
GATES = f"SELECT name, {', '.join(GATE)} FROM lmdaemon.operator"
# The wall time of the daemons' last transactions, the earliest of them: each daemon stores ends in the order of their
# times. Without a daemon everything is stored.
COMMITTED_AT = f"SELECT coalesce(min(wall_at), {NOW}) FROM lmdaemon.member"
# The time of the server, with which daemons date what they store.
NOW_AT = f"SELECT {NOW}"


class Archive:
    """An open database, for `open_archive`, which turns what psycopg raises into a DatabaseError."""

    def __init__(self, sql: Connection) -> None:
        self._sql = sql

    def ended(self, wanted: Wanted, after: tuple[int, int], before_at: int, rows: int = EXPORT_ROWS) -> Ended:
        """The next sessions that ended before `before_at`, after `after` (ended_at, id), with their deliveries.

        Those that are not `wanted` are left out after reading, so a page may be short or empty before the end.
        """
        statement, given = ENDED_BEFORE, tuple[str | None, ...]()
        if wanted.session_id is not None:
            statement, given = ENDED_OF_ID, (wanted.session_id, wanted.player_id)
        elif wanted.player_id is not None:
            statement, given = ENDED_OF_PLAYER, (wanted.player_id, wanted.player_id)
        found = [Session(*row) for row in self._sql.execute(statement, (*given, before_at, *after, rows))]
        deliveries: dict[int, list[Delivery]] = {one.id: [] for one in found if wanted.operator in (None, one.operator)}
        for row in self._sql.execute(DELIVERIES_OF_ALL, (list(deliveries),)):
            delivery = delivery_of(row)
            deliveries[delivery.session].append(delivery)
        page = [(one, deliveries[one.id]) for one in found if one.id in deliveries]
        last = found[-1] if len(found) == rows else None
        return Ended(page, None if last is None else (last.ended_at or 0, last.id))

    def gates(self) -> dict[str, Gate]:
        """The gate of each operator."""
        return {name: Gate(*gate) for name, *gate in self._sql.execute(GATES)}

    def committed_at(self) -> int:
        """The wall time before which every end is stored (Archive)."""
        return self._time(COMMITTED_AT)

    def now_at(self) -> int:
        """Wall time of the server (Archive)."""
        return self._time(NOW_AT)

    def _time(self, statement: str) -> int:
        row = self._sql.execute(statement).fetchone()
        assert row is not None  # noqa: S101 - for the type checker: an aggregate has a row
        return int(row[0])


@contextmanager
def open_archive(url: str, password: str | None) -> Iterator[Archive]:
    """Opens the database for reading. Raises DatabaseError, which names the database, also for errors inside the
    context.
    """
    database = Database(url, password, "export")
    try:
        with database.connect(prepares=True) as sql:
            with suppress(psycopg.Error):  # a standby sends no hints
                # Daemons that have nothing to do answer this hint with a transaction, which moves `committed_at` on
                send(sql, "")
            yield Archive(sql)
    except psycopg.Error as error:
        raise DatabaseError(f"{database.title}: cannot be read: {said(error)}") from error
