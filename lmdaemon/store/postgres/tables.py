"""Statements that a daemon runs beside its batches, and functions that run them on a connection's thread: they read
what all daemons have done, and write what this one has to tell the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import psycopg

from lmdaemon.model import Gate
from lmdaemon.store.contract import Figures
from lmdaemon.store.postgres import asking, members
from lmdaemon.store.postgres.asking import Question
from lmdaemon.store.postgres.batch import GATE, NEXT, fetch_all
from lmdaemon.store.postgres.company import NOW, OTHERS, Seen, seen
from lmdaemon.store.postgres.members import Introduction, Joined
from lmdaemon.store.postgres.owners import CLAIM, HAND_OVER, OWNERS, TELL_WAITS, WAITS, WANT, Wishes
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.store.projection import Loaded

# The furthest service clock of all daemons, also of those that are gone; the wall time of the last transaction; the
# server's time now.
CLOCK = f"""
SELECT max(service_ms), max(wall_at), {NOW}
FROM (SELECT service_ms, wall_at FROM lmdaemon.clock
      UNION ALL SELECT heard_ms, wall_at FROM lmdaemon.member) AS known"""
# Figures of every operator, and the other daemons' part of them. Both are read in one statement, because a commit of
# another daemon between two statements would be counted twice or not at all.
FIGURES = """
SELECT operator, sum(live)::bigint, sum(pending)::bigint, sum(dead)::bigint,
       coalesce(sum(live) FILTER (WHERE theirs), 0)::bigint, coalesce(sum(pending) FILTER (WHERE theirs), 0)::bigint,
       coalesce(sum(dead) FILTER (WHERE theirs), 0)::bigint, coalesce(sum(opened) FILTER (WHERE theirs), 0)::bigint,
       coalesce(sum(made) FILTER (WHERE theirs), 0)::bigint, coalesce(max(touched_ms) FILTER (WHERE theirs), 0)
FROM (SELECT *, member <> %s AS theirs FROM lmdaemon.figure) AS part GROUP BY operator"""
# The other daemons' part of the figures alone.
OTHERS_FIGURES = """
SELECT operator, sum(live)::bigint, sum(pending)::bigint, sum(dead)::bigint, sum(opened)::bigint, sum(made)::bigint,
       max(touched_ms)
FROM lmdaemon.figure WHERE member <> %s GROUP BY operator"""
# The gate of every operator, with the number of its last change.
OPERATORS = f"SELECT name, version, {', '.join(GATE)} FROM lmdaemon.operator"
# Numbers for the next sessions.
NEXT_BLOCK = "SELECT nextval('lmdaemon.session_block')"
# Everything that a look reads of the others: who is there, what they ask, which ends wait, whether owners and gates
# have changed, and their part of the figures.
LOOK = f"""
SELECT {NOW}, {OTHERS}, {asking.UNANSWERED}, {WAITS}, (SELECT coalesce(sum(epoch), 0)::bigint FROM lmdaemon.owner),
       (SELECT coalesce(sum(version), 0)::bigint FROM lmdaemon.operator),
       (SELECT json_agg(to_json(f))::text FROM ({OTHERS_FIGURES}) AS f (o, l, p, d, opened, made, touched))"""
# When the earliest pending delivery is due, by operator and sink: one step in the index for each sink.
EARLIEST = """
WITH RECURSIVE its (operator, sink) AS (
    SELECT name, (SELECT min(sink) FROM lmdaemon.delivery WHERE operator = name)
    FROM unnest(%s::text[]) AS name
    UNION ALL
    SELECT its.operator, (
        SELECT min(d.sink) FROM lmdaemon.delivery d WHERE d.operator = its.operator AND d.sink > its.sink)
    FROM its WHERE its.sink IS NOT NULL)
SELECT its.operator, its.sink, (
    SELECT due_at FROM lmdaemon.delivery d
    WHERE d.operator = its.operator AND d.sink = its.sink AND d.state = 'pending' ORDER BY due_at LIMIT 1)
FROM its WHERE its.sink IS NOT NULL"""
# The names of the daemons, by the numbers of their rows.
NAMES = "SELECT id, name FROM lmdaemon.member"


class Part(NamedTuple):
    """The other daemons' part of an operator's figures. `opened` counts sessions that were opened, and `made` batches
    that made a delivery due: if one of them grows, the operator's owner reads the deadlines or due times again.
    """

    live: int = 0
    pending: int = 0
    dead: int = 0
    opened: int = 0
    made: int = 0
    touched_ms: int = 0


NO_PART = Part()


class Found(NamedTuple):
    """What was read of the tables; `joined` if this daemon has joined just before."""

    at: int  # when the tables were read, by the server's clock (wall ms)
    loaded: Loaded
    joined: Joined | None
    parts: dict[str, Part]
    owners: list[tuple[str, int, int | None, int]]
    versions: dict[str, int]
    # Next deadlines of this daemon's operators; of all operators if it has not joined yet
    next: list[tuple[str, int | None, int | None]]


class Look(NamedTuple):
    """What a look finds. `versions` and `epochs` are the sums of the change numbers of all gates and of all owners.
    `waits` says until when (service ms) ends of operators wait for touches, as their owners have told.
    """

    seen: Seen
    asked: list[Question]
    waits: dict[str, int]
    epochs: int
    versions: int
    parts: dict[str, Part]


# -- functions that must run on a connection's thread


def read(sql: Connection, member: int, joined: Joined | None = None) -> Found:
    """Reads what this daemon keeps in memory of the tables, and takes numbers for new sessions. `member` is this
    daemon's row; 0: it has not joined.
    """
    wanted: list[tuple[str, Sequence[Any]]] = [(CLOCK, ()), (FIGURES, (member,)), (OPERATORS, ())]
    wanted += [(NEXT_BLOCK, ()), (OWNERS, ())]
    (clock,), figures, gates, (block,), owners = fetch_all(sql, wanted)
    known = {name: Figures(*row[:3]) for name, *row in figures}
    held = {name: Gate(*gate) for name, _, *gate in gates}
    mine = [operator for operator, owner, *_ in owners if owner == member] if member else list(known)
    return Found(
        at=clock[2],
        loaded=Loaded(
            service_ms=clock[0],
            committed_at=clock[1],
            operators={name: (known.get(name, Figures()), held.get(name, Gate())) for name in {**known, **held}},
            next_due_ms=None,
            next_lifetime_at=None,
            last_session=block[0] - 1,
        ),
        joined=joined,
        parts={name: Part(*row[3:]) for name, *row in figures},
        owners=owners,
        versions={row[0]: row[1] for row in gates},
        next=next_deadlines(sql, mine) if mine else [],
    )


def who_is_there(sql: Connection, member: int | None) -> Seen:
    """The other daemons on the database; `member` is this one's own row, None before it has one."""
    row = sql.execute(members.LOOK, (member,)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    return seen(*row)


def look(sql: Connection, member: int | None) -> Look:
    """Reads what the others have done; `member` is this daemon's row."""
    row = sql.execute(LOOK, (member, member)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    at, others, hold_until_ms, asked, waits, epochs, versions, figures = row
    questions = [Question(*one) for one in orjson.loads(asked or "[]")]
    parts = {one["o"]: Part(*list(one.values())[1:]) for one in orjson.loads(figures or "[]")}
    return Look(seen(at, others, hold_until_ms), questions, orjson.loads(waits or "{}"), epochs, versions, parts)


def gates(sql: Connection) -> list[tuple[Any, ...]]:
    """Of every operator: its name, the number of the last change, and the fields of `Gate`."""
    return sql.execute(OPERATORS).fetchall()


def owners(sql: Connection) -> list[tuple[Any, ...]]:
    """The rows of `owner`."""
    return sql.execute(OWNERS).fetchall()


def next_deadlines(sql: Connection, operators: list[str]) -> list[tuple[Any, ...]]:
    """Of each operator: its next deadline for inactivity (service ms) and for age (wall ms)."""
    return sql.execute(NEXT, (operators,)).fetchall()


def earliest(sql: Connection, operators: list[str]) -> list[tuple[Any, ...]]:
    """Of each sink of these operators: when its earliest pending delivery is due (wall ms)."""
    return sql.execute(EARLIEST, (operators,)).fetchall()


def fulfil(sql: Connection, member: int, wishes: Wishes) -> None:
    """Does what `wishes` says: takes, asks for and hands over operators."""
    if wishes.claim:
        sql.execute(CLAIM, (member, wishes.claim))
    if wishes.want:
        sql.execute(WANT, (member, wishes.want))
    if wishes.hand_over:
        sql.execute(HAND_OVER, (wishes.hand_over, member))


def tell_waits(sql: Connection, member: int, waits: Mapping[str, int | None]) -> None:
    """Tells the others until when ends of this daemon's operators wait for touches."""
    sql.execute(TELL_WAITS, (list(waits), list(waits.values()), member))


def names(sql: Connection) -> list[tuple[Any, ...]]:
    """The names of the daemons, by the numbers of their rows."""
    return sql.execute(NAMES).fetchall()


def introduce(sql: Connection, member: int, who: Introduction) -> None:
    """Tells the others where this daemon listens, and the digest of its settings."""
    sql.execute(members.INTRODUCE, (who.address, who.digest, member))


def hold(sql: Connection, grace_ms: int) -> None:
    """Lets no session on the database end for inactivity for `grace_ms` of service time from now on, so that clients of
    a daemon that cannot hear them can reach another one.
    """
    sql.execute(members.HOLD, (grace_ms,))


def expel(sql: Connection, me: int, member: int, batch: int, grace_ms: int) -> str | None:
    """Expels a daemon and returns its name. None if that daemon has written again meanwhile, or was expelled by another
    one.
    """
    name = dict(names(sql)).get(member)
    try:
        members.expel(sql, me, member, batch, grace_ms)
    except psycopg.errors.DivisionByZero:
        return None
    return name


def shown(sql: Connection) -> tuple[list[members.Shown], list[tuple[Any, ...]]]:
    """The daemons as people are shown them, and the rows of `owner`."""
    return [members.Shown(*row) for row in sql.execute(members.SHOWN)], sql.execute(OWNERS).fetchall()
