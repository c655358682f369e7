"""Writes a batch into PostgreSQL: reads the facts it needs, and writes its changes as one flush of statements.

What is sent in one flush is one transaction: the server commits it at its end, and rolls all of it back at the first
error. So no transaction waits for this program, which may be stopped at any moment, unless only a part of the flush
has arrived (see CUT_OFF_HALFWAY). The first statement is the fence: it updates the daemon's own row of `member`, which
must be there and have the number of the batch before this one. Statements whose rows another daemon may have changed
check what the changes were decided on. If that is no longer true, they divide by zero or violate a constraint, and the
batch is decided again. Most statements get their rows as one JSON text and lock them in the order of their ids.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import orjson
import psycopg

from lmdaemon.model import HTTP_SINK, Delivery, Gate, Session
from lmdaemon.store.contract import Figures, GateChange, Opening, Recording, StoreError, Sweep
from lmdaemon.store.postgres.cluster import AHEAD_MS
from lmdaemon.store.postgres.company import NOW, OTHERS, Seen, seen
from lmdaemon.store.postgres.errors import meaning
from lmdaemon.store.postgres.hints import HINT
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.store.postgres.wall import Asked
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

DECIDED_ON_LOOP_MAX = 300  # most operations decided on the event loop: 2 ms, or 20 ms for the largest notices
# Most operators whose due sessions one sweep reads; of their sessions it reads no more than it looks at
OPERATORS_AT_ONCE = 16
# Times that a batch is tried: another daemon may change what it was decided on, or lock the same rows in another order
TRIES = 10

GATE = tuple(field.name for field in fields(Gate))
FIGURE = ("live", "pending", "dead", "opened", "made", "touched_ms")  # columns of the table `figure`
SESSION = ", ".join(Session._fields)
DELIVERY = ", ".join(f"s.{name}" if name in ("session_id", "token") else f"d.{name}" for name in Delivery._fields)

_TYPES = {
    **dict.fromkeys(("operator", "session_id", "player_id", "token", "attributes", "extra", "reason", "nonce"), "text"),
    **dict.fromkeys(("sink", "state", "last_error", "history", "body", "name", "held_reason"), "text"),
    **dict.fromkeys(("held_by", "held_note", "failed_reason", "failed_detail", "urls", "body_digest"), "text"),
    **dict.fromkeys(("opened_request", "ended_request", "request", "discarded"), "text"),
    **dict.fromkeys(("attempts", "step", "last_status"), "integer"),
    "last_code": "numeric",
}


def given(*names: str) -> str:
    """An expression for a table whose rows are the one parameter, a JSON array of arrays. As jsonb it is parsed once,
    as json once for each column.
    """
    columns = ", ".join(f"(r->>{i})::{_TYPES.get(name, 'bigint')} AS {name}" for i, name in enumerate(names))
    return f"(SELECT {columns} FROM jsonb_array_elements(%s::jsonb) r)"


# Rows are found by their ids first, and their states are checked after that: in a CTE, or behind OFFSET 0. Otherwise
# PostgreSQL may find them through a partial index, such as that of the pending deliveries, and read all of it. It does
# so if there were few of them when the table was last analyzed.


def _count(statement: str, rows: str) -> str:
    """Completes a statement that must change exactly as many rows as its last parameter says; else nothing of the batch
    is stored.
    """
    return f"WITH {rows} changed AS ({statement} RETURNING 1) SELECT 1 / (count(*) = %s)::int FROM changed"


# -- facts that a batch needs

# Sessions of one operator by their ids.
SESSIONS_BY_KEY = f"SELECT {SESSION} FROM lmdaemon.session WHERE operator = %s AND session_id = ANY (%s)"
# Which of these deliveries are pending and have no more attempts than the result says.
PENDING_OF = f"""
SELECT d.id
FROM {given("id", "attempts")} AS result, LATERAL (
    SELECT id, state, attempts FROM lmdaemon.delivery WHERE id = result.id OFFSET 0) AS d
WHERE d.state = 'pending' AND d.attempts <= result.attempts"""
# Active sessions of some operators that may be idle for too long, the earliest due of each operator. The operators come
# in the order in which they have waited, the longest first; when enough sessions are found, further operators are not
# looked at.
DUE = f"""
SELECT {SESSION} FROM unnest(%s::text[]) AS its (name), LATERAL (
    SELECT {SESSION} FROM lmdaemon.session
    WHERE operator = its.name AND reason IS NULL AND due_ms <= %s ORDER BY due_ms LIMIT %s) AS due
LIMIT %s"""
# Active sessions of some operators past their lifetime, read in the same way.
DUE_LIFETIME = f"""
SELECT {SESSION} FROM unnest(%s::text[]) AS its (name), LATERAL (
    SELECT {SESSION} FROM lmdaemon.session
    WHERE operator = its.name AND reason IS NULL AND lifetime_at IS NOT NULL AND lifetime_at <= %s
    ORDER BY lifetime_at LIMIT %s) AS outlived
LIMIT %s"""
# How far the slowest of the other daemons has heard, and before which time nothing ends for inactivity.
SLOWEST = """
SELECT (SELECT min(heard_ms) FROM lmdaemon.member WHERE id <> %s), hold_until_ms FROM lmdaemon.clock"""
# Whether a delivery may be sent, now or again. An HTTP delivery without a body was dead from the beginning.
MAY_BE_SENT = "(state = 'pending' OR (state = 'dead' AND (sink <> 'http' OR length(body) > 0)))"
# Which of these deliveries are dead and may be sent, with their sinks.
DEAD = (
    "SELECT id, sink FROM (SELECT * FROM lmdaemon.delivery WHERE id = ANY (%s) OFFSET 0) AS one "
    f"WHERE operator = %s AND state = 'dead' AND discarded IS NULL AND {MAY_BE_SENT}"
)
# Which of these deliveries are dead and not discarded, with their operators.
TO_DISCARD = (
    "SELECT id, operator FROM (SELECT * FROM lmdaemon.delivery WHERE id = ANY (%s) OFFSET 0) AS one "
    "WHERE state = 'dead' AND discarded IS NULL"
)
# Deliveries by their numbers.
DELIVERIES_BY_ID = (
    f"SELECT {DELIVERY} FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session WHERE d.id = ANY (%s)"
)
# Ids of sessions that ended before a time, in the order in which they ended, after a given (ended_at, id).
ENDED_BEFORE = """
SELECT id, ended_at FROM lmdaemon.session WHERE ended_at IS NOT NULL AND ended_at < %s AND (ended_at, id) > (%s, %s)
ORDER BY ended_at, id LIMIT %s"""
# The deliveries of old sessions, which decide whether the sessions can be deleted.
OLD_DELIVERIES = f"SELECT {', '.join(OldDelivery._fields)} FROM lmdaemon.delivery WHERE session = ANY (%s)"
# Gates of operators, each with the number of its last change.
GATES = f"SELECT name, version, {', '.join(GATE)} FROM lmdaemon.operator WHERE name = ANY (%s)"
# Whether touched sessions are active.
STATES = "SELECT session_id, reason IS NULL FROM lmdaemon.session WHERE operator = %s AND session_id = ANY (%s)"
# The next deadlines of some operators.
NEXT = """
SELECT its.name,
       (SELECT due_ms FROM lmdaemon.session WHERE operator = its.name AND reason IS NULL ORDER BY due_ms LIMIT 1),
       (SELECT lifetime_at FROM lmdaemon.session
        WHERE operator = its.name AND reason IS NULL AND lifetime_at IS NOT NULL ORDER BY lifetime_at LIMIT 1)
FROM unnest(%s::text[]) AS its (name)"""
# The next deadlines of some operators. Also tells the other daemons the next deadline of all operators of this daemon:
# the earliest of these and of the rest.
NEXT_TOLD = f"""
WITH next (name, due_ms, lifetime_at) AS MATERIALIZED ({NEXT}),
told AS (UPDATE lmdaemon.member SET next_due_ms = least(%s::bigint, (SELECT min(due_ms) FROM next)) WHERE id = %s)
SELECT * FROM next"""

# -- the changes, in the order in which they are written

# The fence: stores what the daemon tells the others, and reads what they have told. It fails if the daemon's row is
# gone or has another number. Only the daemon itself updates its row, so only daemons that want to delete the row wait
# for this lock.
FENCE = f"""
WITH changed AS (
    UPDATE lmdaemon.member SET heard_ms = %s, wall_at = %s, known_at = %s, next_due_ms = %s, batch = batch + 1
    WHERE id = %s AND batch = %s - 1 RETURNING 1)
SELECT 1 / (count(*) = 1)::int, {NOW}, {OTHERS} FROM changed"""
# The service time of touches that this daemon has heard by its own service time: not below any daemon's clock at this
# moment, as in `cluster.stamp_ms`. The table `clock` has the furthest clock of daemons that are gone, because others
# may have followed it.
STAMP = f"""stamp AS MATERIALIZED (
    SELECT greatest(heard, least(heard + {AHEAD_MS}, max(reached) + 1)) AS ms
    FROM (SELECT %s::bigint AS heard, %s::bigint AS me, {NOW} AS at) AS here, LATERAL (
        SELECT heard_ms + CASE WHEN at >= known_at THEN least(at - known_at, {AHEAD_MS}) ELSE {AHEAD_MS} END AS reached
        FROM lmdaemon.member WHERE id <> me
        UNION ALL SELECT service_ms FROM lmdaemon.clock) AS known
    GROUP BY heard)"""
# Touches the sessions that are active. Returns NULL if all given sessions were touched, else the operators and ids of
# those that were, as JSON. ARRAY(SELECT …) hides from PostgreSQL's planner how many ids come: it then expects ten and
# uses the index.
TOUCH = f"""
WITH {STAMP},
found AS MATERIALIZED (
    SELECT s.id, s.operator, s.session_id, s.reason
    FROM unnest(ARRAY(SELECT json_array_elements_text(%s::json)), ARRAY(SELECT json_array_elements_text(%s::json)))
             AS given (operator, session_id)
    JOIN lmdaemon.session s ON s.operator = given.operator AND s.session_id = given.session_id
    ORDER BY s.id FOR UPDATE OF s),
touched AS (
    UPDATE lmdaemon.session SET seen_ms = greatest(session.seen_ms, stamp.ms), seen_at = greatest(session.seen_at, %s)
    FROM found, stamp
    WHERE session.id = found.id AND found.reason IS NULL RETURNING found.operator, found.session_id)
SELECT CASE WHEN (SELECT count(*) FROM touched) <> %s
       THEN (SELECT coalesce(json_agg(json_build_array(operator, session_id)), '[]') FROM touched) END"""
# Checks that these sessions, which answers have called active, are active. This transaction has just touched them,
# which locks them, so they stay active.
STILL_ACTIVE = "SELECT 1 / (count(*) FILTER (WHERE reason IS NULL) = %s)::int FROM lmdaemon.session WHERE id = ANY (%s)"
# Adds sessions.
ADD_SESSIONS = f"""
WITH {STAMP}
INSERT INTO lmdaemon.session ({SESSION}, due_ms)
SELECT {", ".join("stamp.ms" if name == "seen_ms" else name for name in Session._fields)}, stamp.ms + idle_ms
FROM {given(*Session._fields)} AS new, stamp"""
# Ends sessions that are active. For inactivity a session ends only if it was not touched after the facts were read, if
# every daemon has heard past its deadline, and if `hold_until_ms` is over.
END = _count(
    """UPDATE lmdaemon.session SET reason = locked.reason, ended_at = %s,
                          extra = coalesce(locked.extra, session.extra), token = locked.token,
                          ended_request = locked.request
       FROM locked, heard
       WHERE session.id = locked.id AND locked.was IS NULL AND (locked.seen_ms IS NULL OR (
           locked.touched_ms <= locked.seen_ms AND locked.touched_ms + locked.idle_ms <= heard.ms
           AND heard.hold_until_ms <= heard.ms))""",
    rows=f"""ended AS MATERIALIZED {given("id", "reason", "extra", "token", "seen_ms", "request")},
         heard AS MATERIALIZED (
             SELECT (SELECT min(heard_ms) FROM lmdaemon.member) AS ms, hold_until_ms FROM lmdaemon.clock),
         locked AS MATERIALIZED (
             SELECT ended.*, s.reason AS was, s.seen_ms AS touched_ms, s.idle_ms
             FROM lmdaemon.session s JOIN ended USING (id) ORDER BY s.id FOR UPDATE OF s),""",
)
# Moves `due_ms` to the true deadlines of sessions that were touched.
MOVE_DUE = f"""
WITH moved AS MATERIALIZED {given("id", "due_ms")},
locked AS MATERIALIZED (SELECT moved.* FROM lmdaemon.session s JOIN moved USING (id) ORDER BY s.id FOR UPDATE OF s)
UPDATE lmdaemon.session SET due_ms = locked.due_ms FROM locked WHERE session.id = locked.id"""
# Puts off the end of sessions past their lifetime whose operator is not configured.
MOVE_LIFETIME = MOVE_DUE.replace("due_ms", "lifetime_at")
# Adds deliveries.
ADD_DELIVERIES = f"""
INSERT INTO lmdaemon.delivery ({", ".join(NEW_DELIVERY)})
SELECT {", ".join(NEW_DELIVERY[:-1])}, convert_to(body, 'UTF8') FROM {given(*NEW_DELIVERY)} AS new"""
# Stores results of attempts; a failure only if the delivery has no more attempts than the result says, because
# otherwise another daemon has gone on with it. A delivered one needs its body no longer.
SETTLE = _count(
    f"""UPDATE lmdaemon.delivery SET {", ".join(f"{n} = locked.{n}" for n in RESULT[1:] if n != "attempts")},
               attempts = greatest(delivery.attempts, locked.attempts),
               body = CASE WHEN locked.state = 'delivered' THEN ''::bytea ELSE body END
        FROM locked
        WHERE delivery.id = locked.id AND locked.was = 'pending'
              AND (locked.made <= locked.attempts OR locked.state = 'delivered')""",
    rows=f"""result AS MATERIALIZED {given(*RESULT)},
         locked AS MATERIALIZED (
             SELECT result.*, d.state AS was, d.attempts AS made
             FROM lmdaemon.delivery d JOIN result USING (id) ORDER BY d.id FOR UPDATE OF d),""",
)
# Replaces tokens by their digests where no delivery needs the token any more.
FORGET_TOKENS = f"""
WITH digest AS MATERIALIZED {given("id", "token")},
locked AS MATERIALIZED (SELECT digest.* FROM lmdaemon.session s JOIN digest USING (id) ORDER BY s.id FOR UPDATE OF s)
UPDATE lmdaemon.session SET token = locked.token FROM locked
WHERE session.id = locked.id
      AND NOT EXISTS (
          SELECT 1 FROM (SELECT * FROM lmdaemon.delivery WHERE delivery.session = session.id OFFSET 0) AS its
          WHERE {MAY_BE_SENT})"""
# Makes dead deliveries due again.
REVIVE = _count(
    """UPDATE lmdaemon.delivery SET state = 'pending', due_at = locked.due_at, settled_at = NULL, step = 0,
                           aged_from_at = locked.aged_from_at, held_base_ms = locked.held_base_ms,
                           discarded = NULL
       FROM locked WHERE delivery.id = locked.id AND locked.was = 'dead'""",
    rows=f"""again AS MATERIALIZED {given("id", "due_at", "aged_from_at", "held_base_ms")},
         locked AS MATERIALIZED (
             SELECT again.*, d.state AS was
             FROM lmdaemon.delivery d JOIN again USING (id) ORDER BY d.id FOR UPDATE OF d),""",
)
# Marks dead deliveries as wanted by nobody.
DISCARD = _count(
    """UPDATE lmdaemon.delivery SET discarded = locked.discarded
       FROM locked WHERE delivery.id = locked.id AND locked.was = 'dead' AND locked.known IS NULL""",
    rows=f"""unwanted AS MATERIALIZED {given("id", "discarded")},
         locked AS MATERIALIZED (
             SELECT unwanted.*, d.state AS was, d.discarded AS known
             FROM lmdaemon.delivery d JOIN unwanted USING (id) ORDER BY d.id FOR UPDATE OF d),""",
)
# Deletes the deliveries of pruned sessions. One that is pending again stays, and keeps its session from being deleted.
PRUNE_DELIVERIES = "DELETE FROM lmdaemon.delivery WHERE session = ANY (%s) AND state <> 'pending'"
# Deletes pruned sessions.
PRUNE_SESSIONS = _count("DELETE FROM lmdaemon.session WHERE id = ANY (%s)", rows="")
# Adds to this daemon's part of the figures.
ADD_FIGURES = f"""
INSERT INTO lmdaemon.figure (operator, member, {", ".join(FIGURE)})
SELECT name, %s, {", ".join(FIGURE)} FROM {given("name", *FIGURE)} AS new ORDER BY name
ON CONFLICT (operator, member) DO UPDATE SET {", ".join(f"{n} = figure.{n} + excluded.{n}" for n in FIGURE[:-1])},
    touched_ms = greatest(figure.touched_ms, excluded.touched_ms)"""
# Stores gates of operators, unless another daemon has changed one of them meanwhile.
PUT_GATES = _count(
    f"""INSERT INTO lmdaemon.operator (name, version, {", ".join(GATE)})
        SELECT name, version + 1, {", ".join(GATE)} FROM {given("name", "version", *GATE)} AS new ORDER BY name
        ON CONFLICT (name) DO UPDATE SET version = excluded.version, {", ".join(f"{n} = excluded.{n}" for n in GATE)}
        WHERE operator.version = excluded.version - 1""",
    rows="",
)
# When the wall clock was set back: moves stored waits back by as much, those of the named operators or of all others.
SET_BACK = """
UPDATE lmdaemon.delivery SET due_at = greatest(due_at - %s, %s)
WHERE state = 'pending' AND due_at > %s AND (operator = ANY (%s)) <> %s"""
# Ends the connections of daemons that have sent a part of a batch and nothing more for half a second: their processes
# were stopped, or their machines are gone, and the server keeps the rows locked while it waits for the rest. What was
# sent is undone. One that goes on finds that out, as after any lost connection, and sends the batch again.
CUT_OFF_HALFWAY = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
      AND application_name LIKE 'lmdaemon %' AND state = 'active' AND wait_event = 'ClientRead'
      AND state_change < clock_timestamp() - interval '0.5 s'"""


def to_json(value: Any) -> str:
    """A value as JSON, for one parameter of a statement."""
    return orjson.dumps(value).decode()


def fetch_all(
    sql: Connection, statements: Sequence[tuple[str, Sequence[Any]]], *, prepare: bool | None = None
) -> list[list[tuple[Any, ...]]]:
    """The rows of each statement, in one exchange with the server."""
    with sql.pipeline():
        cursors = [sql.execute(statement, arguments, prepare=prepare) for statement, arguments in statements]
    return [cursor.fetchall() for cursor in cursors]


class Due(NamedTuple):
    """Operators that have something due for inactivity (`idle`) and for age (`aged`), as far as the daemon knows.
    `rest_due_ms` is the next deadline for inactivity of its other operators.
    """

    idle: Sequence[str]
    aged: Sequence[str]
    rest_due_ms: int | None

    @property
    def operators(self) -> list[str]:
        """The operators of both lists, each once."""
        return list(dict.fromkeys((*self.idle, *self.aged)))


class Slowest(NamedTuple):
    """How far the slowest of the other daemons has heard (None: there are no others), and before which service time
    nothing ends for inactivity.
    """

    heard_ms: int | None = None
    hold_until_ms: int = 0


def read_facts(sql: Connection, asked: Questions, wall_at: int, due: Due, member: int) -> tuple[Facts, Slowest]:
    """Reads the facts for a batch and, for its sweeps, how far the other daemons have heard. `member` is this daemon's
    row. A session among the facts may be due by this daemon's clock alone.
    """
    facts = Facts(asked=asked.sessions)
    limit = asked.due_rows
    idle = [] if asked.due_ms is None else list(due.idle)
    retry, pruning = asked.retry, asked.pruning
    named = {number: name for name in asked.deliveries if (number := number_of(name)) is not None}
    wanted: dict[str, tuple[str, Sequence[Any]]] = {
        **{f"of {name}": (SESSIONS_BY_KEY, (name, list(ids))) for name, ids in asked.sessions.items()},
        **({"pending": (PENDING_OF, (to_json(asked.results),))} if asked.results else {}),
        **({"outlived": (DUE_LIFETIME, (list(due.aged), wall_at, limit, limit))} if due.aged and limit else {}),
        **({"due": (DUE, (idle, asked.due_ms, limit, limit))} if idle else {}),
        **({"slowest": (SLOWEST, (member,))} if asked.due_ms is not None else {}),
        **({"dead": (DEAD, (list(retry.deliveries), retry.operator))} if retry else {}),
        **({"to_discard": (TO_DISCARD, (asked.discard,))} if asked.discard else {}),
        **({"deliveries": (DELIVERIES_BY_ID, (list(named),))} if named else {}),
        **({"old": (ENDED_BEFORE, (pruning.before_at, *pruning.after, PRUNE_ROWS))} if pruning else {}),
    }
    found = dict(zip(wanted, fetch_all(sql, list(wanted.values()), prepare=True), strict=True)) if wanted else {}
    facts.sessions = [Session(*row) for name in asked.sessions for row in found[f"of {name}"]]
    facts.pending = frozenset(row[0] for row in found.get("pending", ()))
    facts.outlived = [Session(*row) for row in found.get("outlived", ())]
    facts.due = [Session(*row) for row in found.get("due", ())]
    dead: dict[int, str] = dict(found.get("dead", ()))
    deliveries = {one.webhook_id: one for one in map(delivery_of, found.get("deliveries", ()))}
    facts.deliveries = {name: deliveries.get(name) for name in asked.deliveries}
    for one in deliveries.values():
        if one.state == "dead" and (one.body or one.sink != HTTP_SINK):  # as MAY_BE_SENT has it
            dead[one.id] = one.sink
    facts.dead = dead
    facts.to_discard = dict(found.get("to_discard", ()))
    if pruning:
        facts.old = [(number, ended_at) for number, ended_at in found["old"]]
        ids = [number for number, _ in facts.old]
        facts.old_deliveries = [OldDelivery(*row) for row in sql.execute(OLD_DELIVERIES, (ids,))]
    return facts, Slowest(*found["slowest"][0]) if found.get("slowest") else Slowest()


def delivery_of(row: Sequence[Any]) -> Delivery:
    """A delivery from its columns. Its code, a Decimal, becomes an int if it is whole, else a float."""
    delivery = Delivery(*row)
    code = delivery.last_code
    if code is not None:
        delivery = delivery._replace(last_code=int(code) if code == int(code) else float(code))
    return delivery


def number_of(webhook_id: str) -> int | None:
    """The row number in the public id of a delivery; None if the text is not such an id."""
    number = webhook_id.removeprefix("msg_").partition("_")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) <= 18 else None


class FencedOffError(Exception):
    """The daemon's own row is not as its last transaction has left it: the daemon was expelled, or a transaction whose
    answer was lost has been committed after all.
    """


class Place(NamedTuple):
    """Where the daemon stands: its row in `member`, and the number of the batch to come."""

    member: int
    batch: int


class Moved(NamedTuple):
    """Operators: those named, or with `others` all but those named."""

    operators: list[str]
    others: bool


class Present(NamedTuple):
    """What the daemon has in memory when a batch begins. `versions` are the numbers of the last changes of the gates in
    `world`. The other fields are about this daemon's operators and the other daemons.
    """

    world: World
    versions: dict[str, int]
    due: Due = Due((), (), None)
    next_due_ms: int | None = None  # next deadline for inactivity of this daemon's operators
    asked: Asked = Asked(0.0, 0)  # when this was taken from memory, before the server is asked
    known_at: int = 0  # the latest time of the server (wall ms) that has surely passed
    has_company: bool = False  # whether other daemons use the database
    moved: Moved = Moved([], others=True)  # the operators whose stored waits are moved if the wall clock was set back
    tells_touches: bool = False  # whether it is time to tell the others when operators were touched
    # This daemon's name, to be sent as a hint with the transaction; None: a hint after it is enough. While nothing is
    # live or pending, the others look seldom: if this daemon were killed before its hint, they would find it gone late
    hints_as: str | None = None


_NONE = Figures()


class Batch:
    """One batch. If it needs no facts, it is decided when it is made, on the event loop."""

    def __init__(
        self,
        operations: Sequence[Any],
        present: "Present",
        *,
        expect_known: bool,
        when_sent: Callable[[], None] | None = None,
    ) -> None:
        """`when_sent` is called on the connection's thread whenever the statements were sent and the server is busy."""
        self.operations = operations
        self._when_sent = when_sent
        self._present = present
        self._world = present.world
        self.versions = present.versions
        self.changes: Changes
        self.seen: Seen | None = None  # what the fence of the batch has read of the other daemons
        self.next: list[tuple[str, int | None, int | None]] = []  # the next deadlines of the operators that were swept
        self.looked_up = False  # whether facts were read for the batch
        self._decided = None if self._is_looked_up(expect_known=expect_known) else self._decided_at_once()

    def _is_looked_up(self, *, expect_known: bool) -> bool:
        kinds = set(map(type, self.operations))
        return (
            len(self.operations) > DECIDED_ON_LOOP_MAX
            or must_look_up(kinds)
            or GateChange in kinds  # a hold that is known here may have been released by another daemon
            or (expect_known and not kinds.isdisjoint((Opening, Recording)))
        )

    def _decided_at_once(self) -> Changes | None:
        try:
            return decide(self.operations, None, self._world)
        except FactsNeeded:
            return None

    def run(self, sql: Connection, place: Place) -> list[Any]:
        """Commits the batch and returns an answer for each operation. Raises psycopg.Error, and FencedOffError; then
        nothing is stored, unless the connection was lost.
        """
        decided, has_waited = self._decided, False
        for _ in range(TRIES):
            if decided is None:
                decided = self._decided_on_facts(sql, place)
            try:
                self._apply(sql, decided, place)
            except psycopg.errors.LockNotAvailable:
                if has_waited:
                    raise
                has_waited = True
                sql.execute(CUT_OFF_HALFWAY)
            except psycopg.Error as error:
                found = meaning(error)
                if found == "conflict":
                    self._refresh_gates(sql, decided.gates)
                    decided = None
                elif found != "again":
                    raise
            else:
                self.changes = decided
                return decided.answers
        raise psycopg.errors.SerializationFailure("other daemons or programs keep changing the same rows")

    @property
    def asked(self) -> Asked:
        """When the state that the batch was decided on was taken from memory, which is before the server is asked."""
        return self._present.asked

    @property
    def tells_touches(self) -> bool:
        """Whether the batch tells the others when operators were touched."""
        return self._present.tells_touches

    def renew(self, present: "Present") -> None:
        """Takes the present state after the daemon has joined again; `run` then decides the batch again."""
        self._present, self._world, self.versions = present, present.world, present.versions
        self._decided = None

    def _decided_on_facts(self, sql: Connection, place: Place) -> Changes:
        self.looked_up = True
        self._refresh_gates(sql, {one.operator for one in self.operations if type(one) is GateChange})
        asked = questions(self.operations)
        facts, slowest = read_facts(sql, asked, self._world.wall_at, self._present.due, place.member)
        return decide(self._not_ahead(slowest), facts, self._world)

    def _not_ahead(self, slowest: Slowest) -> Sequence[Any]:
        """The operations. Sweeps among them are limited to how far the slowest daemon has heard, and end nothing for
        inactivity before `hold_until_ms`.
        """
        own_ms = self._world.service_ms
        limit_ms = own_ms if slowest.heard_ms is None else min(own_ms, slowest.heard_ms)

        def limited(as_of_ms: int) -> int | None:
            return min(as_of_ms, limit_ms) if limit_ms >= slowest.hold_until_ms else None

        return [
            Sweep(limited(one.as_of_ms), one.crowd, one.most)
            if isinstance(one, Sweep) and one.as_of_ms is not None
            else one
            for one in self.operations
        ]

    def resolved(self, sql: Connection) -> list[Any]:
        """The answers of a batch that is known to be committed though the server's answer was lost."""
        changes = self.changes
        if changes.touchings:
            self._tell_touched(sql, changes, None)
        return changes.answers

    def _refresh_gates(self, sql: Connection, operators: Collection[str]) -> None:
        """Reads the gates of these operators again, because another daemon may have changed them."""
        if not operators:
            return
        gates, self.versions = dict(self._world.gates), dict(self.versions)
        for name, version, *gate in sql.execute(GATES, (list(operators),)):
            gates[name], self.versions[name] = Gate(*gate), version
        self._world = self._world._replace(gates=gates)

    def _apply(self, sql: Connection, changes: Changes, place: Place) -> None:
        self.changes = changes  # set before the answer comes, because `resolved` needs it if the answer is lost
        sent: list[psycopg.Cursor[Any]] = []
        try:
            with sql.pipeline():
                for statement, arguments in self._statements(changes, place):
                    sent.append(sql.execute(statement, arguments, prepare=True))
                if self._when_sent is not None:
                    self._when_sent()
        except psycopg.Error as error:
            _forget_prepared(sql)
            fence = sent[0].pgresult if sent else None
            if meaning(error) == "conflict" and (fence is None or not _is_good(fence)):
                raise FencedOffError from error
            raise
        told = sent[0].fetchone()
        self.seen = seen(*told[1:]) if told is not None else None
        if changes.touchings:
            touched = sent[2 if self._world.set_back_ms else 1] if changes.touched else None
            row = touched.fetchone() if touched is not None else None
            if row is not None and row[0] is not None:
                self._tell_touched(sql, changes, row[0])
        if self._asks_next(changes):
            self.next = sent[-1].fetchall()

    def _asks_next(self, changes: Changes) -> bool:
        return changes.swept and bool(self._present.due.operators)

    def _statements(self, changes: Changes, place: Place) -> Iterable[tuple[str, tuple[Any, ...]]]:
        """The statements that write the changes, with their arguments, in their order: the fence first."""
        world = changes.world
        present, me = self._present, place.member
        known = (present.known_at, present.next_due_ms)
        yield FENCE, (world.service_ms, world.wall_at, *known, me, place.batch, me)
        if world.set_back_ms:
            yield SET_BACK, (world.set_back_ms, world.wall_at, world.wall_at, *present.moved)
        if changes.touched:
            ids = [session_id for session_ids in changes.touched.values() for session_id in session_ids]
            operators = [operator for operator, session_ids in changes.touched.items() for _ in session_ids]
            yield TOUCH, (changes.seen_ms, me, to_json(operators), to_json(ids), world.wall_at, len(ids))
            if changes.active:
                yield STILL_ACTIVE, (len(changes.active), list(changes.active))
        if changes.sessions:
            yield ADD_SESSIONS, (changes.seen_ms, me, to_json(changes.sessions))
        if changes.ended:
            yield END, (to_json(changes.ended), world.wall_at, len(changes.ended))
        if changes.moved_due:
            yield MOVE_DUE, (to_json(changes.moved_due),)
        if changes.moved_lifetime:
            yield MOVE_LIFETIME, (to_json(changes.moved_lifetime),)
        if changes.deliveries:
            yield ADD_DELIVERIES, (to_json(changes.deliveries),)
        if changes.results:
            yield SETTLE, (to_json(list(changes.results.values())), len(changes.results))
        if changes.digests:
            yield FORGET_TOKENS, (to_json(changes.digests),)
        if changes.revived:
            yield REVIVE, (to_json(changes.revived), len(changes.revived))
        if changes.discarded:
            yield DISCARD, (to_json(changes.discarded), len(changes.discarded))
        if changes.pruned:
            yield PRUNE_DELIVERIES, (changes.pruned,)
            yield PRUNE_SESSIONS, (changes.pruned, len(changes.pruned))
        figures = self._figures(changes)
        if figures:
            yield ADD_FIGURES, (me, to_json(figures))
            if present.hints_as is not None:
                yield HINT, (present.hints_as,)
        if changes.gates:
            gates = [(name, self.versions.get(name, 0), *astuple(gate)) for name, gate in changes.gates.items()]
            yield PUT_GATES, (to_json(gates), len(gates))
        if self._asks_next(changes):
            due = present.due
            if present.has_company:
                yield NEXT_TOLD, (due.operators, due.rest_due_ms, me)
            else:
                yield NEXT, (due.operators,)

    def _figures(self, changes: Changes) -> list[tuple[Any, ...]]:
        """Rows for the table `figure`: an operator, then the columns of FIGURE."""
        opened = Counter(row[1] for row in changes.sessions)  # row[1] is the operator
        made = {operator for operator, _ in changes.due}
        touched = {}
        if self._present.tells_touches:
            touched = dict.fromkeys(filter(changes.world.elsewhere, changes.touched), changes.seen_ms)
        return [
            (name, *astuple(changes.figures.get(name, _NONE)), opened[name], int(name in made), touched.get(name, 0))
            for name in {**changes.figures, **touched}
        ]

    @staticmethod
    def _tell_touched(sql: Connection, changes: Changes, touched: Sequence[tuple[str, str]] | None) -> None:
        """Corrects the answers of touches. `touched` are the sessions that were touched; None if that is no longer
        known. The states of all others are read from the table. The batch is committed by now, so if that fails, the
        callers get a StoreError as their answers.
        """
        active: dict[str, set[str]] = {operator: set() for operator in changes.touched}
        ended: dict[str, set[str]] = {operator: set() for operator in changes.touched}
        for operator, session_id in touched or ():
            active[operator].add(session_id)
        try:
            for operator, session_ids in changes.touched.items():
                left = [session_id for session_id in session_ids if session_id not in active[operator]]
                for session_id, is_active in sql.execute(STATES, (operator, left)).fetchall() if left else ():
                    if not is_active:
                        ended[operator].add(session_id)
                    elif touched is None:
                        active[operator].add(session_id)
        except psycopg.Error as error:
            for place, _, _ in changes.touchings:
                changes.answers[place] = StoreError(f"reading failed: {error}")
            return
        changes.states_of_touched(active, ended)


def _forget_prepared(sql: Connection) -> None:
    """Has all statements prepared again after a flush that has failed. The server has not prepared those it skipped,
    though psycopg may take them to be prepared.
    """
    with suppress(psycopg.Error):
        if not sql.closed:
            sql.execute("DEALLOCATE ALL")


def _is_good(result: psycopg.pq.abc.PGresult) -> bool:
    return result.status in (psycopg.pq.ExecStatus.TUPLES_OK, psycopg.pq.ExecStatus.COMMAND_OK)
