"""The store in a PostgreSQL database: the verbs of `store.contract`, as operations for the writer and as reads.

What changes something runs on the one writer of this daemon, in the order in which it was queued, and is answered after
its commit. What the daemon reads for itself and what people look at have a connection each.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Self

import psycopg

from lmdaemon.clock import Clock
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import (
    AGING_ROWS,
    Claim,
    DatabaseError,
    Dead,
    Figures,
    Operation,
    Page,
    Probe,
    Room,
    StoreError,
)
from lmdaemon.store.postgres import members, pages
from lmdaemon.store.postgres.batch import DELIVERY, GATE, NEXT, SESSION, Batch, delivery_of, fetch_all, to_json
from lmdaemon.store.postgres.cluster import LEASE_S
from lmdaemon.store.postgres.errors import said
from lmdaemon.store.postgres.members import BEAT_S, Joined
from lmdaemon.store.postgres.migrations import check_server, migrate
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Thread
from lmdaemon.store.postgres.writer import Server
from lmdaemon.store.projection import Loaded
from lmdaemon.store.verbs import Died, Verbs
from lmdaemon.store.writer import BATCH_MAX, Writer

OPEN_S = 60.0  # for a migration
JOIN_S = LEASE_S + 10.0
LEAVE_S = 3.0
BLOCK = 10_000  # numbers of sessions that are taken at a time, as schema.sql says; more than a batch can use
LOOK_AFTER_S = 60.0  # how often it is looked whether a failover could lose commits

# One session by its key.
SESSION_BY_KEY = f"SELECT {SESSION} FROM lmdaemon.session WHERE operator = %s AND session_id = %s"
# The deliveries of a session, oldest first.
DELIVERIES_OF = f"""
SELECT {DELIVERY} FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session
WHERE d.session = %s ORDER BY d.id"""
# Pending deliveries of lanes (operator and sink), the earliest due first.
LANES = f"""
SELECT lane.place, found.*
FROM json_to_recordset(%s::json) AS lane (place int, operator text, sink text, taken json, most int),
LATERAL (SELECT {DELIVERY} FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session
         WHERE d.operator = lane.operator AND d.sink = lane.sink AND d.state = 'pending'
               AND d.id NOT IN (SELECT one::bigint FROM json_array_elements_text(lane.taken) AS one)
         ORDER BY d.due_at LIMIT lane.most) AS found
ORDER BY lane.place, found.due_at"""
# Of those that wait for each operator's URL: where the age of the oldest is counted from.
AGING = """
SELECT name, (SELECT min(aged_from_at - held_base_ms)
              FROM (SELECT aged_from_at, held_base_ms FROM lmdaemon.delivery
                    WHERE operator = name AND sink = 'http' AND state = 'pending' ORDER BY id LIMIT %s) AS first)
FROM json_array_elements_text(%s::json) AS name"""
# When the oldest pending delivery of each operator was made: the oldest of each of its sinks, a step in the index each.
OLDEST_PENDING = """
WITH RECURSIVE its (operator, sink) AS (
    SELECT name, (SELECT min(sink) FROM lmdaemon.delivery WHERE operator = name)
    FROM json_array_elements_text(%s::json) AS name
    UNION ALL
    SELECT its.operator, (
        SELECT min(d.sink) FROM lmdaemon.delivery d WHERE d.operator = its.operator AND d.sink > its.sink)
    FROM its WHERE its.sink IS NOT NULL)
SELECT its.operator, min((
    SELECT created_at FROM lmdaemon.delivery d
    WHERE d.operator = its.operator AND d.sink = its.sink AND d.state = 'pending'
    ORDER BY id LIMIT 1))
FROM its GROUP BY its.operator"""
# The service clock, and when it was kept: of those that are there, and of the last one that has gone.
CLOCK = """
SELECT max(service_ms), max(wall_at)
FROM (SELECT service_ms, wall_at FROM lmdaemon.clock
      UNION ALL SELECT heard_ms, wall_at FROM lmdaemon.member) AS known"""
# Figures of every operator.
FIGURES = (
    "SELECT operator, sum(live)::bigint, sum(pending)::bigint, sum(dead)::bigint FROM lmdaemon.figure GROUP BY operator"
)
# What holds every operator back, with the number of its last change.
OPERATORS = f"SELECT name, version, {', '.join(GATE)} FROM lmdaemon.operator"
# Numbers for the next sessions.
NEXT_BLOCK = "SELECT nextval('lmdaemon.session_block')"
# Whether a failover could lose commits: replicas are attached, and none has to confirm a commit.
REPLICAS = """
SELECT (SELECT count(*) FROM pg_stat_replication) > 0 AND current_setting('synchronous_standby_names') = ''"""


class Store(Verbs):
    """The store in one PostgreSQL database; its verbs are documented in `lmdaemon.store.contract`. `run` must be
    running for anything to be written.
    """

    engine: Mapping[str, str] = MappingProxyType({"postgresql": ""})
    wal_bytes = 0
    file_bytes = 0
    room: Room | None = None

    def __init__(self, clock: Clock, name: str, database: Database, thread: Thread) -> None:
        """Made by `open`."""
        super().__init__(clock, name)
        self._database = database
        self._thread = thread
        self._versions: dict[str, int] = {}  # of what holds each operator back: the number of its last change
        self._block_ends = 0  # the last number of this daemon's block of numbers for sessions
        self._expect_known = False  # whether the last sessions to be added were known
        self.strained: str | None = None
        self._joined: Joined
        self._reads: Reads

    @classmethod
    async def open(
        cls,
        url: str,
        clock: Clock,
        *,
        name: str,
        password: str | None = None,
        may_migrate: bool = True,
        count_downtime: bool = False,
    ) -> Self:
        """Connects, brings the schema to the newest version if it may, takes the place of the daemon before, and picks
        up clock, figures and gates where that left them. Raises DatabaseError, and UnsafeSettingError.

        `name` is the daemon's. With `count_downtime`, the wall time since the last transaction is added to the service
        clock.
        """
        database = Database(url, password, name)
        store = cls(clock, name, database, Thread(database, prepares=False))
        try:
            await store._join(name, may_migrate=may_migrate, count_downtime=count_downtime)
        except (psycopg.Error, NoAnswerError) as error:
            store._thread.close()
            raise DatabaseError(f"{database.title}: cannot be used: {said(error)}") from error
        except BaseException:
            store._thread.close()
            raise
        return store

    async def _join(self, name: str, *, may_migrate: bool, count_downtime: bool) -> None:
        clock, title = self._clock, self._database.title

        def prepare(sql: Connection) -> str:
            check_server(sql, title)
            migrate(sql, title, allowed=may_migrate)
            return sql.info.parameter_status("server_version") or ""

        version = await self._thread.run(prepare, within_s=OPEN_S)
        self.engine = MappingProxyType({"postgresql": version})
        self._joined = await self._thread.run(members.join, name, clock.wall_ms(), title, within_s=JOIN_S)
        found = await self._thread.run(self.read, within_s=OPEN_S)
        if count_downtime and found.committed_at:
            downtime_ms = max(0, clock.wall_ms() - found.committed_at)
            found = found._replace(service_ms=found.service_ms + downtime_ms)
        self.load(found)
        server = Server(self._database, self._thread, self._joined, self)
        self._writer: Writer[Batch] = Writer(self, server)
        self._reads = Reads(self._database, self._writer.refused)

    async def run(self) -> None:
        """The writer, and the beats beside it by which others see that the daemon is there, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._writer.run())
            group.create_task(self._beat_for_ever())
            group.create_task(self._look_after_for_ever())

    async def _beat_for_ever(self) -> None:
        while True:
            before = self._writer.commits
            await asyncio.sleep(BEAT_S)
            if self._writer.commits == before and self._writer.failure is None:
                with suppress(StoreError):
                    await self._writer.write(Probe())

    async def _look_after_for_ever(self) -> None:
        while True:
            with suppress(StoreError):
                self.strained = await self._reads.read(_strained)
            await asyncio.sleep(LOOK_AFTER_S)

    async def close(self) -> None:
        """Leaves in order: the next daemon need not wait until this one is known to be gone."""
        self._writer.stop_taking(StoreError("the store is closed"))
        self._reads.close()
        with suppress(psycopg.Error, NoAnswerError):
            await self._thread.run(members.leave, self._joined.member, within_s=LEAVE_S)
        self._thread.close()

    # -- what the writing connection asks, on its thread

    def read(self, sql: Connection) -> Loaded:
        """What the tables say; also numbers for sessions."""
        wanted = [(CLOCK, ()), (FIGURES, ()), (OPERATORS, ()), (NEXT, ()), (NEXT_BLOCK, ())]
        (clock,), figures, gates, (following,), (block,) = fetch_all(sql, wanted)
        known = {name: Figures(*counts) for name, *counts in figures}
        held = {name: Gate(*gate) for name, _, *gate in gates}
        self._versions = {row[0]: row[1] for row in gates}
        self._take_block(block[0])
        return Loaded(
            service_ms=clock[0],
            committed_at=clock[1],
            operators={name: (known.get(name, Figures()), held.get(name, Gate())) for name in {**known, **held}},
            next_due_ms=following[0],
            next_lifetime_at=following[1],
            last_session=block[0] - 1,
        )

    @property
    def is_short_of_numbers(self) -> bool:
        """Whether the next batch may need more numbers for sessions than are left."""
        return self._block_ends - self._last_session < BATCH_MAX

    def take_numbers(self, sql: Connection) -> None:
        """Takes numbers for the next sessions."""
        row = sql.execute(NEXT_BLOCK).fetchone()
        assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
        self._take_block(row[0])

    def _take_block(self, first: int) -> None:
        self._last_session = first - 1
        self._block_ends = first + BLOCK - 1

    # -- what the writer asks

    def begin(self, operations: Sequence[Operation[Any]]) -> Batch:
        return Batch(operations, self.world(), self._versions, expect_known=self._expect_known)

    def committed(self, work: Batch) -> None:
        changes = work.changes
        if work.looked_up and (changes.met_known or changes.sessions):
            self._expect_known = changes.met_known
        self._versions = work.versions
        for name in changes.gates:
            self._versions[name] = self._versions.get(name, 0) + 1
        self.absorb(changes)

    # -- reading, for the daemon itself

    async def session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        def read(sql: Connection) -> tuple[Session, list[Delivery]] | None:
            row = sql.execute(SESSION_BY_KEY, (operator, session_id)).fetchone()
            if row is None:
                return None
            session = Session(*row)
            return session, [delivery_of(row) for row in sql.execute(DELIVERIES_OF, (session.id,))]

        return await self._reads.read(read)

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:
        wanted = [
            {"place": i, "operator": one.operator, "sink": one.sink, "taken": list(one.taken), "most": one.limit}
            for i, one in enumerate(lanes)
        ]

        def read(sql: Connection) -> list[list[Delivery]]:
            found: list[list[Delivery]] = [[] for _ in lanes]
            for place, *row in sql.execute(LANES, (to_json(wanted),)):
                found[place].append(delivery_of(row))
            return found

        return await self._reads.read(read)

    async def oldest_pending(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._reads.read(_oldest_pending, list(operators))

    # -- reading, for people: without tokens, bodies and what else they are not shown

    async def shown_session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        return await self._reads.look(pages.one_session, operator, session_id)

    async def sessions(
        self, operator: str, *, state: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        return await self._reads.look(pages.session_page, operator, state, player_id, limit, after or pages.BEYOND)

    async def find_sessions(
        self, *, session_id: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        operators, after = list(self.figures), after or pages.BEYOND
        return await self._reads.look(pages.found_page, operators, session_id, player_id, limit, after)

    async def delivery(self, webhook_id: str) -> Delivery | None:
        return await self._reads.look(pages.one_delivery, webhook_id)

    async def deliveries(
        self, *, operator: str | None, sink: str | None, state: str | None, limit: int, after: int | None
    ) -> Page[Delivery]:
        after = after or pages.BEYOND
        if operator is sink is state is None:
            return await self._reads.look(pages.newest_deliveries, limit, after)
        operators = [operator] if operator is not None else list(self.figures)  # of all that there ever were
        return await self._reads.look(pages.delivery_page, operators, sink, state, limit, after)

    async def has_sink(self, sink: str) -> bool:
        return await self._reads.look(pages.has_sink, list(self.figures), sink)

    async def aging_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._reads.look(_aging, list(operators))

    async def oldest_pending_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._reads.look(_oldest_pending, list(operators))

    async def _died(self, operator: str, dead: Dead, after: tuple[int, int], limit: int) -> Died:
        return await self._reads.look(pages.died, operator, dead, after, limit)


def _aging(sql: Connection, operators: Sequence[str]) -> dict[str, int | None]:
    return dict(sql.execute(AGING, (AGING_ROWS, to_json(operators))).fetchall())


def _oldest_pending(sql: Connection, operators: Sequence[str]) -> dict[str, int | None]:
    return dict(sql.execute(OLDEST_PENDING, (to_json(operators),)).fetchall())


def _strained(sql: Connection) -> str | None:
    row = sql.execute(REPLICAS).fetchone()
    if row is not None and row[0]:
        return "a failover could lose what was acknowledged: replicas are attached, and none is synchronous"
    return None
