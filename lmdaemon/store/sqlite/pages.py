"""Reads for people: single sessions and deliveries, and pages of them. Only `one_delivery` reads a body and a token.

The functions must run inside a read transaction. Each statement uses an index and reads a bounded number of rows,
however many match; tests/store/sqlite/test_pages.py checks their query plans.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from typing import Any, TypeVar

import orjson

from lmdaemon.model import DELIVERY_STATES, Delivery, Session
from lmdaemon.store.contract import PAGE_BYTES, Dead, Page
from lmdaemon.store.sqlite.rows import DELIVERY, MAY_BE_SENT, as_rows, fetch, number_of, to_json
from lmdaemon.store.verbs import Died, DiedRow

BLOCK = 100  # rows read by one statement
PLAYER_BLOCK = 1000  # sessions of a player looked at by one statement
PLAYER_ROWS = 10_000  # sessions of a player looked at for one page; few of them may be in the state asked for
BEYOND = 2**63 - 1  # every id and every time is below it

_Row = TypeVar("_Row", Session, Delivery)

# The columns of a delivery in a list: without its body, which is the last column, and with empty values for history and
# token.
_LISTED = ", ".join(
    {"session_id": "s.session_id", "token": "NULL", "history": "'[]'"}.get(name, f"d.{name}")
    for name in Delivery._fields[:-1]
)
_SESSION = ", ".join("NULL" if name in ("token", "extra") else name for name in Session._fields)


# Ids of active sessions of an operator, newest first.
_ACTIVE = """
SELECT json_group_array(id) FROM (SELECT id FROM session WHERE operator = ? AND reason IS NULL AND id < ?
                                  ORDER BY id DESC LIMIT ?)"""
# Ids of ended sessions of an operator, newest first.
_ENDED = _ACTIVE.replace("IS NULL", "IS NOT NULL")
# Ids of sessions of a player with an operator, in any state, newest first.
_OF_PLAYER = """
SELECT json_group_array(id) FROM (SELECT id FROM session WHERE operator = ? AND player_id = ? AND id < ?
                                  ORDER BY id DESC LIMIT ?)"""
# Ids of a player's sessions in one state, for which there is no index; how many sessions were looked at; the id of the
# last one that was looked at.
_OF_PLAYER_IN_STATE = """
SELECT json_group_array(id) FILTER (WHERE (reason IS NULL) = ?), count(*), min(id)
FROM (SELECT id, reason FROM session WHERE operator = ? AND player_id = ? AND id < ? ORDER BY id DESC LIMIT ?)"""
# Sessions with an id, of some operators; one index lookup for each operator.
_OF_ID = f"""
SELECT {as_rows("s.id, s.player_id")} FROM json_each(?) AS name
JOIN session s ON s.operator = name.value AND s.session_id = ? WHERE s.id < ?"""
# Sessions by their ids, without columns that are not shown.
_SESSIONS = f"SELECT {as_rows(_SESSION)} FROM session WHERE id IN (SELECT value FROM json_each(?))"

# Ids of all deliveries, newest first.
_ALL = """
SELECT json_group_array(id) FROM (SELECT id FROM delivery WHERE id < ? ORDER BY id DESC LIMIT ?)"""
# Ids of deliveries of one operator and sink in one state, newest first.
_OF_LANE = """
SELECT json_group_array(id) FROM (SELECT id FROM delivery WHERE operator = ? AND sink = ? AND state = ? AND id < ?
                                  ORDER BY id DESC LIMIT ?)"""
# The next sink of an operator after a given one: one step in the index.
_NEXT_SINK = "SELECT sink FROM delivery WHERE operator = ? AND sink > ? ORDER BY sink LIMIT 1"
# Whether any of these operators has a sink: one step in the index for each.
_HAS_SINK = """
SELECT count(*) FROM (SELECT 1 FROM json_each(?) AS name
                      WHERE EXISTS (SELECT 1 FROM delivery WHERE operator = name.value AND sink = ?) LIMIT 1)"""
# Deliveries by their ids, without columns that are not shown.
_DELIVERIES = f"""
SELECT {as_rows(_LISTED)} FROM delivery d JOIN session s ON s.id = d.session
WHERE d.id IN (SELECT value FROM json_each(?))"""

# One session by its key.
_ONE_SESSION = f"SELECT {_SESSION} FROM session WHERE operator = ? AND session_id = ?"
# The deliveries of a session.
_ITS_DELIVERIES = f"""
SELECT {as_rows(_LISTED)} FROM delivery d JOIN session s ON s.id = d.session WHERE d.session = ?"""
# One delivery by its number, whole.
_ONE_DELIVERY = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session WHERE d.id = ?"""

# Dead deliveries of an operator in the order in which they died: id, when it died, whether it can be sent again, cause
# of the last failure.
_DIED = f"""
SELECT {as_rows("id, settled_at, may_be_sent, cause")}
FROM (SELECT id, settled_at, {MAY_BE_SENT} AS may_be_sent, coalesce(last_error, '') AS cause FROM delivery
      WHERE operator = ? AND state = 'dead' AND discarded IS NULL AND (settled_at, id) > (?, ?) AND settled_at < ?
      AND created_at >= ? AND created_at < ? AND coalesce(last_error, '') = coalesce(?, last_error, '')
      ORDER BY settled_at, id LIMIT ?)"""


def one_session(sql: sqlite3.Connection, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
    """A session with its deliveries, oldest first; None: unknown."""
    row = sql.execute(_ONE_SESSION, (operator, session_id)).fetchone()
    if row is None:
        return None
    session = Session(*row)
    return session, sorted(_delivery(row) for row in fetch(sql, _ITS_DELIVERIES, session.id))


def one_delivery(sql: sqlite3.Connection, webhook_id: str) -> Delivery | None:
    """A delivery by its public id, with its history, its body and the session's token; None: unknown."""
    number = number_of(webhook_id)
    row = None if number is None else sql.execute(_ONE_DELIVERY, (number,)).fetchone()
    delivery = None if row is None else Delivery._make(row)
    return delivery if delivery is not None and delivery.webhook_id == webhook_id else None


def session_page(
    sql: sqlite3.Connection, operator: str, state: str | None, player_id: str | None, limit: int, after: int
) -> Page[Session]:
    """Sessions of an operator with ids below `after`."""
    if player_id is not None and state is not None:
        ids, go_on = _ids_of_player_in(sql, state == "active", operator, player_id, limit + 1, after)
        return _page(_sessions(sql, ids[:limit]), ids, go_on)
    if player_id is not None:
        parts = [_ids(sql, _OF_PLAYER, (operator, player_id), after)]
    else:
        wanted = {"active": [_ACTIVE], "ended": [_ENDED], None: [_ACTIVE, _ENDED]}[state]
        parts = [_ids(sql, statement, (operator,), after) for statement in wanted]
    ids = _first(parts, limit + 1)
    return _page(_sessions(sql, ids[:limit]), ids)


def found_page(
    sql: sqlite3.Connection,
    operators: Sequence[str],
    session_id: str | None,
    player_id: str | None,
    limit: int,
    after: int,
) -> Page[Session]:
    """Sessions of these operators by their own or their player's id, with ids below `after`."""
    if session_id is not None:
        found = sorted(fetch(sql, _OF_ID, to_json(operators), session_id, after), reverse=True)
        ids = [number for number, player in found if player_id in (None, player)][: limit + 1]
    else:
        ids = _first([_ids(sql, _OF_PLAYER, (name, player_id or ""), after) for name in operators], limit + 1)
    return _page(_sessions(sql, ids[:limit]), ids)


def delivery_page(
    sql: sqlite3.Connection,
    operators: Iterable[str],
    sink: str | None,
    state: str | None,
    limit: int,
    after: int,
) -> Page[Delivery]:
    """Deliveries of these operators with ids below `after`.

    It takes one step in the index for each operator and sink, and a few for each row of the page.
    """
    states = DELIVERY_STATES if state is None else [state]
    lanes = [(name, one) for name in operators for one in ([sink] if sink else _sinks(sql, name))]
    ids = _first([_ids(sql, _OF_LANE, (*lane, one), after) for lane in lanes for one in states], limit + 1)
    return _page(_deliveries(sql, ids[:limit]), ids)


def newest_deliveries(sql: sqlite3.Connection, limit: int, after: int) -> Page[Delivery]:
    """Deliveries of all operators with ids below `after`."""
    ids = _first([_ids(sql, _ALL, (), after)], limit + 1)
    return _page(_deliveries(sql, ids[:limit]), ids)


def has_sink(sql: sqlite3.Connection, operators: Sequence[str], sink: str) -> bool:
    """Whether one of these operators has deliveries for this sink."""
    return bool(sql.execute(_HAS_SINK, (to_json(operators), sink)).fetchone()[0])


def died(sql: sqlite3.Connection, operator: str, dead: Dead, after: tuple[int, int], limit: int) -> Died:
    """Dead deliveries of an operator in the order in which they died, beginning after `after` (settled_at, id)."""
    until_at, ended_until_at = (BEYOND if at is None else at for at in (dead.until_at, dead.ended_until_at))
    given = (operator, *after, until_at, dead.ended_since_at, ended_until_at, dead.cause, limit)
    found = sorted((DiedRow(*row) for row in fetch(sql, _DIED, *given)), key=lambda row: (row.settled_at, row.id))
    return Died(found, (found[-1].settled_at, found[-1].id) if len(found) == limit else None)


# -- a page is read in two steps: its ids first, then their rows


def _first(parts: Sequence[Iterator[int]], count: int) -> list[int]:
    """The `count` greatest ids of several descending sequences. Each sequence is read only as far as needed."""
    return list(islice(merge(*parts, reverse=True), count))


def _ids(sql: sqlite3.Connection, statement: str, arguments: tuple[str, ...], after: int) -> Iterator[int]:
    """All ids of a statement, read BLOCK at a time."""
    found = [after]
    while found:
        found = fetch(sql, statement, *arguments, found[-1], BLOCK)
        yield from found


def _ids_of_player_in(
    sql: sqlite3.Connection, active: bool, operator: str, player_id: str, count: int, after: int
) -> tuple[list[int], int | None]:
    """Ids of a player's sessions in a state, and the id after which to go on; None: there are no more."""
    ids: list[int] = []
    for _ in range(PLAYER_ROWS // PLAYER_BLOCK):
        arguments = (active, operator, player_id, after, PLAYER_BLOCK)
        found, looked_at, last = sql.execute(_OF_PLAYER_IN_STATE, arguments).fetchone()
        ids += sorted(orjson.loads(found), reverse=True)
        if looked_at < PLAYER_BLOCK:
            return ids[:count], None
        after = last
        if len(ids) >= count:
            break
    return ids[:count], after


def _sinks(sql: sqlite3.Connection, operator: str) -> Iterator[str]:
    row = ("",)
    while row := sql.execute(_NEXT_SINK, (operator, row[0])).fetchone():
        yield row[0]


def _sessions(sql: sqlite3.Connection, ids: Sequence[int]) -> list[Session]:
    return [Session(*row) for row in _rows(sql, _SESSIONS, ids)]


def _deliveries(sql: sqlite3.Connection, ids: Sequence[int]) -> list[Delivery]:
    return [_delivery(row) for row in _rows(sql, _DELIVERIES, ids)]


def _delivery(row: Sequence[Any]) -> Delivery:
    return Delivery._make((*row, b""))


def _rows(sql: sqlite3.Connection, statement: str, ids: Sequence[int]) -> list[list[Any]]:
    """The rows with these ids, in their order, without those that come after PAGE_BYTES are reached."""
    rows: list[list[Any]] = []
    size = 0
    for first in range(0, len(ids), BLOCK):
        (text,) = sql.execute(statement, (to_json(ids[first : first + BLOCK]),)).fetchone()
        rows += sorted(orjson.loads(text), reverse=True)
        size += len(text)
        if size > PAGE_BYTES:
            break
    return rows


def _page(rows: list[_Row], ids: Sequence[int], beyond: int | None = None) -> Page[_Row]:
    """A page of the rows found for these ids. `beyond` is the id after which to go on when all of them were found."""
    return Page(rows, rows[-1].id if len(rows) < len(ids) else beyond)
