"""A PostgreSQL server for the benchmarks, and the sides of the figures about daemons that share one.

The server's data are on the disk of the source tree, and every commit is synced. Its settings are those of
docs/scaling.md. pg_stat_statements, which is part of PostgreSQL, counts the statements.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.compare import Bench, Run, Sample
from benchmarks.ends import DUE, IDLE_MS, NEW, WALLETS, percentile, settings, until, wallet
from benchmarks.load import BULK, Load, session_id
from benchmarks.peers import Absent
from benchmarks.processes import (
    ACME,
    BUILD,
    DUE_SPREAD_MS,
    Broken,
    Daemon,
    Python,
    free_ports,
    generate,
    operator,
    report_of,
    running,
    scratch,
)
from benchmarks.processes import IDLE_MS as LIVE_IDLE_MS
from benchmarks.requests import loaded

BINARIES = Path("/usr/lib/postgresql")
SETTINGS = (
    "shared_buffers=2GB",  # enough for the live sessions with their indexes
    "max_wal_size=8GB",  # less would make touches cause one checkpoint after the other
    "shared_preload_libraries=pg_stat_statements",
)
DAEMONS = 3
ENDS_A_SECOND = 300
LAG_OPENERS = 50  # connections of each daemon that open sessions
JOINED_S = 6.0  # how long (s) daemons that start one after the other take to share the operators out
CALM_S = 4.0
RAW_BATCH = 300  # ids touched by one statement of the floor
RAW_ENDS = 100  # sessions ended by one statement of the floor

# SQL for the id of a session, equal to what `load.session_id` makes in Python.
SESSION_ID = "lpad(to_hex(mod(n * 2654435761, 4294967296)), 8, '0') || '-' || lpad(to_hex(n), 12, '0')"
UNIQUE = """
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE contype = 'u' AND conrelid = 'lmdaemon.session'::regclass"""


class Server:
    """A server that can be started several times, in a directory of its own. Raises Absent if PostgreSQL is not
    installed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (self.port,) = free_ports(1)
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        if find_spec("psycopg") is None:
            raise Absent("psycopg")
        found = sorted(BINARIES.glob("*/bin/initdb"), key=lambda one: int(one.parts[-3]))
        if not found:
            raise Absent("PostgreSQL (apt install postgresql)")
        self._binaries = found[-1].parent
        # PostgreSQL refuses to run as root
        self._as: list[str] = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def make(self) -> None:
        """Makes a new, empty server."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.own()
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C")

    def copy(self, made: Path) -> None:
        """Copies the data of a stopped server."""
        subprocess.run(["cp", "--archive", "--reflink=auto", str(made), str(self.data)], check=True)
        self.own()

    def own(self) -> None:
        """Gives the directory to the user that the server runs as."""
        if self._as:
            shutil.chown(self.directory, "postgres", "postgres")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._binaries / program), "-D", str(self.data), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.directory, check=False)
        if done.returncode:
            raise Absent(f"PostgreSQL: {program} fails: {(done.stderr or done.stdout).strip().splitlines()[-1]}")

    @contextmanager
    def running(self, *more: str) -> Iterator["Server"]:
        options = (*SETTINGS, *more, f"port={self.port}", f"unix_socket_directories={self.directory}")
        given = " ".join(f"-c {one}" for one in options)
        self._run("pg_ctl", "-w", "-l", str(self.directory / "log"), "-o", given, "start")
        try:
            yield self
        finally:
            self._run("pg_ctl", "-w", "-t", "300", "-m", "fast", "stop")

    @contextmanager
    def connected(self) -> Iterator[Any]:
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as sql:
            yield sql

    def rows(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        with self.connected() as sql:
            found: list[tuple[Any, ...]] = sql.execute(statement, arguments or None).fetchall()
        return found

    def daemon(self, directory: Path, python: Python, toml: str = "") -> Daemon:
        """A daemon that uses this server, not started yet."""
        return Daemon(directory, python, f'[database]\nurl = "{self.url}"\n' + (toml or operator(ACME)))


# -- prefilled servers


@cache
def prefilled(python: Python, live: int) -> Path:
    """The data of a stopped server with `live` sessions of ACME. They are kept for the next run, and made as
    `processes.prefilled` makes a file.
    """
    schema = "".join(path.read_text() for path in sorted((python.tree / "lmdaemon/store/postgres").glob("*.sql")))
    digest = hashlib.sha256(f"{schema} {live} {LIVE_IDLE_MS}".encode()).hexdigest()[:16]
    kept = BUILD / f"live-{live}-{digest}.postgres"
    if not kept.exists():
        with scratch() as directory:
            server = Server(directory / "server")
            server.make()
            with server.running("fsync=off", "synchronous_commit=on"):
                with running(daemon := server.daemon(directory / "daemon", python, settings([], _nowhere, grace_s=0))):
                    body = {"playerId": "p", "token": "tok-0123456789", "idleTimeoutSeconds": LIVE_IDLE_MS // 1000}
                    daemon.call("PUT", f"/v1/operators/{ACME}/sessions/{session_id(0)}", body)
                with server.connected() as sql:
                    sql.execute("CREATE EXTENSION pg_stat_statements")
                    if live:
                        _multiply(sql, live)
                    else:
                        sql.execute("DELETE FROM lmdaemon.session")
                        sql.execute("UPDATE lmdaemon.figure SET live = 0")
            subprocess.run(["sync"], check=True)
            server.data.rename(kept)
    return kept


def _multiply(sql: Any, live: int) -> None:
    """Copies the only session. The indexes are dropped first and made anew afterwards, each in one go."""
    sql.execute("SET maintenance_work_mem = '1GB'")
    constraints = sql.execute(UNIQUE).fetchall()
    for name, _ in constraints:
        sql.execute(f"ALTER TABLE lmdaemon.session DROP CONSTRAINT {name}")
    plain = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'lmdaemon' AND tablename = 'session'"
    indexes = [one for one in sql.execute(plain) if one[0] != "session_pkey"]
    for name, _ in indexes:
        sql.execute(f"DROP INDEX lmdaemon.{name}")
    add_sessions(sql, ACME, 1, live - 1, {"due_ms": f"due_ms - mod(n * 7919, {DUE_SPREAD_MS})"})
    for name, definition in constraints:
        sql.execute(f"ALTER TABLE lmdaemon.session ADD CONSTRAINT {name} {definition}")
    for _, definition in indexes:
        sql.execute(definition)
    sql.execute("VACUUM ANALYZE lmdaemon.session")
    sql.execute("CHECKPOINT")


def add_sessions(sql: Any, name: str, first: int, count: int, own: dict[str, str]) -> None:
    """Adds copies of the first live session. `own` has the columns whose values differ, as SQL expressions of the
    number `n`.
    """
    columns = [row[0] for row in sql.execute("SELECT * FROM lmdaemon.session LIMIT 0").description]
    (last,) = sql.execute("SELECT max(id) FROM lmdaemon.session").fetchone()
    values = {
        "id": f"{last} - {first} + 1 + n",
        "operator": f"'{name}'",
        "session_id": SESSION_ID,
        "player_id": "'p' || n",
        **own,
    }
    chosen = ", ".join(f"{values.get(column, column)}" for column in columns)
    sql.execute(
        f"INSERT INTO lmdaemon.session ({', '.join(columns)}) SELECT {chosen} FROM "
        "(SELECT * FROM lmdaemon.session WHERE reason IS NULL ORDER BY id LIMIT 1) AS one, "
        "generate_series(%s::bigint, %s) AS n",
        (first, first + count - 1),
    )
    # Daemons reserve the numbers of new sessions in blocks that begin here
    sql.execute("SELECT setval('lmdaemon.session_block', %s)", (last + count,))
    sql.execute(
        "INSERT INTO lmdaemon.figure (operator, member, live) VALUES (%s, 0, %s) "
        "ON CONFLICT (operator, member) DO UPDATE SET live = figure.live + excluded.live",
        (name, count),
    )


def make_due(server: Server, names: Sequence[str], first: int, count: int) -> None:
    """Adds sessions of these operators that are due when the restart grace of the next start is over. No daemon may
    run.
    """
    with server.connected() as sql:
        sql.execute("UPDATE lmdaemon.clock SET service_ms = service_ms + %s", (IDLE_MS,))
        (service_ms,) = sql.execute("SELECT service_ms FROM lmdaemon.clock").fetchone()
        own = {"idle_ms": str(IDLE_MS), "seen_ms": str(service_ms - IDLE_MS), "due_ms": str(service_ms)}
        each = count // len(names)
        for number, name in enumerate(names):
            add_sessions(sql, name, first + number * each, each, own)


@contextmanager
def copied(bench: Bench, python: Python, live: int | None = None) -> Iterator[Server]:
    """A running server with `live` live sessions."""
    with scratch() as directory:
        server = Server(directory / "server")
        server.directory.mkdir()
        server.copy(prefilled(python, bench.live if live is None else live))
        with server.running():
            yield server


@contextmanager
def together(server: Server, python: Python, toml: str) -> Iterator[list[Daemon]]:
    """Several daemons that have shared the operators out."""
    with ExitStack() as stack:
        daemons = []
        for _ in range(DAEMONS):
            daemon = server.daemon(stack.enter_context(scratch()), python, toml)
            stack.enter_context(running(daemon))
            daemons.append(daemon)
        time.sleep(JOINED_S)
        found = daemons[0].call("GET", "/v1/daemons")["items"]
        if len(found) != DAEMONS or sum(len(one["operators"]) == 0 for one in found) > 1:
            raise Broken(f"the daemons have not divided the operators: {found}")
        yield daemons


# -- touches


@contextmanager
def touches(bench: Bench, python: Python, *, kind: str, connections: int) -> Iterator[Run]:
    with copied(bench, python) as server, scratch() as directory:
        daemon = server.daemon(directory, python)
        with running(daemon):
            load = Load(kind, daemon.api, connections, bench.seconds, [ACME], population=bench.live)
            yield lambda number: loaded(daemon, load._replace(seed=number), BULK if kind == "bulk" else 1)


@contextmanager
def raw_touches(bench: Bench, python: Python) -> Iterator[Run]:
    with copied(bench, python) as server:
        yield partial(_raw, "touches", server, python, bench.live, bench.seconds)


def _raw(what: str, server: Server, python: Python, live: int, seconds: float, number: int) -> Sample:
    arguments = {"url": server.url, "rows": live, "seconds": seconds, "seed": number}
    report = report_of(python, "benchmarks.raw_postgres", what, json.dumps(arguments))
    return {"rate": report["answered"] / report["seconds"]}


# -- ends


@contextmanager
def ends(bench: Bench, python: Python) -> Iterator[Run]:
    """How fast sessions end that are due at the same time, each with a delivery. Their operators are held, so that
    nothing is sent.
    """
    size = bench.notices // len(WALLETS) * len(WALLETS)
    with copied(bench, python) as server:
        toml = held(server, python)

        def run(number: int) -> Sample:
            make_due(server, WALLETS, DUE + size * number, size)
            return hurry(server, python, toml, size)

        yield run


def held(server: Server, python: Python) -> str:
    """Holds all operators. Returns their configuration."""
    toml = settings(WALLETS, _nowhere)
    with scratch() as directory, running(daemon := server.daemon(directory, python, toml)):
        for name in WALLETS:
            daemon.call("POST", f"/v1/operators/{name}/hold")
    return toml


def hurry(server: Server, python: Python, toml: str, size: int) -> Sample:
    """Starts a daemon while `size` sessions are due, and measures until all have ended."""
    with scratch() as directory, running(daemon := server.daemon(directory, python, toml)), server.connected() as sql:
        before = daemon.cpu_s
        until(lambda: _waiting(sql, WALLETS, "live") == 0, 120, "all have ended")
        cpu_s = daemon.cpu_s - before
    sweeps = server.rows(
        "SELECT created_at, count(*) FROM (SELECT created_at FROM lmdaemon.delivery WHERE state = 'pending' "
        "ORDER BY id DESC LIMIT %s) AS made GROUP BY created_at ORDER BY created_at",
        size,
    )
    began, ended, count = sweeps[0][0], sweeps[-1][0], sum(made for _, made in sweeps)
    if count != size or ended - began > 100_000:
        raise Broken(f"{count} of {size} ends have made a delivery, within {ended - began} ms")
    # Deliveries are made when their sweep begins: how long the last sweep took is not known
    return {"rate": (size - sweeps[-1][1]) / max(1, ended - began) * 1000, "cpu_us": cpu_s / size * 1e6}


def _waiting(sql: Any, names: Sequence[str], *columns: str) -> int:
    """How many wait, by the figures. Asked on one connection: each new one would cost the server a process."""
    statement = f"SELECT coalesce(sum({' + '.join(columns)}), 0) FROM lmdaemon.figure WHERE operator = ANY (%s)"
    ((count,),) = sql.execute(statement, (list(names),)).fetchall()
    return int(count)


@contextmanager
def raw_ends(bench: Bench, python: Python) -> Iterator[Run]:
    """The floor: the same rows, written by one statement for every hundred sessions, one statement after the other."""
    with copied(bench, python) as server:

        def run(number: int) -> Sample:
            make_due(server, ["raw"], DUE + bench.notices * number, bench.notices)
            return _raw("ends", server, python, bench.notices, 0, number)

        yield run


# -- several daemons


@contextmanager
def lag(bench: Bench, python: Python) -> Iterator[Run]:
    """Sessions are opened through all daemons and never touched, so they end at the rate at which they were opened."""
    seconds = 2 if bench.quick else 8
    with ExitStack() as stack:
        peers, server = stack.enter_context(wallet()), stack.enter_context(copied(bench, python))
        daemons = stack.enter_context(together(server, python, settings(WALLETS, peers.url)))
        yield lambda number: _ended_late(server, daemons, seconds, number)


def _ended_late(server: Server, daemons: Sequence[Daemon], seconds: int, number: int) -> Sample:
    pause_s = LAG_OPENERS * len(daemons) / ENDS_A_SECOND
    loads = [
        Load("open", daemon.api, LAG_OPENERS, seconds, WALLETS, pause_s=pause_s, idle_s=seconds + 1)._replace(
            first=NEW + (number * len(daemons) + place) * 1_000_000
        )
        for place, daemon in enumerate(daemons)
    ]
    with ThreadPoolExecutor(len(loads)) as pool:
        count = sum(report["answered"] for report in pool.map(generate, loads))
    with server.connected() as sql:
        until(lambda: _waiting(sql, WALLETS, "live", "pending") == 0, 60, "all have ended and are delivered")
    late = [
        row[0]
        for row in server.rows(
            "SELECT ended_at - seen_at - idle_ms FROM lmdaemon.session WHERE operator = ANY (%s) AND idle_ms = %s "
            "ORDER BY opened_at DESC LIMIT %s",
            WALLETS,
            (seconds + 1) * 1000,
            count,
        )
    ]
    if len(late) != count or min(late) < 0:
        raise Broken(f"{len(late)} of {count} have ended, the earliest {min(late)} ms after its deadline")
    return {"p50": percentile(late, 0.5), "p99": percentile(late, 0.99), "max": max(late)}


@contextmanager
def idle(bench: Bench, python: Python) -> Iterator[Run]:
    """The number of statements that daemons send while nothing happens, with live sessions and without."""

    def run(number: int) -> Sample:
        return {
            "live": _statements(bench, python, bench.live, 5.0 if bench.quick else 20.0),
            "empty": _statements(bench, python, 0, 5.0 if bench.quick else 40.0),
        }

    Server(BUILD)  # fails here if PostgreSQL is not installed
    yield run


def _statements(bench: Bench, python: Python, live: int, seconds: float) -> float:
    """The number of statements of all daemons per second."""
    with ExitStack() as stack:
        server = stack.enter_context(copied(bench, python, live))
        stack.enter_context(together(server, python, settings(WALLETS, _nowhere)))
        time.sleep(CALM_S)
        before, began = _counted(server), time.monotonic()
        time.sleep(seconds)
        return (_counted(server) - before - 1) / (time.monotonic() - began)


def _counted(server: Server) -> int:
    ((count,),) = server.rows("SELECT sum(calls) FROM pg_stat_statements")
    return int(count)


def _nowhere(path: str) -> str:
    return f"http://127.0.0.1:9/{path}"
