"""Moves a stopped daemon's file into an empty database, in steps, each of which can be repeated.

Rows keep their ids, so a step that is repeated adds only what is not there yet. Until the import has finished, no
daemon can use the database (see `members.join`).
"""

from collections.abc import Callable
from dataclasses import astuple

import psycopg

from lmdaemon.model import Delivery, Session
from lmdaemon.store.contract import DatabaseError, Moved, Whole
from lmdaemon.store.postgres.batch import GATE, SESSION, fetch_all, given, to_json
from lmdaemon.store.postgres.errors import said
from lmdaemon.store.postgres.members import ALONE, MEMBERS
from lmdaemon.store.postgres.migrations import UnsafeSettingError, check_server, migrate
from lmdaemon.store.postgres.thread import Connection, Database

ROWS = 1000  # rows moved in one step

_STORED = tuple(name for name in Delivery._fields if name not in ("session_id", "token"))

# What has been moved into the database so far.
IMPORTED = "SELECT source, finished_at FROM lmdaemon.imported"
# Whether the database has any sessions, figures or gates.
IS_USED = """
SELECT EXISTS (SELECT 1 FROM lmdaemon.session) OR EXISTS (SELECT 1 FROM lmdaemon.figure)
       OR EXISTS (SELECT 1 FROM lmdaemon.operator)"""
# Notes that an import has begun: from now on no daemon can join.
BEGIN = "INSERT INTO lmdaemon.imported (source) VALUES (%s)"
# How far an earlier run has come: the greatest ids that were moved.
REACHED = (
    "SELECT coalesce((SELECT max(id) FROM lmdaemon.session), 0), coalesce((SELECT max(id) FROM lmdaemon.delivery), 0)"
)
# Adds sessions with their ids.
ADD_SESSIONS = f"""
INSERT INTO lmdaemon.session ({SESSION}, due_ms)
SELECT {SESSION}, due_ms FROM {given(*Session._fields, "due_ms")} AS new ON CONFLICT (id) DO NOTHING"""
# Adds deliveries with their ids.
ADD_DELIVERIES = f"""
INSERT INTO lmdaemon.delivery ({", ".join(_STORED)})
SELECT {", ".join(_STORED[:-1])}, convert_to(body, 'UTF8') FROM {given(*_STORED)} AS new ON CONFLICT (id) DO NOTHING"""
# Adds the gate of an operator.
PUT_OPERATOR = f"""
INSERT INTO lmdaemon.operator (name, version, {", ".join(GATE)})
SELECT name, 1, {", ".join(GATE)} FROM {given("name", *GATE)} AS new ON CONFLICT (name) DO NOTHING"""
# Adds the figures of operators, as if they were those of daemons that have left.
PUT_FIGURES = f"""
INSERT INTO lmdaemon.figure (operator, member, live, pending, dead)
SELECT name, 0, live, pending, dead FROM {given("name", "live", "pending", "dead")} AS new
ON CONFLICT (operator, member) DO NOTHING"""
# Sets the service clock to that of the file, so that idle times continue.
PUT_CLOCK = "UPDATE lmdaemon.clock SET service_ms = %s, wall_at = %s"
# Gives new sessions and deliveries greater numbers than those that were moved.
NUMBER_ON = """
SELECT setval('lmdaemon.session_block', greatest(1, (SELECT max(id) FROM lmdaemon.session))),
       setval(pg_get_serial_sequence('lmdaemon.delivery', 'id'),
              greatest(1, (SELECT max(id) FROM lmdaemon.delivery)))"""
# Numbers of sessions and deliveries by state, counted as in the file.
COUNTS = """
SELECT 'sessions active', count(*) FROM lmdaemon.session WHERE reason IS NULL
UNION ALL SELECT 'sessions ended', count(*) FROM lmdaemon.session WHERE reason IS NOT NULL
UNION ALL SELECT 'deliveries ' || state, count(*) FROM lmdaemon.delivery GROUP BY state"""
# Notes that the import has finished: daemons may join.
FINISH = "UPDATE lmdaemon.imported SET finished_at = %s"


def move(
    url: str,
    password: str | None,
    whole: Whole,
    now_at: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Moved:
    """Moves everything. `progress` is called with how many rows of how many have been moved. Raises DatabaseError."""
    database = Database(url, password, "import")
    title = database.title
    try:
        with database.connect(prepares=True) as sql:
            check_server(sql, title)
            migrate(sql, title)
            if _is_done(sql, whole, title):
                return Moved(whole.counts(), before=True)
            _move(sql, whole, progress)
            counts: dict[str, int] = dict(sql.execute(COUNTS).fetchall())
            if counts != whole.counts():
                raise DatabaseError(f"{title}: the counts differ: {counts} here, {dict(whole.counts())} in the file")
            sql.execute(FINISH, (now_at,))
            return Moved(counts, before=False)
    except UnsafeSettingError as error:
        raise DatabaseError(f"{title}: {error}") from error
    except psycopg.Error as error:
        raise DatabaseError(f"{title}: cannot be used: {said(error)}") from error


def _is_done(sql: Connection, whole: Whole, title: str) -> bool:
    """Whether this file has been moved already. If not, notes that its import has begun. Raises DatabaseError if the
    database must not be filled.
    """
    with sql.transaction():
        sql.execute(ALONE)
        found = sql.execute(IMPORTED).fetchone()
        if found is not None and found[0] == whole.source:
            return found[1] is not None
        if found is not None and found[1] is None:
            raise DatabaseError(f"{title}: an import of another file has not finished")
        others = sql.execute(MEMBERS).fetchall()
        if others:
            raise DatabaseError(f"{title}: is in use by an lmdaemon ({others[0][1]})")
        used = sql.execute(IS_USED).fetchone()
        if found is not None or used is None or used[0]:
            raise DatabaseError(f"{title}: has other sessions: a file can only be moved into an empty database")
        sql.execute(BEGIN, (whole.source,))
    return False


def _move(sql: Connection, whole: Whole, progress: Callable[[int, int], None]) -> None:
    of = sum(whole.counts().values())
    ((session, delivery),) = fetch_all(sql, [(REACHED, ())])[0]
    done = 0
    while page := whole.sessions(session, ROWS):
        sql.execute(ADD_SESSIONS, (to_json([(*one, due_ms) for one, due_ms in page]),))
        session, done = page[-1][0].id, done + len(page)
        progress(done, of)
    while rows := whole.deliveries(delivery, ROWS):
        sql.execute(ADD_DELIVERIES, (to_json([_stored(one) for one in rows]),))
        delivery, done = rows[-1].id, done + len(rows)
        progress(done, of)
    operators = whole.operators()
    gates = [(name, *astuple(gate)) for name, (_, gate) in operators.items()]
    figures = [(name, *astuple(counted)) for name, (counted, _) in operators.items()]
    fetch = [(PUT_OPERATOR, (to_json(gates),)), (PUT_FIGURES, (to_json(figures),)), (PUT_CLOCK, whole.clock())]
    with sql.pipeline():
        for statement, arguments in fetch:
            sql.execute(statement, arguments)
        sql.execute(NUMBER_ON)


def _stored(delivery: Delivery) -> tuple[object, ...]:
    """The columns of a delivery, with the body as text."""
    values = delivery._asdict() | {"body": delivery.body.decode()}
    return tuple(values[name] for name in _STORED)
