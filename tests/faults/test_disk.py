"""Every way in which a disk can fail, caused for real while the daemon runs and at its start.

strace injects into the running process the faults that no file system can be asked for: errors, hangs, and a kill
inside the commit. `Ledger` keeps what was acknowledged, and looks for all of it after every recovery.
"""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chance import FULL
from processes import AS_USERS_DO, Process, wait_for

from lmdaemon.clock import STALL_S
from lmdaemon.limits import LIMITS
from lmdaemon.store.sqlite.file import DISK_PAGE_BYTES

TOML = """
[database]
path = "disk/lmdaemon.sqlite3"
[sessions]
restart_grace = "0s"
[operators.acme]
provider_id = "luckymonaco"
notify = true
url = "{url}"
allow_private_network = true
timeout = "120s"  # an attempt under way outlasts every fault
concurrency = 1
schedule = ["1s", "1s", "1s", "1s", "1s", "1s", "1s", "1s"]
"""
LONG_S = 600  # an idle time, in seconds, longer than any test
# The idle time of the session that must outlive a fault; longer than a busy machine takes to cause a fault
SLEEPS_S = 3
LASTS_S = SLEEPS_S + 0.2  # how long a fault lasts
# The limit RLIMIT_FSIZE applies to every regular file, also to the log. So the log is written through a pipe
LOG_THROUGH_A_PIPE = ("bash", "-c", 'exec "$0" "$@" 2> >(exec cat >&2)', *AS_USERS_DO)


# -- the operator, and a client that keeps acknowledgements


@dataclass
class Wallet:
    """The operator's server, on threads of its own. It answers with success while `answers` is set, and waits
    otherwise. (A script of the simulated operator would have to know these moments beforehand.)
    """

    url: str = ""
    # For each webhook-id, the body of each attempt
    bodies: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    answers: threading.Event = field(default_factory=threading.Event)

    @property
    def attempts(self) -> Counter[str]:
        """The number of attempts for each session."""
        return Counter(json.loads(body)["sessionId"] for bodies in list(self.bodies.values()) for body in [*bodies])

    @property
    def ids(self) -> Counter[str]:
        """The number of different deliveries for each session. More than one would mean that the session ended
        twice.
        """
        return Counter(json.loads(bodies[0])["sessionId"] for bodies in list(self.bodies.values()))


@pytest.fixture
def wallet() -> Iterator[Wallet]:
    wallet = Wallet()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            wallet.bodies[self.headers["webhook-id"]].append(body)
            wallet.answers.wait(120)
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"error":0}')

        def log_message(self, *arguments: Any) -> None:
            pass

    wallet.answers.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving.start()
        wallet.url = f"http://127.0.0.1:{server.server_address[1]}/"
        yield wallet
        wallet.answers.set()
        server.shutdown()
        serving.join()


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any


class Daemon(Process):
    """A daemon whose database is in a directory of its own, on which a disk can be mounted."""

    @property
    def path(self) -> Path:
        return self.directory / "disk" / "lmdaemon.sqlite3"

    @property
    def wal(self) -> Path:
        return Path(f"{self.path}-wal")

    def ask(self, method: str, url: str, body: object = None) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read()
                return Answer(answer.status, answer.headers, json.loads(text) if text else None)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, json.loads(error.read() or b"null"))

    @property
    def health(self) -> list[tuple[int, str]]:
        """The answers of both listeners, requested at the same time."""
        with ThreadPoolExecutor() as pool:
            answers = pool.map(lambda side: self.ask("GET", f"{side}/health"), (self.server, self.api))
            return [(answer.status, answer.body["status"]) for answer in answers]

    def ended_ms(self, session: str) -> int | None:
        """The time at which the end was known to be on disk. The row has the time at which its transaction began."""
        times = [event["time"] for event in self.events("session.ended") if event["session"] == session]
        return int(datetime.fromisoformat(times[0]).timestamp() * 1000) if times else None

    def refuses_to_start(self) -> None:
        """Starts the daemon, which must end with exit code 1 and a message that names the file."""
        written = self.log.read_text() if self.log.exists() else ""
        self.spawn()
        try:
            assert self.popen.wait(60) == 1
        finally:
            self.kill()
        assert str(self.path) in self.log.read_text().removeprefix(written)


SICK, WELL = [(503, "fail")] * 2, [(200, "pass")] * 2


@contextlib.contextmanager
def daemon_on(tmp_path: Path, url: str = "http://127.0.0.1:1/", **options: Any) -> Iterator[Daemon]:
    """A running daemon that serves. It is killed at the end if it still runs."""
    (tmp_path / "disk").mkdir(exist_ok=True)
    daemon = Daemon(tmp_path, TOML.format(url=url), **options)
    daemon.spawn()
    try:
        daemon.wait_until_serving()
        yield daemon
    finally:
        daemon.kill()


class Ledger:
    """Calls the daemon as clients do, and keeps what was acknowledged. Many threads may use it at once."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.opened: set[str] = set()
        self.ended: set[str] = set()
        self.touched_at: dict[str, int] = {}  # wall time before the request, so it is never later than the touch
        self.refused = 0

    @property
    def acknowledged(self) -> int:
        return len(self.opened) + len(self.ended) + len(self.touched_at)

    def do(self, verb: str, name: str, idle_s: int = LONG_S, **more: Any) -> Answer:
        at = time.time_ns() // 1_000_000
        session = f"{self.daemon.api}/v1/operators/acme/sessions/{name}"
        if verb == "open":
            body = {"playerId": "p", "token": "t", "idleTimeoutSeconds": idle_s} | more
            answer = self.daemon.ask("PUT", session, body)
        elif verb == "notice":
            notice = {"providerId": "luckymonaco", "sessionId": name, "externalPlayerId": "p", "token": "t"}
            answer = self.daemon.ask("POST", self.daemon.server + "/V4/SessionExpired", notice)
        else:
            answer = self.daemon.ask("POST", f"{session}/{verb}")
        if answer.status == 503:
            self.refused += 1
        elif answer.status in (200, 201, 204):
            self._note(verb, name, at)
        return answer

    def _note(self, verb: str, name: str, at: int) -> None:
        self.opened.add(name)
        if verb in ("close", "notice"):
            self.ended.add(name)
        else:
            self.touched_at[name] = max(at, self.touched_at.get(name, 0))

    def must(self, verb: str, name: str, idle_s: int = LONG_S) -> None:
        answer = self.do(verb, name, idle_s)
        assert answer.status in (200, 201, 204), (verb, name, answer)

    def check(self) -> None:
        """Everything acknowledged is in the file, every end has exactly one delivery, and the counts equal the rows."""
        found = self.daemon.rows(
            "SELECT session_id, reason, seen_at, count(d.id) "
            "FROM session s LEFT JOIN delivery d ON d.session = s.id GROUP BY s.id"
        )
        rows = {name: (reason, seen_at, deliveries) for name, reason, seen_at, deliveries in found}
        assert len(rows) == len(found)
        assert self.opened - rows.keys() == set()
        assert {name for name in self.ended if rows[name][0] not in ("closed", "reported")} == set()
        assert {name: at for name, at in self.touched_at.items() if rows[name][1] < at} == {}
        assert {name: row for name, row in rows.items() if row[2] != (row[0] is not None)} == {}
        wrong = self.daemon.rows(
            "SELECT live - (SELECT count(*) FROM session WHERE reason IS NULL),"
            " pending - (SELECT count(*) FROM delivery WHERE state = 'pending'),"
            " dead - (SELECT count(*) FROM delivery WHERE state = 'dead') FROM operator"
        )
        assert wrong in ([], [(0, 0, 0)])  # no row before the first session is opened

    def settled(self) -> bool:
        return not self.daemon.rows("SELECT id FROM delivery WHERE state = 'pending'")


# -- the faults


@contextlib.contextmanager
def strace(
    daemon: Daemon, *injections: str, only: Path | None = None, calls: str = "", log: Path | str = os.devnull
) -> Iterator[subprocess.Popen[str]]:
    """Runs strace on the process, with these faults injected on one file or on all. They end with the context. The
    system calls `calls` are written to the log as well, with the names of their files.

    Skips the test where strace is missing (it is a Debian package) or may not trace.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    traced = ",".join([*(one.partition(":")[0] for one in injections), *([calls] if calls else [])])
    command = ["strace", "-f", "-q", "-y", "-o", str(log), "-p", str(daemon.popen.pid), "-e", f"trace={traced}"]
    command += itertools.chain.from_iterable(("-e", f"inject={one}") for one in injections)
    command += [] if only is None else ["-P", str(only)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def attached() -> bool:
        if tracer.poll() is not None and daemon.popen.poll() is None:
            assert tracer.stderr is not None
            pytest.skip(f"strace cannot attach: {tracer.stderr.read().strip()}")
        with contextlib.suppress(OSError):  # a thread may end in the meantime
            statuses = [task.read_text() for task in Path(f"/proc/{daemon.popen.pid}/task").glob("*/status")]
            return all(f"TracerPid:\t{tracer.pid}\n" in status for status in statuses)
        return daemon.popen.poll() is not None

    try:
        wait_for(attached)
        yield tracer
    finally:
        tracer.terminate()
        with tracer:  # waits for strace to end, and closes the pipe
            pass


def injected(*injections: str) -> Callable[[Daemon], AbstractContextManager[Any]]:
    return lambda daemon: strace(daemon, *injections)


@contextlib.contextmanager
def file_size_limit(daemon: Daemon) -> Iterator[None]:
    """Limits the size of files to less than the first frame of the write-ahead log. So the first write is cut short,
    and the next ones fail.
    """
    pid = daemon.popen.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, hard))
    yield
    with contextlib.suppress(ProcessLookupError):  # the process was killed under the limit
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def elsewhere(path: Path, statement: str) -> Iterator[sqlite3.Connection]:
    """A connection of another process, with an open transaction."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        for part in statement.split(";"):
            connection.execute(part).fetchall()
        yield connection


READING = "BEGIN; SELECT count(*) FROM session"


def locked(daemon: Daemon) -> AbstractContextManager[Any]:
    return elsewhere(daemon.path, "BEGIN IMMEDIATE")


@contextlib.contextmanager
def full_disk(daemon: Daemon) -> Iterator[None]:
    """Fills the disk. A reader with an open transaction forces the write-ahead log to grow; otherwise its present size
    would be enough for a while.
    """
    ballast = daemon.path.with_name("ballast")
    with elsewhere(daemon.path, READING):
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        # The end of the write-ahead log may still have space for a small write: a touch of an unknown session writes
        # only the clock, one page. It is used up here.
        while daemon.ask("POST", f"{daemon.api}/v1/operators/acme/sessions/nobody/touch").status != 503:
            pass
        yield
        ballast.unlink()


@contextlib.contextmanager
def mounted(directory: Path, options: str = "size=16m,mode=700") -> Iterator[None]:
    """Mounts a tmpfs on this directory. Skips the test where this user may not mount."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@dataclass
class Fault:
    """A fault that begins and ends: it is in force inside the context that `cause` returns."""

    cause: Callable[[Daemon], AbstractContextManager[Any]]
    mount: bool = False
    options: dict[str, Any] = field(default_factory=dict)


FAULTS = {
    "disk full": Fault(full_disk, mount=True),
    "file size limit": Fault(file_size_limit, options={"command": LOG_THROUGH_A_PIPE}),
    "sync fails": Fault(injected("fdatasync,fsync:error=EIO")),
    "locked by another process": Fault(locked),
}
if FULL:  # the following faults are similar to others, so they only run in the full suite
    FAULTS["remounted read-only"] = Fault(injected("pwrite64,ftruncate:error=EROFS"))
    FAULTS["no space for a write"] = Fault(injected("pwrite64:error=ENOSPC"))
    FAULTS["write fails"] = Fault(injected("pwrite64:error=EIO"))
    FAULTS["everything fails"] = Fault(injected("pwrite64,fdatasync,fsync,ftruncate,pread64:error=EIO"))


def until_refused(ledger: Ledger, verb: str, name: str, **more: Any) -> Answer:
    """Repeats a call until it is refused because of the fault. Calls that are acknowledged before are kept."""
    for _ in range(5000):
        answer = ledger.do(verb, name, **more)
        if answer.status == 503:
            return answer
        assert answer.status in (200, 201, 204), answer
    return pytest.fail("the fault does not bite")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_loses_nothing_and_work_resumes(
    fault: Fault, tmp_path: Path, wallet: Wallet, measured: Callable[..., None]
) -> None:
    """Work resumes by itself. Requests during the fault are refused."""
    with ExitStack() as stack:
        if fault.mount:
            stack.enter_context(mounted(tmp_path / "disk"))
        daemon = stack.enter_context(daemon_on(tmp_path, wallet.url, **fault.options))
        pool = stack.enter_context(ThreadPoolExecutor())
        ledger = Ledger(daemon)
        ledger.must("open", "player")
        ledger.must("notice", "before")
        wait_for(lambda: wallet.attempts["before"] and ledger.settled())
        wallet.answers.clear()
        ledger.must("open", "in-flight")
        ledger.must("close", "in-flight")
        wait_for(lambda: wallet.attempts["in-flight"])  # the operator's answer comes during the fault
        # This delivery waits for the one before, because the operator's concurrency is 1
        ledger.must("notice", "waiting")
        ledger.must("open", "sleeper", SLEEPS_S)

        with fault.cause(daemon):
            until_refused(ledger, "touch", "sleeper")
            began = time.monotonic()
            wallet.answers.set()
            asked = {verb: pool.submit(ledger.do, verb, "during") for verb in ("notice", "open", "touch", "close")}
            sick = pool.submit(lambda: daemon.health)
            refused = {verb: future.result() for verb, future in asked.items()}
            assert all(answer.status == 503 and int(answer.headers["Retry-After"]) > 0 for answer in refused.values())
            assert refused.pop("notice").body["error"] == 100
            types = {answer.headers["Content-Type"].partition(";")[0] for answer in refused.values()}
            assert types == {"application/problem+json"}
            assert sick.result() == SICK
            while time.monotonic() < began + LASTS_S:
                assert ledger.do("touch", "sleeper").status == 503
            lasted_ms = int((time.monotonic() - began) * 1000)
            reasons = [event["reason"] for event in daemon.events("store.failing")]
            assert sorted(set(reasons)) == sorted(reasons) != []  # each reason is logged once, not at every try
        lifted = time.monotonic()

        wait_for(lambda: wallet.attempts["waiting"])  # work resumes although no request comes
        resumed_s = time.monotonic() - lifted
        ledger.must("touch", "player")
        ledger.must("notice", "during")
        wait_for(lambda: daemon.health == WELL)
        ended_ms = wait_for(lambda: daemon.ended_ms("sleeper"))
        wait_for(ledger.settled)
        ((seen_ms,),) = daemon.rows("SELECT seen_at FROM session WHERE session_id = 'sleeper'")
        # Service time stood still during the fault; times are whole milliseconds
        assert ended_ms - seen_ms >= SLEEPS_S * 1000 + lasted_ms - 5
        assert wallet.attempts == dict.fromkeys(("before", "in-flight", "waiting", "during", "sleeper"), 1)
        assert (len(daemon.events("store.failing")), len(daemon.events("store.recovered"))) == (len(reasons), 1)
        ledger.check()

        with fault.cause(daemon):  # the same fault again, with a kill during it
            ledger.refused = 0
            until_refused(ledger, "open", "player")
            daemon.kill()
        daemon.start()
        ledger.must("touch", "player")
        ledger.check()
        assert daemon.rows("PRAGMA integrity_check") == [("ok",)]
        measured(acknowledged=ledger.acknowledged, lost=0, resumed_after_s=round(resumed_s, 1))


def test_reads_that_fail_are_refused_and_resume_by_themselves(tmp_path: Path, wallet: Wallet) -> None:
    """An answer from a connection's cache is allowed. Anything else is answered with 503 ("try later")."""
    with daemon_on(tmp_path, wallet.url) as daemon:
        ledger = Ledger(daemon)
        session = f"{daemon.api}/v1/operators/acme/sessions/player"
        ledger.must("open", "player")
        with strace(daemon, "pread64:error=EIO"):

            def refused() -> Answer | None:
                ledger.do("touch", "player")  # this commit makes the cache of the reading connection out of date
                answer = daemon.ask("GET", session)
                assert answer.status in (200, 503)
                return answer if answer.status == 503 else None

            answer = wait_for(refused)
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.headers["Content-Type"].startswith("application/problem+json")
            ledger.do("notice", "told")  # the delivery of this session cannot be read during the fault
            wait_for(lambda: daemon.health == SICK)
            time.sleep(2.5)  # the fault lasts this long, through several tries
            assert len(daemon.events("delivery.waiting_for_store")) <= 1
        wait_for(lambda: daemon.ask("GET", session).status == 200)
        ledger.must("notice", "told")
        wait_for(lambda: wallet.attempts["told"])
        wait_for(lambda: daemon.health == WELL)
        ledger.check()


# -- a disk that hangs

HANGS = "fdatasync,fsync:delay_enter=300000000"  # in microseconds, far longer than the hang lasts


def until_hanging(ledger: Ledger, pool: ThreadPoolExecutor, name: str) -> "Future[Answer]":
    """Sends touches until the commit of one hangs, and returns that touch. By then, `/health` has answered that it
    fails.
    """
    for _ in range(100):
        touch = pool.submit(ledger.do, "touch", name)
        wait_for(lambda touch=touch: touch.done() or ledger.daemon.health == SICK)
        if not touch.done():
            return touch
    return pytest.fail("the disk does not hang")


def test_a_disk_that_hangs_acknowledges_nothing_and_costs_no_idle_time(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    """`/health` fails during the hang, and the watchdog of systemd gets no sign of life."""
    with ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)

        def told() -> list[list[str]]:
            """What the daemon has told the service manager since the last call."""
            heard = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    heard.append(manager.recv(4096).decode().splitlines())
            return heard

        def fed() -> bool:
            return any("WATCHDOG=1" in message for message in told())

        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        daemon = stack.enter_context(daemon_on(tmp_path, environment=environment))
        pool = stack.enter_context(ThreadPoolExecutor())
        ledger = Ledger(daemon)
        idle_s = 8
        ledger.must("open", "player")
        ledger.must("open", "sleeper", idle_s)
        wait_for(fed)
        with strace(daemon, HANGS):
            waiting = [until_hanging(ledger, pool, "sleeper")]
            began = time.monotonic()
            waiting += [pool.submit(ledger.do, verb, name) for verb, name in (("touch", "player"), ("notice", "told"))]
            wait_for(lambda: daemon.events("watchdog.withheld"))
            told()
            hungry: list[list[str]] = []
            wait_for(lambda: hungry.extend(told()) or len(hungry) >= 3)
            assert not any("WATCHDOG=1" in message for message in hungry)
            assert all("STATUS=Stuck: " in message[0] and "writer." in message[0] for message in hungry)
            assert daemon.health == SICK
            assert not any(request.done() for request in waiting)
            lasted_s = time.monotonic() - began
            over_ms = time.time_ns() // 1_000_000
        assert {request.result().status for request in waiting} == {200, 204}
        wait_for(lambda: daemon.health == WELL)
        wait_for(fed)
        assert [len(daemon.events(f"watchdog.{event}")) for event in ("withheld", "resumed")] == [1, 1]
        ledger.check()
        # Nobody could touch between the beginning and the end of the hanging commit. So the idle time is left, except
        # for the time until the hang shows, and on a busy machine until it is noticed.
        ended_ms = wait_for(lambda: daemon.ended_ms("sleeper"))
        left_s = (ended_ms - over_ms) / 1000
        assert left_s >= idle_s - 2 * STALL_S
        measured(hung_s=round(lasted_s, 1), idle_time_left_s=round(left_s, 1))


# -- killed inside the commit


def work(ledger: Ledger, worker: int, life: int) -> None:
    """Makes calls as a client does, until the daemon is gone."""
    with contextlib.suppress(OSError):
        for number in itertools.count():
            name = f"{life}-{worker}-{number}"
            ledger.do("open", name)
            ledger.do("open", f"{name}-idle", 1)
            ledger.do("touch", name)
            ledger.do(("close", "notice")[number % 2], name)


def test_killed_inside_a_commit_or_a_checkpoint_it_has_lost_nothing(
    tmp_path: Path, wallet: Wallet, measured: Callable[..., None]
) -> None:
    """The kill comes at one of the writes and syncs of the log and of the file."""
    kills = 40 if FULL else 10
    with daemon_on(tmp_path, wallet.url) as daemon, ThreadPoolExecutor() as pool:
        ledger = Ledger(daemon)
        places = [("pwrite64", daemon.wal), ("fdatasync", daemon.wal), ("pwrite64", daemon.path)]
        places += [("fdatasync", daemon.path)] if FULL else []
        for life in range(kills):
            call, file = places[life % len(places)]
            when = 1 if call == "fdatasync" and file == daemon.path else 1 + 3 * (life // len(places))
            with strace(daemon, f"{call}:signal=SIGKILL:when={when}", only=file):
                wait([pool.submit(work, ledger, worker, life) for worker in range(3)])
                assert daemon.popen.wait(60) == -signal.SIGKILL
            daemon.start()
            ledger.check()
        wait_for(lambda: not daemon.rows("SELECT 1 FROM session WHERE reason IS NULL AND idle_ms = 1000"), 60)
        wait_for(ledger.settled, 60)
        ledger.check()
        ended = {name for (name,) in daemon.rows("SELECT session_id FROM session WHERE reason IS NOT NULL")}
        assert wallet.ids == dict.fromkeys(ended, 1)
        assert all(len(set(bodies)) == 1 for bodies in wallet.bodies.values())
        assert daemon.rows("PRAGMA integrity_check") == [("ok",)]
        repeats = wallet.attempts.total() - len(ended)
        measured(kills=kills, acknowledged=ledger.acknowledged, lost=0, ended=len(ended), sent_again=repeats)


def test_every_acknowledgement_is_sent_after_the_disk_has_confirmed(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    """A power cut loses what was written but not synced. So between each answer and the one before it, there must be a
    write to the write-ahead log, and then a successful sync of it. The daemon also writes for itself, as for its clock.
    So a later write may wait for its sync while an answer is sent.
    """
    log = tmp_path / "calls"
    with daemon_on(tmp_path) as daemon:
        ledger = Ledger(daemon)
        with strace(daemon, calls="pwrite64,fdatasync,sendto,sendmsg,write,writev", log=log):
            for number in range(20):
                ledger.must("open", f"s{number}")
                ledger.must("touch", f"s{number}")
                ledger.must(("close", "notice")[number % 2], f"s{number}")
        written = confirmed = False
        syncing: set[str] = set()  # threads whose sync began after the write and has not finished
        answers = 0
        for line in log.read_text().splitlines():
            thread = line.split()[0]
            if str(daemon.wal) in line and "pwrite64(" in line:
                written = True
            elif str(daemon.wal) in line and "fdatasync(" in line and written:
                confirmed |= line.endswith("= 0")
                syncing.add(thread)
            elif "fdatasync resumed" in line and thread in syncing:
                confirmed |= line.endswith("= 0")
            elif '"HTTP/1.1 20' in line:
                assert confirmed, line
                answers += 1
                written = confirmed = False
                syncing.clear()
        assert answers == 60
        measured(answers=answers, sent_before_the_sync=0)


# -- a reader that keeps the log from starting over

WAL_MAX = 300_000
WITH_A_SMALL_WAL = (
    sys.executable,
    "-c",
    f"""
from functools import partial
from lmdaemon import daemon
from lmdaemon.__main__ import main
from lmdaemon.limits import Limits, StoreLimits
daemon.Daemon = partial(daemon.Daemon, limits=Limits(store=StoreLimits(wal_max={WAL_MAX})))
exit(main())""",
)


def test_killed_while_a_full_wal_is_written_over_it_has_lost_nothing(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    """In such a log, the frames after the last commit are not empty: they have commits of the round before."""
    kills = 20 if FULL else 5
    starts_over = 0
    with daemon_on(tmp_path, command=WITH_A_SMALL_WAL) as daemon, ThreadPoolExecutor() as pool:
        ledger = Ledger(daemon)
        for life in range(kills):
            with strace(daemon, f"pwrite64:signal=SIGKILL:when={300 + 41 * life}", only=daemon.wal):
                wait([pool.submit(work, ledger, worker, life) for worker in range(3)])
                assert daemon.popen.wait(60) == -signal.SIGKILL
            # How often the log has started over. Source: sqlite.org/fileformat2.html, "WAL Header Format"
            starts_over += int.from_bytes(daemon.wal.read_bytes()[12:16], "big")
            daemon.start()
            ledger.check()
        assert starts_over > 0
        assert daemon.rows("PRAGMA integrity_check") == [("ok",)]
        measured(kills=kills, acknowledged=ledger.acknowledged, lost=0, starts_over=starts_over)


def test_a_long_read_of_another_process_slows_no_writer(tmp_path: Path, measured: Callable[..., None]) -> None:
    """The reader may be a `backup` of a large file, or an administrator's sqlite3 that was left open."""
    with daemon_on(tmp_path, command=WITH_A_SMALL_WAL) as daemon:
        ledger = Ledger(daemon)
        ledger.must("open", "player")
        with elsewhere(daemon.path, READING):
            for number in itertools.count():
                ledger.do("open", f"{number}", attributes={"x": "x" * 4000})
                if daemon.wal.stat().st_size > WAL_MAX:
                    break
            began = time.monotonic()
            touches = 5
            for _ in range(touches):
                ledger.must("touch", "player")
            took_s = time.monotonic() - began
            # A writer that the reader held up would wait for a whole busy time-out at each commit. Even a busy machine
            # needs less than half of that
            assert took_s < touches * LIMITS.store.busy_timeout_s / 2

        def shrunk() -> bool:
            ledger.must("touch", "player")
            return daemon.wal.stat().st_size <= WAL_MAX

        wait_for(shrunk)
        ledger.check()
        measured(commits=touches, took_s=round(took_s, 2))


# -- files that are lost while they are used


def until_gone(ledger: Ledger) -> int:
    """Sends touches until the daemon is gone. Returns its exit code."""

    def gone() -> bool:
        with contextlib.suppress(OSError):
            ledger.do("touch", "player")
        return ledger.daemon.popen.poll() is not None

    wait_for(gone)
    return ledger.daemon.popen.wait()


def test_a_wal_unlinked_under_the_running_daemon_is_noticed(tmp_path: Path) -> None:
    """Nothing acknowledged is lost."""
    with daemon_on(tmp_path) as daemon:
        ledger = Ledger(daemon)
        ledger.must("open", "player")
        ledger.must("notice", "told")
        daemon.wal.unlink()
        assert until_gone(ledger) == 1
        assert [event["level"] for event in daemon.events("store.lost_file")] == ["error"]
        daemon.start()
        ledger.must("touch", "player")
        ledger.check()
        assert daemon.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_database_replaced_under_the_running_daemon_is_left_alone(tmp_path: Path, good: bytes) -> None:
    """If a backup is moved over the file of a running daemon, the daemon ends without touching it. The next start uses
    the backup as it is.
    """
    with daemon_on(tmp_path) as daemon:
        ledger = Ledger(daemon)
        ledger.must("open", "player")
        (daemon.path.parent / "backup").write_bytes(good)
        (daemon.path.parent / "backup").rename(daemon.path)
        assert until_gone(ledger) == 1
        assert [event["level"] for event in daemon.events("store.lost_file")] == ["error"]
        assert daemon.path.read_bytes() == good


def test_a_wal_removed_after_a_crash_is_reported_and_the_daemon_starts(tmp_path: Path) -> None:
    with daemon_on(tmp_path) as daemon:
        ledger = Ledger(daemon)
        ledger.must("open", "player")
        assert daemon.stop() == 0
        daemon.start()
        ledger.must("open", "other")
        daemon.kill()
        daemon.start()
        # Not after a clean end, and not after a crash that left the log
        assert daemon.events("store.wal_missing") == []
        daemon.kill()
        daemon.wal.unlink()
        daemon.start()
        assert [event["level"] for event in daemon.events("store.wal_missing")] == ["error"]
        assert daemon.health == WELL


# -- files that cannot be used


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole database as a daemon leaves it when it stops: 200 sessions, half of them ended."""
    with daemon_on(tmp_path_factory.mktemp("good")) as daemon, ThreadPoolExecutor(8) as pool:
        ledger = Ledger(daemon)
        wait([pool.submit(ledger.do, ("open", "notice")[n % 2], f"s-{n}") for n in range(200)])
        ledger.check()
        assert daemon.stop() == 0
        return daemon.path.read_bytes()


def damaged_at(place: int, length: int = 100) -> Callable[[bytes], bytes]:
    return lambda good: good[:place] + b"\xa5" * length + good[place + length :]


def damaged_root(table: str) -> Callable[[bytes], bytes]:
    """Damages a page in the middle of the file that every start reads."""

    def damage(good: bytes) -> bytes:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            # Marks the file as not in WAL mode, because a database in memory cannot use that mode
            connection.deserialize(as_copy(good))
            (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
        return damaged_at((page - 1) * DISK_PAGE_BYTES, DISK_PAGE_BYTES)(good)

    return damage


DAMAGES = {
    "header": damaged_at(16, 84),
    "clock": damaged_root("clock"),
    "figures": damaged_root("operator"),
    "deadlines": damaged_root("session_due"),
    "truncated": lambda good: good[: len(good) // 2],
    "no database": lambda good: b"this is no database, but long enough to be read as one" * 100,
}
if FULL:
    DAMAGES |= {"magic": damaged_at(0, 16), "schema": damaged_at(100), "within the header": lambda good: good[:50]}


def as_copy(good: bytes) -> bytes:
    """The file in the mode in which a backup is written."""
    return good[:18] + b"\x01\x01" + good[20:]


@pytest.mark.parametrize("kind", [bytes, as_copy], ids=["used", "copy"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_left_as_it_is(
    damage: Callable[[bytes], bytes], kind: Callable[[bytes], bytes], tmp_path: Path, good: bytes
) -> None:
    good = kind(good)
    (tmp_path / "disk").mkdir()
    daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"))
    daemon.path.write_bytes(damage(good))
    daemon.refuses_to_start()
    assert daemon.path.read_bytes() == damage(good)
    assert "Traceback" not in daemon.log.read_text()


def test_a_damaged_file_is_left_as_it_is_together_with_the_wal_of_a_crash(tmp_path: Path, good: bytes) -> None:
    with daemon_on(tmp_path) as daemon:
        Ledger(daemon).must("open", "player")
        assert daemon.stop() == 0
        daemon.path.write_bytes(good)
        daemon.start()
        Ledger(daemon).must("open", "player")
        daemon.kill()
        # This page is read at every start and was written by no commit, so the log does not hide the damage
        daemon.path.write_bytes(damaged_root("session_lifetime")(daemon.path.read_bytes()))
        before = daemon.path.read_bytes(), daemon.wal.read_bytes()
        daemon.refuses_to_start()
        assert (daemon.path.read_bytes(), daemon.wal.read_bytes()) == before


def test_a_file_damaged_in_use_is_never_the_source_of_a_success(tmp_path: Path, good: bytes) -> None:
    """No answer that depends on a damaged page is a success."""
    with daemon_on(tmp_path) as daemon:
        assert daemon.stop() == 0
        daemon.path.write_bytes(good)
        daemon.start()
        with daemon.path.open("r+b") as file:  # the first page stays whole, because every transaction reads it
            file.seek(DISK_PAGE_BYTES)
            file.write(b"\xa5" * (len(good) - DISK_PAGE_BYTES))
        sessions = f"{daemon.api}/v1/operators/acme/sessions"
        answers = [daemon.ask("GET", f"{sessions}/s-{number}") for number in range(0, 200, 10)]
        answers += [daemon.ask("POST", f"{sessions}/s-{number}/touch") for number in range(0, 200, 10)]
        assert {answer.status for answer in answers} == {503}
        wait_for(lambda: daemon.events("store.failing"))
        daemon.kill()
        daemon.refuses_to_start()


BARE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


@pytest.mark.parametrize(
    ("place", "mode"), [("lmdaemon.sqlite3", 0), ("lmdaemon.sqlite3", 0o400), (".", 0), (".", 0o500)]
)
def test_without_permission_the_file_is_named_and_left_as_it_is(
    place: str, mode: int, tmp_path: Path, good: bytes
) -> None:
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may read and write every file until it gives that right up
        closed = tmp_path / "closed"
        closed.touch(0)
        works = shutil.which("setpriv") and not subprocess.run([*BARE, "true"], capture_output=True).returncode
        if not works or not subprocess.run([*BARE, "cat", closed], capture_output=True).returncode:
            pytest.skip("root cannot give up its right to read everything: no setpriv that works")
        prefix = BARE
    (tmp_path / "disk").mkdir()
    daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"), command=(*prefix, *AS_USERS_DO))
    daemon.path.write_bytes(good)
    (daemon.path.parent / place).chmod(mode)
    try:
        daemon.refuses_to_start()
    finally:
        daemon.path.parent.chmod(0o700)
    assert daemon.path.read_bytes() == good
    assert "Traceback" not in daemon.log.read_text()


def test_on_a_disk_mounted_read_only_the_file_is_named_and_left_as_it_is(tmp_path: Path, good: bytes) -> None:
    with mounted(tmp_path / "disk"):
        daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"))
        daemon.path.write_bytes(good)
        subprocess.run(["mount", "-o", "remount,ro", daemon.path.parent], check=True)
        daemon.refuses_to_start()
        assert daemon.path.read_bytes() == good


def test_a_full_disk_at_start_is_named_and_left_as_it_is(tmp_path: Path, good: bytes) -> None:
    with mounted(tmp_path / "disk"):
        daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"))
        daemon.path.write_bytes(good)
        with (tmp_path / "disk" / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        daemon.refuses_to_start()
        assert daemon.path.read_bytes() == good


@pytest.mark.parametrize("new", [True, False], ids=["new", "existing"])
def test_a_start_on_a_full_disk_says_so_wherever_it_runs_out_of_room(tmp_path: Path, good: bytes, new: bool) -> None:
    """The free space goes from nothing to almost enough. It runs out for the lock, the database, its -shm (SQLite then
    says "disk I/O error"), its log, or the first tables.
    """
    said = set()
    for pages in (0, 1, 2, 3, 5, 8, 11, 12, 13, 14) if new else (0, 1, 3, 6):
        with mounted(tmp_path / "disk", "size=64k,mode=700" if new else "size=256k,mode=700"):
            daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"))
            if not new:
                daemon.path.write_bytes(good)
            with (tmp_path / "disk" / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            left = max(0, (tmp_path / "disk" / "ballast").stat().st_size - pages * 4096)
            os.truncate(tmp_path / "disk" / "ballast", left)
            daemon.spawn()
            if daemon.popen.wait(60) != 1:
                pytest.fail(f"{pages} pages were enough: {daemon.log.read_text()}")
            (failed,) = daemon.events("daemon.failed")
            assert f"the disk of {tmp_path}/disk is full (" in failed["reason"]
            assert not daemon.events("store.created")
            said.add(failed["reason"].rpartition("(")[2])
            daemon.log.unlink()
    assert len(said) > 1 or not new


def test_a_disk_without_room_for_one_more_file_is_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=16m,mode=700,nr_inodes=2"):
        daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"))
        (tmp_path / "disk" / "the-last-one").touch()
        daemon.spawn()
        assert daemon.popen.wait(60) == 1
        (failed,) = daemon.events("daemon.failed")
        assert f"the disk of {tmp_path}/disk is full (No space left on device)" in failed["reason"]


@pytest.mark.parametrize("instead", ["nothing", "a file", "a directory"])
def test_a_place_where_no_file_can_be_is_named(instead: str, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, TOML.format(url="http://127.0.0.1:1/"))
    if instead == "a file":
        (tmp_path / "disk").touch()
    elif instead == "a directory":
        daemon.path.mkdir(parents=True)
    daemon.refuses_to_start()
    assert "Traceback" not in daemon.log.read_text()
