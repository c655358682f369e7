"""The store in one SQLite file: the verbs of `store.contract`, as operations for the writer and as reads.

Changes are made by the one writer, in the order in which they were queued, and answered after their commit. Reads of
the daemon itself and reads for people have a connection each.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from lmdaemon.clock import Clock
from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.log import Log
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import (
    AGING_ROWS,
    Claim,
    DatabaseError,
    Dead,
    Figures,
    Oldest,
    Operation,
    Page,
    Room,
    StoreError,
)
from lmdaemon.store.projection import Loaded
from lmdaemon.store.sqlite import pages
from lmdaemon.store.sqlite.batch import GATE, NEXT, SET_UP, Batch
from lmdaemon.store.sqlite.database import Database
from lmdaemon.store.sqlite.rows import DELIVERY, as_rows, fetch, scalar, session_by_key, to_json
from lmdaemon.store.verbs import Died, Verbs

LANES_AT_ONCE = 32  # lanes read by one statement

log = Log("store")


# The digest is for proof, and not needed for sending
_CLAIMED = DELIVERY.replace("d.body_digest", "NULL AS body_digest")
# Pending deliveries of one lane (operator and sink), the earliest due first, as one JSON array.
_LANE = f"""
SELECT {as_rows(", ".join([*Delivery._fields[:-1], "CAST(body AS TEXT)"]))} AS lane
FROM (SELECT {_CLAIMED} FROM delivery d JOIN session s ON s.id = d.session
      WHERE d.operator = ? AND d.sink = ? AND d.state = 'pending' AND d.id NOT IN (SELECT value FROM json_each(?))
      ORDER BY d.due_at LIMIT ?)"""


@cache
def _lanes(count: int) -> str:
    """A statement for `count` lanes. It returns one row, a JSON array with the rows of each lane."""
    return f"SELECT json_group_array(json(lane)) FROM ({' UNION ALL '.join([_LANE] * count)})"


# All deliveries of a session, oldest first.
_DELIVERIES_OF = f"""
SELECT {DELIVERY} FROM delivery d JOIN session s ON s.id = d.session WHERE d.session = ? ORDER BY d.id"""
# The oldest pending delivery of an operator. It takes one step in the index for each of its sinks. Columns beside min()
# have the values of the row with the least value (SQLite, "Bare columns in an aggregate query").
_OLDEST_PENDING = """
WITH RECURSIVE its(sink) AS (
    SELECT (SELECT sink FROM delivery WHERE operator = :operator ORDER BY sink LIMIT 1)
    UNION ALL
    SELECT (SELECT d.sink FROM delivery d WHERE d.operator = :operator AND d.sink > its.sink ORDER BY d.sink LIMIT 1)
    FROM its WHERE its.sink IS NOT NULL)
SELECT min(created_at), delivery.sink, due_at, last_error FROM its JOIN delivery ON id = (
    SELECT id FROM delivery d WHERE d.operator = :operator AND d.sink = its.sink AND d.state = 'pending'
    ORDER BY id LIMIT 1)"""


class Store(Verbs):
    """The store in one SQLite file. Its verbs are described in `lmdaemon.store.contract`.

    Nothing is written unless `run` is running.
    """

    engine: Mapping[str, str] = MappingProxyType({"sqlite": sqlite3.sqlite_version})

    def __init__(self, clock: Clock, name: str, limits: StoreLimits) -> None:
        """Use `open` instead."""
        super().__init__(clock, name, limits)
        self._expect_known = False  # whether the last batch was to add sessions that were known already
        self.db: Database[Batch]  # the parts that write and read the file

    @classmethod
    async def open(
        cls,
        path: Path,
        clock: Clock,
        *,
        name: str = "",
        count_downtime: bool = False,
        limits: StoreLimits = LIMITS.store,
    ) -> Self:
        """Opens the file and reads clock, figures and gates as the last run left them. Raises DatabaseError.

        `name` is the daemon's. With `count_downtime`, the wall time since the last transaction is added to the service
        clock.
        """
        store = cls(clock, name, limits)
        store.db = await Database.open(path, store, setup=SET_UP, limits=limits)
        store.writer = store.db.writer
        try:
            found = await store.db.reads.read(_load)
            if count_downtime and found.committed_at:
                downtime_ms = max(0, clock.wall_ms() - found.committed_at)
                found = found._replace(service_ms=found.service_ms + downtime_ms)
            store.load(found)
            await store.db.accept()
        except StoreError as error:  # a page is damaged that opening the file did not read
            await store.db.close()
            raise DatabaseError(f"{path}: {error}") from error
        except BaseException:
            await store.db.close()
            raise
        return store

    async def run(self) -> None:
        await self.db.run()

    async def close(self) -> None:
        await self.db.close()

    @property
    def path(self) -> Path:
        return self.db.path

    @property
    def wal_bytes(self) -> int:
        return self.db.wal_bytes

    @property
    def strained(self) -> str | None:
        is_large = self.wal_bytes > self._limits.large_wal
        return "the WAL cannot start over: somebody keeps reading" if is_large else None

    @property
    def file_bytes(self) -> int:
        return self.db.file_bytes

    @property
    def room(self) -> Room | None:
        return self.db.room

    # -- called by the writer

    def begin(self, operations: Sequence[Operation[Any]]) -> Batch:
        return Batch(operations, self.world(), expect_known=self._expect_known)

    def committed(self, work: Batch) -> None:
        changes = work.changes
        if work.looked_up and (changes.met_known or changes.sessions):
            self._expect_known = changes.met_known
        self.absorb(changes)

    # -- reading, for the daemon itself

    async def session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:

        def read(sql: sqlite3.Connection) -> tuple[Session, list[Delivery]] | None:
            session = session_by_key(sql, operator, session_id)
            if session is None:
                return None
            return session, [Delivery(*row) for row in sql.execute(_DELIVERIES_OF, (session.id,))]

        return await self.db.reads.read(read)

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:

        def read(sql: sqlite3.Connection) -> list[list[Delivery]]:
            found: list[list[Delivery]] = []
            for first in range(0, len(lanes), LANES_AT_ONCE):
                some = lanes[first : first + LANES_AT_ONCE]
                arguments = chain.from_iterable((one.operator, one.sink, to_json(one.taken), one.limit) for one in some)
                found += ([_claimed(row) for row in rows] for rows in fetch(sql, _lanes(len(some)), *arguments))
            return found

        return await self.db.reads.read(read)

    async def oldest_pending(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self.db.reads.read(_oldest_pending, list(operators))

    async def oldest_waiting(self, operators: Iterable[str]) -> dict[str, Oldest]:
        return await self.db.reads.read(_oldest, list(operators))

    # -- reading, for people

    async def shown_session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        return await self.db.reads.look(pages.one_session, operator, session_id)

    async def sessions(
        self, operator: str, *, state: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        return await self.db.reads.look(pages.session_page, operator, state, player_id, limit, after or pages.BEYOND)

    async def find_sessions(
        self, *, session_id: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        operators, after = self.operators_with_sessions, after or pages.BEYOND
        return await self.db.reads.look(pages.found_page, operators, session_id, player_id, limit, after)

    async def delivery(self, webhook_id: str) -> Delivery | None:
        return await self.db.reads.look(pages.one_delivery, webhook_id)

    async def deliveries(
        self, *, operator: str | None, sink: str | None, state: str | None, limit: int, after: int | None
    ) -> Page[Delivery]:
        after = after or pages.BEYOND
        if operator is sink is state is None:
            return await self.db.reads.look(pages.newest_deliveries, limit, after)
        operators = [operator] if operator is not None else list(self.figures)  # also those no longer configured
        return await self.db.reads.look(pages.delivery_page, operators, sink, state, limit, after)

    async def has_sink(self, sink: str) -> bool:
        return await self.db.reads.look(pages.has_sink, list(self.figures), sink)

    async def _died(self, operator: str, dead: Dead, after: tuple[int, int], limit: int) -> Died:
        return await self.db.reads.look(pages.died, operator, dead, after, limit)

    async def aging_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self.db.reads.look(_aging, list(operators))

    async def oldest_pending_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self.db.reads.look(_oldest_pending, list(operators))


# The time from which the age of the oldest delivery that waits for an operator's URL is counted.
_AGING = """
SELECT min(aged_from_at - held_base_ms)
FROM (SELECT aged_from_at, held_base_ms FROM delivery WHERE operator = ? AND sink = 'http' AND state = 'pending'
      ORDER BY id LIMIT ?)"""
# Figures and gate of every operator.
_OPERATORS = f"SELECT name, live, pending, dead, {', '.join(GATE)} FROM operator"


def _load(sql: sqlite3.Connection) -> Loaded:
    """Reads from the tables what the daemon keeps in memory."""
    service_ms, wall_at = _clock(sql)
    operators: dict[str, tuple[Figures, Gate]] = {}
    for name, live, pending, dead, *gate in sql.execute(_OPERATORS):
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


def _aging(sql: sqlite3.Connection, operators: Iterable[str]) -> dict[str, int | None]:
    return {name: scalar(sql.execute(_AGING, (name, AGING_ROWS))) for name in operators}


def _oldest(sql: sqlite3.Connection, operators: Iterable[str]) -> dict[str, Oldest]:
    rows = ((name, sql.execute(_OLDEST_PENDING, {"operator": name}).fetchone()) for name in operators)
    return {name: Oldest(*row) for name, row in rows if row[0] is not None}


def _oldest_pending(sql: sqlite3.Connection, operators: Iterable[str]) -> dict[str, int | None]:
    return {name: scalar(sql.execute(_OLDEST_PENDING, {"operator": name})) for name in operators}


def _clock(sql: sqlite3.Connection) -> tuple[int, int]:
    service_ms, wall_at = sql.execute("SELECT service_ms, wall_at FROM clock").fetchone()
    return service_ms, wall_at


def _claimed(row: list[Any]) -> Delivery:
    row[-1] = row[-1].encode()  # the last column is the body, which was read as text
    return Delivery(*row)
