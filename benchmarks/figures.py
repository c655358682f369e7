"""The figures: what is measured, what it is compared with, and what the result should be."""

from dataclasses import replace
from functools import partial

from benchmarks import ends, postgres, requests, resources
from benchmarks.compare import Figure, Row

HANDLER = "aiohttp handler"
BARE = "aiohttp, aiosqlite, orjson"


def _requests(key: str, kind: str, connections: int, *rows: Row, tls: bool = False) -> Figure:
    return Figure(
        key,
        partial(requests.requests, kind=kind, connections=connections, tls=tls),
        rows,
        partial(requests.bare_requests, kind=kind, connections=connections, tls=tls),
        f"{HANDLER}, TLS" if tls else HANDLER,
    )


def _at_most(value: str, title: str, unit: str, must: float, goal: float) -> Row:
    """A value that should be small, not compared with a floor."""
    return Row(value, title, unit, must, goal, "lower", "value")


TOUCH = _requests(
    "touch",
    "touch",
    64,
    Row("rate", "durable touches, 64 connections", "/s", 1.0, 1.6),
    Row("cpu_us", "CPU time of one", "µs", 1.0, 0.7, "lower"),
)

FIGURES = (
    replace(TOUCH, peers={"call_later": requests.timers, "APScheduler": requests.scheduler}),
    _requests("touch256", "touch", 256, Row("rate", "durable touches, 256 connections", "/s", 1.2, 1.9)),
    Figure(
        "webdis",
        TOUCH.daemon,
        (Row("rate", "durable touches, 64 connections", "/s", 1.0, 1.3),),
        requests.webdis,
        "Redis (always), webdis",
        in_quick=False,
    ),
    Figure(
        "bulk",
        partial(requests.requests, kind="bulk", connections=4),
        (Row("rate", "ids touched in bulk, 4 × 1,000", "/s", 1.5, 1.9),),
        requests.raw_sqlite,
        "sqlite3, 1,000 a transaction",
    ),
    _requests("notice", "notice", 64, Row("rate", "notices accepted, 64 connections", "/s", 0.8, 1.2)),
    _requests("touch_tls", "touch", 64, Row("rate", "durable touches over TLS", "/s", 0.50, 0.85), tls=True),
    _requests("notice_tls", "notice", 64, Row("rate", "notices accepted over TLS", "/s", 0.45, 0.75), tls=True),
    _requests("open", "open", 64, Row("rate", "sessions opened, 64 connections", "/s", 0.7, 1.0)),
    Figure(
        "delivery",
        ends.backlog,
        (Row("rate", "a backlog delivered and recorded, 64 at once", "/s", 0.62, 0.80),),
        ends.bare_client,
        "aiohttp client",
    ),
    Figure(
        "hanging",
        ends.beside_a_hanging,
        (Row("rate", "ended and delivered to 49, the 50th hangs", "/s", 0.85, 0.97),),
        partial(ends.beside_a_hanging, ends_for_it=False),
        "nothing for the 50th",
        most_rounds=4,
    ),
    Figure(
        "lag",
        ends.lag,
        (
            _at_most("end_p50", "lateness of ends at 1,000/s, p50", "ms", 15, 6),
            _at_most("end_p99", "the same, p99", "ms", 15, 6),
            _at_most("arrival_p50", "until the operator has it, p50", "ms", 25, 10),
            _at_most("arrival_p99", "the same, p99", "ms", 25, 10),
        ),
        ends.timers_lag,
        "call_later",
        most_rounds=2,
    ),
    Figure(
        "listeners",
        partial(ends.heard, listeners=10),
        (Row("cpu_us", "CPU time of an end, 10 listen to events", "µs", 1.15, 1.08, "lower"),),
        partial(ends.heard, listeners=0),
        "nobody listens",
        most_rounds=4,
    ),
    Figure(
        "storm",
        ends.storm,
        (
            Row("rate", "ends, {crowd} due at once", "/s", 20_000, 60_000, "higher", "value"),
            _at_most("touch", "p99 of a touch meanwhile, to calm", "×", 3.5, 2),
            _at_most("health", "p99 of /health meanwhile, to calm", "×", 6, 2),
            _at_most("mib", "memory added meanwhile", "MiB", 32, 8),
        ),
        most_rounds=4,
    ),
    Figure(
        "many",
        ends.many_operators,
        (
            _at_most(
                "worst_added_ms",
                "worst touch while {operators} operators are scraped and reloaded, above calm",
                "ms",
                50,
                20,
            ),
            _at_most("p99_added_ms", "the same, p99", "ms", 50, 10),
        ),
        most_rounds=2,
    ),
    Figure(
        "memory",
        resources.memory,
        (
            Row("empty_mib", "memory, nothing live", "MiB", 1.35, 1.15, "lower"),
            Row("live_mib", "memory, {live} live", "MiB", 2.0, 1.6, "lower"),
            _at_most("live_mib", "the same by itself", "MiB", 80, 80),
        ),
        resources.bare_memory,
        BARE,
        {"call_later": resources.timers_memory, "Redis, webdis": resources.redis_memory},
        most_rounds=1,
    ),
    Figure(
        "start",
        resources.start,
        (
            Row("ready_s", "start until READY", "s", 1.8, 1.2, "lower"),
            _at_most("added_s", "added by {live} live", "s", 0.15, 0.05),
        ),
        resources.bare_start,
        BARE,
        most_rounds=4,
    ),
    Figure(
        "idle",
        resources.idle,
        tuple(
            row
            for name, title in (("empty", "nothing live"), ("live", "{live} live"), ("backlog", "a backlog hangs"))
            for row in (
                _at_most(f"{name}_switches", f"context switches, idle, {title}", "/s", 5, 1),
                _at_most(f"{name}_cpu", f"CPU, idle, {title}", "%", 0.5, 0.1),
            )
        ),
        resources.bare_idle,
        BARE,
        most_rounds=1,
    ),
    Figure(
        "kill",
        ends.killed,
        (
            _at_most("touches_lost", "acknowledged touches lost by kill -9", "", 0, 0),
            _at_most("ends_lost", "ends lost by kill -9, of {ends}", "", 0, 0),
        ),
        peers={
            "call_later": partial(ends.killed_peer, name="timers"),
            "APScheduler": partial(ends.killed_peer, name="scheduler"),
            "Redis listener": ends.killed_listener,
        },
        most_rounds=1,
    ),
    Figure(
        "pg_touch",
        partial(postgres.touches, kind="touch", connections=64),
        (Row("rate", "on PostgreSQL: durable touches, 64 connections", "/s", 0.35, 0.6),),
        TOUCH.daemon,
        "the same on SQLite",
    ),
    Figure(
        "pg_bulk",
        partial(postgres.touches, kind="bulk", connections=4),
        (Row("rate", "on PostgreSQL: ids touched in bulk, 4 × 1,000", "/s", 0.6, 0.9),),
        postgres.raw_touches,
        "raw statements of 300",
    ),
    Figure(
        "pg_ends",
        postgres.ends,
        (Row("rate", "on PostgreSQL: ends with one delivery each", "/s", 0.5, 0.8),),
        postgres.raw_ends,
        "raw statements of 100",
        most_rounds=4,
    ),
    Figure(
        "pg_lag",
        postgres.lag,
        (
            _at_most("p50", "three daemons: lateness of ends at 300/s, p50", "ms", 50, 20),
            _at_most("p99", "the same, p99", "ms", 100, 40),
        ),
        most_rounds=2,
    ),
    Figure(
        "pg_idle",
        postgres.idle,
        (
            _at_most("live", "three daemons: statements, idle, {live} live", "/s", 10, 7),
            _at_most("empty", "the same, nothing live", "/s", 1, 0.2),
        ),
        most_rounds=1,
    ),
)
