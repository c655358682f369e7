"""Writes a batch into SQLite: reads the facts it needs, and writes its changes as one statement.

Each step of a statement, each fetched row and each call of a Python function from SQL releases the interpreter's lock
and has to wait for it again, behind a busy event loop. So a batch that needs no facts is decided on the loop, which has
the lock anyway, and written as one row for a temporary view, whose trigger does the rest. Rows of the tables are given
as JSON in it; new sessions as rows of their own.
"""

import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from functools import cache
from typing import Any

from lmdaemon.model import Gate, Session
from lmdaemon.store.contract import Opening, Recording, StoreError
from lmdaemon.store.rules import (
    NEW_DELIVERY,
    PRUNE_ROWS,
    RESULT,
    Changes,
    Facts,
    FactsNeeded,
    OldDelivery,
    Questions,
    World,
    decide,
    must_look_up,
    questions,
)
from lmdaemon.store.sqlite.rows import (
    ENDED_BEFORE,
    MAY_BE_SENT,
    SESSION,
    as_rows,
    delivery_by_webhook_id,
    fetch,
    fetch_sessions,
    given,
    ids_of,
    to_json,
)

DECIDED_ON_LOOP_MAX = 300  # most operations decided on the event loop: 2 ms, or 20 ms for the largest notices

GATE = tuple(field.name for field in fields(Gate))

# -- facts that a batch needs

# Sessions of an operator by their ids.
SESSIONS_BY_KEY = f"""
SELECT {as_rows(SESSION)} FROM session WHERE operator = ? AND session_id IN (SELECT value FROM json_each(?))"""
# Which of these deliveries are pending.
PENDING_OF = """
SELECT json_group_array(id) FROM delivery WHERE id IN (SELECT value FROM json_each(?)) AND state = 'pending'"""
# Active sessions that may be idle for too long, the earliest due first.
DUE = f"""
SELECT {as_rows(SESSION)}
FROM (SELECT {SESSION} FROM session WHERE reason IS NULL AND due_ms <= ? ORDER BY due_ms LIMIT ?)"""
# Active sessions past their maximum lifetime, the longest first.
DUE_LIFETIME = f"""
SELECT {as_rows(SESSION)}
FROM (SELECT {SESSION} FROM session WHERE reason IS NULL AND lifetime_at IS NOT NULL AND lifetime_at <= ?
      ORDER BY lifetime_at LIMIT ?)"""
# Which of these deliveries are dead and can be sent, with their sinks; discarded ones only if the third parameter is
# true. The `+` keeps SQLite from using the index of all dead deliveries.
DEAD = f"""
SELECT {as_rows("id, sink")} FROM delivery
WHERE id IN (SELECT value FROM json_each(?)) AND +operator = ? AND state = 'dead' AND (discarded IS NULL OR ?)
      AND {MAY_BE_SENT}"""
# Which of these deliveries are dead and not discarded, with their operators.
TO_DISCARD = f"""
SELECT {as_rows("id, operator")} FROM delivery
WHERE id IN (SELECT value FROM json_each(?)) AND state = 'dead' AND discarded IS NULL"""
# The deliveries of old sessions, which decide whether the sessions can be deleted.
OLD_DELIVERIES = f"""
SELECT {as_rows(", ".join(OldDelivery._fields))} FROM delivery WHERE session IN (SELECT value FROM json_each(?))"""
# After a batch: whether touched sessions are active.
STATES = f"""
SELECT {as_rows("session_id, reason IS NULL")} FROM session
WHERE operator = ? AND session_id IN (SELECT value FROM json_each(?))"""
# After a sweep: the next deadlines of the whole table.
NEXT = """
SELECT (SELECT due_ms FROM session WHERE reason IS NULL ORDER BY due_ms LIMIT 1),
       (SELECT lifetime_at FROM session WHERE reason IS NULL AND lifetime_at IS NOT NULL
        ORDER BY lifetime_at LIMIT 1)"""


def read_facts(sql: sqlite3.Connection, asked: Questions, wall_at: int) -> Facts:
    """Reads the facts for a batch, inside the transaction that writes it."""
    facts = Facts(asked=asked.sessions)
    if asked.sessions:
        facts.sessions = [
            session
            for operator, session_ids in asked.sessions.items()
            for session in fetch_sessions(sql, SESSIONS_BY_KEY, operator, to_json(list(session_ids)))
        ]
    if asked.results:
        facts.pending = frozenset(fetch(sql, PENDING_OF, to_json([number for number, _ in asked.results])))
    if asked.due_rows:
        limit = asked.due_rows
        facts.outlived = fetch_sessions(sql, DUE_LIFETIME, wall_at, limit)
        if asked.due_ms is not None:
            facts.due = fetch_sessions(sql, DUE, asked.due_ms, limit)
    if asked.retry is not None:
        facts.dead = dict(fetch(sql, DEAD, to_json(asked.retry.deliveries), asked.retry.operator, False))
    facts.deliveries = {name: delivery_by_webhook_id(sql, name) for name in asked.deliveries}
    for found in facts.deliveries.values():
        if found is not None:
            facts.dead |= dict(fetch(sql, DEAD, to_json([found.id]), found.operator, True))
    if asked.discard:
        facts.to_discard = dict(fetch(sql, TO_DISCARD, to_json(asked.discard)))
    if asked.pruning is not None:
        rows = fetch(sql, ENDED_BEFORE, asked.pruning.before_at, *asked.pruning.after, PRUNE_ROWS)
        facts.old = [(number, ended_at) for number, ended_at in rows]
        facts.old_deliveries = [OldDelivery(*row) for row in fetch(sql, OLD_DELIVERIES, ids_of(rows))]
    return facts


# -- the changes: they are written as one row for a view, and the view's trigger runs these statements, in this order

# Sets the time of the last touch of touched sessions that are active.
TOUCH = """
UPDATE session SET seen_ms = NEW.seen_ms, seen_at = NEW.wall_at
WHERE (operator, session_id) IN (SELECT ids.key, id.value FROM json_each(?) AS ids, json_each(ids.value) AS id)
      AND reason IS NULL"""
# Adds sessions.
ADD_SESSIONS = f"""
INSERT INTO session ({", ".join(Session._fields)}, due_ms)
SELECT *, seen_ms + idle_ms FROM (SELECT {given(*Session._fields)} FROM json_each(?))"""
# Ends sessions that are active.
END = f"""
UPDATE session SET reason = ended.reason, ended_at = NEW.wall_at, extra = coalesce(ended.extra, session.extra),
                   token = ended.token, ended_request = ended.request
FROM (SELECT {given("id", "reason", "extra", "token", "seen_ms", "request")} FROM json_each(?)) AS ended
WHERE session.id = ended.id AND session.reason IS NULL"""
# Moves `due_ms` to the true deadlines of sessions that were touched.
MOVE_DUE = f"""
UPDATE session SET due_ms = moved.due_ms FROM (SELECT {given("id", "due_ms")} FROM json_each(?)) AS moved
WHERE session.id = moved.id"""
# Puts off the end of sessions past their lifetime whose operator is not configured.
MOVE_LIFETIME = f"""
UPDATE session SET lifetime_at = moved.lifetime_at
FROM (SELECT {given("id", "lifetime_at")} FROM json_each(?)) AS moved WHERE session.id = moved.id"""
# Adds deliveries.
ADD_DELIVERIES = f"""
INSERT INTO delivery ({", ".join(NEW_DELIVERY)})
SELECT {", ".join(NEW_DELIVERY[:-1])}, CAST(body AS BLOB)
FROM (SELECT {given(*NEW_DELIVERY)} FROM json_each(?))"""
# Stores results of attempts; a delivered one needs its body no longer.
SETTLE = f"""
UPDATE delivery SET {", ".join(f"{name} = result.{name}" for name in RESULT[1:])},
                    body = CASE WHEN result.state = 'delivered' THEN x'' ELSE body END
FROM (SELECT {given(*RESULT)} FROM json_each(?)) AS result
WHERE delivery.id = result.id AND delivery.state = 'pending'"""
# Replaces tokens by their digests where no delivery needs the token any more.
FORGET_TOKENS = f"""
UPDATE session SET token = digest.token FROM (SELECT {given("id", "token")} FROM json_each(?)) AS digest
WHERE session.id = digest.id AND NOT EXISTS (SELECT 1 FROM delivery WHERE session = session.id AND {MAY_BE_SENT})"""
# Makes dead deliveries due again.
REVIVE = f"""
UPDATE delivery SET state = 'pending', due_at = again.due_at, settled_at = NULL, step = 0,
                    aged_from_at = again.aged_from_at, held_base_ms = again.held_base_ms, discarded = NULL
FROM (SELECT {given("id", "due_at", "aged_from_at", "held_base_ms")} FROM json_each(?)) AS again
WHERE delivery.id = again.id"""
# Marks dead deliveries as wanted by nobody.
DISCARD = f"""
UPDATE delivery SET discarded = unwanted.discarded
FROM (SELECT {given("id", "discarded")} FROM json_each(?)) AS unwanted WHERE delivery.id = unwanted.id"""
# Deletes the deliveries of pruned sessions.
PRUNE_DELIVERIES = "DELETE FROM delivery WHERE session IN (SELECT value FROM json_each(?))"
# Deletes pruned sessions.
PRUNE_SESSIONS = "DELETE FROM session WHERE id IN (SELECT value FROM json_each(?))"
# Adds to the counts of operators.
ADD_FIGURES = f"""
INSERT INTO operator (name, live, pending, dead)
SELECT {given("name", "live", "pending", "dead")} FROM json_each(?) WHERE TRUE
ON CONFLICT (name) DO UPDATE SET live = live + excluded.live, pending = pending + excluded.pending,
                                 dead = dead + excluded.dead"""
# Stores the gates of operators.
PUT_GATES = f"""
INSERT INTO operator (name, {", ".join(GATE)}) SELECT {given("name", *GATE)} FROM json_each(?) WHERE TRUE
ON CONFLICT (name) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in GATE)}"""
# Stores the clocks as of this transaction.
PUT_CLOCK = "UPDATE clock SET service_ms = NEW.service_ms, wall_at = NEW.wall_at"
# Moves stored waits back with the wall clock. It runs before everything else in a batch, because the batch may add
# waits that need no correction, and in the same transaction, because the new time and the corrected waits must be
# stored together. It takes 0.7 s where 100,000 deliveries wait.
SET_BACK = "UPDATE delivery SET due_at = max(due_at - ?, ?) WHERE state = 'pending' AND due_at > ?"

_COLUMNS = ("service_ms", "seen_ms", "wall_at")
_PARTS = {
    "touched": (TOUCH,),
    "sessions": (ADD_SESSIONS,),
    "ended": (END,),
    "moved_due": (MOVE_DUE,),
    "moved_lifetime": (MOVE_LIFETIME,),
    "deliveries": (ADD_DELIVERIES,),
    "results": (
        SETTLE,
        "SELECT RAISE(ABORT, 'a result was stored before') WHERE changes() <> json_array_length(?)",
    ),
    "digests": (FORGET_TOKENS,),
    "revived": (REVIVE,),
    "discarded": (DISCARD,),
    "pruned": (PRUNE_DELIVERIES, PRUNE_SESSIONS),
    "figures": (ADD_FIGURES,),
    "gates": (PUT_GATES,),
}
# The parts that each view's trigger writes. A batch uses the first view that has all the parts it needs. A statement
# takes 2 µs even if it has nothing to write, so the usual batches have views whose triggers leave out other statements.
_VIEWS = {
    "touches": ("touched",),
    "outcomes": ("results", "digests", "figures", "gates"),
    "sweeps": ("ended", "moved_due", "deliveries", "figures"),
    "batch": tuple(_PARTS),
}


# New sessions are rows of a view of their own, because SQLite takes longer to read them out of JSON than to add them.
# The batch's touches are in the row before them, and all the rest is in the row after them.
_ARRIVALS = frozenset(("touched", "sessions", "deliveries", "figures"))
_NEW = tuple(f"new_{name}" for name in Session._fields)
_ADD_SESSION = f"""
INSERT INTO session ({", ".join(Session._fields)}, due_ms)
VALUES ({", ".join(f"NEW.{name}" for name in _NEW)}, NEW.new_seen_ms + NEW.new_idle_ms)"""
# The numbers of new sessions for which there is a statement: few, because SQLite keeps 3 MB for all of them. A batch
# uses the next larger one, whose last rows are then empty. More sessions than the last number are given as JSON.
_ARRIVALS_OF = (1, 2, 4, *range(8, 129, 8))


def _columns(parts: Sequence[str]) -> str:
    return ", ".join(f"NULL AS {name}" for name in (*_COLUMNS, *parts))


def _writes(parts: Sequence[str]) -> str:
    """The statements of a trigger: those of the given parts, in the order of _PARTS, then the one that stores the
    clocks.
    """
    its = [statement.replace("?", f"NEW.{part}") for part in parts for statement in _PARTS[part]]
    return "; ".join([*its, PUT_CLOCK])


SET_UP = (
    "PRAGMA temp_store = MEMORY",
    *(f"CREATE TEMP VIEW {name} AS SELECT {_columns(parts)}" for name, parts in _VIEWS.items()),
    *(
        f"CREATE TEMP TRIGGER write_{name} INSTEAD OF INSERT ON {name} BEGIN {_writes(parts)}; END"
        for name, parts in _VIEWS.items()
    ),
    f"CREATE TEMP VIEW arrivals AS SELECT {_columns(('touched', 'deliveries', 'figures', *_NEW))}",
    f"""CREATE TEMP TRIGGER touch_first INSTEAD OF INSERT ON arrivals WHEN NEW.touched IS NOT NULL
        BEGIN {TOUCH.replace("?", "NEW.touched")}; END""",
    f"""CREATE TEMP TRIGGER add_session INSTEAD OF INSERT ON arrivals WHEN NEW.new_id IS NOT NULL
        BEGIN {_ADD_SESSION}; END""",
    f"""CREATE TEMP TRIGGER write_rest INSTEAD OF INSERT ON arrivals WHEN NEW.figures IS NOT NULL
        BEGIN {_writes(("deliveries", "figures"))}; END""",
)
# For each view: the parts that it can write, and the statement that writes them.
_WRITE = tuple(
    (frozenset(parts), parts, f"INSERT INTO {name} VALUES ({', '.join('?' * (len(_COLUMNS) + len(parts)))})")
    for name, parts in _VIEWS.items()
)


@cache
def _write_arrivals(count: int) -> str:
    """The statement that writes so many new sessions, and what else a batch of arrivals has."""
    empty = ", ".join(["NULL"] * len(_NEW))
    touches = f"(?, ?, ?, ?, NULL, NULL, {empty})"
    session = f"(NULL, NULL, NULL, NULL, NULL, NULL, {', '.join('?' * len(_NEW))})"
    rest = f"(?, ?, ?, NULL, ?, ?, {empty})"
    return f"INSERT INTO arrivals VALUES {', '.join([touches, *[session] * count, rest])}"


class Written:
    """The changes as a statement and its arguments. It is made on the event loop if the batch is decided there."""

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        rows = _rows_of(changes)
        # The number of rows that change if all touched sessions are known and active; 1 is for the clock
        self._rows = sum(map(len, changes.touched.values())) + sum(map(len, rows.values())) + 1
        if changes.touched:
            rows["touched"] = {operator: list(session_ids) for operator, session_ids in changes.touched.items()}
        times = (changes.world.service_ms, changes.seen_ms, changes.world.wall_at)
        added = len(changes.sessions)
        if 0 < added <= _ARRIVALS_OF[-1] and rows.keys() <= _ARRIVALS:
            count = _ARRIVALS_OF[bisect_left(_ARRIVALS_OF, added)]
            self._statement = _write_arrivals(count)
            of_sessions = [value for session in changes.sessions for value in session]
            of_sessions += [None] * ((count - added) * len(_NEW))
            touched, *rest = (to_json(rows[part]) if part in rows else None for part in ("touched", "deliveries"))
            self._arguments = (*times, touched, *of_sessions, *times, *rest, to_json(rows.get("figures", [])))
        else:
            parts, self._statement = next((parts, text) for written, parts, text in _WRITE if written.issuperset(rows))
            self._arguments = (*times, *(to_json(rows[part]) if part in rows else None for part in parts))

    def apply(self, sql: sqlite3.Connection) -> None:
        """Writes everything or nothing. Raises sqlite3.IntegrityError when an assumption of the decision is wrong."""
        before = sql.total_changes
        sql.execute(self._statement, self._arguments)
        if self.changes.touchings and sql.total_changes - before != self._rows:
            self._look_closer(sql)

    def _look_closer(self, sql: sqlite3.Connection) -> None:
        """Finds out which touched sessions have ended or are unknown.

        Only this thread writes, so nothing has changed since the batch was written.
        """
        active: dict[str, set[str]] = {}
        ended: dict[str, set[str]] = {}
        try:
            for operator, session_ids in self.changes.touched.items():
                states = fetch(sql, STATES, operator, to_json(list(session_ids)))
                active[operator] = {session_id for session_id, is_active in states if is_active}
                ended[operator] = {session_id for session_id, is_active in states if not is_active}
        # Every error, also MemoryError, is caught, because the batch may be committed by now
        except Exception as error:
            for place, _, _ in self.changes.touchings:
                self.changes.answers[place] = StoreError(f"reading failed: {error}")
            return
        self.changes.states_of_touched(active, ended)


def _rows_of(changes: Changes) -> dict[str, Any]:
    """The rows of each part that has any, except those of `touched`."""
    rows = {
        "sessions": changes.sessions,
        "ended": changes.ended,
        "moved_due": changes.moved_due,
        "moved_lifetime": changes.moved_lifetime,
        "deliveries": changes.deliveries,
        "results": list(changes.results.values()),
        "digests": changes.digests,
        "revived": changes.revived,
        "discarded": changes.discarded,
        "pruned": changes.pruned,
        "figures": [(name, one.live, one.pending, one.dead) for name, one in changes.figures.items()],
        "gates": [(name, *astuple(gate)) for name, gate in changes.gates.items()],
    }
    return {part: its for part, its in rows.items() if its}


class Batch:
    """One batch. If it needs no facts, it is decided when it is made, on the event loop."""

    def __init__(self, operations: Sequence[Any], world: World, *, expect_known: bool) -> None:
        self._operations = operations
        self._world = world
        self.changes: Changes
        self._written = None if self._is_looked_up(expect_known=expect_known) else self._decided_at_once()
        self.looked_up = False  # whether facts were read for it

    def _is_looked_up(self, *, expect_known: bool) -> bool:
        kinds = set(map(type, self._operations))
        return (
            len(self._operations) > DECIDED_ON_LOOP_MAX
            or self._world.set_back_ms > 0  # stored waits are moved first, in a statement of their own
            or must_look_up(kinds)
            or (expect_known and not kinds.isdisjoint((Opening, Recording)))
        )

    def _decided_at_once(self) -> Written | None:
        try:
            return Written(decide(self._operations, None, self._world))
        except FactsNeeded:
            return None

    def run(self, sql: sqlite3.Connection) -> list[Any]:
        """Commits the batch on the connection's thread and returns an answer for each operation.

        The answer of a touch is a StoreError where reading the states of its sessions failed. Raises any exception when
        nothing was stored.
        """
        if self._written is not None:
            try:
                return self._answered(self._written, sql)  # one statement is a transaction of its own
            except sqlite3.IntegrityError:
                pass  # an assumption is wrong: the batch is decided again, with facts
        return _in_transaction(sql, self._decide_and_apply)

    def _decide_and_apply(self, sql: sqlite3.Connection) -> list[Any]:
        world = self._world
        if world.set_back_ms:
            sql.execute(SET_BACK, (world.set_back_ms, world.wall_at, world.wall_at))
        self.looked_up = True
        facts = read_facts(sql, questions(self._operations), world.wall_at)
        answers = self._answered(Written(decide(self._operations, facts, world)), sql)
        if self.changes.swept:
            self.changes.next_due_ms, self.changes.next_lifetime_at = sql.execute(NEXT).fetchone()
        return answers

    def _answered(self, written: Written, sql: sqlite3.Connection) -> list[Any]:
        written.apply(sql)
        self.changes = written.changes
        return self.changes.answers


def _in_transaction(sql: sqlite3.Connection, run: Callable[[sqlite3.Connection], list[Any]]) -> list[Any]:
    try:
        sql.execute("BEGIN IMMEDIATE")
        answers = run(sql)
        sql.execute("COMMIT")
    except BaseException:
        if sql.in_transaction:
            sql.execute("ROLLBACK")
        raise
    return answers
