"""Everything that changes the tables: open, touch, close, record, end what is due, settle, retry, prune.

Run by the writer, in the order they were queued: each operation on its thread for all neighbours of its kind at once,
in one transaction; or all of a batch `AtOnce`, as a single statement. It decides nothing about the protocol or the
network: what a session's end means for which sink is handed in as `sinks_of`.
"""

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import orjson

from lmdaemon.database import StoreError
from lmdaemon.model import Delivery, DeliveryState, Gate, Reason, Session
from lmdaemon.rows import (
    ENDED_BEFORE,
    SESSION,
    as_rows,
    delivery_by_webhook_id,
    execute_rows,
    fetch,
    fetch_sessions,
    given,
    ids_of,
    to_json,
)

SWEEP_ROWS = 100  # sessions looked at in one sweep operation: about 3 ms on the writer
PRUNE_ROWS = 500
RETRY_ROWS = 500
RETRY_SPACING_MS = 100  # dead deliveries come back at most ten a second for an operator
REVISIT_MS = 3_600_000  # a due session of an operator that is not configured is looked at again this much later
AT_ONCE_MAX = 300  # operations worked out on the event loop in one go: 2 ms, of the largest notices 20
HISTORY_MAX = 50  # attempts kept per delivery, the latest


class NewDelivery(NamedTuple):
    """A sink of an ended session: its body as it will be sent, or why it never can be."""

    sink: str
    body: bytes
    impossible: str | None = None


class Opening(NamedTuple):
    operator: str
    session_id: str
    player_id: str
    token: str | None
    attributes: str | None
    idle_ms: int
    lifetime_ms: int  # 0: none


class Opened(NamedTuple):
    outcome: Literal["created", "open", "differs", "ended"]
    session: Session


class Touching(NamedTuple):
    operator: str
    session_ids: Sequence[str]


class Touched(NamedTuple):
    touched: int
    unknown: list[str]
    ended: list[str]


class Key(NamedTuple):
    operator: str
    session_id: str


class Recording(NamedTuple):
    """A notice to record. `token` None: not to be compared; `accept_unknown` False: an unknown session is refused."""

    operator: str
    session_id: str
    player_id: str
    token: str | None
    compare_token: bool
    accept_unknown: bool
    extra: str | None
    idle_ms: int


Recorded = Literal["ended", "repeated", "unknown_session", "player_mismatch", "bad_token"]


class Swept(NamedTuple):
    """What one sweep did. `looked_at` equal to SWEEP_ROWS says that more may be due."""

    ended: int
    looked_at: int


class Settlement(NamedTuple):
    """The result of one attempt: what becomes of the row, after how many milliseconds a pending one is due again, the
    history's entry (None when nothing was sent), whether it counts as an attempt, and what it does to the operator's
    gate at the wall time of its commit (None for a plug-in, which has none).
    """

    delivery: Delivery
    state: DeliveryState
    wait_ms: int
    step: int
    attempt: Mapping[str, Any] | None = None
    spent: bool = True
    gate: Callable[[Gate, int], Gate] | None = None


class Settled(NamedTuple):
    """When the row is due again, if it is pending, and the operator's gate before and after."""

    due_at: int
    before: Gate
    after: Gate


@dataclass(slots=True)
class Figures:
    """Counts kept up in every transaction, so that nobody ever counts rows."""

    live: int = 0
    pending: int = 0
    dead: int = 0


_NEW_SESSION = tuple(name for name in Session._fields if name != "id")
GATE = tuple(field.name for field in fields(Gate))

SinksOf = Callable[[Session], Sequence[NewDelivery]]


class Change:
    """One transaction of the writer: the two times all of it happens at, and what it changed."""

    def __init__(
        self,
        service_ms: int,
        wall_at: int,
        set_back_ms: int,
        sinks_of: SinksOf,
        known: frozenset[str],
        gates: Mapping[str, Gate],
    ) -> None:
        self.service_ms = service_ms
        self.wall_at = wall_at
        self.set_back_ms = set_back_ms  # by so much, since the last transaction
        self.sinks_of = sinks_of
        self.known = known
        self.gates = gates
        self.figures: dict[str, Figures] = {}
        self.ended: list[Session] = []
        self.due: dict[tuple[str, str], int] = {}
        self.new_gates: dict[str, Gate] = {}
        self.next_due_ms: int | None = None
        self.next_lifetime_at: int | None = None
        self.looked_ahead = False
        self.last_session = 0  # the greatest number given to a session
        self.is_at_once = False
        self.met_known = False  # what was to be added at once was there already
        self.sql: sqlite3.Connection

    @property
    def seen_ms(self) -> int:
        """What a touch is stamped with: rounded up, so that no session ends a fraction of a millisecond early."""
        return self.service_ms + 1

    def twin(self) -> "Change":
        """Another transaction at the same time."""
        twin = Change(self.service_ms, self.wall_at, self.set_back_ms, self.sinks_of, self.known, self.gates)
        twin.is_at_once = True
        return twin

    def bind(self, connection: sqlite3.Connection) -> None:
        self.sql = connection
        if self.set_back_ms:
            _set_back(self)

    def of(self, operator: str) -> Figures:
        figures = self.figures.get(operator)
        if figures is None:
            figures = self.figures[operator] = Figures()
        return figures

    def note_due(self, operator: str, sink: str, due_at: int) -> None:
        known = self.due.get((operator, sink))
        self.due[operator, sink] = due_at if known is None else min(known, due_at)

    def note_deadline(self, due_ms: int, lifetime_at: int | None) -> None:
        self.next_due_ms = least(self.next_due_ms, due_ms)
        self.next_lifetime_at = least(self.next_lifetime_at, lifetime_at)

    @property
    def figure_rows(self) -> list[tuple[Any, ...]]:
        return [(name, *_triple(figures)) for name, figures in self.figures.items()]

    @property
    def gate_rows(self) -> list[tuple[Any, ...]]:
        return [(name, *astuple(gate)) for name, gate in self.new_gates.items()]

    def finish(self) -> None:
        """Keeps up the figures, the gates and the clock in the same transaction."""
        execute_rows(self.sql, _ADD_FIGURES, self.figure_rows)
        execute_rows(self.sql, _PUT_GATES, self.gate_rows)
        self.sql.execute(_PUT_CLOCK, (self.service_ms, self.wall_at))


_ADD_FIGURES = f"""
INSERT INTO operator (name, live, pending, dead)
SELECT {given("name", "live", "pending", "dead")} FROM json_each(?) WHERE TRUE
ON CONFLICT (name) DO UPDATE SET live = live + excluded.live, pending = pending + excluded.pending,
                                 dead = dead + excluded.dead"""
_PUT_GATES = f"""
INSERT INTO operator (name, {", ".join(GATE)}) SELECT {given("name", *GATE)} FROM json_each(?) WHERE TRUE
ON CONFLICT (name) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in GATE)}"""
_PUT_CLOCK = "UPDATE clock SET service_ms = ?, wall_at = ?"


def _add_sessions(*columns: str) -> str:
    return f"""
INSERT INTO session ({", ".join(columns)}, due_ms)
SELECT *, seen_ms + idle_ms FROM (SELECT {given(*columns)} FROM json_each(?))"""


_ADD_SESSIONS = _add_sessions(*_NEW_SESSION) + " WHERE TRUE ON CONFLICT (operator, session_id) DO NOTHING"
_SESSIONS_BY_KEY = f"""
SELECT {as_rows(SESSION)} FROM session WHERE operator = ? AND session_id IN (SELECT value FROM json_each(?))"""
_TOUCH = """
UPDATE session SET seen_ms = ?, seen_at = ?
WHERE operator = ? AND session_id IN (SELECT value FROM json_each(?)) AND reason IS NULL"""
_STATES = f"""
SELECT {as_rows("session_id, reason IS NULL")} FROM session
WHERE operator = ? AND session_id IN (SELECT value FROM json_each(?))"""
_END = f"""
UPDATE session SET reason = ?, ended_at = ?, extra = coalesce(?, extra), token = ended.token
FROM (SELECT {given("id", "token")} FROM json_each(?)) AS ended WHERE session.id = ended.id"""
_DUE = f"""
SELECT {as_rows(SESSION)}
FROM (SELECT {SESSION} FROM session WHERE reason IS NULL AND due_ms <= ? ORDER BY due_ms LIMIT ?)"""
_DUE_LIFETIME = f"""
SELECT {as_rows(SESSION)}
FROM (SELECT {SESSION} FROM session WHERE reason IS NULL AND lifetime_at IS NOT NULL AND lifetime_at <= ?
      ORDER BY lifetime_at LIMIT ?)"""
_MOVE_DUE = f"""
UPDATE session SET due_ms = moved.due_ms FROM (SELECT {given("id", "due_ms")} FROM json_each(?)) AS moved
WHERE session.id = moved.id"""
_MOVE_LIFETIME = f"""
UPDATE session SET lifetime_at = moved.lifetime_at
FROM (SELECT {given("id", "lifetime_at")} FROM json_each(?)) AS moved WHERE session.id = moved.id"""
NEXT = """
SELECT (SELECT due_ms FROM session WHERE reason IS NULL ORDER BY due_ms LIMIT 1),
       (SELECT lifetime_at FROM session WHERE reason IS NULL AND lifetime_at IS NOT NULL
        ORDER BY lifetime_at LIMIT 1)"""

_NEW_DELIVERY = (
    *("nonce", "session", "operator", "sink", "state", "created_at", "due_at", "settled_at", "aged_from_at"),
    *("held_base_ms", "last_error", "body"),
)
_ADD_DELIVERIES = f"""
INSERT INTO delivery ({", ".join(_NEW_DELIVERY)})
SELECT {", ".join(_NEW_DELIVERY[:-1])}, CAST(body AS BLOB)
FROM (SELECT {given(*_NEW_DELIVERY)} FROM json_each(?))"""


_RESULT = (
    "id",
    "state",
    "due_at",
    "settled_at",
    "attempts",
    "step",
    "last_status",
    "last_code",
    "last_error",
    "history",
)
_SETTLE = f"""
UPDATE delivery SET {", ".join(f"{name} = result.{name}" for name in _RESULT[1:])},
                    body = CASE WHEN result.state = 'delivered' THEN x'' ELSE body END
FROM (SELECT {given(*_RESULT)} FROM json_each(?)) AS result
WHERE delivery.id = result.id AND delivery.state = 'pending'"""
# A delivery that may be sent again; an http one without a body could never be composed.
_MAY_BE_SENT = "(state = 'pending' OR (state = 'dead' AND (sink <> 'http' OR length(body) > 0)))"
_FORGET_TOKENS = f"""
UPDATE session SET token = digest.token FROM (SELECT {given("id", "token")} FROM json_each(?)) AS digest
WHERE session.id = digest.id AND NOT EXISTS (SELECT 1 FROM delivery WHERE session = session.id AND {_MAY_BE_SENT})"""
_SET_BACK = "UPDATE delivery SET due_at = max(due_at - ?, ?) WHERE state = 'pending' AND due_at > ?"
_REVIVE = f"""
UPDATE delivery SET state = 'pending', due_at = again.due_at, settled_at = NULL, step = 0,
                    aged_from_at = again.aged_from_at, held_base_ms = again.held_base_ms
FROM (SELECT {given("id", "due_at", "aged_from_at", "held_base_ms")} FROM json_each(?)) AS again
WHERE delivery.id = again.id"""
_DEAD = f"""
SELECT {as_rows("id, sink")} FROM delivery
WHERE id IN (SELECT value FROM json_each(?)) AND +operator = ? AND state = 'dead' AND {_MAY_BE_SENT}"""
_KEPT = """
SELECT json_group_array(session) FROM delivery
WHERE session IN (SELECT value FROM json_each(?)) AND (state = 'pending' OR settled_at >= ?)"""
_PRUNED_DEAD = """
SELECT operator, count(*) FROM delivery
WHERE session IN (SELECT value FROM json_each(?)) AND state = 'dead' GROUP BY operator"""
_PRUNE_DELIVERIES = "DELETE FROM delivery WHERE session IN (SELECT value FROM json_each(?))"
_PRUNE_SESSIONS = "DELETE FROM session WHERE id IN (SELECT value FROM json_each(?))"


# -- operations, told of by the verbs of Store: each runs on the writer's thread for all neighbours of its kind at once


def nothing(change: Change, arguments: Sequence[None]) -> list[None]:
    return list(arguments)


def open_sessions(change: Change, openings: Sequence[Opening]) -> list[Opened]:
    first: dict[Key, Opening] = {}
    for opening in openings:
        first.setdefault(Key(opening.operator, opening.session_id), opening)
    stored = dict(zip(first, _add(change, [_opened(change, opening) for opening in first.values()]), strict=True))
    results = []
    for opening in openings:
        key = Key(opening.operator, opening.session_id)
        session, added = stored[key]
        if added and first[key] is opening:
            results.append(_created(change, session))
        else:
            results.append(_open_again(change, opening, session))
    return results


def _created(change: Change, session: Session) -> Opened:
    change.of(session.operator).live += 1
    change.note_deadline(session.deadline_ms, session.lifetime_at)
    return Opened("created", session)


def _opened(change: Change, new: Opening) -> tuple[Any, ...]:
    """A row as in _NEW_SESSION."""
    now = change.wall_at
    lifetime_at = now + new.lifetime_ms if new.lifetime_ms else None
    named = (new.operator, new.session_id, new.player_id, new.token, new.attributes, None)
    return (*named, new.idle_ms, now, change.seen_ms, now, lifetime_at, None, None)


def _open_again(change: Change, new: Opening, known: Session) -> Opened:
    if known.reason is not None:
        return Opened("ended", known)
    if known.player_id != new.player_id or not _same(known.token, new.token):
        return Opened("differs", known)
    seen = (change.seen_ms, change.wall_at)
    change.sql.execute("UPDATE session SET seen_ms = ?, seen_at = ? WHERE id = ?", (*seen, known.id))
    return Opened("open", known._replace(seen_ms=seen[0], seen_at=seen[1]))


def _add(change: Change, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Session, bool]]:
    """Adds sessions (rows as in _NEW_SESSION) where none of that key is known. Each as stored, and if it is new."""
    if not rows:
        return []
    cursor = change.sql.execute(_ADD_SESSIONS, (to_json(rows),))
    added, last = cursor.rowcount, cursor.lastrowid or 0
    if added:  # otherwise that is the last row of another table
        change.last_session = last
    ids = range(last - added + 1, last + 1)  # SQLite numbers them in their order, one above the greatest so far
    if added == len(rows):
        return [(Session(number, *row), True) for number, row in zip(ids, rows, strict=True)]
    known = _known(change.sql, [Key(*row[:2]) for row in rows])
    stored = [known[Key(*row[:2])] for row in rows]
    return [(session, session.id in ids) for session in stored]


def touch_sessions(change: Change, touchings: Sequence[Touching]) -> list[Touched]:
    wanted: dict[str, set[str]] = {}
    for operator, session_ids in touchings:
        wanted.setdefault(operator, set()).update(session_ids)
    states = {operator: _touch_all(change, operator, session_ids) for operator, session_ids in wanted.items()}
    return [_touched(touching, *states[touching.operator]) for touching in touchings]


def _touch_all(change: Change, operator: str, session_ids: set[str]) -> tuple[set[str], set[str]]:
    """Touches and says which were active and which had ended."""
    ids = to_json(list(session_ids))
    stamp = (change.seen_ms, change.wall_at)
    # No RETURNING: each row that is fetched gives the interpreter lock away, and waits to have it back.
    if change.sql.execute(_TOUCH, (*stamp, operator, ids)).rowcount == len(session_ids):
        return session_ids, set()
    return _states(change.sql, operator, ids)


def _states(sql: sqlite3.Connection, operator: str, ids: str) -> tuple[set[str], set[str]]:
    """Which of them are active and which have ended."""
    active: set[str] = set()
    ended: set[str] = set()
    for session_id, is_active in fetch(sql, _STATES, operator, ids):
        (active if is_active else ended).add(session_id)
    return active, ended


def _touched(touching: Touching, active: set[str], ended: set[str]) -> Touched:
    session_ids = dict.fromkeys(touching.session_ids)
    if active >= session_ids.keys():  # as almost always
        return Touched(len(session_ids), [], [])
    return Touched(
        sum(session_id in active for session_id in session_ids),
        [session_id for session_id in session_ids if session_id not in active and session_id not in ended],
        [session_id for session_id in session_ids if session_id in ended],
    )


def close_sessions(change: Change, keys: Sequence[Key]) -> list[Session | None]:
    known = _known(change.sql, set(keys))
    live = [session for session in known.values() if session.reason is None]
    known.update((Key(session.operator, session.session_id), session) for session in _end(change, live, "closed"))
    return [known.get(key) for key in keys]


def record_notices(change: Change, recordings: Sequence[Recording]) -> list[Recorded]:
    new: dict[Key, Recording] = {}
    for one in recordings:
        if _unacceptable(one) is None:
            new.setdefault(Key(one.operator, one.session_id), one)
    rows, sinks = _all_reported(change, list(new.values()))
    # Almost all sessions are not known here. So they are added; those that are known turn out then.
    known = _known(change.sql, {Key(one.operator, one.session_id) for one in recordings} - new.keys())
    added: dict[Key, Session] = {}
    for key, (session, is_new) in zip(new, _add(change, rows), strict=True):
        (added if is_new else known)[key] = session
    _follow_up(change, [(added[key], its) for key, its in zip(new, sinks, strict=True) if key in added])
    results: list[Recorded] = []
    for one in recordings:
        key = Key(one.operator, one.session_id)
        if key in added and new[key] is one:
            known[key] = added[key]  # from here on
            results.append("ended")
        else:
            results.append(_record_one(change, one, known))
    return results


def _known(sql: sqlite3.Connection, keys: Iterable[Key]) -> dict[Key, Session]:
    by_operator: dict[str, list[str]] = {}
    for operator, session_id in keys:
        by_operator.setdefault(operator, []).append(session_id)
    return {
        Key(operator, session.session_id): session
        for operator, session_ids in by_operator.items()
        for session in fetch_sessions(sql, _SESSIONS_BY_KEY, operator, to_json(session_ids))
    }


def _unacceptable(new: Recording) -> Recorded | None:
    """Why a notice of a session that is not known here is refused; None: it is recorded."""
    if new.compare_token:
        return "bad_token"
    return None if new.accept_unknown else "unknown_session"


def _all_reported(
    change: Change, recordings: Sequence[Recording]
) -> tuple[list[tuple[Any, ...]], list[Sequence[NewDelivery]]]:
    """Sessions that are known only by their ends, as rows as in _NEW_SESSION, and the sinks of each."""
    reported = [_reported(change, one) for one in recordings]
    sinks = [change.sinks_of(session) for session in reported]
    tokens = _tokens_kept([session.token for session in reported], sinks)
    return [session._replace(token=token)[1:] for session, token in zip(reported, tokens, strict=True)], sinks


def _reported(change: Change, new: Recording) -> Session:
    """A session that is known only by its end, without its number."""
    now, ms = change.wall_at, change.service_ms
    named = (new.operator, new.session_id, new.player_id, new.token, None, new.extra)
    return Session(0, *named, new.idle_ms, now, ms, now, None, now, "reported")


def _record_one(change: Change, new: Recording, known: dict[Key, Session]) -> Recorded:
    key = Key(new.operator, new.session_id)
    session = known.get(key)
    if session is None:
        return _unacceptable(new) or "ended"
    if new.compare_token and not _same(session.token, new.token):
        return "bad_token"
    if session.player_id != new.player_id:
        return "player_mismatch"
    if session.reason is not None:
        return "repeated"
    # The token of the opening stays; the notice's serves where there was none.
    token = None if session.token else new.token
    (known[key],) = _end(change, [session], "reported", token=token, extra=new.extra)
    return "ended"


def end_due(change: Change, arguments: Sequence[int | None]) -> list[Swept]:
    swept = [_end_due_once(change, as_of_ms) for as_of_ms in arguments]
    change.next_due_ms, change.next_lifetime_at = change.sql.execute(NEXT).fetchone()
    change.looked_ahead = True
    return swept


def _end_due_once(change: Change, as_of_ms: int | None) -> Swept:
    outlived = fetch_sessions(change.sql, _DUE_LIFETIME, change.wall_at, SWEEP_ROWS)
    ended = _end(change, [session for session in outlived if session.operator in change.known], "max_lifetime")
    later_at = change.wall_at + REVISIT_MS
    orphans = [(session.id, later_at) for session in outlived if session.operator not in change.known]
    execute_rows(change.sql, _MOVE_LIFETIME, orphans)
    if as_of_ms is None:
        return Swept(len(ended), len(outlived))
    due = fetch_sessions(change.sql, _DUE, as_of_ms, SWEEP_ROWS)
    moves, idle_for_too_long = [], []
    for session in due:
        if session.deadline_ms > as_of_ms:  # it was touched: this is its true deadline
            moves.append((session.id, session.deadline_ms))
        elif session.operator not in change.known:  # nobody knows its sinks now; ending it would lose its notice
            moves.append((session.id, as_of_ms + REVISIT_MS))
        else:
            idle_for_too_long.append(session)
    execute_rows(change.sql, _MOVE_DUE, moves)
    ended += _end(change, idle_for_too_long, "inactivity")
    return Swept(len(ended), max(len(outlived), len(due)))


def _end(
    change: Change, sessions: Sequence[Session], reason: Reason, token: str | None = None, extra: str | None = None
) -> list[Session]:
    """The one way a live session ends: the end and what follows from it, in this transaction."""
    if not sessions:
        return []
    now = change.wall_at
    ended = [s._replace(reason=reason, ended_at=now, token=token or s.token, extra=extra or s.extra) for s in sessions]
    sinks = [change.sinks_of(session) for session in ended]
    for session in ended:
        change.of(session.operator).live -= 1
    tokens = _tokens_kept([session.token for session in ended], sinks)
    ids = [session.id for session in ended]
    change.sql.execute(_END, (reason, now, extra, to_json(list(zip(ids, tokens, strict=True)))))
    _follow_up(change, list(zip(ended, sinks, strict=True)))
    return ended


def _tokens_kept(tokens: Sequence[str | None], sinks: Sequence[Sequence[NewDelivery]]) -> list[str | None]:
    """What is kept of the tokens of ended sessions: all of it for sending, and where nothing can be sent, only what
    tells it from another.
    """
    unneeded = [all(one.impossible for one in its) for its in sinks]
    salts = iter(_random_hex(8, sum(unneeded)))
    return [
        _digest(token, next(salts)) if token and never else token for token, never in zip(tokens, unneeded, strict=True)
    ]


def _follow_up(change: Change, ended: Sequence[tuple[Session, Sequence[NewDelivery]]]) -> None:
    """One delivery for each sink of each ended session."""
    execute_rows(change.sql, _ADD_DELIVERIES, _followed_up(change, ended))


def _followed_up(change: Change, ended: Sequence[tuple[Session, Sequence[NewDelivery]]]) -> list[tuple[Any, ...]]:
    """The same as rows as in _NEW_DELIVERY."""
    now = change.wall_at
    rows = []
    for session, sinks in ended:
        figures = change.of(session.operator)
        held_ms = _held_ms(_gate(change, session.operator), now)
        for sink, body, impossible in sinks:
            if impossible is None:
                figures.pending += 1
                change.note_due(session.operator, sink, now)
            else:
                figures.dead += 1
            fate = ("dead", now, now, now) if impossible else ("pending", now, now, None)
            rows.append((session.id, session.operator, sink, *fate, now, held_ms, impossible, body.decode()))
    change.ended += [session for session, _ in ended]
    return [(nonce, *row) for nonce, row in zip(_random_hex(10, len(rows)), rows, strict=True)]


class _SettledBefore(Exception):  # noqa: N818 - breaks the batch: each result then has a transaction of its own
    """Some of many results are of deliveries that are pending no more."""


def settle_deliveries(change: Change, settlements: Sequence[Settlement]) -> list[Settled]:
    stored = change.sql.execute(_SETTLE, (to_json([_result(change, one) for one in settlements]),)).rowcount
    if stored != len(settlements) > 1:
        raise _SettledBefore
    if stored:
        execute_rows(change.sql, _FORGET_TOKENS, _digests(settlements))
    return [_settled(change, one, stored=bool(stored)) for one in settlements]


def _digests(settlements: Sequence[Settlement]) -> list[tuple[int, str]]:
    """What is to be left of the tokens of deliveries that are over, by session."""
    over = [one.delivery for one in settlements if one.state != "pending"]
    # The nonce is no secret, nor need a salt be one: it makes equal tokens differ.
    return [(one.session, _digest(one.token, one.nonce[:16])) for one in over if one.token]


def _result(change: Change, settlement: Settlement) -> tuple[Any, ...]:
    """A row as in _RESULT."""
    delivery, attempt = settlement.delivery, settlement.attempt or {}
    history = orjson.loads(delivery.history)
    if attempt:
        history.append(attempt)
    return (
        *(delivery.id, settlement.state, change.wall_at + settlement.wait_ms),
        None if settlement.state == "pending" else change.wall_at,
        *(delivery.attempts + bool(attempt and settlement.spent), settlement.step),
        attempt.get("status", delivery.last_status),
        attempt.get("code", delivery.last_code),
        attempt.get("error", delivery.last_error),
        to_json(history[-HISTORY_MAX:]),
    )


def _settled(change: Change, settlement: Settlement, *, stored: bool) -> Settled:
    """Keeps up what follows from a result. One of a delivery that was settled before changes the gate alone."""
    delivery, due_at = settlement.delivery, change.wall_at + settlement.wait_ms
    if stored and settlement.state == "pending":
        change.note_due(delivery.operator, delivery.sink, due_at)
    elif stored:
        change.of(delivery.operator).pending -= 1
        change.of(delivery.operator).dead += settlement.state == "dead"
    before, alter = _gate(change, delivery.operator), settlement.gate
    if alter is None:
        return Settled(due_at, before, before)
    return Settled(due_at, before, _set_gate_one(change, delivery.operator, lambda gate: alter(gate, change.wall_at)))


def _set_back(change: Change) -> None:
    """Waits outlive the process, so they are kept as wall times. When the wall clock is set back, by an hour or from a
    wrong century, they are put back with it, in the transaction that keeps the new time: nothing waits longer than it
    was meant to, whatever is killed when.
    """
    now, by_ms = change.wall_at, change.set_back_ms
    change.sql.execute(_SET_BACK, (by_ms, now, now))
    for operator in change.gates:
        _set_gate_one(change, operator, partial(_gate_set_back, now_at=now, by_ms=by_ms))


def _gate_set_back(gate: Gate, now_at: int, by_ms: int) -> Gate:
    def back(at: int) -> int:
        return max(now_at, at - by_ms) if at > now_at else at

    return replace(
        gate,
        not_before_at=back(gate.not_before_at),
        probe_at=back(gate.probe_at),
        paced_until_at=back(gate.paced_until_at),
    )


def set_gates(change: Change, arguments: Sequence[tuple[str, Callable[[Gate], Gate]]]) -> list[Gate]:
    return [_set_gate_one(change, operator, alter) for operator, alter in arguments]


def _set_gate_one(change: Change, operator: str, alter: Callable[[Gate], Gate]) -> Gate:
    before = _gate(change, operator)
    gate = alter(before)
    if gate != before:
        change.new_gates[operator] = gate
    return gate


def retry_dead(change: Change, arguments: Sequence[tuple[str, Sequence[int]]]) -> list[int]:
    results = []
    for operator, ids in arguments:
        sinks = dict(fetch(change.sql, _DEAD, to_json(ids), operator))  # of those that are dead still
        _revive(change, operator, [(number, sinks[number]) for number in ids if number in sinks])
        results.append(len(sinks))
    return results


def retry_some(change: Change, webhook_ids: Sequence[str]) -> list[Delivery | None]:
    results = []
    for webhook_id in webhook_ids:
        delivery = delivery_by_webhook_id(change.sql, webhook_id)
        if delivery is not None and delivery.state == "dead" and _possible(delivery):
            _revive(change, delivery.operator, [(delivery.id, delivery.sink)])
        results.append(delivery)
    return results


def _revive(change: Change, operator: str, dead: Sequence[tuple[int, str]]) -> None:
    """Dead deliveries, as (id, sink), become due again, RETRY_SPACING_MS apart, counted over all calls, so that a
    wallet that has just come back is not run over.
    """
    gate = _gate(change, operator)
    due_at = max(change.wall_at, gate.paced_until_at)
    rows = []
    for number, sink in dead:
        rows.append((number, due_at, change.wall_at, _held_ms(gate, change.wall_at)))
        change.note_due(operator, sink, due_at)
        due_at += RETRY_SPACING_MS
    execute_rows(change.sql, _REVIVE, rows)
    change.new_gates[operator] = replace(gate, paced_until_at=due_at)
    figures = change.of(operator)
    figures.dead -= len(dead)
    figures.pending += len(dead)


def prune_sessions(
    change: Change, arguments: Sequence[tuple[int, tuple[int, int]]]
) -> list[tuple[int, tuple[int, int] | None]]:
    return [_prune_once(change, before_at, after) for before_at, after in arguments]


def _prune_once(change: Change, before_at: int, after: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    rows = fetch(change.sql, ENDED_BEFORE, before_at, *after, PRUNE_ROWS)
    old = ids_of(rows)
    kept = set(fetch(change.sql, _KEPT, old, before_at))
    gone = to_json([row[0] for row in rows if row[0] not in kept])
    for operator, dead in change.sql.execute(_PRUNED_DEAD, (gone,)).fetchall():
        change.of(operator).dead -= dead
    change.sql.execute(_PRUNE_DELIVERIES, (gone,))
    pruned = change.sql.execute(_PRUNE_SESSIONS, (gone,)).rowcount
    return pruned, (rows[-1][1], rows[-1][0]) if len(rows) == PRUNE_ROWS else None


# -- all of a batch as one statement

# A row for a view, whose trigger does the rest. Each statement waits for the interpreter's lock when it is done, behind
# a busy event loop; this one takes the place of four to seven.
_PARTS = ("touched", "sessions", "deliveries", "results", "digests", "figures", "gates")


def _of(part: str, statement: str) -> str:
    return statement.replace("?", f"NEW.{part}")


_TOUCH_ALL = """
UPDATE session SET seen_ms = NEW.seen_ms, seen_at = NEW.wall_at
WHERE (operator, session_id) IN (SELECT ids.key, id.value FROM json_each(?) AS ids, json_each(ids.value) AS id)
      AND reason IS NULL"""
_BATCH = ("service_ms", "seen_ms", "wall_at", *_PARTS)
SET_UP = (
    "PRAGMA temp_store = MEMORY",
    f"CREATE TEMP VIEW batch AS SELECT {', '.join(f'NULL AS {name}' for name in _BATCH)}",
    f"""
CREATE TEMP TRIGGER write_batch INSTEAD OF INSERT ON batch BEGIN
{_of("touched", _TOUCH_ALL)};
{_of("sessions", _add_sessions("id", *_NEW_SESSION))};
{_of("deliveries", _ADD_DELIVERIES)};
{_of("results", _SETTLE)};
SELECT RAISE(ABORT, 'a result was stored before') WHERE changes() <> json_array_length(NEW.results);
{_of("digests", _FORGET_TOKENS)};
{_of("figures", _ADD_FIGURES)};
{_of("gates", _PUT_GATES)};
UPDATE clock SET service_ms = NEW.service_ms, wall_at = NEW.wall_at;
END""",
)
_WRITE_BATCH = f"INSERT INTO batch VALUES ({', '.join('?' * len(_BATCH))})"


class AtOnce:
    """A batch whose operations neither depend on what is stored nor on one another, as one statement. It is made on the
    event loop, so that the writer's thread hardly needs the interpreter, whose lock it would wait for.

    That what is added was not known, and what is settled was pending, is assumed. Otherwise nothing is stored, and the
    batch takes the ordinary way.
    """

    def __init__(self, instead: Change, last_session: int) -> None:
        self.txn = instead.twin()
        self.new: set[Key] = set()
        self._instead = instead
        self._touched: dict[str, dict[str, None]] = {}
        self._touchings: list[tuple[int, Touching]] = []  # and the place of each one's result
        self._last_session = last_session
        self._sessions: list[tuple[Any, ...]] = []
        self._deliveries: list[tuple[Any, ...]] = []
        self._settled: list[tuple[Any, ...]] = []
        self._digests: list[tuple[int, str]] = []
        self._results: list[Any] = []

    def add(self, run: Callable[..., Any], arguments: Sequence[Any]) -> bool:
        """Takes in neighbouring operations of one kind; False: a batch with these takes the ordinary way."""
        return AT_ONCE[run](self, arguments)

    @property
    def holds(self) -> bool:
        """Whether no session is both added and touched."""
        return not any(key.session_id in self._touched.get(key.operator, ()) for key in self.new)

    def touch(self, touchings: Sequence[Touching]) -> bool:
        for touching in touchings:
            self._touchings.append((len(self._results), touching))
            if len(touching.session_ids) == 1:  # as almost always
                self._touched.setdefault(touching.operator, {})[touching.session_ids[0]] = None
                self._results.append(_ONE_TOUCHED)
            else:
                distinct = dict.fromkeys(touching.session_ids)
                self._touched.setdefault(touching.operator, {}).update(distinct)
                self._results.append(Touched(len(distinct), [], []))
        return True

    def open(self, openings: Sequence[Opening]) -> bool:
        rows = [_opened(self.txn, opening) for opening in openings]
        self._results += [_created(self.txn, session) for session in self._added(rows)]
        return True

    def record(self, recordings: Sequence[Recording]) -> bool:
        if any(_unacceptable(one) for one in recordings):
            return False
        rows, sinks = _all_reported(self.txn, recordings)
        self._deliveries += _followed_up(self.txn, list(zip(self._added(rows), sinks, strict=True)))
        self._results += ["ended"] * len(recordings)
        return True

    def settle(self, settlements: Sequence[Settlement]) -> bool:
        self._settled += [_result(self.txn, one) for one in settlements]
        self._digests += _digests(settlements)
        self._results += [_settled(self.txn, one, stored=True) for one in settlements]
        return True

    def set_gate(self, arguments: Sequence[tuple[str, Callable[[Gate], Gate]]]) -> bool:
        self._results += set_gates(self.txn, arguments)
        return True

    def nothing(self, arguments: Sequence[None]) -> bool:
        self._results += arguments
        return True

    def _added(self, rows: Sequence[tuple[Any, ...]]) -> list[Session]:
        numbered = [(number, *row) for number, row in enumerate(rows, self._last_session + 1)]
        self._last_session = self.txn.last_session = self._last_session + len(rows)
        self._sessions += numbered
        sessions = [Session._make(row) for row in numbered]
        self.new.update(Key(session.operator, session.session_id) for session in sessions)
        return sessions

    def sealed(self) -> Self:
        """Nothing is added any more."""
        touched = {operator: list(session_ids) for operator, session_ids in self._touched.items()}
        rows = (
            *(self._sessions, self._deliveries, self._settled, self._digests),
            *(self.txn.figure_rows, self.txn.gate_rows),
        )
        self._changes = sum(map(len, touched.values())) + sum(map(len, rows)) + 1  # the clock
        parts = (to_json(part) if part else None for part in (touched, *rows))
        self._arguments = (self.txn.service_ms, self.txn.seen_ms, self.txn.wall_at, *parts)
        return self

    def run(self, connection: sqlite3.Connection) -> list[Any]:
        before = connection.total_changes
        try:
            connection.execute(_WRITE_BATCH, self._arguments)
        except sqlite3.IntegrityError:
            self._instead.met_known = bool(self.new)
            raise
        if self._touched and connection.total_changes - before != self._changes:
            self._look_closer(connection)
        return self._results

    def _look_closer(self, connection: sqlite3.Connection) -> None:
        """Finds out which of the touched had ended or are unknown. Nobody but this thread writes, so they still are."""
        try:
            states = {name: _states(connection, name, to_json(list(ids))) for name, ids in self._touched.items()}
        except Exception as error:  # also no memory: all is stored by now, so nothing may fail any more
            for place, _ in self._touchings:
                self._results[place] = StoreError(f"reading failed: {error}")
            return
        for place, touching in self._touchings:
            self._results[place] = _touched(touching, *states[touching.operator])


_ONE_TOUCHED = Touched(1, [], [])
AT_ONCE: Mapping[Callable[..., Any], Callable[[AtOnce, Any], bool]] = {
    touch_sessions: AtOnce.touch,
    open_sessions: AtOnce.open,
    record_notices: AtOnce.record,
    settle_deliveries: AtOnce.settle,
    set_gates: AtOnce.set_gate,
    nothing: AtOnce.nothing,
}
ADDING = {open_sessions, record_notices}


class Detour:
    """Whether to try what is added at once: not for 1, 2, 4 ... 32 batches after each that met known sessions."""

    def __init__(self) -> None:
        self._length = self._left = 0

    def taken(self) -> bool:
        if self._left:
            self._left -= 1
            return True
        return False

    def note(self, change: Change) -> None:
        if change.met_known:
            self._left = self._length = min(32, 2 * self._length or 1)
        elif change.is_at_once and change.last_session:
            self._length = 0


# -- pieces


def _random_hex(size: int, count: int) -> list[str]:
    """Of so many bytes each. Asked of the system in one call, which gives the interpreter lock away too."""
    if not count:
        return []
    text = secrets.token_hex(size * count)
    return [text[at : at + 2 * size] for at in range(0, len(text), 2 * size)]


OPEN_GATE = Gate()


def _gate(change: Change, operator: str) -> Gate:
    return change.new_gates.get(operator) or change.gates.get(operator, OPEN_GATE)


def _held_ms(gate: Gate, now_at: int) -> int:
    """How long the operator has been held so far, a hold under way included: where a new delivery's age starts."""
    return gate.held_total_ms + (max(0, now_at - gate.held_at) if gate.held_at is not None else 0)


def _possible(delivery: Delivery) -> bool:
    """Whether it can ever be sent: an http delivery without a body could not be composed."""
    return bool(delivery.body) or delivery.sink != "http"


def _triple(figures: Figures) -> tuple[int, int, int]:
    return figures.live, figures.pending, figures.dead


_DIGEST = "\x1f"  # begins what is left of a token; a token itself has no control characters


def _digest(token: str, salt: str) -> str:
    """What is left of a token that is needed no more: enough to know it again."""
    return f"{_DIGEST}{salt}{hashlib.sha256(f'{salt}{token}'.encode()).hexdigest()}"


def _same(stored: str | None, given: str | None) -> bool:
    """Compares two tokens in constant time; an absent one equals only an absent one."""
    if stored is None or given is None:
        return stored is given
    if stored.startswith(_DIGEST):
        given = _digest(given, stored[1:17])
    return hmac.compare_digest(stored.encode(), given.encode())


def least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
