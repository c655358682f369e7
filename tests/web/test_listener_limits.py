"""Limits of the daemon's process, reached from outside on both event loops: open files, resident memory, time for a
stop.
"""

import contextlib
import http.client
import json
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import process, wait_for

from lmdaemon.limits import LIMITS
from lmdaemon.web.listener import connections_max

NO_GRACE = '[sessions]\nrestart_grace = "0s"\n[operators.acme]\nprovider_id = "luckymonaco"\n'
SESSION = "/v1/operators/acme/sessions/s-1"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment variables of a daemon that uses this event loop."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop is not installed")
        return {}
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "uvloop.py").write_text("raise ImportError('not installed')\n")
    return {"PYTHONPATH": f"{tmp_path / 'without'}{os.pathsep}{Path(__file__).parents[2]}"}


def port(url: str) -> int:
    return int(url.rpartition(":")[2])


def connect(url: str, source: str = "127.0.0.1", timeout: float = 20) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port(url)), timeout=timeout, source_address=(source, 0))


def ask(connection: socket.socket, request: bytes = HEALTH) -> bytes:
    """The first bytes of the answer, or nothing if the connection was closed."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(request)
        return connection.recv(65536)
    return b""


class Client:
    """A client that keeps one connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port(url), timeout=20)
        self._connection.connect()

    def call(self, method: str, path: str) -> tuple[int, str]:
        self._connection.request(method, path)
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def health(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.call("GET", "/health")[1])
        return report

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def strangers(url: str, count: int, addresses: int) -> Iterator[list[bytes]]:
    """Connects clients from several addresses. Each asks once and keeps its connection. Yields their answers."""
    with contextlib.ExitStack() as stack:
        answers = []
        for index in range(count):
            one = stack.enter_context(connect(url, f"127.0.1.{1 + index % addresses}"))
            answers.append(ask(one))
        yield answers


# -- open files


@pytest.mark.parametrize(
    ("files", "attempts", "most"),
    [
        pytest.param(65_536, 40, LIMITS.connections_max, id="the unit's limit"),
        pytest.param(1024, 8, 476, id="a shell's limit"),
        pytest.param(1024, 100_000, 224, id="deliveries get at most half"),
        pytest.param(16, 8, 1, id="never none"),
    ],
)
def test_the_listeners_share_the_files_that_the_rest_leaves(files: int, attempts: int, most: int) -> None:
    """Deliveries and the store need the rest of the files."""
    assert connections_max(files, attempts, LIMITS.connections_max) == most


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    with process(tmp_path, NO_GRACE, preexec_fn=limit) as daemon:
        assert resource.prlimit(daemon.popen.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_strangers_on_the_public_port_do_not_keep_touches_out(tmp_path: Path, loop: dict[str, str]) -> None:
    """Strangers take every connection that the public listener accepts and try more. Meanwhile touches on new private
    connections are answered.
    """
    files = 300

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    with process(tmp_path, NO_GRACE, loop, preexec_fn=limit) as daemon:
        body = {"playerId": "p", "token": "tok-3n", "idleTimeoutSeconds": 600}
        assert daemon.call("PUT", daemon.api + SESSION, body)[0] == 201
        with strangers(daemon.server, files, addresses=8) as answers:
            assert any(answer.startswith(b"HTTP/1.1 200") for answer in answers)
            assert answers[-1].startswith(b"HTTP/1.1 503")
            for _ in range(30):
                assert daemon.call("POST", daemon.api + SESSION + "/touch")[0] == 204
            assert daemon.call("GET", daemon.api + SESSION)[1]["state"] == "active"


@pytest.mark.slow
def test_a_daemon_that_cannot_accept_lets_no_idleness_pass(tmp_path: Path, loop: dict[str, str]) -> None:
    """The daemon reports it in `/health`, `/metrics` and the log, and recovers by itself."""
    with process(tmp_path, NO_GRACE, loop) as daemon, contextlib.ExitStack() as stack:
        known = stack.enter_context(contextlib.closing(Client(daemon.api)))
        assert known.health()["checks"]["listeners"][0]["status"] == "pass"
        before = resource.prlimit(daemon.popen.pid, resource.RLIMIT_NOFILE)
        body = {"playerId": "p", "token": "tok-3n", "idleTimeoutSeconds": 1}
        assert daemon.call("PUT", daemon.api + SESSION, body)[0] == 201
        files = len(list(Path(f"/proc/{daemon.popen.pid}/fd").iterdir()))
        resource.prlimit(daemon.popen.pid, resource.RLIMIT_NOFILE, (files, before[1]))
        waiting = [stack.enter_context(connect(daemon.api)) for _ in range(3)]
        for one in waiting:
            one.sendall(f"POST {SESSION}/touch HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        found = wait_for(lambda: (report := known.health())["status"] == "fail" and report)
        output = "api cannot accept connections: Too many open files"
        assert (found["checks"]["listeners"][0]["status"], found["checks"]["listeners"][0]["output"]) == (
            "fail",
            output,
        )
        metrics = known.call("GET", "/metrics")[1]
        assert 'lmdaemon_service_clock_frozen{reason="listening"} 1.0' in metrics
        assert 'lmdaemon_http_accepting{listener="api"} 0.0' in metrics
        time.sleep(2)  # longer than the session's idle time; what is tested is that it does not end meanwhile
        assert '"state":"active"' in known.call("GET", SESSION)[1]
        resource.prlimit(daemon.popen.pid, resource.RLIMIT_NOFILE, before)
        for one in waiting:
            assert one.recv(100).startswith(b"HTTP/1.1 204")
        wait_for(lambda: known.health()["status"] == "pass")
        wait_for(lambda: '"state":"ended"' in known.call("GET", SESSION)[1])
        assert [line["listener"] for line in daemon.events("http.cannot_accept")] == ["api"]
        assert len(daemon.events("http.accepting_again")) == 1


# -- the time for a stop


def test_who_does_not_come_to_an_end_does_not_hold_a_stop_up(tmp_path: Path, loop: dict[str, str]) -> None:
    """The clients sent half a request (the first or a later one; a part of the head or of the body), or nothing, or do
    not read their answers.
    """
    toml = NO_GRACE + 'notify = true\nurl = "http://127.0.0.1:1/"\nallow_private_network = true\ntimeout = "1s"\n'
    post = b"POST /V4/SessionExpired HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun = [
        b"",
        HEALTH[:9],
        HEALTH + HEALTH[:9],
        post + b"Content-Length: 99\r\n\r\n{",
        HEALTH + post + b"Content-Length: 9\r\n\r\n",
    ]
    begun += [post + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"]
    with process(tmp_path, toml, loop) as daemon, contextlib.ExitStack() as stack:
        for side in (daemon.server, daemon.api):
            for data in begun * 3:
                stack.enter_context(connect(side)).sendall(data)
        deaf = stack.enter_context(connect(daemon.api))
        # More than fits into the kernel's buffers
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        wait_for(lambda: daemon.call("GET", daemon.api + "/v1/operators")[0] == 200)
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 6  # the longest time-out of a delivery (1 s) and 5 s


# -- resident memory

MEMORY_MAX_MIB = 100
CROWD = 1900  # connections of attackers; the rest is left to honest senders
# A head of 30 KB that does not end
BIG_HEAD = HEALTH[:-2] + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 480) for n in range(62))
PIPELINE = b"".join([HEALTH[:-2] + b"X: %b\r\n" % (b"x" * 8000) * 3 + b"\r\n"] * 31)
NOTICE = (
    b"POST /V4/SessionExpired HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 16000\r\n\r\n"
)
BULK = b"POST /v1/operators/acme/sessions/touch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
FLOODS = {
    "first heads": ("server", b"", BIG_HEAD),
    "later heads": ("server", HEALTH, BIG_HEAD),
    "heads behind requests": ("server", b"", HEALTH + BIG_HEAD),
    "requests in a row": ("server", b"", PIPELINE),
    "bodies announced": ("server", b"", NOTICE + b" " * 15_900),
    "heads to the api": ("api", HEALTH, BIG_HEAD),
    "bulk bodies without a token": ("api", b"", BULK + b" " * 500_000),
}


@contextlib.contextmanager
def flood(url: str, first: bytes, payload: bytes) -> Iterator[Callable[[], bool]]:
    """Opens connections from several addresses. Yields a function that sends as much of the payload on each as it
    takes, and returns whether any took something.
    """
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for index in range(CROWD):
            one = stack.enter_context(connect(url, f"127.0.1.{1 + index % 8}"))
            if first:
                assert ask(one, first)
            one.setblocking(False)
            selector.register(one, selectors.EVENT_WRITE, [memoryview(payload)])

        def send() -> bool:
            ready = selector.select(0.2)
            for key, _ in ready:
                left = key.data
                try:
                    left[0] = left[0][key.fileobj.send(left[0][:8192]) :]
                except OSError:  # the daemon cut the connection
                    left[0] = b""
                if not left[0]:
                    selector.unregister(key.fileobj)
            return bool(ready)

        yield send


@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_does_not_fill_the_memory_and_honest_senders_are_answered(
    tmp_path: Path, measured: Callable[..., None], name: str
) -> None:
    side, first, payload = FLOODS[name]
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    (tmp_path / "tokens").chmod(0o600)
    with process(tmp_path, 'token_file = "tokens"\n' + NO_GRACE) as daemon:
        url = daemon.server if side == "server" else daemon.api
        with flood(url, first, payload) as send:
            until = time.monotonic() + 3
            while send() and time.monotonic() < until:
                with connect(url, "127.0.9.9") as honest:
                    assert ask(honest).startswith(b"HTTP/1.1 200")
            for _ in range(5):  # until the daemon has read everything
                with connect(url, "127.0.9.9") as honest:
                    assert ask(honest).startswith(b"HTTP/1.1 200")
            status = Path(f"/proc/{daemon.popen.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    measured(peak_mib=peak_kib // 1024)
    assert peak_kib < MEMORY_MAX_MIB * 1024
