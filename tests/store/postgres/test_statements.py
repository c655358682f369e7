"""Every statement finds its rows through an index. The tables are so large that reading all rows would show."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from clocks import HandClock
from engines import PostgresEngine
from operations import IDLE_MS, opening

from lmdaemon.store.postgres import archive, batch, pages, store, tables
from lmdaemon.store.postgres.batch import Slowest, read_facts
from lmdaemon.store.postgres.migrations import migrate
from lmdaemon.store.postgres.thread import Connection, Database
from lmdaemon.store.rules import Facts

SESSIONS, DELIVERIES = 100_000, 50_000
IDS = [number * 7 for number in range(1, 301)]
FILL = (
    f"""INSERT INTO lmdaemon.session (id, operator, session_id, player_id, idle_ms, opened_at, seen_ms, seen_at, due_ms,
            lifetime_at, ended_at, reason)
        SELECT i, 'o' || i % 10, 's' || i, 'p' || i % 5000, 1, i, i, i, i, CASE WHEN i % 9 = 0 THEN i END,
               CASE WHEN i % 2 = 0 THEN i END, CASE WHEN i % 2 = 0 THEN 'closed' END
        FROM generate_series(1, {SESSIONS}) AS i""",
    f"""INSERT INTO lmdaemon.delivery (nonce, session, operator, sink, state, created_at, due_at, settled_at,
            aged_from_at, held_base_ms, body)
        SELECT 'x', i * 2, 'o' || i % 10, 'http', CASE WHEN i % 3 = 0 THEN 'pending' WHEN i % 3 = 1 THEN 'dead'
               ELSE 'delivered' END, i, i, CASE WHEN i % 3 > 0 THEN i END, i, 0, 'body'
        FROM generate_series(1, {DELIVERIES}) AS i""",
    "INSERT INTO lmdaemon.figure (operator, member) SELECT 'o' || i, 0 FROM generate_series(0, 9) AS i",
    "ANALYZE",
)


def given(*row: Any) -> str:
    return json.dumps([[number, *row] for number in IDS])


NAMES, OPERATORS = json.dumps(["o1", "o2"]), json.dumps(["o1"] * len(IDS))
KEYS = json.dumps([f"s{number}" for number in IDS])
RESULT = given("dead", 1, 1, 9, 0, None, None, None, "[]")
LANE = json.dumps([{"place": 0, "operator": "o1", "sink": "http", "taken": [5, 6], "most": 4}])
OF_LANES = {"operators": NAMES, "sink": None, "states": '["dead"]', "after": 10**9, "count": 101}
OF_PLAYER = {"operators": NAMES, "player": "p1", "after": 10**9, "count": 101}
# Arguments for each statement that searches sessions or deliveries
CASES: dict[str, tuple[str, Any]] = {
    "TOUCH": (batch.TOUCH, (5, 1, OPERATORS, KEYS, 5, 300)),
    "STILL_ACTIVE": (batch.STILL_ACTIVE, (300, IDS)),
    "END": (batch.END, (given("closed", None, None, None), 5, 300)),
    "MOVE_DUE": (batch.MOVE_DUE, (given(5),)),
    "MOVE_LIFETIME": (batch.MOVE_LIFETIME, (given(5),)),
    "SETTLE": (batch.SETTLE, (RESULT, 300)),
    "FORGET_TOKENS": (batch.FORGET_TOKENS, (given("x"),)),
    "REVIVE": (batch.REVIVE, (given(5, 5, 5), 300)),
    "PRUNE_DELIVERIES": (batch.PRUNE_DELIVERIES, (IDS,)),
    "PRUNE_SESSIONS": (batch.PRUNE_SESSIONS, (IDS, 300)),
    "SESSIONS_BY_KEY": (batch.SESSIONS_BY_KEY, ("o1", ["s1", "s11"])),
    "STATES": (batch.STATES, ("o1", ["s1", "s11"])),
    "PENDING_OF": (batch.PENDING_OF, (given(5),)),
    "DUE": (batch.DUE, (["o1", "o2"], 50_000, 100, 100)),
    "DUE_LIFETIME": (batch.DUE_LIFETIME, (["o1", "o2"], 50_000, 100, 100)),
    "NEXT": (batch.NEXT, (["o1", "o2"],)),
    "NEXT_TOLD": (batch.NEXT_TOLD, (["o1", "o2"], 5, 1)),
    "EARLIEST": (tables.EARLIEST, (["o1", "o2"],)),
    "DEAD": (batch.DEAD, (IDS, "o1")),
    "DISCARD": (batch.DISCARD, (given("{}"), 300)),
    "TO_DISCARD": (batch.TO_DISCARD, (IDS,)),
    "DELIVERIES_BY_ID": (batch.DELIVERIES_BY_ID, (IDS,)),
    "ENDED_BEFORE": (batch.ENDED_BEFORE, (90_000, 5, 5, 500)),
    "OLD_DELIVERIES": (batch.OLD_DELIVERIES, (IDS,)),
    "LANES": (store.LANES, (LANE,)),
    "OLDEST_PENDING": (store.OLDEST_PENDING, (NAMES,)),
    "AGING": (store.AGING, (100, NAMES)),
    "SESSION_BY_KEY": (store.SESSION_BY_KEY, ("o1", "s1")),
    "DELIVERIES_OF": (store.DELIVERIES_OF, (2,)),
    "ACTIVE": (pages.ACTIVE, ("o1", 10**9, 101)),
    "ENDED": (pages.ENDED, ("o1", 10**9, 101)),
    "OF_PLAYER": (pages.OF_PLAYER, ("o1", "p1", 10**9, 101)),
    "OF_PLAYER_IN_STATE": (pages.OF_PLAYER_IN_STATE, (True, "o1", "p1", 10**9, 10_000)),
    "OF_ID": (pages.OF_ID, (NAMES, "s1", None, 10**9, 101)),
    "OF_PLAYER_ANYWHERE": (pages.OF_PLAYER_ANYWHERE, OF_PLAYER),
    "SESSIONS": (pages.SESSIONS, (IDS[:100],)),
    "ALL": (pages.ALL, (10**9, 101)),
    "OF_LANES": (pages.OF_LANES, OF_LANES),
    "HAS_SINK": (pages.HAS_SINK, (NAMES, "http")),
    "DELIVERIES": (pages.DELIVERIES, (IDS[:100],)),
    "ONE_SESSION": (pages.ONE_SESSION, ("o1", "s1")),
    "ITS_DELIVERIES": (pages.ITS_DELIVERIES, (2,)),
    "ONE_DELIVERY": (pages.ONE_DELIVERY, (2,)),
    "DIED": (pages.DIED, ("o1", 5, 5, 10**9, 0, 10**9, None, 500)),
    "archive.ENDED_BEFORE": (archive.ENDED_BEFORE, (90_000, 5, 5, 500)),
    "ENDED_OF_PLAYER": (archive.ENDED_OF_PLAYER, ("p1", "p1", 90_000, 5, 5, 500)),
    "ENDED_OF_ID": (archive.ENDED_OF_ID, ("s1", None, 90_000, 5, 5, 500)),
    "DELIVERIES_OF_ALL": (archive.DELIVERIES_OF_ALL, (IDS,)),
}


@pytest.fixture(scope="module")
def filled(postgres_template: tuple[str, str]) -> Iterator[str]:
    """The URL of a database with large tables."""
    url, _ = postgres_template
    name = f"lmdaemon_test_plans_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute(f"DROP DATABASE IF EXISTS {name}")
        sql.execute(f"CREATE DATABASE {name}")
        full = psycopg.conninfo.make_conninfo(url, dbname=name)
        with psycopg.connect(full, autocommit=True) as inside:
            migrate(inside, name)
            for statement in FILL:
                inside.execute(statement)  # type: ignore[arg-type]
        yield full
        sql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("name", CASES)
def test_a_statement_goes_through_an_index(filled: str, name: str) -> None:
    statement, arguments = CASES[name]
    with psycopg.connect(filled) as sql:
        plan = "\n".join(row[0] for row in sql.execute(f"EXPLAIN {statement}", arguments))  # type: ignore[arg-type]
    assert re.findall(r"Seq Scan on (?:session|delivery)\b.*", plan) == [], plan


@pytest.mark.parametrize("name", [name for name, statement in CASES.items() if statement[0] in vars(batch).values()])
def test_so_does_a_plan_made_when_the_tables_were_empty(postgres_engine: PostgresEngine, name: str) -> None:
    """A prepared statement keeps its plan while the tables grow."""
    statement, arguments = CASES[name]
    with Database(postgres_engine.url, None, "plans").connect(prepares=False) as sql:
        sql.execute("SET plan_cache_mode = force_generic_plan")
        # The statement raises this because it finds fewer rows than it must
        with suppress(psycopg.errors.DivisionByZero):
            sql.execute(statement, arguments, prepare=True)  # type: ignore[arg-type]
        ((prepared, types),) = sql.execute(
            "SELECT name, cardinality(parameter_types) FROM pg_prepared_statements"
        ).fetchall()
        nothing = ", ".join(["NULL"] * types)
        plan = "\n".join(row[0] for row in sql.execute(f"EXPLAIN EXECUTE {prepared} ({nothing})"))  # type: ignore[arg-type]
    assert re.findall(r"Seq Scan on (?:session|delivery)\b.*|(?:Hash|Merge) .*Join.*", plan) == [], plan
    # An index of few rows is read from end to end, if nothing else says how to find some of them
    whole = r"Index(?: Only)? Scan (?:using \w+ on (?:session|delivery)\b|on (?:session|delivery)_).*\n(?!.*Index Cond)"
    assert re.findall(whole, plan + "\n") == [], plan


async def test_after_a_flush_that_failed_every_statement_works(
    postgres_engine: PostgresEngine, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statements that the failed flush has skipped are prepared again. Here another connection touches a session while
    it is being ended. The statement for the next deadline follows after the one that fails.
    """
    touched = []

    def read_and_be_overtaken(sql: Connection, *arguments: Any) -> tuple[Facts, Slowest]:
        facts, slowest = read_facts(sql, *arguments)
        if facts.due and not touched:
            # The statement for the next deadlines is not prepared yet, as at a start
            tables.next_deadlines(sql, ["acme"])
            with psycopg.connect(postgres_engine.url, autocommit=True) as sql:
                touched.append(sql.execute("UPDATE lmdaemon.session SET seen_ms = seen_ms + 100000").rowcount)
        return facts, slowest

    monkeypatch.setattr(batch, "read_facts", read_and_be_overtaken)
    async with postgres_engine.open(clock) as db:
        db.configure(frozenset({"acme"}), lambda session: ())
        await db.open_session(opening())
        ended = []
        for _ in range(3):
            for _ in range(IDLE_MS // 1000 * 8):
                clock.advance(1)
                db.service_clock.now_ms()
            ended.append((await db.end_due(idle=True)).ended)
    assert (touched, ended) == ([1], [0, 1, 0])


def test_every_statement_about_these_tables_has_a_case() -> None:
    looks = {
        name
        for module in (archive, batch, pages, store, tables)
        for name, statement in vars(module).items()
        if isinstance(statement, str) and re.search(r"(FROM|JOIN|UPDATE) lmdaemon\.(session|delivery)\b", statement)
    }
    # The first reads everything that is pending, and the second is a template
    assert looks - {name.rpartition(".")[2] for name in CASES} == {"SET_BACK", "_ENDED_OF_FEW"}
