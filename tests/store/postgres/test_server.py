"""What a server must be like, which program may use its database, and what happens to an operation that cannot be
stored.
"""

import asyncio
import contextlib
from contextlib import AsyncExitStack, closing
from pathlib import Path
from random import Random

import psycopg
import pytest
from clocks import HandClock
from engines import END_OTHERS, SOON, PostgresEngine, own_name
from operations import notice, opening
from postgres import own_server
from processes import wait_for
from proxy import Proxy
from support import ScriptedOperator, operator_table, scripted_operator, serving, until

from lmdaemon.limits import StoreLimits
from lmdaemon.store.contract import DatabaseError, Store, StoreError
from lmdaemon.store.postgres import members
from lmdaemon.store.postgres.migrations import UnsafeSettingError, migrate
from lmdaemon.store.postgres.store import Store as PostgresStore
from lmdaemon.store.postgres.strains import OLD_S, Strains, unsafe_settings
from lmdaemon.store.postgres.versions import MIGRATIONS
from lmdaemon.sweeper import Sweeper


def execute(engine: PostgresEngine, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(engine.url, autocommit=True) as sql:
        cursor = sql.execute(statement.replace("DATABASE_NAME", sql.info.dbname))  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


class TestRefusals:
    """Each refusal names its reason, and nothing is changed."""

    @pytest.mark.parametrize("value", ["off", "local"])
    async def test_a_commit_that_a_crash_could_undo_is_refused(
        self, postgres_engine: PostgresEngine, clock: HandClock, value: str
    ) -> None:
        execute(postgres_engine, f"ALTER DATABASE DATABASE_NAME SET synchronous_commit = {value}")
        with pytest.raises(UnsafeSettingError, match=f"synchronous_commit is '{value}'"):
            await PostgresStore.open(postgres_engine.url, clock, name=own_name())

    async def test_a_database_that_cannot_be_written_is_refused(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        execute(postgres_engine, "ALTER DATABASE DATABASE_NAME SET default_transaction_read_only = on")
        with pytest.raises(DatabaseError, match="is read-only"):
            await PostgresStore.open(postgres_engine.url, clock, name=own_name())

    async def test_a_database_that_is_not_there_is_named(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        url = psycopg.conninfo.make_conninfo(postgres_engine.url, dbname="nowhere")
        with pytest.raises(DatabaseError, match=r'postgresql 127\.0\.0\.1/nowhere: .*"nowhere" does not exist'):
            await PostgresStore.open(url, clock, name=own_name())

    async def test_a_server_that_cannot_be_reached_is_named(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        url = psycopg.conninfo.make_conninfo(postgres_engine.url, port=1, password="hush-4711")
        with pytest.raises(DatabaseError, match="refused") as caught:
            await PostgresStore.open(url, clock, name=own_name())
        assert "hush-4711" not in str(caught.value)

    async def test_a_schema_of_a_newer_program_is_refused(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        execute(postgres_engine, "UPDATE lmdaemon.version SET current = 9, oldest = 9")
        with pytest.raises(DatabaseError, match="newer lmdaemon"):
            await PostgresStore.open(postgres_engine.url, clock, name=own_name())
        # The newer version has only added to the schema
        execute(postgres_engine, "UPDATE lmdaemon.version SET current = 9, oldest = 1")
        async with postgres_engine.open(clock) as db:
            assert (await db.open_session(opening())).outcome == "created"

    async def test_without_leave_to_migrate_a_missing_schema_is_named(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        execute(postgres_engine, "DROP SCHEMA lmdaemon CASCADE")
        with pytest.raises(DatabaseError, match="run `lmdaemon migrate`"):
            await PostgresStore.open(postgres_engine.url, clock, name=own_name(), may_migrate=False)
        async with postgres_engine.open(clock):
            pass


def test_two_who_set_up_a_database_at_once_set_it_up_once(postgres_engine: PostgresEngine) -> None:
    execute(postgres_engine, "DROP SCHEMA lmdaemon CASCADE")

    async def both() -> list[list[int]]:
        def one() -> list[int]:
            with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
                return migrate(sql, "it")

        return await asyncio.gather(*(asyncio.to_thread(one) for _ in range(4)))

    assert sorted(asyncio.run(both())) == [[], [], [], list(range(1, len(MIGRATIONS) + 1))]


class TestOneDaemon:
    """Programs that use the database one after the other."""

    SOON = StoreLimits(watch_s=0.02)

    async def test_a_program_that_knows_nothing_of_others_keeps_the_schema_as_it_is(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        execute(postgres_engine, "DROP SCHEMA lmdaemon CASCADE")
        with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
            migrate(sql, "it", MIGRATIONS[:4])
        execute(
            postgres_engine,
            "INSERT INTO lmdaemon.member (name, program, since_at, heard_ms, wall_at) VALUES ('old:1-a', '1', 1, 1, 1)",
        )
        moving = asyncio.create_task(self.move(postgres_engine))
        with pytest.raises(DatabaseError, match=r"is in use by an older lmdaemon \(old:1-a\)"):
            await PostgresStore.open(postgres_engine.url, clock, name=own_name(), limits=self.SOON)
        moving.cancel()
        assert execute(postgres_engine, "SELECT current FROM lmdaemon.version") == [(4,)]
        soon_gone = self.SOON._replace(lease_s=0.1)  # the other program counts as gone after this time
        async with postgres_engine.open(clock, limits=soon_gone):
            assert len(execute(postgres_engine, "SELECT name FROM lmdaemon.member")) == 1

    async def move(self, engine: PostgresEngine) -> None:
        while True:
            await asyncio.to_thread(execute, engine, "UPDATE lmdaemon.member SET batch = batch + 1")
            await asyncio.sleep(0.02)

    async def test_one_that_has_left_leaves_no_wait(self, postgres_engine: PostgresEngine, clock: HandClock) -> None:
        for _ in range(3):
            async with asyncio.timeout(self.SOON.lease_s):
                async with postgres_engine.open(clock, limits=self.SOON):
                    assert len(execute(postgres_engine, "SELECT name FROM lmdaemon.member")) == 1
        assert execute(postgres_engine, "SELECT name FROM lmdaemon.member") == []


async def test_an_operation_that_cannot_be_stored_fails_alone(db: Store) -> None:
    """PostgreSQL accepts no NUL in a text. If one gets through the checks, only its own operation may fail."""
    openings = [opening("a"), opening("b", player_id="nul\0"), opening("c")]
    told = await asyncio.gather(*(db.open_session(one) for one in openings), return_exceptions=True)
    assert isinstance(told[1], psycopg.Error)
    assert [one.outcome for one in (told[0], told[2])] == ["created", "created"]  # type: ignore[union-attr]
    assert (db.failure, db.live) == (None, 2)


@pytest.mark.slow
async def test_a_touch_moves_no_index_entry(db: Store, postgres_engine: PostgresEngine) -> None:
    """A touch changes no indexed column, and the pages have free space, so nearly all updates are heap-only (HOT)."""
    names = [f"s{number}" for number in range(300)]
    await asyncio.gather(*(db.open_session(opening(name)) for name in names))
    random = Random(1)
    for _ in range(100):
        await db.touch("acme", random.sample(names, 5))
    statement = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'session'"

    async def counted() -> tuple[object, ...] | None:
        await db.probe()  # PostgreSQL 14 counts what a connection has done only at a later transaction of it
        return next((row for row in execute(postgres_engine, statement) if row[0] == 500), None)

    (updated, hot) = await until(counted)
    assert hot > 0.9 * updated


async def test_a_server_that_crashes_loses_nothing_and_work_resumes_by_itself(clock: HandClock) -> None:
    with own_server() as own, closing(PostgresEngine(own.url)) as engine:
        async with engine.open(clock) as db:
            db.configured = frozenset({"acme"})
            await asyncio.gather(*(db.open_session(opening(f"s{number}")) for number in range(50)))
            await asyncio.to_thread(own.stop, "immediate")
            with pytest.raises(StoreError):
                await db.touch("acme", ["s1"])
            with pytest.raises(StoreError):
                await db.session("acme", "s1")
            assert "store" in db.service_clock.frozen
            await asyncio.to_thread(own.start)
            async with asyncio.timeout(20):
                while db.failure:
                    await asyncio.sleep(0.05)
            assert await db.touch("acme", [f"s{number}" for number in range(50)]) == (50, [], [])
            assert await db.record(notice("s1")) == "ended"


async def test_a_commit_setting_that_became_unsafe_is_warned_of(clock: HandClock) -> None:
    """By a reload of the server at once, for the role only when the writer's connection is made anew. It counts how
    that connection is set: others may be older.
    """
    with own_server() as own, closing(PostgresEngine(own.url)) as engine:

        async def told(db: PostgresStore) -> str:
            await db.look_for_strains()
            return db.strained or ""

        async def set_to(db: PostgresStore, value: str, *, unsafe: bool) -> None:
            execute(engine, f"ALTER SYSTEM SET synchronous_commit = {value}")
            execute(engine, "SELECT pg_reload_conf()")
            async with asyncio.timeout(20):  # every process of the server reads its files anew in its own time
                while (f"synchronous_commit is '{value}'" in await told(db)) is not unsafe:
                    await asyncio.sleep(0.02)

        async with engine.open(clock) as db:
            await db.open_session(opening("s"))
            assert "synchronous_commit" not in await told(db)
            await set_to(db, "off", unsafe=True)
            await set_to(db, "remote_write", unsafe=False)
            await set_to(db, "local", unsafe=True)
            await set_to(db, "on", unsafe=False)
            execute(engine, "ALTER ROLE postgres SET synchronous_commit = off")
            assert "synchronous_commit" not in await told(db)
            await asyncio.to_thread(own.stop)
            await asyncio.to_thread(own.start)
            async with asyncio.timeout(20):
                while "synchronous_commit is 'off'" not in await told(db):
                    await asyncio.sleep(0.05)


def test_a_server_that_does_not_sync_is_warned_of() -> None:
    """Nothing but its file system stands between a commit and a power cut then."""
    with own_server() as own:
        with psycopg.connect(own.url, autocommit=True) as sql:
            assert unsafe_settings(sql) == [
                "fsync is off, so that a crash of the server's machine could lose what was acknowledged"
            ]
        own.stop()
        own.start("fsync=on")
        with psycopg.connect(own.url, autocommit=True) as sql:
            assert unsafe_settings(sql) == []


def test_a_failover_that_could_lose_commits_is_warned_of(tmp_path: Path) -> None:
    """The server has a replica, and no commit waits for it. Here pg_receivewal is the replica."""
    with own_server() as own, psycopg.connect(own.url, autocommit=True) as sql:
        strains = Strains()
        assert strains.look(sql, 0) is None
        with own.receiver():
            told = wait_for(lambda: strains.look(sql, 0))
            assert "a failover could lose" in told
            sql.execute("ALTER SYSTEM SET synchronous_standby_names = 'pg_receivewal'")
            sql.execute("SELECT pg_reload_conf()")
            wait_for(lambda: strains.look(sql, 0) is None)


def test_a_snapshot_that_is_held_for_long_is_warned_of(postgres_engine: PostgresEngine) -> None:
    """Such a snapshot keeps vacuum from removing old versions of rows, of which each touch leaves one. The short
    snapshots of ordinary statements do not.
    """
    with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
        with psycopg.connect(postgres_engine.url, application_name="report") as holder:
            strains = Strains()
            assert strains.look(sql, 0) is None
            holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1")
            assert strains.look(sql, 0) is None
            assert strains.look(sql, OLD_S - 1) is None
            told = strains.look(sql, OLD_S)
            assert told is not None
            assert "an old snapshot keeps vacuum from removing dead rows, and the tables grow" in told
            assert f"report, process {holder.info.backend_pid}, for 5 min" in told
        assert strains.look(sql, OLD_S + 1) is None


class TestDaemon:
    """The whole daemon on a PostgreSQL database."""

    async def test_sessions_and_their_ends_go_the_whole_way(
        self, postgres_engine: PostgresEngine, tmp_path: Path
    ) -> None:
        async with scripted_operator() as operator:
            toml = config(postgres_engine, operator)
            async with serving(tmp_path, toml) as d:
                base = f"{d.api}/v1/operators/acme/sessions"
                for name in ("a", "b"):
                    body = {"playerId": "p", "token": "tok-3n"}
                    async with d.client.put(f"{base}/{name}", json=body) as answer:
                        assert answer.status == 201
                async with d.client.post(f"{base}/touch", json={"sessionIds": ["a", "b", "c"]}) as answer:
                    assert await answer.json() == {"touched": 2, "unknown": ["c"], "ended": []}
                async with d.client.post(f"{base}/a/close") as answer:
                    assert (await answer.json())["reason"] == "closed"
                await operator.wait_for(1)
                await until(lambda: d.store.figures_of("acme").pending == 0)
                async with d.client.get(f"{d.api}/v1/deliveries?operator=acme&state=delivered") as answer:
                    (delivery,) = (await answer.json())["items"]
                assert operator.received[0].headers["webhook-id"] == delivery["id"]
                async with d.client.get(f"{d.api}/health") as answer:
                    assert (await answer.json())["checks"]["store"][0]["status"] != "fail"
                async with d.client.get(f"{d.api}/metrics") as answer:
                    assert 'postgresql="' in await answer.text()
            async with serving(tmp_path, toml) as d:  # the sessions are there after a restart
                async with d.client.get(f"{base_of(d)}/b") as answer:
                    assert (await answer.json())["state"] == "active"


def base_of(d: object) -> str:
    return f"{d.api}/v1/operators/acme/sessions"  # type: ignore[attr-defined]


def config(engine: PostgresEngine, operator: ScriptedOperator) -> str:
    return f'[database]\nurl = "{engine.as_url}"\n{operator_table("acme", operator.url)}'


async def test_the_restart_grace_is_that_of_the_first_daemon_for_all(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    """A daemon that starts a second later joins the first one. It ends nothing before the first one's grace is over."""
    async with AsyncExitStack() as stack:
        stores = []
        for _ in range(2):
            opened = await PostgresStore.open(
                postgres_engine.url, clock, name=own_name(), restart_grace_ms=0 if stores else 60_000, paces=SOON
            )
            stack.push_async_callback(opened.close)
            running = asyncio.create_task(opened.run())
            stack.callback(running.cancel)
            await opened.probe()
            stores.append(opened)
            clock.advance(1)
            for one in stores:
                one.service_clock.now_ms()
        first, second = stores
        assert (first.joined_others, second.joined_others) == (False, True)
        assert first.hold_until_ms == second.hold_until_ms == 60_000
        assert Sweeper(second, clock, 60.0).hold_s == pytest.approx(58, abs=1)


async def test_the_restart_grace_is_the_one_in_force_when_it_joins(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    store = await PostgresStore.open(postgres_engine.url, clock, name=own_name(), restart_grace_ms=60_000, paces=SOON)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        store.configure(frozenset(), lambda session: (), grace_ms=7000)
        running = asyncio.create_task(store.run())
        stack.callback(running.cancel)
        await store.probe()
        assert store.hold_until_ms == 7000


async def test_a_daemon_that_stops_while_it_joins_keeps_nobody_from_it(
    postgres_engine: PostgresEngine, proxied: tuple[PostgresEngine, Proxy]
) -> None:
    """Daemons join one at a time. A daemon sends the rest of its joining at once, so that the server need not wait for
    it while it is stopped.
    """
    engine, proxy = proxied
    who = members.Introduction("stopped", 1)

    def join() -> None:
        with contextlib.suppress(psycopg.Error), psycopg.connect(engine.url, autocommit=True) as sql:
            members.join(sql, who, 0, 0, 0, "it")

    with psycopg.connect(postgres_engine.url) as holder:
        holder.execute("SELECT 1 FROM lmdaemon.version FOR UPDATE")
        joining = asyncio.create_task(asyncio.to_thread(join))
        await until(lambda: execute(postgres_engine, WAITING) == [(1,)])
        proxy.mode = "swallow"  # nothing that the daemon sends arrives from here on
    await until(lambda: execute(postgres_engine, "SELECT name FROM lmdaemon.member") == [("stopped",)])
    execute(postgres_engine, "SELECT 1 FROM lmdaemon.version FOR UPDATE NOWAIT")
    execute(postgres_engine, END_OTHERS)
    proxy.mode = "pass"
    await joining


WAITING = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"""
