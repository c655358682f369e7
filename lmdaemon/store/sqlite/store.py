"""The store in one SQLite file: the verbs of `store.contract`, as operations for the writer and as reads.

What changes something runs on the one writer, in the order in which it was queued, and is answered after its commit.
What the daemon reads for itself and what people look at have a connection each.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

from lmdaemon.clock import Clock
from lmdaemon.log import Log
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import (
    Claim,
    Closing,
    DatabaseError,
    Figures,
    GateChange,
    Opened,
    Opening,
    Operation,
    Page,
    Probe,
    Pruned,
    Pruning,
    Recorded,
    Recording,
    RetryDead,
    RetryOne,
    Settled,
    Settlement,
    StoreError,
    Sweep,
    Swept,
    Touched,
    Touching,
)
from lmdaemon.store.projection import Loaded, Projection
from lmdaemon.store.rules import RETRY_ROWS
from lmdaemon.store.sqlite import pages
from lmdaemon.store.sqlite.batch import GATE, NEXT, SET_UP, Batch
from lmdaemon.store.sqlite.file import WAL_MAX, Database
from lmdaemon.store.sqlite.rows import (
    DELIVERY,
    ENDED_BEFORE,
    SESSION,
    as_rows,
    fetch,
    ids_of,
    scalar,
    session_by_key,
    to_json,
)

LARGE_WAL = 2 * WAL_MAX  # bytes; somebody reads in one long transaction, and the WAL cannot start over
RETRIES_MAX = 100_000  # dead deliveries made due again by one call
EXPORT_ROWS = 500  # sessions in one read
LANES_AT_ONCE = 32  # in one statement


log = Log("store")


_LANE = f"""
SELECT {as_rows(", ".join([*Delivery._fields[:-1], "CAST(body AS TEXT)"]))} AS lane
FROM (SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session
      WHERE d.operator = ? AND d.sink = ? AND d.state = 'pending' AND d.id NOT IN (SELECT value FROM json_each(?))
      ORDER BY d.due_at LIMIT ?)"""


@cache
def _lanes(count: int) -> str:
    """So many lanes as one row: an array of arrays of rows."""
    return f"SELECT json_group_array(json(lane)) FROM ({' UNION ALL '.join([_LANE] * count)})"


_DELIVERIES_OF = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session WHERE d.session = ? ORDER BY d.id"""
# The oldest of each sink of an operator, a step in the index each.
_OLDEST_PENDING = """
WITH RECURSIVE its(sink) AS (
    SELECT (SELECT sink FROM delivery WHERE operator = :operator ORDER BY sink LIMIT 1)
    UNION ALL
    SELECT (SELECT d.sink FROM delivery d WHERE d.operator = :operator AND d.sink > its.sink ORDER BY d.sink LIMIT 1)
    FROM its WHERE its.sink IS NOT NULL)
SELECT min(created_at) FROM its JOIN delivery ON id = (
    SELECT id FROM delivery d WHERE d.operator = :operator AND d.sink = its.sink AND d.state = 'pending'
    ORDER BY id LIMIT 1)"""
_SESSIONS_OF = f"""
SELECT {SESSION} FROM session WHERE id IN (SELECT value FROM json_each(?)) AND operator = coalesce(?, operator)"""
_DELIVERIES_OF_ALL = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session
WHERE d.session IN (SELECT value FROM json_each(?)) ORDER BY d.id"""


class Store(Projection):
    """The store in one SQLite file; its verbs are documented in `lmdaemon.store.contract`. Opened once; `run` must be
    running for anything to be written.
    """

    def __init__(self, clock: Clock) -> None:
        """Made by `open`."""
        super().__init__(clock)
        self._expect_known = False  # whether the last sessions to be added were known
        self._db: Database[Batch]

    @classmethod
    async def open(cls, path: Path, clock: Clock, *, count_downtime: bool = False) -> Self:
        """Opens the file and picks up clock, figures and gates where the last run left them. Raises DatabaseError.

        With `count_downtime`, the wall time since the last transaction is added to the service clock.
        """
        store = cls(clock)
        store._db = await Database.open(path, store, setup=SET_UP)
        try:
            found = await store._db.read(_load)
            if count_downtime and found.committed_at:
                downtime_ms = max(0, clock.wall_ms() - found.committed_at)
                found = found._replace(service_ms=found.service_ms + downtime_ms)
            store.load(found)
            await store._db.accept()
        except StoreError as error:  # a page that the opening has not met
            await store._db.close()
            raise DatabaseError(f"{path}: {error}") from error
        except BaseException:
            await store._db.close()
            raise
        return store

    async def run(self) -> None:
        """The writer, the checkpoints beside it, and the emptying of the WAL after them, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._db.run())
            group.create_task(self._db.checkpoint_for_ever())
            group.create_task(self._db.empty_wal_when_idle())

    async def close(self) -> None:
        await self._db.close()

    @property
    def path(self) -> Path:
        return self._db.path

    @property
    def failure(self) -> str | None:
        return self._db.failure

    @property
    def writing_since(self) -> float | None:
        return self._db.writing_since

    @property
    def waiting(self) -> int:
        return self._db.waiting

    @property
    def wal_bytes(self) -> int:
        return self._db.wal_bytes

    @property
    def strained(self) -> str | None:
        return "the WAL cannot start over: somebody keeps reading" if self.wal_bytes > LARGE_WAL else None

    @property
    def file_bytes(self) -> int:
        return self._db.file_bytes

    @property
    def refused(self) -> Mapping[str, int]:
        return self._db.refused

    # -- what the writer asks

    def begin(self, operations: Sequence[Operation[Any]]) -> Batch:
        return Batch(operations, self.world(), expect_known=self._expect_known)

    def committed(self, work: Batch) -> None:
        changes = work.changes
        if work.looked_up and (changes.met_known or changes.sessions):
            self._expect_known = changes.met_known
        self.absorb(changes)

    # -- changes

    async def open_session(self, opening: Opening) -> Opened:
        return await self._db.write(opening)

    async def touch(self, operator: str, session_ids: Sequence[str]) -> Touched:
        return await self._db.write(Touching(operator, session_ids))

    async def end(self, operator: str, session_id: str) -> Session | None:
        return await self._db.write(Closing(operator, session_id))

    async def record(self, recording: Recording) -> Recorded:
        return await self._db.write(recording)

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        # Due as of now, when it is queued, not when the writer comes to it: of a touch that was queued before its
        # deadline, every sweep that could end its session stands behind it, however long the disk takes.
        as_of_ms = self.service_clock.now_ms() if idle else None
        return await self._db.write(Sweep(as_of_ms, crowd))

    async def settle(self, settlement: Settlement) -> Settled:
        return await self._db.write(settlement)

    async def set_gate(self, operator: str, change: Callable[[Gate], Gate]) -> Gate:
        return await self._db.write(GateChange(operator, change))

    async def retry_dead(self, operator: str, since_at: int) -> int:
        # Found by reading, and changed in steps, so that other writers get their turn
        retried, after = 0, (since_at, 0)
        while retried < RETRIES_MAX:
            found = await self._db.look(pages.died, operator, after, min(RETRY_ROWS, RETRIES_MAX - retried))
            if found.ids:
                retried += await self._db.write(RetryDead(operator, found.ids))
            if found.after is None:
                break
            after = found.after
        return retried

    async def retry_one(self, webhook_id: str) -> Delivery | None:
        return await self._db.write(RetryOne(webhook_id))

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        return await self._db.write(Pruning(before_at, after))

    async def probe(self) -> None:
        try:
            await self._db.write(Probe())
        except sqlite3.Error as error:
            raise StoreError(f"writing failed: {error}") from error

    # -- reading, for the daemon itself

    async def session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:

        def read(sql: sqlite3.Connection) -> tuple[Session, list[Delivery]] | None:
            session = session_by_key(sql, operator, session_id)
            if session is None:
                return None
            return session, [Delivery(*row) for row in sql.execute(_DELIVERIES_OF, (session.id,))]

        return await self._db.read(read)

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:

        def read(sql: sqlite3.Connection) -> list[list[Delivery]]:
            found: list[list[Delivery]] = []
            for first in range(0, len(lanes), LANES_AT_ONCE):
                some = lanes[first : first + LANES_AT_ONCE]
                arguments = chain.from_iterable((one.operator, one.sink, to_json(one.taken), one.limit) for one in some)
                found += ([_claimed(row) for row in rows] for rows in fetch(sql, _lanes(len(some)), *arguments))
            return found

        return await self._db.read(read)

    async def oldest_pending(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._db.read(_oldest_pending, list(operators))

    # -- reading, for people: without tokens, bodies and what else they are not shown

    async def shown_session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        return await self._db.look(pages.one_session, operator, session_id)

    async def sessions(
        self, operator: str, *, state: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        return await self._db.look(pages.session_page, operator, state, player_id, limit, after or pages.BEYOND)

    async def delivery(self, webhook_id: str) -> Delivery | None:
        return await self._db.look(pages.one_delivery, webhook_id)

    async def deliveries(
        self, *, operator: str | None, sink: str | None, state: str | None, limit: int, after: int | None
    ) -> Page[Delivery]:
        after = after or pages.BEYOND
        if operator is sink is state is None:
            return await self._db.look(pages.newest_deliveries, limit, after)
        operators = [operator] if operator is not None else list(self.figures)  # of all that there ever were
        return await self._db.look(pages.delivery_page, operators, sink, state, limit, after)

    async def has_sink(self, sink: str) -> bool:
        return await self._db.look(pages.has_sink, list(self.figures), sink)

    async def oldest_pending_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._db.look(_oldest_pending, list(operators))


def _load(sql: sqlite3.Connection) -> Loaded:
    """What the tables say at the start."""
    service_ms, wall_at = _clock(sql)
    operators: dict[str, tuple[Figures, Gate]] = {}
    for name, live, pending, dead, *gate in sql.execute(
        f"SELECT name, live, pending, dead, {', '.join(GATE)} FROM operator"
    ):
        operators[name] = (Figures(live, pending, dead), Gate(*gate))
    next_due_ms, next_lifetime_at = sql.execute(NEXT).fetchone()
    return Loaded(
        service_ms=service_ms,
        committed_at=wall_at,
        operators=operators,
        next_due_ms=next_due_ms,
        next_lifetime_at=next_lifetime_at,
        last_session=scalar(sql.execute("SELECT max(id) FROM session")) or 0,
    )


def _oldest_pending(sql: sqlite3.Connection, operators: Iterable[str]) -> dict[str, int | None]:
    return {name: scalar(sql.execute(_OLDEST_PENDING, {"operator": name})) for name in operators}


# -- reading the file from another process, beside the daemon


class Ended(NamedTuple):
    """Ended sessions with their deliveries, in the order in which they ended, and where to go on, None at the end."""

    sessions: list[tuple[Session, list[Delivery]]]
    after: tuple[int, int] | None


def ended(
    sql: sqlite3.Connection, operator: str | None, after: tuple[int, int], before_at: int, rows: int = EXPORT_ROWS
) -> Ended:
    """A page of what ended before then, beginning behind `after`, as (ended_at, id). One short read transaction: longer
    ones would keep the WAL from starting over. Raises sqlite3.Error.
    """
    sql.execute("BEGIN")
    try:
        keys = fetch(sql, ENDED_BEFORE, before_at, *after, rows)
        sessions = {row[0]: Session(*row) for row in sql.execute(_SESSIONS_OF, (ids_of(keys), operator))}
        found: dict[int, list[Delivery]] = {session: [] for session in sessions}
        for row in sql.execute(_DELIVERIES_OF_ALL, (to_json(list(sessions)),)):
            delivery = Delivery(*row)
            found[delivery.session].append(delivery)
    finally:
        sql.execute("COMMIT")
    page = [(sessions[key], found[key]) for key, _ in keys if key in sessions]
    return Ended(page, (keys[-1][1], keys[-1][0]) if len(keys) == rows else None)


def gates(sql: sqlite3.Connection) -> dict[str, Gate]:
    """What holds each operator back. Raises sqlite3.Error."""
    return {name: Gate(*gate) for name, *gate in sql.execute(f"SELECT name, {', '.join(GATE)} FROM operator")}


def committed_at(sql: sqlite3.Connection) -> int:
    """Wall time of the last transaction in the file."""
    return _clock(sql)[1]


def _clock(sql: sqlite3.Connection) -> tuple[int, int]:
    service_ms, wall_at = sql.execute("SELECT service_ms, wall_at FROM clock").fetchone()
    return service_ms, wall_at


def _claimed(row: list[Any]) -> Delivery:
    row[-1] = row[-1].encode()  # the body
    return Delivery(*row)
