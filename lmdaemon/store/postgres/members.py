"""The daemons that use a database: joining, being put out, leaving. A daemon is a row of `member`, which each of its
transactions updates; without it nothing of it can be committed.

One daemon at a time uses a database. A second one is refused at its start while the first one's row moves on; a row
that has stood still for LEASE_S, as after a kill, is deleted, and keeps its daemon out should it come back.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.postgres.batch import fetch_all
from lmdaemon.store.postgres.cluster import Watch
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.version import __version__

BEAT_S = 1.0  # between two transactions of a daemon, at the most
WATCH_S = 0.25  # between two looks at its row

# Every daemon that uses the database, and its last transaction.
MEMBERS = "SELECT id, name, batch FROM lmdaemon.member ORDER BY id"
# Whether a file is being moved into the database.
IS_IMPORTING = "SELECT 1 FROM lmdaemon.imported WHERE finished_at IS NULL"
# One at a time from here to the end of the transaction: who joins, and who is put out.
ALONE = "SELECT 1 FROM lmdaemon.version FOR UPDATE"
# Joins, unless somebody else is there.
JOIN = """
INSERT INTO lmdaemon.member (name, program, since_at, heard_ms, wall_at)
SELECT %s, %s, %s, service_ms, wall_at FROM lmdaemon.clock
WHERE NOT EXISTS (SELECT 1 FROM lmdaemon.member)
      AND NOT EXISTS (SELECT 1 FROM lmdaemon.imported WHERE finished_at IS NULL) RETURNING id"""
# Keeps the service clock of a daemon that goes.
KEEP_CLOCK = """
UPDATE lmdaemon.clock SET service_ms = greatest(service_ms, heard_ms), wall_at = greatest(clock.wall_at, member.wall_at)
FROM lmdaemon.member WHERE member.id = %s"""
# Adds the figures of a daemon that goes to those of member 0.
FOLD_FIGURES = """
INSERT INTO lmdaemon.figure (operator, member, live, pending, dead)
SELECT operator, 0, live, pending, dead FROM lmdaemon.figure WHERE member = %s ORDER BY operator
ON CONFLICT (operator, member) DO UPDATE SET live = figure.live + excluded.live,
    pending = figure.pending + excluded.pending, dead = figure.dead + excluded.dead"""
# The daemon's own part is in member 0's by now.
DROP_FIGURES = "DELETE FROM lmdaemon.figure WHERE member = %s"
# Lets a daemon go, unless its row has moved on meanwhile; then the division by zero undoes the rest.
DROP_MEMBER = """
WITH gone AS (DELETE FROM lmdaemon.member WHERE id = %s AND batch = coalesce(%s::bigint, batch) RETURNING 1)
SELECT 1 / count(*)::int FROM gone"""


class Joined(NamedTuple):
    """This daemon's row, its name, and the number of its last transaction."""

    member: int
    name: str
    batch: int


class Member(NamedTuple):
    id: int
    name: str
    batch: int


def join(sql: Connection, name: str, wall_at: int, title: str) -> Joined:
    """Takes the place of a daemon that is gone, or waits until it is known to be. Raises DatabaseError while it
    lives.
    """
    while True:
        if sql.execute(IS_IMPORTING).fetchone():
            raise DatabaseError(f"{title}: an import has not finished; run `lmdaemon import` again")
        _put_out(sql, _outlived(sql, title))
        arguments = (name, __version__, wall_at)
        found = fetch_all(sql, [(ALONE, ()), (JOIN, arguments)])[1]
        if found:
            return Joined(found[0][0], name, 0)


def _outlived(sql: Connection, title: str) -> list[Member]:
    """Those that are there, once their rows have stood still for LEASE_S. Raises DatabaseError when one moves on."""
    first = {one.id: one for one in _members(sql)}
    watch, now = Watch(), first
    while now and watch.gone({one.id: one.batch for one in now.values()}, time.monotonic()) != now.keys():
        time.sleep(WATCH_S)
        now = {one.id: one for one in _members(sql)}
        for member in now.values():
            if first.setdefault(member.id, member).batch != member.batch:
                raise DatabaseError(f"{title}: is in use by another lmdaemon ({member.name})")
    return list(now.values())


def _members(sql: Connection) -> list[Member]:
    return [Member(*row) for row in sql.execute(MEMBERS)]


def _put_out(sql: Connection, members: Sequence[Member]) -> None:
    for member in members:
        _drop(sql, member.id, member.batch)


def leave(sql: Connection, member: int) -> None:
    """Goes in order: the row of the daemon goes at once, so that nobody has to wait."""
    _drop(sql, member, None)


def _drop(sql: Connection, member: int, batch: int | None) -> None:
    """Raises psycopg.errors.DivisionByZero when it is gone already, or has moved on."""
    it = (member,)
    fetch = [(ALONE, ()), (KEEP_CLOCK, it), (FOLD_FIGURES, it), (DROP_FIGURES, it), (DROP_MEMBER, (member, batch))]
    with sql.pipeline():
        for statement, arguments in fetch:
            sql.execute(statement, arguments)
