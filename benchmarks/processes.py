"""The processes that are measured: the daemon of a source tree as users run it, floors and peers; and what the kernel
counts for them.
"""

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.load import Load, session_id, unverified

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
IDLE_MS = 2_592_000_000  # 30 days: prefilled sessions stay live
ACME = "acme"  # the operator of the prefilled sessions
DUE_SPREAD_MS = 1_000_000_000
PAGE = os.sysconf("SC_PAGE_SIZE")


class Broken(Exception):  # noqa: N818
    """Something that should be measured does not work; the text says what."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Python:
    """Which code on which event loop: the source tree from which `lmdaemon` is imported, and whether uvloop may be
    used.
    """

    tree: Path = ROOT
    uvloop: bool = False

    def environment(self) -> dict[str, str]:
        paths = [str(self.tree), str(ROOT)]
        if not self.uvloop:
            paths.insert(0, str(_without_uvloop()))
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": ""}


def _without_uvloop() -> Path:
    """A directory in which `uvloop` cannot be imported, so that one installation serves both loops."""
    directory = BUILD / "without_uvloop"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "uvloop.py").write_text('raise ImportError("switched off by the benchmark")\n')
    return directory


@dataclass(frozen=True)
class Usage:
    """What a process has used so far."""

    cpu_s: float
    switches: int
    at: float


class Process:
    """A child process that reports READY as sd_notify(3) does, or whose readiness is found out in another way."""

    def __init__(self, command: Sequence[str], directory: Path, environment: dict[str, str]) -> None:
        self.command = command
        self.directory = directory
        self.environment = environment
        self.popen: subprocess.Popen[bytes]
        self.ready_s = 0.0

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def start(self, within_s: float = 120.0) -> None:
        address = f"\0lmdaemon-bench-{os.getpid()}-{time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(address)
            began = time.perf_counter()
            self._spawn(self.environment | {"NOTIFY_SOCKET": "@" + address[1:]})
            while not select.select([notify], [], [], 0.5)[0] or b"READY=1" not in notify.recv(4096):
                if self.popen.poll() is not None or time.perf_counter() - began > within_s:
                    raise Broken(f"{' '.join(self.command)}: does not start: {self.log.read_text()[-2000:]}")
            self.ready_s = time.perf_counter() - began

    def start_until_connected(self, port: int, within_s: float = 20.0) -> None:
        """Starts a process that does not use sd_notify, and waits until its port accepts connections."""
        self._spawn(self.environment)
        deadline = time.monotonic() + within_s
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise Broken(f"{self.command[0]}: does not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)

    def _spawn(self, environment: dict[str, str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, cwd=self.directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self, number: int = signal.SIGTERM, within_s: float = 30.0) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    @property
    def cpu_s(self) -> float:
        """User and system time (s) of all its threads, from the process's CPU clock: clock_getcpuclockid(3)."""
        return time.clock_gettime((~self.popen.pid << 3) | 2)

    @property
    def rss_mib(self) -> float:
        return int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]) * PAGE / 2**20

    def usage(self) -> Usage:
        """CPU time and context switches of all threads."""
        switches = 0
        for task in Path(f"/proc/{self.popen.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                lines = (task / "status").read_text().splitlines()
                switches += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        return Usage(self.cpu_s, switches, time.perf_counter())


@contextlib.contextmanager
def running(process: Process, *, hangs: bool = False) -> Iterator[Process]:
    """Starts a process, and stops it at the end. With `hangs` it is killed, because it would wait for requests that
    hang.
    """
    process.start()
    try:
        yield process
    finally:
        process.stop(signal.SIGKILL if hangs else signal.SIGTERM)


class Daemon(Process):
    """`python -m lmdaemon --config FILE serve` of one source tree. It can be started several times."""

    def __init__(self, directory: Path, python: Python, toml: str = "", *, tls: bool = False) -> None:
        self.server, self.api = free_ports(2)
        self.tls = tls
        config = directory / "config.toml"
        super().__init__(
            [sys.executable, "-m", "lmdaemon", "--config", str(config), "serve"], directory, python.environment()
        )
        directory.mkdir(parents=True, exist_ok=True)
        own = "tls_cert_file = '{}'\ntls_key_file = '{}'\n".format(*certificate(directory)) if tls else ""
        config.write_text(
            f'[server]\nlisten = "127.0.0.1:{self.server}"\n{own}[api]\nlisten = "127.0.0.1:{self.api}"\n{own}'
            + (toml or operator(ACME))
        )

    @property
    def path(self) -> Path:
        return self.directory / "lmdaemon.sqlite3"

    def call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.api}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30, context=unverified() if self.tls else None) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def text(self, path: str) -> str:
        """The answer to a GET, unchanged."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.api}{path}", timeout=30) as answer:
            return str(answer.read(), "utf-8")

    def operators(self) -> dict[str, dict[str, Any]]:
        return {one["operator"]: one for one in self.call("GET", "/v1/operators")["items"]}

    def rows(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Reads rows from the SQLite file, over a separate connection."""
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=30)) as sql:
            return sql.execute(statement, arguments).fetchall()


def operator(name: str, url: str = "", extra: str = "") -> str:
    """The configuration of one operator."""
    toml = f'[operators.{name}]\nprovider_id = "{name}"\nendpoint = "/{name}"\n{extra}\n'
    return toml + (f'notify = true\nurl = "{url}"\nallow_private_network = true\n' if url else "")


def certificate(directory: Path) -> tuple[str, str]:
    """Makes a self-signed certificate, with the kind of key that most servers use today. Returns the files of both."""
    cert, key = str(directory / "own.crt"), str(directory / "own.key")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    new += ["-days", "2", "-subj", "/CN=127.0.0.1", "-out", cert, "-keyout", key]
    try:
        subprocess.run(new, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Broken(f"openssl makes no certificate: {error}") from error
    return cert, key


def python_process(python: Python, directory: Path, module: str, name: str, **arguments: Any) -> Process:
    """The process of a floor or peer written in Python, not started yet."""
    command = [sys.executable, "-m", module, name, json.dumps(arguments)]
    return Process(command, directory, python.environment())


def report_of(python: Python, module: str, *arguments: str) -> dict[str, Any]:
    """Runs a process that prints one JSON report, and returns the report."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=BUILD,
        env=python.environment(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise Broken(f"{module} {arguments}: {done.stderr.decode()[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def generate(load: Load) -> dict[str, Any]:
    """Runs the load generator and returns its report. Raises Broken if a request failed."""
    report = report_of(Python(), "benchmarks.load", json.dumps(load._asdict()))
    if report["failed"] or report["lost"] or not report["answered"]:
        raise Broken(f"{load.kind}: {report['failed']} failed, {report['lost']} lost: {report['first_failure']}")
    return report


# -- prefilled files


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory on the disk of the source tree. It is removed at the end."""
    directory = BUILD / f"run-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@cache
def prefilled(python: Python, live: int) -> Path:
    """A database file with this source tree's schema and `live` sessions of ACME. It is kept for the next run.

    The daemon itself makes the file and opens one session. The others are copies of its row with ids of their own. So
    the rows are as this source tree writes them, whatever their columns are.
    """
    with scratch() as directory:
        daemon = Daemon(directory, python)
        with running(daemon):
            body = {"playerId": "p", "token": "tok-0123456789", "idleTimeoutSeconds": IDLE_MS // 1000}
            daemon.call("PUT", f"/v1/operators/{ACME}/sessions/{session_id(0)}", body)
        schema = "\n".join(str(row) for row in daemon.rows("SELECT name, sql FROM sqlite_schema ORDER BY name"))
        digest = hashlib.sha256(f"{schema} {live} {IDLE_MS}".encode()).hexdigest()[:16]
        kept = BUILD / f"live-{live}-{digest}.sqlite3"
        if not kept.exists():
            _multiply(daemon.path, live)
            daemon.path.rename(kept)
    return kept


def columns_of(sql: sqlite3.Connection) -> list[str]:
    """The columns of the session table."""
    return [row[1] for row in sql.execute("PRAGMA table_info(session)")]


@contextlib.contextmanager
def filling(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for adding millions of rows. The indexes are dropped first and made anew afterwards, each in
    one go.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA synchronous = OFF")
        sql.execute("PRAGMA cache_size = -1048576")
        indexes = sql.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL").fetchall()
        sql.execute("BEGIN")
        for name, _ in indexes:
            sql.execute(f"DROP INDEX {name}")
        yield sql
        for _, statement in indexes:
            sql.execute(statement)
        sql.execute("COMMIT")
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def add_sessions(sql: sqlite3.Connection, template: dict[str, Any], own: Iterable[dict[str, Any]]) -> None:
    """Adds copies of one row. Each copy has values of its own in some columns."""
    columns = columns_of(sql)
    rows = (tuple((template | values)[column] for column in columns) for values in own)
    sql.executemany(f"INSERT INTO session VALUES ({', '.join('?' * len(columns))})", rows)


def _multiply(path: Path, live: int) -> None:
    with filling(path) as sql:
        (row,) = sql.execute("SELECT * FROM session").fetchall()
        template = dict(zip(columns_of(sql), row, strict=True)) | {"id": None}
        # Sorted by id, so that the index is filled from one side; touches are drawn at random anyway. `due_ms` is at
        # the true deadline or before it, as a touch would have left it.
        own = (
            {
                "session_id": name,
                "player_id": f"p{number}",
                "due_ms": template["due_ms"] - number * 7919 % DUE_SPREAD_MS,
            }
            for name, number in sorted((session_id(number), number) for number in range(1, live))
        )
        add_sessions(sql, template, own)
        sql.execute("UPDATE operator SET live = ? WHERE name = ?", (live, ACME))


def check_live(daemon: Daemon, live: int) -> None:
    """Checks through the API that the prefilled sessions are live. Raises Broken."""
    names = [session_id(number) for number in range(0, live, max(1, live // 1000))]
    touched = daemon.call("POST", f"/v1/operators/{ACME}/sessions/touch", {"sessionIds": names})
    known = daemon.operators()[ACME]["live"]
    ((rows,),) = daemon.rows("SELECT count(*) FROM session WHERE reason IS NULL AND operator = ?", ACME)
    if touched["touched"] != len(names) or known != live or rows != live:
        raise Broken(f"{live} sessions were prefilled; touched {touched}, known {known}, rows {rows}")


@contextlib.contextmanager
def serving(python: Python, directory: Path, live: int = 0, toml: str = "", *, tls: bool = False) -> Iterator[Daemon]:
    """A running daemon with `live` live sessions."""
    daemon = Daemon(directory, python, toml, tls=tls)
    if live:
        shutil.copyfile(prefilled(python, live), daemon.path)
    with running(daemon):
        if live:
            check_live(daemon, live)
        yield daemon
