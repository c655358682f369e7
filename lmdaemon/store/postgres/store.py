"""The store in a PostgreSQL database: the verbs of `store.contract`, as operations for the writer and as reads.

Changes are made by this daemon's one writer, in the order in which they were queued, and answered after their commit.
Reads of the daemon itself and reads for people have a connection each.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import psycopg

from lmdaemon.clock import Clock
from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.model import Delivery, Session
from lmdaemon.store.contract import AGING_ROWS, Claim, DatabaseError, Dead, Oldest, Page, Room
from lmdaemon.store.postgres import members, pages
from lmdaemon.store.postgres.batch import DELIVERY, SESSION, delivery_of, to_json
from lmdaemon.store.postgres.errors import said
from lmdaemon.store.postgres.migrations import check_server, migrate
from lmdaemon.store.postgres.paces import PACES, Paces
from lmdaemon.store.postgres.shared import Shared
from lmdaemon.store.postgres.tables import read
from lmdaemon.store.postgres.thread import Connection, Database, NoAnswerError, Thread
from lmdaemon.store.postgres.wall import ServerClock
from lmdaemon.store.verbs import Died

OPEN_S = 60.0  # the longest time that a step of opening may take, such as a migration
JOIN_S = 10.0  # the longest time to find out whether the daemons in the table live, besides their lease

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
# For each operator: the time from which the age of the oldest delivery that waits for the operator's URL is counted.
AGING = """
SELECT name, (SELECT min(aged_from_at - held_base_ms)
              FROM (SELECT aged_from_at, held_base_ms FROM lmdaemon.delivery
                    WHERE operator = name AND sink = 'http' AND state = 'pending' ORDER BY id LIMIT %s) AS first)
FROM json_array_elements_text(%s::json) AS name"""
# The oldest pending delivery of each operator. It takes one step in the index for each of its sinks.
OLDEST_PENDING = """
WITH RECURSIVE its (operator, sink) AS (
    SELECT name, (SELECT min(sink) FROM lmdaemon.delivery WHERE operator = name)
    FROM json_array_elements_text(%s::json) AS name
    UNION ALL
    SELECT its.operator, (
        SELECT min(d.sink) FROM lmdaemon.delivery d WHERE d.operator = its.operator AND d.sink > its.sink)
    FROM its WHERE its.sink IS NOT NULL)
SELECT DISTINCT ON (its.operator) its.operator, found.created_at, its.sink, found.due_at, found.last_error
FROM its LEFT JOIN LATERAL (
    SELECT created_at, due_at, last_error FROM lmdaemon.delivery d
    WHERE d.operator = its.operator AND d.sink = its.sink AND d.state = 'pending'
    ORDER BY id LIMIT 1) AS found ON true
ORDER BY its.operator, found.created_at"""


class Store(Shared):
    """The store in one PostgreSQL database. Its verbs are described in `lmdaemon.store.contract`.

    Nothing is written unless `run` is running.
    """

    engine: Mapping[str, str] = MappingProxyType({"postgresql": ""})
    wal_bytes = 0
    file_bytes = 0
    room: Room | None = None

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
        restart_grace_ms: int = 0,
        paces: Paces = PACES,
        limits: StoreLimits = LIMITS.store,
    ) -> Self:
        """Connects, brings the schema to the newest version if `may_migrate`, and reads clock, figures and gates as the
        last transaction left them. The daemon joins the others on the database with its first batch. Raises
        DatabaseError, and UnsafeSettingError.

        `name` is the daemon's. With `count_downtime`, the wall time since the last transaction is added to the service
        clock. Whenever this daemon joins and no other is there, nothing ends for inactivity for `restart_grace_ms` (or
        what `configure` was given since), also in daemons that join later.
        """
        database = Database(url, password, name, limits)
        thread, wall = Thread(database, prepares=False), ServerClock(clock)
        try:
            version = await thread.run(_prepare, database.title, may_migrate, limits, within_s=OPEN_S)
            within_s = limits.lease_s + JOIN_S
            joins_others = await thread.run(members.make_room, database.title, limits, within_s=within_s)
            asked = wall.ask()
            found = await thread.run(read, 0, within_s=OPEN_S)
            wall.told(found.at, asked)
            loaded = found.loaded._replace(
                next_due_ms=min((due_ms for _, due_ms, _ in found.next if due_ms is not None), default=None),
                next_lifetime_at=min((at for *_, at in found.next if at is not None), default=None),
            )
            if joins_others:  # the other daemons have kept the service clock going, so there was no downtime
                loaded = loaded._replace(committed_at=0)
            elif count_downtime and loaded.committed_at:
                downtime_ms = max(0, wall.wall_ms() - loaded.committed_at)
                loaded = loaded._replace(service_ms=loaded.service_ms + downtime_ms)
        except (psycopg.Error, NoAnswerError) as error:
            thread.close()
            raise DatabaseError(f"{database.title}: cannot be used: {said(error)}") from error
        except BaseException:
            thread.close()
            raise
        store = cls(wall, name, database, thread, found._replace(loaded=loaded), restart_grace_ms, paces, limits)
        store.engine = MappingProxyType({"postgresql": version})
        store.joined_others = joins_others
        return store

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

    async def oldest_waiting(self, operators: Iterable[str]) -> dict[str, Oldest]:
        return await self._reads.read(_oldest, list(operators))

    # -- reading, for people

    async def shown_session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        return await self._reads.look(pages.one_session, operator, session_id)

    async def sessions(
        self, operator: str, *, state: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        return await self._reads.look(pages.session_page, operator, state, player_id, limit, after or pages.BEYOND)

    async def find_sessions(
        self, *, session_id: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        operators, after = self.operators_with_sessions, after or pages.BEYOND
        return await self._reads.look(pages.found_page, operators, session_id, player_id, limit, after)

    async def delivery(self, webhook_id: str) -> Delivery | None:
        return await self._reads.look(pages.one_delivery, webhook_id)

    async def deliveries(
        self, *, operator: str | None, sink: str | None, state: str | None, limit: int, after: int | None
    ) -> Page[Delivery]:
        after = after or pages.BEYOND
        if operator is sink is state is None:
            return await self._reads.look(pages.newest_deliveries, limit, after)
        operators = [operator] if operator is not None else list(self.figures)  # also those no longer configured
        return await self._reads.look(pages.delivery_page, operators, sink, state, limit, after)

    async def has_sink(self, sink: str) -> bool:
        return await self._reads.look(pages.has_sink, list(self.figures), sink)

    async def aging_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._reads.look(_aging, list(operators))

    async def oldest_pending_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        return await self._reads.look(_oldest_pending, list(operators))

    async def _died(self, operator: str, dead: Dead, after: tuple[int, int], limit: int) -> Died:
        return await self._reads.look(pages.died, operator, dead, after, limit)


def _prepare(sql: Connection, title: str, may_migrate: bool, limits: StoreLimits) -> str:
    """Checks the server, and brings the schema to the newest version. Returns the server's version."""
    check_server(sql, title)
    migrate(sql, title, allowed=may_migrate, limits=limits)
    return sql.info.parameter_status("server_version") or ""


def _aging(sql: Connection, operators: Sequence[str]) -> dict[str, int | None]:
    return dict(sql.execute(AGING, (AGING_ROWS, to_json(operators))).fetchall())


def _oldest(sql: Connection, operators: Sequence[str]) -> dict[str, Oldest]:
    rows = sql.execute(OLDEST_PENDING, (to_json(operators),)).fetchall()
    return {name: Oldest(*row) for name, *row in rows if row[0] is not None}


def _oldest_pending(sql: Connection, operators: Sequence[str]) -> dict[str, int | None]:
    rows = sql.execute(OLDEST_PENDING, (to_json(operators),)).fetchall()
    return {name: created_at for name, created_at, *_ in rows}
