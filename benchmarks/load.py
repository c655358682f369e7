"""The load generator: a process that keeps connections busy with HTTP/1.1 requests and prints a report as JSON.

It is a plain epoll loop over sockets that looks only for the end of each answer. So a request costs it a fraction of
what it costs a bare aiohttp handler. Each connection sends one request at a time (no pipelining), as clients do.
"""

import json
import os
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count, cycle, repeat
from random import Random
from typing import NamedTuple

BULK = 1000  # ids in one bulk touch
BULK_BODIES = 100  # made before the measurement begins, and sent again and again


class Load(NamedTuple):
    """What to send. With `pause_s`, each connection begins a request at this interval, otherwise as soon as it has its
    answer. Live sessions have the numbers below `population`. `first` is the first number for sessions that are opened
    or reported, so that no session comes twice.
    """

    kind: str
    port: int
    connections: int
    seconds: float
    operators: list[str]
    population: int = 0
    first: int = 0
    pause_s: float = 0.0
    seed: int = 0
    most: int = 0  # requests altogether; 0: as many as fit into the time
    idle_s: int = 2_592_000
    times: bool = False  # whether to report each request's start (wall ms) and duration (ms)
    tls: bool = False


def session_id(number: int) -> str:
    """A session id as long as real ones, in an order that does not help an index."""
    return f"{number * 2654435761 % 2**32:08x}-{number:012x}"


def _request(method: str, path: str, body: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n{body}".encode()


def _of_sessions(
    load: Load, numbers: Iterable[int], method: str, path: str, body: Mapping[str, object] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Makes a request for each number. NUMBER is replaced by the number, ID by its session, and OPERATOR by the
    session's operator. All requests have one length, so each is a prepared request filled in: the load must cost little
    compared with what it measures.
    """
    ready = []
    for operator in load.operators or [""]:  # peers have no operators
        parts = [part.replace("OPERATOR", operator) for part in (path, json.dumps(body) if body else "")]
        filled = _request(method, *(part.replace("ID", session_id(0)).replace("NUMBER", f"{0:012d}") for part in parts))
        ready.append(filled.replace(session_id(0).encode(), b"%(id)b").replace(b"%012d" % 0, b"%(number)b"))
    for number in numbers:
        name = session_id(number)
        yield name, ready[number % len(ready)] % {b"id": name.encode(), b"number": b"%012d" % number}


def _at_random(load: Load) -> Iterator[int]:
    rng = Random(load.seed)
    while True:
        yield rng.randrange(load.population)


def _touches(load: Load) -> Iterator[tuple[str, bytes]]:
    return _of_sessions(load, _at_random(load), "POST", "/v1/operators/OPERATOR/sessions/ID/touch")


def _bulks(load: Load) -> Iterator[tuple[str, bytes]]:
    rng = Random(load.seed)
    bodies = []
    for _ in range(BULK_BODIES):
        ids = [session_id(number) for number in rng.sample(range(load.population), BULK)]
        bodies.append(json.dumps({"sessionIds": ids}))
    ready = [_request("POST", f"/v1/operators/{load.operators[0]}/sessions/touch", body) for body in bodies]
    return (("", request) for request in cycle(ready))


def _notices(load: Load) -> Iterator[tuple[str, bytes]]:
    body = {"providerId": "OPERATOR", "sessionId": "ID", "externalPlayerId": "pNUMBER", "token": "tok-0123456789"}
    return _of_sessions(load, count(load.first), "POST", "/OPERATOR", body)


def _opens(load: Load) -> Iterator[tuple[str, bytes]]:
    body = {"playerId": "pNUMBER", "token": "tok-0123456789", "idleTimeoutSeconds": load.idle_s}
    return _of_sessions(load, count(load.first), "PUT", "/v1/operators/OPERATOR/sessions/ID", body)


def _closes(load: Load) -> Iterator[tuple[str, bytes]]:
    numbers = range(load.first, load.population)
    return _of_sessions(load, numbers, "POST", "/v1/operators/OPERATOR/sessions/ID/close")


def _health(load: Load) -> Iterator[tuple[str, bytes]]:
    return repeat(("", _request("GET", "/health")))


def _webdis(load: Load) -> Iterator[tuple[str, bytes]]:
    """A touch of the Redis peer: the key lives for another `idle_s`."""
    return _of_sessions(load, _at_random(load), "GET", f"/EXPIRE/ID/{load.idle_s}")


def _setex(load: Load) -> Iterator[tuple[str, bytes]]:
    """An opening at the Redis peer."""
    return _of_sessions(load, count(load.first), "GET", f"/SETEX/ID/{load.idle_s}/acme:pNUMBER")


KINDS: dict[str, Callable[[Load], Iterator[tuple[str, bytes]]]] = {
    "touch": _touches,
    "bulk": _bulks,
    "notice": _notices,
    "open": _opens,
    "close": _closes,
    "health": _health,
    "webdis": _webdis,
    "setex": _setex,
}


def unverified() -> ssl.SSLContext:
    """A TLS context that accepts the self-signed certificates of the benchmarks."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Connection:
    """One socket, and the request that is under way on it."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            self.socket = context.wrap_socket(self.socket)
        self.socket.setblocking(False)
        self.answer = b""
        self.name = ""
        self.began = 0.0
        self.began_at = 0.0  # wall ms
        self.next_at = 0.0

    def send(self, name: str, request: bytes) -> None:
        self.name, self.answer, self.began_at, self.began = name, b"", time.time() * 1000, time.perf_counter()
        sent = self.socket.send(request)
        if sent < len(request):  # a bulk body: the rest is sent as the server reads
            self.socket.settimeout(20)
            self.socket.sendall(request[sent:])
            self.socket.setblocking(False)

    def receive(self) -> bool:
        """Reads what has come. Returns whether the answer is complete. Raises ConnectionError if the server has
        gone.
        """
        part = self.socket.recv(65536)
        if not part:
            raise ConnectionResetError("closed by the server")
        self.answer += part
        head, found, body = self.answer.partition(b"\r\n\r\n")
        if not found:
            return False
        _, found, rest = head.lower().partition(b"content-length:")
        return len(body) >= int(rest.split(b"\r\n", 1)[0]) if found else True

    @property
    def succeeded(self) -> bool:
        # Webdis answers 0 for a key that has expired
        return self.answer[9:10] == b"2" and not self.answer.endswith(b":0}")


class Run:
    """Keeps all connections busy until the time is over. Then each finishes the request that is under way."""

    def __init__(self, load: Load) -> None:
        self.load = load
        requests = KINDS[load.kind](load)
        # The first request is made before the measurement begins, because making it takes long
        self.requests = chain([next(requests)], requests)
        self.sent = 0
        self.failed = 0
        self.lost = 0  # connections that broke
        self.acknowledged: list[str] = []
        self.began_at: list[float] = []  # wall ms
        self.took_ms: list[float] = []
        self.first_failure = ""

    def run(self) -> dict[str, object]:
        load = self.load
        poll = select.epoll()
        context = unverified() if load.tls else None
        connections = {}
        for index in range(load.connections):
            connection = Connection(load.port, context)
            connections[connection.socket.fileno()] = connection
            poll.register(connection.socket, select.EPOLLIN)
            connection.next_at = time.perf_counter() + load.pause_s * index / load.connections
        waiting = list(connections.values())
        began = time.perf_counter()
        self.over = began + load.seconds
        signal.signal(signal.SIGTERM, self._stop)
        busy = 0
        while True:
            now = time.perf_counter()
            later = []
            for connection in waiting:
                if now >= self.over or (load.most and self.sent >= load.most):
                    continue
                if connection.next_at > now:
                    later.append(connection)
                    continue
                if not self._send(connection):
                    continue
                busy += 1
            waiting = later
            if not busy and not waiting:
                break
            pause = max(0.0, min(one.next_at for one in waiting) - now) if waiting else 1.0
            for fd, _ in poll.poll(pause, 512):
                connection = connections[fd]
                try:
                    complete = connection.receive()
                except (BlockingIOError, ssl.SSLWantReadError):
                    continue
                except ConnectionError:
                    self.lost += 1
                    poll.unregister(fd)
                    busy -= 1
                    continue
                if complete:
                    busy -= 1
                    self._note(connection)
                    waiting.append(connection)
        return self._report(time.perf_counter() - began)

    def _stop(self, *_: object) -> None:
        self.over = 0.0

    def _send(self, connection: Connection) -> bool:
        request = next(self.requests, None)
        if request is None:
            return False
        self.sent += 1
        connection.next_at = max(connection.next_at + self.load.pause_s, time.perf_counter())
        try:
            connection.send(*request)
        except ConnectionError:
            self.lost += 1
            return False
        return True

    def _note(self, connection: Connection) -> None:
        took = time.perf_counter() - connection.began
        self.took_ms.append(took * 1000)
        if not connection.succeeded:
            self.failed += 1
            self.first_failure = self.first_failure or connection.answer[:300].decode(errors="replace")
        elif self.load.times:
            self.acknowledged.append(connection.name)
            self.began_at.append(connection.began_at)

    def _report(self, seconds: float) -> dict[str, object]:
        in_order = sorted(self.took_ms) or [0.0]
        report: dict[str, object] = {
            "answered": len(self.took_ms),
            "failed": self.failed,
            "first_failure": self.first_failure,
            "lost": self.lost,
            "seconds": seconds,
            "cpu_s": time.process_time(),
            "p50_ms": in_order[len(in_order) // 2],
            "p99_ms": in_order[int(len(in_order) * 0.99)],
        }
        if self.load.times:
            report |= {"acknowledged": self.acknowledged, "began_at": self.began_at, "took_ms": self.took_ms}
        return report


def as_from_elsewhere() -> None:
    """Makes this process give way, as a client on another machine would: it takes no core from a server that has more
    answers to send. With SCHED_BATCH, a process that wakes up does not preempt others. Source: sched(7).
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


if __name__ == "__main__":
    as_from_elsewhere()
    json.dump(Run(Load(**json.loads(sys.argv[1]))).run(), sys.stdout)
