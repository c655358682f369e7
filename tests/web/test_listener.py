"""The listeners of a whole daemon, tested from raw sockets on both event loops: limits of connections, heads, memory
and times.
"""

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support import LISTEN, RawAnswer, RawConnection, hear, raw_connection, serving, until

from lmdaemon.limits import Limits
from lmdaemon.sweeper import LOOP_TURNS
from lmdaemon.web import connection as connections

SIDES = pytest.mark.parametrize("side", ["server", "api"])
CONFIG = '[operators.acme]\nprovider_id = "luckymonaco"\n'
ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
TOUCH = b"POST /v1/operators/acme/sessions/touch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TOUCH += b'Content-Length: 21\r\n\r\n{"sessionIds":["s1"]}'


NO_HTTP = {
    "no HTTP": b"tok-3n\r\n\r\n",
    "no such version": b"GET /tok-3n HTTP/9.9\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nHost: localhost\r\ntok-3n\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: tok-3n\0\r\n\r\n",
    "a long line": b"GET /" + b"tok-3n" * 1000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"tok-3n" * 2000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"tok: tok-3n\r\n" * 100 + b"\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\ntok-3n",
    "two types": b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"Content-Type: tok-3n\r\n" * 2 + b"\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: tok-3n\r\nHost: localhost\r\n\r\n",
    "a long name": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"tok-3n" * 2000 + b": x\r\n\r\n",
    "a signed length": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +6\r\n\r\ntok-3n",
    "length and chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n"
    b"Transfer-Encoding: chunked\r\n\r\ntok-3n",
}


@SIDES
async def test_what_is_no_http_is_answered_without_repeating_it(
    tmp_path: Path, side: str, subtests: pytest.Subtests
) -> None:
    async with serving(tmp_path, CONFIG) as daemon:
        for name, sent in NO_HTTP.items():
            with subtests.test(name):
                async with raw_connection(getattr(daemon, side)) as peer:
                    await peer.send(sent)
                    answer = await peer.answer()
                    assert answer.status == 400
                    assert b"tok-3n" not in answer.body
                    shape = (
                        ["error", "description"] if side == "server" else ["type", "title", "status", "detail", "code"]
                    )
                    told = json.loads(answer.body)
                    assert list(told) == shape
                    assert await peer.rest() == b""  # what follows is not read as another request


TYPE = b"Content-Type: application/json\r\n"


GET, HOST = b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n"
HEADS: list[tuple[bytes, str]] = [
    (GET + TYPE * 2, "header Content-Type stands twice"),
    (GET + HOST * 2, "header Host stands twice"),
    (GET, "header Host is missing"),
    (GET + HOST + b"X: y\r\n" * 63, ""),
    (GET + HOST + b"X: y\r\n" * 64, "too many headers: at most 64"),
    (GET + HOST + b"X: " + b"y" * 8190 + b"\r\n", ""),
    (GET + HOST + b"X: " + b"y" * 8191 + b"\r\n", "header too long: at most 8190 bytes"),
    (GET + HOST + b"x" * 8192 + b": y\r\n", "header too long: at most 8190 bytes"),
    (GET.replace(b"/ ", b"/" + b"y" * 4095 + b" ") + HOST, ""),
    (GET.replace(b"/ ", b"/" + b"y" * 4096 + b" ") + HOST, "request line too long: at most 4096 bytes"),
    (GET + HOST + (b"X: " + b"y" * 8000 + b"\r\n") * 5, "headers too long: at most 32768 bytes altogether"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "this address does not speak https://"),
    (b"get / HTTP/1.1\r\n" + HOST, "malformed HTTP"),
    (GET + HOST + b"X : y\r\n", "malformed HTTP"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", "malformed HTTP"),
]


@SIDES
async def test_what_is_wrong_with_a_head_is_answered_and_logged(tmp_path: Path, side: str) -> None:
    async with serving(tmp_path, CONFIG) as daemon:
        for head, reason in HEADS:
            with hear() as events:
                async with raw_connection(getattr(daemon, side)) as peer:
                    await peer.send(head + b"\r\n")
                    answer = await peer.answer()
            told = json.loads(answer.body)
            lines = [event.facts for event in events if event.name == "http.malformed"]
            if reason:
                said = reason[0].upper() + reason[1:] if side == "server" else reason
                assert (answer.status, told.get("description", told.get("detail"))) == (400, said)
                assert lines == [{"listener": side, "reason": reason, "peer": "127.0.0.1"}]
            else:
                assert (answer.status, lines) == (404, [])


def tells_to_retry(answer: RawAnswer, side: str, reason: str) -> bool:
    """Whether an answer to an unread request is a 503 in the form of its side, with the code for "retry"."""
    assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "5", "close")
    told = json.loads(answer.body)
    if side == "server":
        assert answer.headers["content-type"] == "application/json"
        return bool(told == {"error": 100, "description": f"{reason[0].upper()}{reason[1:]}, please retry"})
    assert answer.headers["content-type"] == "application/problem+json"
    kind = {"type": "urn:lmdaemon:problem:cannot-store", "title": "Service Unavailable", "status": 503}
    return bool(told == kind | {"detail": reason, "code": "cannot-store"})


@SIDES
async def test_connections_are_bounded_and_the_one_too_many_is_told(tmp_path: Path, side: str) -> None:
    # Loopback counts as a proxy, so that no address has a limit of its own
    trusting = LISTEN.replace("[api]", 'trusted_proxies = ["127.0.0.1"]\n[api]')
    async with (
        serving(tmp_path, trusting + CONFIG, limits=Limits(connections_max=2)) as daemon,
        contextlib.AsyncExitStack() as stack,
    ):
        url = getattr(daemon, side)
        peers = [await stack.enter_async_context(raw_connection(url)) for _ in range(2)]
        for peer in peers:
            await peer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await peer.answer()).status == 200
        async with raw_connection(url) as third:
            assert tells_to_retry(await third.answer(), side, "too many connections")
            assert await third.rest() == b""
        peers[0].writer.close()

        async def served() -> bool:
            async with raw_connection(url) as peer:
                await peer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return (await peer.answer()).status == 200

        await until(served)


# -- heads


def head(size: int, path: str = "/health") -> bytes:
    """A request head of exactly `size` bytes, as the parser counts them, in headers of at most 4 KB."""
    start, end = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode(), b"\r\n"
    lines, left = [], size - len(start) - len(end)
    while left:
        length = left if left <= 4000 else min(4000, left - 100)
        lines.append(b"X: " + b"x" * (length - 5) + b"\r\n")
        left -= length
    return start + b"".join(lines) + end


LATER = pytest.mark.parametrize("later", [False, True], ids=["the first", "a later one"])
WAYS = pytest.mark.parametrize("pieces", [1, 20], ids=["at once", "in pieces"])


async def send_in_pieces(peer: RawConnection, data: bytes, pieces: int) -> None:
    step = -(-len(data) // pieces)
    for start in range(0, len(data), step):
        await peer.send(data[start : start + step])
        await asyncio.sleep(0.002)  # usually enough for the daemon to read each piece alone


@SIDES
@LATER
@WAYS
async def test_a_head_has_a_total(tmp_path: Path, side: str, later: bool, pieces: int) -> None:
    """A head below the limit is answered; a head above it is refused like any broken HTTP."""
    async with serving(tmp_path, CONFIG) as daemon:
        for size, status in ((connections.HEAD_MAX - 200, 200), (connections.HEAD_MAX + 200, 400)):
            async with raw_connection(getattr(daemon, side)) as peer:
                if later:
                    await peer.send(ASK)
                    assert (await peer.answer()).status == 200
                await send_in_pieces(peer, head(size), pieces)
                assert (await peer.answer()).status == status
                if status == 400:
                    assert await peer.rest() == b""


async def test_a_head_that_is_too_long_is_refused_in_its_turn(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(daemon.server) as peer:
        await peer.send(ASK + ASK + head(connections.HEAD_MAX + 200) + ASK)
        assert [(await peer.answer()).status for _ in range(3)] == [200, 200, 400]
        assert await peer.rest() == b""


async def test_a_body_behind_a_head_does_not_count_as_one(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(daemon.api) as peer:
        for body in (
            json.dumps({"sessionIds": [f"{n:0100}" for n in range(count)]}).encode() for count in (2000, 9000)
        ):
            start = b"POST /v1/operators/acme/sessions/touch HTTP/1.1\r\nHost: localhost\r\n"
            start += b"Content-Type: application/json\r\n"
            await peer.send(start + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert (await peer.answer()).status == 200
            await peer.send(ASK)
            assert (await peer.answer()).status == 200


@pytest.mark.parametrize("last", [ASK, TOUCH], ids=["without a body", "with a body"])
async def test_a_request_held_back_behind_an_unread_body_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    """The parser stops in a body that nobody reads, and continues once the bytes received so far are discarded.

    The requests that it finds then must not count as more of one long head.
    """
    body = b"x" * 600_000
    refused = b"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    refused += b"Content-Length: %d\r\n\r\n" % len(body) + body
    whole, cut, arrived = refused + last, 130_000, b""
    received = connections.Connection.data_received

    def data_received(connection: connections.Connection, data: bytes) -> None:
        nonlocal arrived
        # Reads everything that has come so far in one call, as a busy daemon does
        if data and len(arrived) < len(whole):
            arrived += data
            if len(arrived) < len(whole):
                return
            received(connection, arrived[:cut])
            data = arrived[cut:]
        received(connection, data)

    monkeypatch.setattr(connections.Connection, "data_received", data_received)
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(daemon.api) as peer:
        await peer.send(whole)
        assert (await peer.answer()).status == 405
        assert (await peer.answer()).status == 200
        await send_in_pieces(peer, ASK, 4)
        assert (await peer.answer()).status == 200


@SIDES
async def test_a_refusal_is_not_lost_behind_what_is_still_sent(tmp_path: Path, side: str) -> None:
    """Closing a connection with unread bytes resets it, and the client may then lose the answer that it has
    received.
    """
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(getattr(daemon, side)) as peer:
        await peer.send(head(30 * connections.HEAD_MAX))
        assert (await peer.answer()).status == 400
        assert await peer.rest() == b""


# Requests whose end the daemon must recognise, so that it knows that the next head has not begun
NOTICE = b'{"providerId":"luckymonaco","sessionId":"s","externalPlayerId":"p","token":"tok-3n"}'
POST = b"POST /V4/SessionExpired HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SIZED = POST + b"Content-Length: %d\r\n\r\n" % len(NOTICE)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(NOTICE), NOTICE)
WHOLE = {
    "without a body": [ASK],
    "with a body": [SIZED + NOTICE],
    "a body behind its head": [SIZED, NOTICE],
    "a body in pieces": [SIZED + NOTICE[:10], NOTICE[10:20], NOTICE[20:]],
    "a head in pieces": [SIZED[:30], SIZED[30:] + NOTICE],
    "chunks": [CHUNKED + CHUNKS],
    "chunks behind their head": [CHUNKED, CHUNKS[:9], CHUNKS[9:]],
    "two at once": [ASK + ASK],
}


IMPATIENT = Limits(patrol_s=0.02, head_s=0.2)  # for tests of slow heads


async def ask_in_pieces(peer: RawConnection, pieces: list[bytes]) -> None:
    for piece in pieces:
        await peer.send(piece)
        await asyncio.sleep(0.02)
    for _ in range(b"".join(pieces).count(b" HTTP/1.1")):
        assert (await peer.answer()).status == 200


@pytest.mark.parametrize("name", WHOLE)
async def test_a_client_that_has_asked_may_wait(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path, CONFIG, limits=IMPATIENT) as daemon, raw_connection(daemon.server) as peer:
        await ask_in_pieces(peer, WHOLE[name])
        # No wait for a state: what is tested is that nothing happens meanwhile
        await asyncio.sleep(2 * IMPATIENT.head_s)
        await ask_in_pieces(peer, WHOLE[name])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("joined", [False, True], ids=["in its own time", "right behind"])
async def test_each_head_has_to_come_in_time(tmp_path: Path, name: str, joined: bool) -> None:
    *first, last = WHOLE[name]
    async with serving(tmp_path, CONFIG, limits=IMPATIENT) as daemon, raw_connection(daemon.server) as peer:
        if joined:
            await ask_in_pieces(peer, [*first, last + ASK[:10]])
        else:
            await ask_in_pieces(peer, WHOLE[name])
            await peer.send(ASK[:10])
        assert await peer.rest() == b""
        assert daemon.sites["server"].cuts["head"] == 1


async def test_a_connection_is_kept_for_as_long_as_configured(tmp_path: Path) -> None:
    """Tested are the public listener, and connections that come after a reload."""
    toml = LISTEN.replace("[api]", 'keepalive = "{}"\n[api]') + CONFIG
    async with serving(tmp_path, toml.format("1h")) as daemon, raw_connection(daemon.api) as private:
        async with raw_connection(daemon.server) as long:
            for peer in (private, long):
                await peer.send(ASK)
                assert (await peer.answer()).status == 200
            (tmp_path / "config.toml").write_text(toml.format("1s"))
            await daemon.daemon.reload_once()
            async with raw_connection(daemon.server) as short:
                await short.send(ASK)
                assert (await short.answer()).status == 200
                assert await short.rest() == b""
            for peer in (private, long):
                await peer.send(ASK)
                assert (await peer.answer()).status == 200


# -- memory


@SIDES
async def test_who_sends_less_than_others_is_answered_when_memory_is_short(tmp_path: Path, side: str) -> None:
    async with (
        serving(tmp_path, CONFIG, limits=Limits(strangers_max=100_000)) as daemon,
        contextlib.AsyncExitStack() as stack,
    ):
        bounds, site, url = daemon.bounds, daemon.sites[side], getattr(daemon, side)
        modest = [await stack.enter_async_context(raw_connection(url)) for _ in range(12)]
        for peer in modest:
            await peer.send(head(6000)[:-2])
        await until(lambda: bounds.strangers.used > 71_000)
        for _ in range(5):
            async with raw_connection(url) as greedy:
                await greedy.send(head(30_000)[:-2])
                assert tells_to_retry(await greedy.answer(), side, "too many bytes are waiting here")
                assert await greedy.rest() == b""
        assert site.cuts["memory"] == 5
        async with raw_connection(daemon.server) as honest:
            for name in WHOLE:
                await ask_in_pieces(honest, WHOLE[name])
        for peer in modest:
            await peer.send(b"\r\n")
            assert (await peer.answer()).status == 200
        assert site.cuts["memory"] == 5


async def test_bodies_from_known_senders_do_not_count_as_strangers(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    (tmp_path / "tokens").chmod(0o600)
    toml = LISTEN + 'token_file = "tokens"\n' + CONFIG
    start = b"POST /v1/operators/acme/sessions/touch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    start += b"Content-Length: 900000\r\n"
    async with serving(tmp_path, toml, limits=Limits(strangers_max=400_000)) as daemon:
        async with raw_connection(daemon.api) as known, raw_connection(daemon.api) as stranger:
            await known.send(start + b"Authorization: Bearer a-token-of-some-length\r\n\r\n")
            await known.send(b" " * 500_000)
            await until(lambda: daemon.bounds.known.used > 500_000)
            await stranger.send(start + b"Authorization: Bearer another\r\n\r\n")
            assert (await stranger.answer()).status == 401
            with contextlib.suppress(ConnectionError):
                await stranger.send(b" " * 500_000)
            await until(lambda: daemon.sites["api"].cuts["memory"] == 1)
            await known.send(b" " * 399_983 + b'{"sessionIds":[]}')
            assert (await known.answer()).status == 200


async def test_what_connections_hold_is_given_back(tmp_path: Path) -> None:
    """Whatever clients send and however their connections end, no byte counts as held in the end."""
    sent = [b"".join(pieces) for pieces in WHOLE.values()]
    sent += [b"GET", head(30_000)[:-2], head(50_000), SIZED, SIZED + NOTICE[:9], CHUNKED + b"zz\r\n", b"\0", ASK * 100]
    sent += [
        POST + b"Content-Length: 99999\r\n\r\n" + b"x" * 50_000,
        POST + b"Expect: 100-continue\r\n\r\n",
        SIZED + b"x" * 999,
    ]
    sent += [ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), ASK + b"\r\n\r\n\r\n", b"\r\n\r\n"]
    async with serving(tmp_path, CONFIG) as daemon:
        for side in (daemon.server, daemon.api):
            for data in sent:
                for patient in (False, True):
                    async with raw_connection(side) as peer:
                        await peer.send(data)
                        if patient:
                            await asyncio.sleep(0.02)
        sites, bounds = daemon.sites, daemon.bounds
        await until(lambda: not any(site.connections for site in sites.values()))
        await until(lambda: (bounds.strangers.used, bounds.known.used) == (0, 0))
        assert not bounds.open
        assert not any(site._by_address for site in sites.values())


# -- answers that nobody takes


HASTY = Limits(patrol_s=0.02, write_s=0.5)  # for tests of clients that do not read their answers


def narrow(url: str, window: int = 4096) -> socket.socket:
    """A connection with a small receive buffer, so that unread answers soon fill it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"], ids=["kept open", "about to close"])
async def test_a_client_that_takes_no_answers_is_cut(tmp_path: Path, last: bytes) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
    async with serving(tmp_path, CONFIG, limits=HASTY) as daemon:
        with narrow(daemon.api) as peer:
            site = daemon.sites["api"]
            # More than fits into the kernel's buffers
            await asyncio.to_thread(peer.sendall, request % b"" * 300 + request % last)
            await until(lambda: site.cuts["reader"] == 1 and not site.connections)
            await until(lambda: daemon.bounds.known.used == 0)


async def test_a_client_that_takes_them_slowly_gets_all(tmp_path: Path) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n%b\r\n"

    def read(peer: socket.socket) -> int:
        peer.sendall(request % b"" * 60 + request % b"Connection: close\r\n")
        taken = 0
        while data := peer.recv(65536):
            taken += len(data)
            time.sleep(0.01)
        return taken

    async with serving(tmp_path, CONFIG, limits=HASTY) as daemon:
        async with daemon.client.get(daemon.api + "/openapi.json") as answer:
            size = len(await answer.read())
        with narrow(daemon.api, 65536) as peer:
            assert await asyncio.to_thread(read, peer) > 61 * size
        assert daemon.sites["api"].cuts["reader"] == 0


# -- what the sweeper relies on


@pytest.mark.parametrize("kept", [False, True], ids=["on a new connection", "on one that is kept"])
async def test_a_touch_is_queued_within_the_turns_that_a_sweep_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """The touch arrives while the loop is busy, and waits in the kernel until the loop's next turn."""
    queued = []
    async with serving(tmp_path, CONFIG) as daemon:
        submit = daemon.store.submit

        def seen(*given: Any) -> None:
            queued.append(given)
            submit(*given)

        for part in (daemon.store.writer, daemon.sites["api"]):  # a touch is queued by either of them
            monkeypatch.setattr(part, "submit", seen)
        host, port = daemon.api.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as peer:
            if kept:
                peer.sendall(ASK)
                connections = daemon.bounds.open
                await until(lambda: connections and not any(one.unheard for one in connections))
            peer.sendall(b"POST /v1/operators/acme/sessions/s/touch HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for _ in range(LOOP_TURNS):
                await asyncio.sleep(0)
            assert queued


# -- what answers tell


@SIDES
async def test_no_answer_names_the_software(tmp_path: Path, side: str) -> None:
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    (tmp_path / "tokens").chmod(0o600)
    sent = [
        ASK,
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"nonsense\r\n\r\n",
        ASK.replace(b"1.1", b"1.0"),
        SIZED + NOTICE,
    ]
    touch = b"POST /v1/operators/acme/sessions/s/touch HTTP/1.1\r\nHost: localhost\r\n"
    known = b"Authorization: Bearer a-token-of-some-length\r\n\r\n"
    sent += [touch + b"\r\n", touch + known, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n" + known]
    async with serving(tmp_path, LISTEN + 'token_file = "tokens"\n' + CONFIG) as daemon:
        for request in sent:
            async with raw_connection(getattr(daemon, side)) as peer:
                await peer.send(request)
                assert "server" not in (await peer.answer()).headers


# -- stopping


@SIDES
async def test_who_was_let_in_is_heard_out_when_the_daemon_stops(tmp_path: Path, side: str) -> None:
    async with (
        serving(tmp_path, CONFIG, limits=Limits(heard_within_s=30)) as daemon,
        contextlib.AsyncExitStack() as stack,
    ):
        silent, known = [await stack.enter_async_context(raw_connection(getattr(daemon, side))) for _ in range(2)]
        await known.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await known.answer()).status == 200
        daemon.daemon.stop()

        async def closed() -> bool:
            with contextlib.suppress(OSError):
                async with raw_connection(getattr(daemon, side)):
                    return False
            return True

        await until(closed)
        for peer in (known, silent):
            await peer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await peer.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await peer.rest() == b""


@pytest.mark.parametrize(
    ("side", "first", "rest"),
    [
        pytest.param("server", ASK[:9], ASK[9:], id="a head"),
        pytest.param("api", ASK[:9], ASK[9:], id="a head to the api"),
        pytest.param("server", ASK + ASK[:9], ASK[9:], id="a later head"),
        pytest.param("server", SIZED, NOTICE, id="a body"),
        pytest.param("server", CHUNKED + CHUNKS[:9], CHUNKS[9:], id="chunks"),
    ],
)
async def test_who_has_begun_to_ask_may_end_it_when_the_daemon_stops(
    tmp_path: Path, side: str, first: bytes, rest: bytes
) -> None:
    async with (
        serving(tmp_path, CONFIG, limits=Limits(heard_within_s=30)) as daemon,
        raw_connection(getattr(daemon, side)) as peer,
    ):
        await peer.send(first)
        if first.startswith(ASK):
            assert (await peer.answer()).status == 200
        site = daemon.sites[side]
        connections = daemon.bounds.open
        await until(lambda: connections and all(one.arriving for one in connections))
        daemon.daemon.stop()
        await until(lambda: site.closing)
        await peer.send(rest)
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await peer.rest() == b""


async def test_who_was_let_in_and_asks_nothing_does_not_hold_a_stop_up(tmp_path: Path) -> None:
    """Neither a client that never asked anything delays the stop, nor one that got its answer and keeps its
    connection.
    """
    async with (
        serving(tmp_path, CONFIG, limits=Limits(heard_within_s=0.2)) as daemon,
        raw_connection(daemon.api) as silent,
    ):
        async with raw_connection(daemon.api) as idle:
            await idle.send(ASK)
            assert (await idle.answer()).status == 200
            daemon.daemon.stop()
            assert await silent.rest() == b""
            assert await idle.rest() == b""
            async with asyncio.timeout(8):  # the time-out for a client under way would be 15 s
                await asyncio.shield(daemon.running)


async def test_a_stop_waits_for_nobody_where_nobody_is_connected(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG, limits=Limits(heard_s=60)) as daemon, asyncio.timeout(20):
        async with raw_connection(daemon.api) as gone:
            await gone.send(ASK)
            assert (await gone.answer()).status == 200
        await until(lambda: not daemon.sites["api"].connections)
        daemon.daemon.stop()
        await asyncio.shield(daemon.running)
