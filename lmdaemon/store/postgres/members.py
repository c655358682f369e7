"""The daemons that use a database: joining, leaving, being expelled. A daemon is a row of the table `member`. Each of
its transactions updates that row, and cannot commit without it.

If a row does not change for `lease_s` while others watch it, as after a kill, one of them expels its daemon: it deletes
the row. If that daemon runs on after all, it can write nothing until it has joined again, with a new row.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import psycopg

from lmdaemon.limits import StoreLimits
from lmdaemon.store.contract import DatabaseError
from lmdaemon.store.postgres import versions
from lmdaemon.store.postgres.cluster import Watch
from lmdaemon.store.postgres.company import NOW, OTHERS, Seen, seen
from lmdaemon.store.postgres.hints import send
from lmdaemon.store.postgres.owners import FREE
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.version import __version__

# Every daemon that uses the database, and its last transaction.
MEMBERS = "SELECT id, name, batch FROM lmdaemon.member ORDER BY id"
# Whether a file is being moved into the database.
IS_IMPORTING = "SELECT 1 FROM lmdaemon.imported WHERE finished_at IS NULL"
# Locks the version until the end of the transaction, so that daemons join and go one at a time.
ALONE = "SELECT current, oldest FROM lmdaemon.version FOR UPDATE"
# Adds this daemon's row, with the furthest service clock of all. If the row is there already, an earlier attempt was
# committed whose answer was lost.
JOIN = f"""
INSERT INTO lmdaemon.member (name, program, since_at, heard_ms, wall_at, known_at, address, digest)
SELECT %s, %s, %s, greatest(%s, service_ms, (SELECT max(heard_ms) FROM lmdaemon.member)), %s, {NOW}, %s, %s
FROM lmdaemon.clock
WHERE NOT EXISTS (SELECT 1 FROM lmdaemon.imported WHERE finished_at IS NULL)
      AND (SELECT oldest FROM lmdaemon.version) <= %s
ON CONFLICT (name) DO UPDATE SET heard_ms = greatest(member.heard_ms, excluded.heard_ms), known_at = excluded.known_at
RETURNING id, heard_ms, batch"""
# The server's time, and the other daemons.
LOOK = f"SELECT {NOW}, {OTHERS}"
# Tells the others where this daemon listens, and the digest of its settings.
INTRODUCE = "UPDATE lmdaemon.member SET address = %s, digest = %s WHERE id = %s"
# Everything that people are shown of the daemons.
SHOWN = """
SELECT id, name, program, address, since_at, wall_at, heard_ms, digest FROM lmdaemon.member ORDER BY since_at, id"""

# Locks the row of a daemon that goes. If that daemon has written since, the division by zero undoes the whole
# transaction. Everything else that the daemon may be waiting for is locked after this row.
LOCK_MEMBER = """
WITH going AS (
    SELECT 1 FROM lmdaemon.member WHERE id = %s AND batch = coalesce(%s::bigint, batch) FOR UPDATE)
SELECT 1 / count(*)::int FROM going"""
# Ends the connections of a daemon that is gone, unless it has had a transaction meanwhile. A process that was stopped
# while it sent a batch leaves a transaction open, which locks its row and those of sessions while the server waits for
# the rest. The name of a connection has 63 bytes at most.
CUT_OFF = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
      AND application_name = (
          SELECT left('lmdaemon ' || name, 63) FROM lmdaemon.member WHERE id = %s AND batch = %s)"""
# Fails if the daemon that expels another has no row itself.
IS_THERE = """
WITH here AS (SELECT 1 FROM lmdaemon.member WHERE id = %s FOR KEY SHARE) SELECT 1 / count(*)::int FROM here"""
# Lets nothing end for inactivity for so long (ms): the clients of a daemon that is expelled need time to reach another
# one.
HOLD = """
UPDATE lmdaemon.clock
SET hold_until_ms = greatest(hold_until_ms, (SELECT max(heard_ms) FROM lmdaemon.member) + %s)"""
# Lets nothing end for inactivity for so long (ms) if no other daemon is there when the one of this name joins: until
# then nobody could hear touches.
HOLD_ALONE = """
UPDATE lmdaemon.clock
SET hold_until_ms = greatest(hold_until_ms, (SELECT heard_ms FROM lmdaemon.member WHERE name = %s) + %s)
WHERE NOT EXISTS (SELECT 1 FROM lmdaemon.member WHERE name <> %s)"""
# Keeps the service clock of a daemon that goes, if it is the furthest.
KEEP_CLOCK = """
UPDATE lmdaemon.clock SET service_ms = greatest(service_ms, heard_ms), wall_at = greatest(clock.wall_at, member.wall_at)
FROM lmdaemon.member WHERE member.id = %s"""
# Adds the figures of a daemon that goes to those of member 0.
FOLD_FIGURES = """
INSERT INTO lmdaemon.figure (operator, member, live, pending, dead, opened, made, touched_ms)
SELECT operator, 0, live, pending, dead, opened, made, touched_ms FROM lmdaemon.figure
WHERE member = %s ORDER BY operator
ON CONFLICT (operator, member) DO UPDATE SET live = figure.live + excluded.live,
    pending = figure.pending + excluded.pending, dead = figure.dead + excluded.dead,
    opened = figure.opened + excluded.opened, made = figure.made + excluded.made,
    touched_ms = greatest(figure.touched_ms, excluded.touched_ms)"""
# Deletes the part of a daemon that goes, which member 0's contains by now.
DROP_FIGURES = "DELETE FROM lmdaemon.figure WHERE member = %s"
# Deletes the row of a daemon that goes.
DROP_MEMBER = "DELETE FROM lmdaemon.member WHERE id = %s"


class Joined(NamedTuple):
    """This daemon's row, its service time, the number of its last transaction, and who else is there."""

    member: int
    heard_ms: int
    batch: int
    seen: Seen


class Introduction(NamedTuple):
    """What a daemon tells of itself: its name, when it started (wall ms), where its private side listens, and the
    digest of its settings.
    """

    name: str
    since_at: int
    address: str = ""
    digest: str = ""


class Row(NamedTuple):
    """A daemon's row: its number, its daemon's name, and the number of its last transaction."""

    id: int
    name: str
    batch: int


class Shown(NamedTuple):
    """What people are shown of a daemon."""

    id: int
    name: str
    program: str
    address: str
    since_at: int
    wall_at: int
    heard_ms: int
    digest: str


def join(sql: Connection, who: Introduction, heard_ms: int, wall_at: int, grace_ms: int, title: str) -> Joined:
    """Adds this daemon's row. If no other daemon is there, nothing ends for inactivity for `grace_ms` from now on.
    Raises DatabaseError while an import has not finished, and if a newer program has changed the schema so that this
    one cannot use it.
    """
    known = len(versions.MIGRATIONS)
    arguments = (who.name, __version__, who.since_at, heard_ms, wall_at, who.address, who.digest, known)
    with sql.pipeline():  # one flush, which is one transaction: the server never waits for this program in it
        version = sql.execute(ALONE)
        joining = sql.execute(JOIN, arguments)
        sql.execute(HOLD_ALONE, (who.name, grace_ms, who.name))
    found = joining.fetchone()
    if found is None:
        current, oldest = version.fetchone() or (0, 0)
        raise versions.newer(title, current, known) if oldest > known else _importing(title)
    member, heard_ms, batch = found
    row = sql.execute(LOOK, (member,)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    return Joined(member, heard_ms, batch, seen(*row))


def _importing(title: str) -> DatabaseError:
    return DatabaseError(f"{title}: an import has not finished; run `lmdaemon import` again")


def make_room(sql: Connection, title: str, limits: StoreLimits) -> bool:
    """At a start: waits until it is known whether any daemon of those in the table lives; if none does, deletes their
    rows. Returns whether one lives. Raises DatabaseError while an import has not finished.
    """
    if sql.execute(IS_IMPORTING).fetchone():
        raise _importing(title)
    while True:
        gone, living = outlived(sql, limits)
        if living is not None:
            return True
        if not gone:
            return False
        for member in gone:
            # The daemon has written after all, or another one that starts has deleted the row
            with suppress(psycopg.errors.DivisionByZero):
                drop(sql, member.id, member.batch)


def refuse_old(sql: Connection, title: str, limits: StoreLimits) -> None:
    """Is called before a change of the schema that older programs cannot live with. Raises DatabaseError while a daemon
    uses the database.
    """
    _, living = outlived(sql, limits)
    if living is not None:
        raise DatabaseError(f"{title}: is in use by an older lmdaemon ({living}); stop it first")


def outlived(sql: Connection, limits: StoreLimits) -> tuple[list[Row], str | None]:
    """Watches the rows of all daemons. If none changes for `lease_s`, returns the rows and None. As soon as one has
    changed, returns no rows and the name of its daemon.
    """
    watch, first = Watch(limits.lease_s), dict[int, Row]()
    while now := {one.id: one for one in _members(sql)}:
        if now.keys() - first.keys():
            send(sql, "")  # a daemon that has nothing to do answers this hint with a transaction, which changes its row
        for member in now.values():
            if first.setdefault(member.id, member).batch != member.batch:
                return [], member.name
        if watch.gone({one.id: one.batch for one in now.values()}, time.monotonic()) == now.keys():
            break
        time.sleep(limits.watch_s)
    return list(now.values()), None


def _members(sql: Connection) -> list[Row]:
    return [Row(*row) for row in sql.execute(MEMBERS)]


def leave(sql: Connection, member: int) -> None:
    """Deletes this daemon's row at an orderly stop, so that no other daemon has to wait until this one counts as
    gone.
    """
    drop(sql, member, None)
    send(sql, "")


def expel(sql: Connection, me: int, member: int, batch: int, grace_ms: int) -> None:
    """Deletes the row of a daemon that is gone. Raises psycopg.errors.DivisionByZero as `drop` does, and if this daemon
    has no row itself.
    """
    drop(sql, member, batch, [(IS_THERE, (me,)), (HOLD, (grace_ms,))])


def drop(sql: Connection, member: int, batch: int | None, besides: Sequence[tuple[str, tuple[int, ...]]] = ()) -> None:
    """Deletes a daemon's row: the row of one that is gone, if `batch` is still the number of its last transaction, or
    this daemon's own row (None). Raises psycopg.errors.DivisionByZero if the row is not there, or has another number.
    """
    if batch is not None:
        sql.execute(CUT_OFF, (member, batch))
    it = (member,)
    statements: list[tuple[str, tuple[int | None, ...]]] = [(ALONE, ()), (LOCK_MEMBER, (member, batch)), *besides]
    statements += [(KEEP_CLOCK, it), (FOLD_FIGURES, it), (DROP_FIGURES, it), (FREE, (member, member, member))]
    with sql.pipeline():
        for statement, arguments in (*statements, (DROP_MEMBER, it)):
            sql.execute(statement, arguments)
