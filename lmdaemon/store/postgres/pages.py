"""Reads for people: single sessions and deliveries, and pages of them. Only `one_delivery` reads a body and a token.

Each statement goes through an index and reads a bounded number of rows, however many rows match.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lmdaemon.model import DELIVERY_STATES, Delivery, Session
from lmdaemon.store.contract import PAGE_BYTES, Dead, Page
from lmdaemon.store.postgres.batch import DELIVERY, MAY_BE_SENT, delivery_of, number_of, to_json
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.store.verbs import Died, DiedRow

BLOCK = 100  # rows read by one statement
PLAYER_ROWS = 10_000  # sessions of a player looked at for one page: few of them may be in the state that is asked for
BEYOND = 2**63 - 1  # every id is below it

_Row = TypeVar("_Row", Session, Delivery)

# The columns of a delivery in a list, with empty values for its body, its history and the session's token.
_HIDDEN = {"session_id": "s.session_id", "token": "NULL", "history": "'[]'", "body": "''::bytea"}
_LISTED = ", ".join(_HIDDEN.get(name, f"d.{name}") for name in Delivery._fields)
_SESSION = ", ".join("NULL" if name in ("token", "extra") else name for name in Session._fields)

# Ids of active sessions of an operator, newest first.
ACTIVE = "SELECT id FROM lmdaemon.session WHERE operator = %s AND reason IS NULL AND id < %s ORDER BY id DESC LIMIT %s"
# Ids of ended sessions of an operator, newest first.
ENDED = ACTIVE.replace("IS NULL", "IS NOT NULL")
# Ids of sessions of a player with an operator, in any state, newest first.
OF_PLAYER = (
    "SELECT id FROM lmdaemon.session WHERE operator = %s AND player_id = %s AND id < %s ORDER BY id DESC LIMIT %s"
)
# Ids of a player's sessions in one state, for which there is no index, among the newest ones; how many sessions were
# looked at, and the id of the last of them.
OF_PLAYER_IN_STATE = """
SELECT array_agg(id ORDER BY id DESC) FILTER (WHERE (reason IS NULL) = %s), count(*), min(id)
FROM (SELECT id, reason FROM lmdaemon.session WHERE operator = %s AND player_id = %s AND id < %s
      ORDER BY id DESC LIMIT %s) AS of"""
# Ids of the sessions of some operators with a session id, and perhaps of a player, newest first.
OF_ID = """
SELECT s.id FROM json_array_elements_text(%s::json) AS name JOIN lmdaemon.session s ON s.operator = name
WHERE s.session_id = %s AND s.player_id = coalesce(%s::text, s.player_id) AND s.id < %s ORDER BY s.id DESC LIMIT %s"""
# Ids of a player's sessions with some operators, newest first.
OF_PLAYER_ANYWHERE = """
SELECT found.id FROM json_array_elements_text(%(operators)s::json) AS name, LATERAL (
    SELECT id FROM lmdaemon.session WHERE operator = name AND player_id = %(player)s AND id < %(after)s
    ORDER BY id DESC LIMIT %(count)s) AS found
ORDER BY found.id DESC LIMIT %(count)s"""
# Sessions by their ids, without columns that are not shown.
SESSIONS = f"SELECT {_SESSION} FROM lmdaemon.session WHERE id = ANY (%s) ORDER BY id DESC"

# Ids of all deliveries, newest first.
ALL = "SELECT id FROM lmdaemon.delivery WHERE id < %s ORDER BY id DESC LIMIT %s"
# Ids of deliveries of some operators, sinks and states, newest first: one index lookup for each lane, and one for each
# of its rows.
OF_LANES = """
WITH RECURSIVE its (operator, sink) AS (
    SELECT name, (SELECT min(sink) FROM lmdaemon.delivery WHERE operator = name)
    FROM json_array_elements_text(%(operators)s::json) AS name
    UNION ALL
    SELECT its.operator, (
        SELECT min(d.sink) FROM lmdaemon.delivery d WHERE d.operator = its.operator AND d.sink > its.sink)
    FROM its WHERE its.sink IS NOT NULL)
SELECT found.id
FROM its, json_array_elements_text(%(states)s::json) AS wanted (state), LATERAL (
    SELECT id FROM lmdaemon.delivery d
    WHERE d.operator = its.operator AND d.sink = its.sink AND d.state = wanted.state AND d.id < %(after)s
    ORDER BY id DESC LIMIT %(count)s) AS found
WHERE its.sink = coalesce(%(sink)s::text, its.sink)
ORDER BY found.id DESC LIMIT %(count)s"""
# Whether any of some operators has a sink; one index lookup for each.
HAS_SINK = """
SELECT EXISTS (SELECT 1 FROM json_array_elements_text(%s::json) AS name
               WHERE EXISTS (SELECT 1 FROM lmdaemon.delivery d WHERE d.operator = name AND d.sink = %s))"""
# Deliveries by their ids, without columns that are not shown.
DELIVERIES = f"""
SELECT {_LISTED} FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session
WHERE d.id = ANY (%s) ORDER BY d.id DESC"""

# One session by its key.
ONE_SESSION = f"SELECT {_SESSION} FROM lmdaemon.session WHERE operator = %s AND session_id = %s"
# The deliveries of a session, oldest first.
ITS_DELIVERIES = f"""
SELECT {_LISTED}
FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session WHERE d.session = %s ORDER BY d.id"""
# One delivery by its number, with its body, its history and the token of its session.
ONE_DELIVERY = f"""
SELECT {DELIVERY}
FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session WHERE d.id = %s"""

# Dead deliveries of an operator in the order in which they died: id, when it died, whether it may be sent again, cause
# of the last failure.
DIED = f"""
SELECT id, settled_at, {MAY_BE_SENT}, coalesce(last_error, '') FROM lmdaemon.delivery
WHERE operator = %s AND state = 'dead' AND discarded IS NULL AND (settled_at, id) > (%s, %s) AND settled_at < %s
      AND created_at >= %s AND created_at < %s AND coalesce(last_error, '') = coalesce(%s::text, last_error, '')
ORDER BY settled_at, id LIMIT %s"""


def one_session(sql: Connection, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
    """A session with its deliveries, oldest first."""
    row = sql.execute(ONE_SESSION, (operator, session_id)).fetchone()
    if row is None:
        return None
    session = Session(*row)
    return session, [delivery_of(row) for row in sql.execute(ITS_DELIVERIES, (session.id,))]


def one_delivery(sql: Connection, webhook_id: str) -> Delivery | None:
    """A delivery by its public id, with its history, its body and the session's token."""
    number = number_of(webhook_id)
    row = None if number is None else sql.execute(ONE_DELIVERY, (number,)).fetchone()
    delivery = None if row is None else delivery_of(row)
    return delivery if delivery is not None and delivery.webhook_id == webhook_id else None


def session_page(
    sql: Connection, operator: str, state: str | None, player_id: str | None, limit: int, after: int
) -> Page[Session]:
    """Sessions of an operator with ids below `after`."""
    if player_id is not None and state is not None:
        arguments = (state == "active", operator, player_id, after, PLAYER_ROWS)
        ids, looked_at, last = sql.execute(OF_PLAYER_IN_STATE, arguments).fetchone() or (None, 0, None)
        ids = (ids or [])[: limit + 1]
        return _page(_sessions(sql, ids[:limit]), ids, last if looked_at == PLAYER_ROWS else None)
    if player_id is not None:
        ids = _ids(sql, OF_PLAYER, operator, player_id, after, limit + 1)
    else:
        wanted = {"active": [ACTIVE], "ended": [ENDED], None: [ACTIVE, ENDED]}[state]
        found = [number for statement in wanted for number in _ids(sql, statement, operator, after, limit + 1)]
        ids = sorted(found, reverse=True)[: limit + 1]
    return _page(_sessions(sql, ids[:limit]), ids)


def found_page(
    sql: Connection, operators: Sequence[str], session_id: str | None, player_id: str | None, limit: int, after: int
) -> Page[Session]:
    """Sessions of these operators by their own or their player's id, with ids below `after`."""
    names = to_json(operators)
    if session_id is not None:
        ids = _ids(sql, OF_ID, names, session_id, player_id, after, limit + 1)
    else:
        wanted = {"operators": names, "player": player_id or "", "after": after, "count": limit + 1}
        ids = [row[0] for row in sql.execute(OF_PLAYER_ANYWHERE, wanted)]
    return _page(_sessions(sql, ids[:limit]), ids)


def delivery_page(
    sql: Connection, operators: Iterable[str], sink: str | None, state: str | None, limit: int, after: int
) -> Page[Delivery]:
    """Deliveries of these operators with ids below `after`."""
    states = DELIVERY_STATES if state is None else (state,)
    wanted = {"operators": to_json(list(operators)), "sink": sink, "states": to_json(states), "after": after}
    ids = [row[0] for row in sql.execute(OF_LANES, {**wanted, "count": limit + 1})]
    return _page(_deliveries(sql, ids[:limit]), ids)


def newest_deliveries(sql: Connection, limit: int, after: int) -> Page[Delivery]:
    """Deliveries of all operators with ids below `after`."""
    ids = _ids(sql, ALL, after, limit + 1)
    return _page(_deliveries(sql, ids[:limit]), ids)


def has_sink(sql: Connection, operators: Sequence[str], sink: str) -> bool:
    """Whether any of these operators has deliveries for this sink."""
    found = sql.execute(HAS_SINK, (to_json(operators), sink)).fetchone()
    return bool(found and found[0])


def died(sql: Connection, operator: str, dead: Dead, after: tuple[int, int], limit: int) -> Died:
    """Dead deliveries of an operator in the order in which they died, beginning after `after` (settled_at, id)."""
    until_at, ended_until_at = (BEYOND if at is None else at for at in (dead.until_at, dead.ended_until_at))
    given = (operator, *after, until_at, dead.ended_since_at, ended_until_at, dead.cause, limit)
    found = [DiedRow(*row) for row in sql.execute(DIED, given)]
    return Died(found, (found[-1].settled_at, found[-1].id) if len(found) == limit else None)


# -- a page is read in two steps: its ids first, then their rows


def _ids(sql: Connection, statement: str, *arguments: Any) -> list[int]:
    return [row[0] for row in sql.execute(statement, arguments)]


def _sessions(sql: Connection, ids: Sequence[int]) -> list[Session]:
    return [Session(*row) for row in _rows(sql, SESSIONS, ids)]


def _deliveries(sql: Connection, ids: Sequence[int]) -> list[Delivery]:
    return [delivery_of(row) for row in _rows(sql, DELIVERIES, ids)]


def _rows(sql: Connection, statement: str, ids: Sequence[int]) -> list[tuple[Any, ...]]:
    """The rows with these ids, in their order, without those that come after PAGE_BYTES are reached."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    for first in range(0, len(ids), BLOCK):
        block = sql.execute(statement, (list(ids[first : first + BLOCK]),)).fetchall()
        rows += block
        size += sum(len(str(value)) for row in block for value in row)
        if size > PAGE_BYTES:
            break
    return rows


def _page(rows: list[_Row], ids: Sequence[int], beyond: int | None = None) -> Page[_Row]:
    """A page of the rows found for these ids. `beyond` is the id after which to go on when all of them were found."""
    return Page(rows, rows[-1].id if len(rows) < len(ids) else beyond)
