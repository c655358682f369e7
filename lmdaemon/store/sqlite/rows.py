"""Passes rows to SQL and back as JSON, and has the statements that several modules share. Each step of a statement,
that is each row of an executemany() or of a result, releases the interpreter's lock and has to wait for it again,
behind a busy event loop. So many rows are passed as one JSON array.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from lmdaemon.model import Delivery, Session

SESSION = ", ".join(Session._fields)
DELIVERY = ", ".join(f"s.{name}" if name in ("session_id", "token") else f"d.{name}" for name in Delivery._fields)


def given(*names: str) -> str:
    """An expression for the columns of rows that json_each(?) returns, each row being a JSON array."""
    return ", ".join(f"json_extract(value, '$[{place}]') AS {name}" for place, name in enumerate(names))


def as_rows(columns: str) -> str:
    """An expression for one column that has all rows of a result, as a JSON array of arrays."""
    return f"json_group_array(json_array({columns}))"


# A session by its key.
_SESSION_BY_KEY = f"SELECT {SESSION} FROM session WHERE operator = ? AND session_id = ?"
# A delivery by its number.
_DELIVERY_BY_ID = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session WHERE d.id = ?"""

# Whether a delivery can be sent, now or again. An HTTP delivery without a body was dead from the beginning.
MAY_BE_SENT = "(state = 'pending' OR (state = 'dead' AND (sink <> 'http' OR length(body) > 0)))"

# Ids of sessions that ended before a time, in the order in which they ended, after a given (ended_at, id).
ENDED_BEFORE = f"""
SELECT {as_rows("id, ended_at")}
FROM (SELECT id, ended_at FROM session WHERE ended_at IS NOT NULL AND ended_at < ? AND (ended_at, id) > (?, ?)
      ORDER BY ended_at, id LIMIT ?)"""


def to_json(value: Sequence[Any] | Mapping[str, Any]) -> str:
    """A value as JSON text, to be bound to a statement."""
    return orjson.dumps(value).decode()


def fetch(sql: sqlite3.Connection, statement: str, *arguments: Any) -> list[Any]:
    """The rows of a statement that returns them as one JSON array."""
    found: list[Any] = orjson.loads(sql.execute(statement, arguments).fetchone()[0])
    return found


def ids_of(rows: Sequence[Sequence[int]]) -> str:
    """The ids of rows, which come first in each, as JSON."""
    return to_json([row[0] for row in rows])


def scalar(cursor: sqlite3.Cursor) -> int | None:
    """The first column of the first row, or None."""
    row = cursor.fetchone()
    return None if row is None else row[0]


def fetch_sessions(sql: sqlite3.Connection, statement: str, *arguments: Any) -> list[Session]:
    """The sessions of a statement that returns them as one JSON array."""
    return [Session(*row) for row in fetch(sql, statement, *arguments)]


def session_by_key(sql: sqlite3.Connection, operator: str, session_id: str) -> Session | None:
    """The session with this id, or None."""
    row = sql.execute(_SESSION_BY_KEY, (operator, session_id)).fetchone()
    return None if row is None else Session(*row)


def number_of(webhook_id: str) -> int | None:
    """The row number in the public id of a delivery; None if the text is not such an id."""
    number = webhook_id.removeprefix("msg_").partition("_")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) <= 18 else None


def delivery_by_webhook_id(sql: sqlite3.Connection, webhook_id: str) -> Delivery | None:
    """The delivery with this public id, or None."""
    number = number_of(webhook_id)
    row = None if number is None else sql.execute(_DELIVERY_BY_ID, (number,)).fetchone()
    delivery = None if row is None else Delivery(*row)
    return delivery if delivery is not None and delivery.webhook_id == webhook_id else None
