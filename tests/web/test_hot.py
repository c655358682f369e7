"""Plain requests served by `hot` (past most of aiohttp) and by aiohttp ("ordinary"): no client can tell which of the
two has answered.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from chance import FULL, examples
from clocks import HandClock
from engines import PostgresEngine
from faults import locked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres import NoServerError, server
from support import RawConnection, Serving, hear, raw_connection, scrape, serving, until
from ways import WAYS, on_the
from wires import FORM, JSON, WIRES, operator, query, write_secrets

from lmdaemon.limits import Limits, StoreLimits
from lmdaemon.web import connection as connections
from lmdaemon.web import hot
from lmdaemon.web.hot import HotConnection
from lmdaemon.web.requests import Ready
from lmdaemon.web.sessions import Sessions

TOKEN, READ_TOKEN = "api-token-1", "api-token-2"
CONFIG = (
    '[server]\nlisten = "127.0.0.1:0"\ntrusted_proxies = ["127.0.0.1"]\n[api]\nlisten = "127.0.0.1:0"\n'
    'token_file = "api.tokens"\nread_token_file = "api.read"\n'
    + operator("v4", "v4.01", "v4.02", "v1", "pragmatic")
    + operator("v4", name="closed", endpoint="/closed", allow_from=["203.0.113.0/24"])
    + operator("v4", name="few", endpoint="/few", unknown_per_minute=1)
    + operator("v4", name="strict", endpoint="/strict", unknown_session="reject", token_check="session")
)
NOBODY = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
Head = tuple[str, str]


def request(method: str, path: str, *headers: str, body: bytes = b"", version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def api(method: str, path: str, body: object = None, *headers: str, token: str = TOKEN, **options: Any) -> bytes:
    own = [f"Authorization: Bearer {token}"] if token else []
    if body is None:
        return request(method, f"/v1/operators/{path}", *own, *headers, **options)
    own.append(f"Content-Type: {JSON}")
    written = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(method, f"/v1/operators/{path}", *own, *headers, body=written, **options)


def notice(path: str = "/V4/SessionExpired", *headers: str, dialect: str = "v4", **changes: Any) -> bytes:
    wire = WIRES[dialect]
    return request("POST", path, f"Content-Type: {wire.content}", *headers, body=wire.body(**changes))


def posted(body: bytes, *headers: str, content: str = JSON) -> bytes:
    return request("POST", "/V4/SessionExpired", f"Content-Type: {content}", *headers, body=body)


@dataclass(frozen=True)
class Case:
    """Requests on one connection, sent in pieces that arrive one by one. `plain` says how many of them `hot` serves,
    where it is in use.
    """

    name: str
    side: str
    pieces: tuple[bytes, ...]
    plain: int = 0


PLAYER = {"playerId": "p", "token": "t"}
IDLE = PLAYER | {"idleTimeoutSeconds": 90, "attributes": {"table": 7}}
API = [
    # name, what is sent, how many requests `hot` serves; the cases run in this order
    ("opened", [api("PUT", "acme/sessions/s", IDLE)], 1),
    ("opened again", [api("PUT", "acme/sessions/s", IDLE)], 1),
    ("opened otherwise", [api("PUT", "acme/sessions/s", PLAYER | {"playerId": "q"})], 1),
    ("touched", [api("POST", "acme/sessions/s/touch")], 1),
    ("touched with an id of its own", [api("POST", "acme/sessions/s/touch", None, "X-Request-Id: r-1")], 1),
    ("touched with a body", [api("POST", "acme/sessions/s/touch", {"x": 1})], 1),
    ("touched with a query", [api("POST", "acme/sessions/s/touch?x=1")], 1),
    ("an id with escapes", [api("PUT", "acme/sessions/a%2Fb%20%C3%BC", PLAYER)], 1),
    ("its touch", [api("POST", "acme/sessions/a%2fb%20%c3%bc/touch")], 1),
    ("an id with a broken escape", [api("POST", "acme/sessions/a%2/touch")], 0),
    ("an id that is not UTF-8", [api("POST", "acme/sessions/a%FF/touch")], 0),
    ("an id that is a dot", [api("PUT", "acme/sessions/%2E", PLAYER)], 0),
    ("an id that is too long", [api("PUT", "acme/sessions/" + "s" * 300, PLAYER)], 0),
    ("an id with braces", [api("PUT", "acme/sessions/{s}", PLAYER)], 1),
    ("an id that is a word", [api("PUT", "acme/sessions/touch", PLAYER)], 1),
    ("its touch as well", [api("POST", "acme/sessions/touch/touch")], 1),
    ("an unknown session", [api("POST", "acme/sessions/none/touch")], 1),
    ("an unknown operator", [api("POST", "nobody/sessions/s/touch")], 0),
    ("an operator with an escape", [api("POST", "ac%6De/sessions/s/touch")], 0),
    ("in bulk", [api("POST", "acme/sessions/touch", {"sessionIds": ["s", "s", "none"]})], 1),
    ("in bulk, nothing", [api("POST", "acme/sessions/touch", {"sessionIds": []})], 1),
    ("in bulk, no list", [api("POST", "acme/sessions/touch", {"sessionIds": "s"})], 0),
    ("in bulk, large", [api("POST", "acme/sessions/touch", {"sessionIds": ["s" * 100] * 50})], 0),
    ("in bulk, no body", [api("POST", "acme/sessions/touch")], 0),
    ("a field too many", [api("PUT", "acme/sessions/s", PLAYER | {"x": 1})], 0),
    ("a field of a wrong type", [api("PUT", "acme/sessions/s", PLAYER | {"playerId": 1})], 0),
    ("a missing field", [api("PUT", "acme/sessions/s", {"token": "t"})], 0),
    ("no JSON", [api("PUT", "acme/sessions/s", b"{")], 0),
    ("a list", [api("PUT", "acme/sessions/s", b"[]")], 0),
    ("no type", [request("PUT", "/v1/operators/acme/sessions/s", f"Authorization: Bearer {TOKEN}", body=b"{}")], 0),
    ("compressed", [api("PUT", "acme/sessions/s", b"{}", "Content-Encoding: gzip")], 0),
    ("a coding that is none", [api("PUT", "acme/sessions/s", PLAYER, "Content-Encoding: identity")], 1),
    ("no token", [api("POST", "acme/sessions/s/touch", token="")], 0),
    ("a wrong token", [api("POST", "acme/sessions/s/touch", token="x")], 0),
    ("a token that may read", [api("POST", "acme/sessions/s/touch", token=READ_TOKEN)], 0),
    ("another scheme", [api("POST", "acme/sessions/s/touch", None, "Authorization: Basic x", token="")], 0),
    ("another method", [api("DELETE", "acme/sessions/s")], 0),
    ("another method for a touch", [api("GET", "acme/sessions/s/touch")], 0),
    ("another call", [api("POST", "acme/sessions/s/reopen")], 0),
    ("an open path with a slash behind", [api("PUT", "acme/sessions/s/", PLAYER)], 0),
    ("read", [api("GET", "acme/sessions/s")], 0),
    ("only its head", [api("HEAD", "acme/sessions/s")], 0),
    ("HTTP/1.0", [api("POST", "acme/sessions/s/touch", version="1.0")], 0),
    ("HTTP/1.0, kept", [api("POST", "acme/sessions/s/touch", None, "Connection: keep-alive", version="1.0")], 0),
    ("the last one", [api("POST", "acme/sessions/s/touch", None, "Connection: close")], 0),
    ("the last one, opening", [api("PUT", "acme/sessions/s2", PLAYER, "Connection: close")], 0),
    ("kept, and said so", [api("POST", "acme/sessions/s/touch", None, "Connection: keep-alive")], 1),
    ("asked for first", [api("PUT", "acme/sessions/s", PLAYER, "Expect: 100-continue")], 0),
    ("asked for something else", [api("PUT", "acme/sessions/s", PLAYER, "Expect: x")], 0),
    ("an upgrade", [api("POST", "acme/sessions/s/touch", None, "Connection: upgrade", "Upgrade: websocket")], 0),
    ("an upgrade to what is not known", [api("POST", "acme/sessions/s/touch", None, "Upgrade: x")], 1),
    (
        "in chunks",
        [
            api("PUT", "acme/sessions/s3", None, f"Content-Type: {JSON}", "Transfer-Encoding: chunked")
            + b'11\r\n{"playerId": "p"}\r\n0\r\n\r\n'
        ],
        0,
    ),
    ("an absolute URL", [request("POST", "http://localhost/v1/operators/acme/sessions/s/touch")], 0),
    ("two in a row", [api("POST", "acme/sessions/s/touch") * 2], 0),
    ("two, one by one", [api("POST", "acme/sessions/s/touch")] * 2, 2),
    ("forty in a row", [api("POST", "acme/sessions/s/touch") * 40], 0),
    ("in two pieces", [api("POST", "acme/sessions/s/touch")[:50], api("POST", "acme/sessions/s/touch")[50:]], 0),
    (
        "its body later",
        [api("PUT", "acme/sessions/s", IDLE)[:-20], api("PUT", "acme/sessions/s", IDLE)[-20:]],
        0,
    ),
    ("one and a half", [api("POST", "acme/sessions/s/touch") + NOBODY[:10], NOBODY[10:]], 0),
    ("line ends before it", [b"\r\n" + api("POST", "acme/sessions/s/touch")], 1),
    ("line ends behind it", [api("POST", "acme/sessions/s/touch") + b"\r\n\r\n"], 1),
    ("line ends behind its body", [api("PUT", "acme/sessions/s", IDLE) + b"\r\n"], 0),
    ("what is no HTTP", [b"nonsense\r\n\r\n"], 0),
    ("what is no HTTP behind it", [api("POST", "acme/sessions/s/touch"), b"nonsense\r\n\r\n"], 1),
    ("no host", [b"POST /v1/operators/acme/sessions/s/touch HTTP/1.1\r\n\r\n"], 0),
    ("two types", [api("PUT", "acme/sessions/s", IDLE, f"Content-Type: {JSON}")], 0),
    ("a long head", [api("POST", "acme/sessions/s/touch", None, "X: " + "x" * 4000)], 0),
    ("closed", [api("POST", "acme/sessions/s/close")], 0),
    ("touched after its end", [api("POST", "acme/sessions/s/touch")], 1),
    ("opened after its end", [api("PUT", "acme/sessions/s", IDLE)], 1),
    ("in bulk after its end", [api("POST", "acme/sessions/touch", {"sessionIds": ["s", "touch"]})], 1),
]
BEHIND = "X-Forwarded-For: 203.0.113.9"
SERVER = [
    ("a notice", [notice()], 1),
    ("repeated", [notice()], 1),
    ("with fields of its own", [notice(session="n1", extra={"why": "x", "secret": "y"})], 1),
    ("v4.01", [notice(dialect="v4.01", session="n2")], 1),
    ("v4.02", [notice("/v4/SessionExpired", dialect="v4.02", session="n3")], 1),
    ("v1", [notice("/v1/SessionExpired", dialect="v1", session="n4")], 1),
    ("pragmatic", [notice("/sessionexpired", dialect="pragmatic", session="n5")], 1),
    ("a wrong hash", [notice("/sessionexpired", dialect="pragmatic", session="n6", hash="0" * 32)], 0),
    ("another player", [notice(player="q")], 1),
    ("another provider", [notice(provider="x")], 0),
    ("misspelled", [notice(provider="LuckyMonaco", session="n7")], 1),
    ("a missing field", [notice(player=None)], 0),
    ("an id too long", [notice(session="s" * 300)], 0),
    ("no JSON", [posted(b"{")], 0),
    ("no body", [request("POST", "/V4/SessionExpired", f"Content-Type: {JSON}")], 0),
    ("a key twice", [posted(b'{"providerId":"luckymonaco","providerId":"x"}')], 0),
    ("another content", [posted(b"{}", content="text/plain")], 0),
    ("a form where none is read", [posted(b"a=b", content=FORM)], 0),
    ("compressed", [posted(b"{}", "Content-Encoding: gzip")], 0),
    ("a charset as coding", [notice("/V4/SessionExpired", "Content-Encoding: utf-8", session="n8")], 1),
    ("an id of the request", [notice("/V4/SessionExpired", "X-Request-Id: r-2", session="n9")], 1),
    ("repeated slashes", [notice("//V4//SessionExpired/", session="n10")], 1),
    ("with a query", [notice("/V4/SessionExpired?x=1", session="n11")], 1),
    ("another path", [notice("/elsewhere")], 0),
    ("another method", [request("GET", "/V4/SessionExpired")], 0),
    ("its health", [request("GET", "/health")], 0),
    ("posted to its health", [request("POST", "/health")], 0),
    ("from somewhere else", [notice("/closed")], 0),
    ("from where it may", [notice("/closed", BEHIND)], 1),
    ("through a proxy that is none", [notice("/closed", "X-Forwarded-For: 203.0.113.9, 192.0.2.1")], 0),
    ("an unknown one", [notice("/few", session="f1")], 0),
    ("unknown ones too many", [notice("/few", session="f2")], 0),
    ("the known one again", [notice("/few", session="f1")], 0),
    ("what must be known", [notice("/strict", session="x")], 1),
    ("the last one", [notice("/V4/SessionExpired", "Connection: close")], 0),
    ("HTTP/1.0", [notice().replace(b"HTTP/1.1", b"HTTP/1.0")], 0),
    ("asked for first", [notice("/V4/SessionExpired", "Expect: 100-continue")], 0),
    ("two in a row", [notice() * 2], 0),
    ("two, one by one", [notice(), notice()], 2),
    ("in two pieces", [notice()[:200], notice()[200:]], 0),
    ("too large, and said so", [posted(b" " * 16385)], 0),
    ("as large as may be", [posted(b" " * 16384)], 0),
    ("never finished", [posted(b"{}")[:-1]], 0),
]
CASES = [Case(name, "api", tuple(pieces), plain) for name, pieces, plain in API]
CASES += [Case(name, "server", tuple(pieces), plain) for name, pieces, plain in SERVER]
# Metrics that are measured and differ from run to run
MEASURED = re.compile(r"process_|python_|lmdaemon_log_|lmdaemon_\w*(seconds|bytes|commit|batch|loop|build)")


class Seen:
    """Watches a daemon's connections: the bytes that have arrived, and the requests that `hot` has taken."""

    def __init__(self) -> None:
        self.arrived = 0
        self.plain = 0

    @contextlib.contextmanager
    def watching(self, kind: type[connections.Connection]) -> Iterator[None]:
        received, takes = kind.data_received, HotConnection._takes

        def data_received(connection: connections.Connection, data: bytes) -> None:
            received(connection, data)
            self.arrived += len(data)

        def counted(connection: HotConnection, *arguments: Any) -> bool:
            taken = takes(connection, *arguments)
            self.plain += taken
            return taken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "data_received", data_received)
            patch.setattr(HotConnection, "_takes", counted)
            yield


def is_waiting(connection: Any) -> bool:
    """Whether the connection waits for its client: all requests that have come whole are answered."""
    return not connection.unanswered or not connection._arrival.body.is_eof()


@dataclass
class Tried:
    """A daemon, and what is seen of its connections."""

    daemon: Serving
    seen: Seen

    @property
    def connections(self) -> list[Any]:
        return list(self.daemon.bounds.open)

    async def answers(self, case: Case) -> bytes:
        """All bytes that are answered on a connection, without dates. The last request of the case closes the
        connection.
        """
        received = b""
        async with self.connected(getattr(self.daemon, case.side)) as peer, asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                for piece in case.pieces:
                    await self.send(peer, piece)
                    await until(lambda: all(map(is_waiting, self.connections)))
                await until(lambda: not any(one.unanswered for one in self.connections))
                await peer.send(NOBODY)
            with contextlib.suppress(ConnectionError):
                while part := await peer.reader.read(65536):
                    received += part
        await until(lambda: not self.connections)
        return re.sub(rb"Date: [^\r]+", b"Date: now", received)

    @contextlib.asynccontextmanager
    async def connected(self, url: str) -> AsyncIterator[RawConnection]:
        """A connection that already waits for its first request. Otherwise, on uvloop with Python 3.11, the first
        request may come sooner, and aiohttp would serve it.
        """
        before = set(self.connections)
        async with raw_connection(url) as peer:
            await until(lambda: any(one._waiter for one in self.connections if one not in before))
            yield peer

    async def send(self, peer: RawConnection, piece: bytes) -> None:
        """Sends bytes and waits until they have arrived; few bytes arrive in one piece."""
        expected = self.seen.arrived + len(piece)
        await peer.send(piece)
        await until(lambda: self.seen.arrived >= expected or not self.connections)


PATIENT = Limits(store=StoreLimits(busy_timeout_s=60, hung_s=60))  # with a database that is locked


@contextlib.asynccontextmanager
async def trying(way: str, directory: Path, database: str = "", limits: Limits = PATIENT) -> AsyncIterator[Tried]:
    directory.mkdir()
    write_secrets(directory)
    for name, token in (("api.tokens", TOKEN), ("api.read", READ_TOKEN)):
        (directory / name).write_text(f"{token}\n")
        (directory / name).chmod(0o600)
    seen = Seen()
    with on_the(way), seen.watching(HotConnection if way == "hot" else connections.Connection):
        async with serving(directory, CONFIG + database, HandClock(), limits) as daemon:
            daemon.client.headers["Authorization"] = f"Bearer {TOKEN}"
            yield Tried(daemon, seen)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    try:
        with server() as url:
            yield url
    except NoServerError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def database_for(way: str, url: str) -> Iterator[str]:
    """A new database for the configuration. The server's clock stands still there, as the daemon's does."""
    name = f"lmdaemon_{way}_{os.getpid()}"
    own = f"{url.rpartition('/')[0]}/{name}"
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute(f"CREATE DATABASE {name}")
        try:
            with contextlib.closing(PostgresEngine(own)) as engine:
                engine.follow(HandClock())
            yield f'[database]\nurl = "{own}"\n'
        finally:
            sql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
async def test_every_case_is_answered_logged_and_counted_alike(
    tmp_path: Path, request: pytest.FixtureRequest, engine: str
) -> None:
    """Answers are equal byte for byte, on both databases. Where `hot` is in use, it serves all requests that it may
    serve.
    """
    url = request.getfixturevalue("postgres") if engine == "postgres" else ""
    found: dict[str, Any] = {}
    for way in WAYS:
        with hear() as events, database_for(way, url) if url else contextlib.nullcontext("") as database:
            async with trying(way, tmp_path / way, database, PATIENT._replace(body_s=0.2)) as tried:
                events.clear()
                answers, plain, lines = {}, {}, {}
                for case in CASES:
                    key = (case.side, case.name)
                    before, tried.seen.plain = len(events), 0
                    answers[key], plain[key] = await tried.answers(case), tried.seen.plain
                    # Lines of the daemon belong to no request
                    told = [event for event in events[before:] if not event.name.startswith("daemon.")]
                    lines[key] = [(event.name, event.facts, event.level) for event in told]
                counts = await scrape(tried.daemon)
                statement = "SELECT operator, session_id, player_id, reason, seen_ms FROM session ORDER BY id"
                rows = [] if url else query(tmp_path / way, statement)
                bounds = tried.daemon.bounds
                assert (bounds.strangers.used, bounds.known.used) == (0, 0)
        found[way] = (answers, lines, {name: one for name, one in counts.items() if not MEASURED.match(name)}, rows)
        assert plain == {(case.side, case.name): case.plain if way == "hot" else 0 for case in CASES}
    for hot_one, ordinary in zip(*found.values(), strict=True):
        assert hot_one == ordinary


# -- a request under way

OPEN, TOUCH = api("PUT", "acme/sessions/s", PLAYER), api("POST", "acme/sessions/s/touch")
EACH_WAY = pytest.mark.parametrize("on", WAYS)


@contextlib.asynccontextmanager
async def under_way(tried: Tried, piece: bytes) -> AsyncIterator[tuple[RawConnection, Callable[[], None]]]:
    """A connection on which these bytes were sent and whose request waits for its commit until the function is
    called.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(locked(tried.daemon.store.path))
        async with tried.connected(tried.daemon.api) as peer:
            await tried.send(peer, piece)
            await until(lambda: any(one.unanswered for one in tried.connections))
            yield peer, held.close
            held.close()


async def nothing_is_held(tried: Tried) -> None:
    bounds = tried.daemon.bounds
    await until(lambda: not tried.connections and (bounds.strangers.used, bounds.known.used) == (0, 0))


async def opened(tried: Tried) -> None:
    async with tried.connected(tried.daemon.api) as peer:
        await peer.send(OPEN)
        assert (await peer.answer()).status == 201
    await nothing_is_held(tried)


@EACH_WAY
async def test_what_arrives_meanwhile_is_answered_after_it_in_order(tmp_path: Path, on: str) -> None:
    async with trying(on, tmp_path / "d") as tried:
        await opened(tried)
        async with under_way(tried, TOUCH) as (peer, commit):
            for later in (
                NOBODY.replace(b"Connection: close\r\n", b""),
                api("POST", "acme/sessions/none/touch"),
                TOUCH,
            ):
                await tried.send(peer, later)
            commit()
            assert [(await peer.answer()).status for _ in range(4)] == [204, 401, 404, 204]
            await peer.send(TOUCH)
            assert (await peer.answer()).status == 204
        await nothing_is_held(tried)
    assert tried.seen.plain == (3 if on == "hot" else 0)  # the opening, the first touch and the last touch


@EACH_WAY
@pytest.mark.parametrize("count", [31, 32, 33, 70])
async def test_more_requests_than_aiohttp_queues_are_all_answered(tmp_path: Path, on: str, count: int) -> None:
    """aiohttp stops to read at 32 requests, and must notice when it can go on."""
    async with trying(on, tmp_path / "d") as tried:
        await opened(tried)
        async with under_way(tried, TOUCH) as (peer, commit):
            await tried.send(peer, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * count)
            commit()
            assert [(await peer.answer()).status for _ in range(count + 1)] == [204, *[401] * count]
        await nothing_is_held(tried)


@EACH_WAY
@pytest.mark.parametrize("by", ["its client", "us"])
async def test_what_was_begun_is_stored_when_the_connection_is_lost(tmp_path: Path, on: str, by: str) -> None:
    async with trying(on, tmp_path / "d") as tried:
        async with under_way(tried, OPEN) as (peer, commit):
            if by == "us":
                tried.connections[0].cut("stop")
            else:
                peer.writer.transport.abort()
            await until(lambda: not tried.connections)
            assert tried.daemon.store.live == 0
            commit()
            await until(lambda: tried.daemon.store.live == 1)
        await nothing_is_held(tried)
    assert tried.seen.plain == (on == "hot")


@EACH_WAY
async def test_a_client_that_has_nothing_more_to_say_is_treated_alike(tmp_path: Path, on: str) -> None:
    """A client that closes its side before the answer gets none. What it asked for is stored."""
    async with trying(on, tmp_path / "d") as tried:
        async with under_way(tried, OPEN) as (peer, commit):
            peer.writer.write_eof()
            await until(lambda: not tried.connections)
            commit()
            assert await peer.rest() == b""
            await until(lambda: tried.daemon.store.live == 1)
        await nothing_is_held(tried)


@EACH_WAY
async def test_at_a_stop_what_is_under_way_is_answered_and_the_client_told(tmp_path: Path, on: str) -> None:
    async with trying(on, tmp_path / "d") as tried:
        await opened(tried)
        async with under_way(tried, TOUCH) as (peer, commit), raw_connection(tried.daemon.api) as idle:
            tried.daemon.daemon.stop()
            await until(lambda: all(site.closing for site in tried.daemon.sites.values()))
            commit()
            answer = await peer.answer()
            assert (answer.status, answer.headers["connection"]) == (204, "close")
            assert await peer.rest() == await idle.rest() == b""
            await tried.daemon.running


@EACH_WAY
async def test_a_connection_is_kept_as_long_as_after_any_other_request(tmp_path: Path, on: str) -> None:
    async with trying(on, tmp_path / "d") as tried:
        await opened(tried)
        tried.daemon.sites["api"].keepalive_s = 0.3
        async with under_way(tried, TOUCH) as (peer, commit):
            (connection,) = tried.connections
            # The time has passed, and the connection was not closed
            await until(lambda: connection._keepalive_handle is None)
            commit()
            assert (await peer.answer()).status == 204
            assert await peer.rest() == b""  # closed in the meantime, because no further request came
        await nothing_is_held(tried)


async def test_who_does_not_take_its_answers_is_served_by_the_framework(tmp_path: Path) -> None:
    """aiohttp's way limits how long a client may take to read its answers."""
    async with trying("hot", tmp_path / "d") as tried:
        await opened(tried)
        async with tried.connected(tried.daemon.api) as peer:
            await peer.send(TOUCH)
            assert (await peer.answer()).status == 204
            (connection,) = tried.connections
            connection.pause_writing()
            await peer.send(TOUCH)
            assert (await peer.answer()).status == 204
            connection.resume_writing()
    assert tried.seen.plain == 2


@EACH_WAY
async def test_a_bug_after_the_commit_is_answered_and_logged(
    tmp_path: Path, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Ready:
        raise LookupError

    with monkeypatch.context() as patch, hear() as events:
        patch.setattr(Sessions, "touched", fails)
        async with trying(on, tmp_path / "d") as tried:
            await opened(tried)
            async with tried.connected(tried.daemon.api) as peer:
                for _ in range(2):
                    await peer.send(TOUCH)
                    assert (await peer.answer()).status == 500
            await nothing_is_held(tried)
    facts = [event.facts for event in events if event.name == "api.failed"]
    assert [(one["call"], one["error"]) for one in facts] == [("touchSession", "LookupError")] * 2


async def test_if_an_answer_cannot_be_written_only_its_connection_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trying("hot", tmp_path / "d") as tried:
        await opened(tried)
        monkeypatch.delattr(Ready, "whole")
        async with under_way(tried, TOUCH) as (peer, commit):
            (connection,) = tried.connections
            task = connection._task_handler
            await tried.send(peer, NOBODY)  # is held in memory until the connection ends
            commit()
            assert await peer.rest() == b""
            await until(task.done)
        await nothing_is_held(tried)
        await tried.daemon.store.probe()  # the store goes on


async def test_what_cannot_be_begun_is_served_by_the_framework(tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise LookupError

    async with trying("hot", tmp_path / "d") as tried:
        await opened(tried)
        tried.daemon.sites["api"].begin = fails
        async with tried.connected(tried.daemon.api) as peer:
            await peer.send(TOUCH)
            assert (await peer.answer()).status == 204
    assert tried.seen.plain == 1  # the opening


@EACH_WAY
async def test_a_refusal_is_logged_and_counted_when_its_client_has_left(tmp_path: Path, on: str) -> None:
    with hear() as events:
        async with trying(on, tmp_path / "d") as tried:
            async with under_way(tried, api("POST", "acme/sessions/none/touch")) as (peer, commit):
                peer.writer.transport.abort()
                await until(lambda: not tried.connections)
                commit()
                await until(lambda: any(event.name == "touch.refused" for event in events))
            await nothing_is_held(tried)
            counts = await scrape(tried.daemon)
    assert counts['lmdaemon_api_errors_total{status="404"}'] == 1


async def test_a_refusal_is_logged_if_its_connection_is_cut_after_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = HotConnection._stored

    def cut_after(connection: HotConnection, result: Any) -> None:
        stored(connection, result)
        connection.cut("memory")

    monkeypatch.setattr(HotConnection, "_stored", cut_after)
    with hear() as events:
        async with trying("hot", tmp_path / "d") as tried:
            async with under_way(tried, api("POST", "acme/sessions/none/touch")) as (peer, commit):
                commit()
                assert await peer.rest() == b""
                await until(lambda: any(event.name == "touch.refused" for event in events))
            await nothing_is_held(tried)
            counts = await scrape(tried.daemon)
    assert counts['lmdaemon_api_errors_total{status="404"}'] == 1


# -- in pieces

SOME = [
    *(TOUCH, OPEN, api("PUT", "acme/sessions/s", PLAYER | {"playerId": "q"}), api("POST", "acme/sessions/none/touch")),
    *(api("POST", "acme/sessions/touch", {"sessionIds": ["s", "x"]}), request("GET", "/nothing"), TOUCH + b"\r\n"),
]


def test_requests_are_answered_alike_wherever_they_are_cut(tmp_path: Path) -> None:
    """Compares several requests in a row, cut at random places and served by `hot`, with the same requests in one
    piece, served by aiohttp.
    """
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        ordinary = runner.run(stack.enter_async_context(trying("ordinary", tmp_path / "ordinary")))
        tried = runner.run(stack.enter_async_context(trying("hot", tmp_path / "hot")))
        for one in (ordinary, tried):
            runner.run(opened(one))

        @settings(
            max_examples=1000 if FULL else examples(60),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(
            st.lists(st.sampled_from(SOME), min_size=1, max_size=5),
            st.lists(st.integers(0, 2000), max_size=4),
            st.booleans(),
        )
        def alike(requests: list[bytes], cuts: list[int], each_by_itself: bool) -> None:
            whole = b"".join(requests)
            borders = accumulate(map(len, requests)) if each_by_itself else ()
            edges = sorted({0, len(whole), *borders, *(cut % len(whole) for cut in cuts)})
            pieces = tuple(whole[start:end] for start, end in pairwise(edges))
            expected = runner.run(ordinary.answers(Case("", "api", (whole,))))
            assert runner.run(tried.answers(Case("", "api", pieces))) == expected
            assert expected.count(b"HTTP/1.1 ") == len(requests) + 1

        try:
            alike()
            assert tried.seen.plain  # how many `hot` has served depends on the cuts
        finally:
            runner.run(stack.aclose())


# -- where it stands aside


async def is_served(directory: Path) -> tuple[type, list[Any]]:
    """The class that serves the connections of a daemon started now, and the reasons that the daemon logs for not using
    `hot`.
    """
    with hear() as events:
        async with serving(directory, operator()) as daemon, raw_connection(daemon.api) as peer:
            await peer.send(request("GET", "/health"))
            assert (await peer.answer()).status == 200
            kind = type(next(iter(daemon.bounds.open)))
    return kind, [event.facts["reason"] for event in events if event.name == "http.slower"]


async def test_it_fits_the_aiohttp_that_is_installed(tmp_path: Path) -> None:
    """`hot` uses these internals of aiohttp's connection and parser. If an upgrade of aiohttp fails here, `hot` must be
    adapted.
    """
    assert hot.misfit() is None
    assert await is_served(tmp_path) == (HotConnection, [])


async def test_without_it_everything_is_served(tmp_path: Path) -> None:
    with on_the("ordinary"):
        assert await is_served(tmp_path) == (connections.Connection, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("_CONNECTION", (*hot._CONNECTION, "_gone"), id="an attribute is missing"),
        pytest.param("HttpRequestParser", hot.HttpRequestParserPy, id="the parser in C is missing"),
        pytest.param("_MESSAGE", hot._MESSAGE | {"gone": 1}, id="a field is missing"),
        pytest.param("_MESSAGE", hot._MESSAGE | {"method": "PUT"}, id="a field means something else"),
    ],
)
async def test_it_stands_aside_where_aiohttp_is_not_as_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """`hot` then needs what this aiohttp does not have."""
    monkeypatch.setattr(hot, name, value)
    kind, reasons = await is_served(tmp_path)
    assert kind is connections.Connection
    assert len(reasons) == 1
