"""The answers of an operator's server, byte by byte over real sockets: how each is judged, which bytes are ignored, and
how much is read.
"""

import asyncio
import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver
from certificates import DAY, make
from clocks import HandClock
from support import bench, hear, load, operator_table, until

from lmdaemon import retry, tls
from lmdaemon.clock import Clock
from lmdaemon.delivery import sender as sender_module
from lmdaemon.delivery.answers import HEAD_MAX, HEADERS_MAX, INTERIM_MAX, WIRE_MAX
from lmdaemon.delivery.sender import ANSWER_MAX, Sender, Unreachable, request_headers
from lmdaemon.model import Delivery

# What a server does: sends bytes (each item as one segment), pauses (seconds), or ends with CLOSE or RESET
Steps = Sequence[bytes | float]
CLOSE, RESET = -1.0, -2.0
SOON = 0.05

try:
    import uvloop

    LOOPS: list[Any] = [asyncio.new_event_loop, uvloop.new_event_loop]
except ImportError:
    LOOPS = [asyncio.new_event_loop]


@pytest.fixture(params=LOOPS, ids=lambda factory: factory.__module__.partition(".")[0])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """A function that runs a coroutine, on each of the event loops that the daemon can use."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda it: runner.run(asyncio.wait_for(it, 30))  # type: ignore[arg-type]


class Peer:
    """An operator's server. It gives its answers in order, one for each request, over whatever connection the request
    comes.
    """

    def __init__(self, *answers: Steps, greeting: bytes = b"") -> None:
        self._answers = list(answers)
        self._greeting = greeting
        self.port = 0
        self.greeted = asyncio.Event()
        self.connections = self.open = self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        writer.write(self._greeting)
        self.greeted.set()
        try:
            while await self._request(reader):
                self.requests += 1
                for step in self._answers.pop(0):
                    if isinstance(step, bytes):
                        writer.write(step)
                        await writer.drain()
                    elif step == CLOSE:
                        return
                    elif step == RESET:
                        writer.transport.abort()
                        return
                    else:
                        await asyncio.sleep(step)
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()

    @staticmethod
    async def _request(reader: asyncio.StreamReader) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            return bool(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return False


@contextlib.asynccontextmanager
async def listening(peer: Peer, **options: Any) -> AsyncIterator[None]:
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0, **options)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield
    finally:
        server.close()


@pytest.fixture(params=["post", "ask"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways in which the sender sends: deliveries bypass aiohttp's client session, checks use it."""
    monkeypatch.setattr(Attempts, "way", request.param)
    return str(request.param)


class Attempts:
    """Makes attempts with the daemon's own sender: as the dispatcher does (`post`), or as the checks do (`ask`)."""

    way = "post"

    def __init__(self, directory: Path, peer: Peer, **keys: Any) -> None:
        scheme = "https" if "ca_file" in keys else "http"
        toml = operator_table("acme", f"{scheme}://127.0.0.1:{peer.port}/", timeout="10s", **keys)
        self._operator = load(directory / "config.toml", toml).operators["acme"]
        self._sender = Sender(Clock())

    async def __aenter__(self) -> "Attempts":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sender.close()

    @property
    def client(self) -> aiohttp.ClientSession:
        return self._sender._client(guarded=False)

    async def __call__(self) -> tuple[str, str]:
        """Sends one request. Returns the verdict on its answer, and the reason."""
        outcome = await self.outcome()
        return outcome.verdict, outcome.reason

    async def outcome(self) -> retry.Outcome:
        try:
            if self.way == "post":
                found = await self._sender.post(self._operator, "msg_1_ab", b"{}")
            else:
                found = await self._sender.ask(
                    self._operator, request_headers(self._operator, "msg_1_ab", b"{}", 0), b"{}"
                )
        except Unreachable as error:
            return retry.Outcome("retry", error.cause, detail=error.detail)
        status, _, body, complete = found
        return retry.judge(status, body, complete=complete, now_s=0)


def answer(body: bytes | str, status: str = "200 OK", *headers: str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers]).encode() + b"\r\n\r\n" + data


def chunked(body: str, end: str = "0\r\n\r\n") -> bytes:
    return f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n{end}".encode()


OK = '{"error": 0}'
SUCCESS, REFUSAL = answer(OK), answer('{"error": 7}')
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
DELIVERED, REFUSED = ("delivered", ""), ("retry", "code_7")
HTML = b"<html><!-- served by edge 7 --></html>\n"

STRAY = {
    "last chunk": b"0\r\n\r\n",
    "html": HTML,
    "html without a line's end": HTML.strip(),
    "line's end": b"\r\n",
    "half an answer": b"HTTP/1.1 200 O",
    "answer": SUCCESS,
    "answers": SUCCESS * 100,
    "nul": b"\0",
}
BEHIND: dict[str, tuple[bytes, tuple[str, str]]] = {
    "length": (SUCCESS, DELIVERED),
    "closing": (answer(OK, "200 OK", "Connection: close"), DELIVERED),
    "empty": (answer(""), ("retry", "bad_answer")),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", ("retry", "status_204")),
    "no content with a length": (b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", ("retry", "status_204")),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", ("retry", "redirect")),
    "chunks": (chunked(OK), DELIVERED),
    "chunks and a trailer": (chunked(OK, "0\r\nX: x\r\n\r\n"), DELIVERED),
    "interim": (CONTINUE + SUCCESS, DELIVERED),
    "bare line feeds": (SUCCESS.replace(b"\r\n", b"\n"), DELIVERED),
}


class TestBytesBehindAnAnswer:
    """Bytes after an answer close the connection, except an empty line that comes with the last chunk. They change
    neither the verdict on this answer nor on the next.
    """

    @pytest.mark.parametrize(
        ("before", "stray"),
        [("length", stray) for stray in STRAY if stray != "line's end"]
        + [(before, stray) for before in BEHIND for stray in ("html", "answer")],
    )
    def test_in_the_same_segment(self, run: Any, tmp_path: Path, before: str, stray: str) -> None:
        async def attempts() -> None:
            whole, verdict = BEHIND[before]
            peer = Peer([whole + STRAY[stray]], [REFUSAL])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == verdict
                assert await attempt() == REFUSED
                assert (peer.connections, peer.requests) == (2, 2)

        run(attempts())

    @pytest.mark.parametrize("stray", STRAY)
    @pytest.mark.parametrize("before", ["length", "chunks", "no content"])
    def test_later(self, run: Any, tmp_path: Path, before: str, stray: str) -> None:
        async def attempts() -> None:
            whole, verdict = BEHIND[before]
            peer = Peer([whole, SOON, STRAY[stray]], [REFUSAL])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == verdict
                await until(lambda: not peer.open)
                assert await attempt() == REFUSED
                assert peer.connections == 2

        run(attempts())

    @pytest.mark.parametrize("at", range(1, len(SUCCESS) + 4, 7))
    def test_wherever_the_segments_part(self, run: Any, tmp_path: Path, at: int) -> None:
        async def attempts() -> None:
            whole = SUCCESS + HTML
            peer = Peer([whole[:at], SOON, whole[at:]], [REFUSAL])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == DELIVERED
                await until(lambda: not peer.open)
                assert await attempt() == REFUSED

        run(attempts())

    def test_byte_by_byte(self, run: Any, tmp_path: Path) -> None:
        async def attempts() -> None:
            whole = CONTINUE + SUCCESS + HTML
            peer = Peer([step for byte in whole for step in (bytes([byte]), 0.0)], [REFUSAL])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == DELIVERED
                await until(lambda: not peer.open)
                assert await attempt() == REFUSED

        run(attempts())

    @pytest.mark.parametrize("is_closed", [False, True])
    def test_a_body_longer_than_it_says_is_cut_there(self, run: Any, tmp_path: Path, is_closed: bool) -> None:
        async def attempts() -> None:
            end = [CLOSE] if is_closed else []
            too_short = SUCCESS.replace(b"Length: 12", b"Length: 5")
            just_right = answer(OK + '{"error": 120}').replace(b"Length: 26", b"Length: 12")
            peer = Peer([too_short, *end], [just_right, *end], [REFUSAL])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == ("retry", "bad_answer")
                assert await attempt() == DELIVERED
                assert await attempt() == REFUSED
                assert peer.connections == 3

        run(attempts())

    def test_nothing_behind_it_keeps_the_connection(self, run: Any, tmp_path: Path) -> None:
        async def attempts() -> None:
            whole = [BEHIND[name] for name in BEHIND if name not in ("closing", "no content with a length")]
            peer = Peer(*([bytes_] for bytes_, _ in whole))
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert [await attempt() for _ in whole] == [verdict for _, verdict in whole]
                assert peer.connections == 1

        run(attempts())


@pytest.mark.parametrize("greeting", [SUCCESS, b"220 mail.example ESMTP\r\n", b"HTTP/1.1 200 O", b"\r\n"])
def test_what_stands_before_a_request_settles_nothing(run: Any, tmp_path: Path, greeting: bytes) -> None:
    async def attempts() -> None:
        peer = Peer([REFUSAL], greeting=greeting)

        async with listening(peer), Attempts(tmp_path, peer) as attempt:
            connector: Any = attempt.client.connector
            connect = connector.connect

            async def connected(*arguments: Any, **options: Any) -> Any:
                connection = await connect(*arguments, **options)
                await peer.greeted.wait()
                for _turn in range(10):
                    await asyncio.sleep(0)
                return connection

            connector.connect = connected
            assert await attempt() == ("retry", "unsolicited_answer")

    run(attempts())


async def test_a_delivery_is_sent_byte_for_byte_as_aiohttp_sends_it(tmp_path: Path, monkeypatch: Any) -> None:
    """Both ways send the same bytes: with capitals or an umlaut in the host name, with user info, with an escaped path
    and query, and with a signing key.
    """
    (tmp_path / "signing.key").write_text("whsec_" + "A" * 32 + "\n")
    (tmp_path / "signing.key").chmod(0o600)
    sent: list[bytes] = []

    class Socket(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            sent.append(data)
            self.transport.write(answer(OK))

    server = await asyncio.get_running_loop().create_server(Socket, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    class There(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> Any:
            return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 6, "flags": 0}]

        async def close(self) -> None:
            pass

    monkeypatch.setattr(sender_module, "Resolver", lambda **_: There())
    for place in ("wallet.example", "user:p%C3%A4ss@wallet.example", "WALLET.example", "bücher.example"):
        url = f"http://{place}:{port}/V4/Session%45xpired?a=b&c=%2F"
        toml = operator_table("acme", url, signing_secret_file="signing.key")
        operator = load(tmp_path / "config.toml", toml).operators["acme"]
        sender, body = Sender(HandClock()), b'{"a": "\xc3\xa4"}'
        now_s = HandClock().wall_ms() / 1000
        assert (await sender.post(operator, "msg_1_ab", body))[0] == 200
        assert (await sender.ask(operator, request_headers(operator, "msg_1_ab", body, now_s), body))[0] == 200
        await sender.close()
        posted, asked = sent
        assert posted == asked
        assert posted.startswith(b"POST /V4/Session%45xpired?a=b&c=%2F HTTP/1.1\r\nHost: ")
        sent.clear()
    server.close()


def head_of(size: int) -> bytes:
    """The head of an answer, exactly `size` bytes long because of one long header."""
    head = answer("", "200 OK", "X: ").replace(b"Length: 0", b"Length: 12")
    return head.replace(b"X: ", b"X: " + b"x" * (size - len(head)))


def head_with(headers: int) -> bytes:
    return answer(OK, "200 OK", *("X:" for _ in range(headers - 1)))


class TestLimits:
    """Each limit is tested at its edge: the largest size that is accepted, and the next larger one."""

    @pytest.mark.parametrize("cut", [None, 0, 10, -1, -3])
    @pytest.mark.parametrize("more", [0, 1])
    def test_the_bytes_of_the_head(self, run: Any, tmp_path: Path, more: int, cut: int | None) -> None:
        async def attempts() -> None:
            head = head_of(HEAD_MAX + more)
            assert len(head) == HEAD_MAX + more
            steps = [head + OK.encode()] if cut is None else [head[:cut], SOON, head[cut:] + OK.encode()]
            peer = Peer([step for step in steps if step])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == (("retry", "headers_too_large") if more else DELIVERED)

        run(attempts())

    @pytest.mark.parametrize("more", [0, 1])
    def test_the_number_of_headers(self, run: Any, tmp_path: Path, more: int) -> None:
        async def attempts() -> None:
            peer = Peer([head_with(HEADERS_MAX + more)])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == (("retry", "headers_too_large") if more else DELIVERED)

        run(attempts())

    @pytest.mark.parametrize("pause", [False, True], ids=["one segment", "a segment each"])
    @pytest.mark.parametrize("more", [0, 1])
    def test_interim_answers(self, run: Any, tmp_path: Path, more: int, pause: bool) -> None:
        async def attempts() -> None:
            count = INTERIM_MAX + more
            apart: Steps = [step for _ in range(count) for step in (CONTINUE, 0.01)]
            peer = Peer([*apart, SUCCESS] if pause else [CONTINUE * count + SUCCESS], [SUCCESS])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == (("retry", "too_many_interim") if more else DELIVERED)
                # The interim answers of the attempt before do not count for this one
                assert await attempt() == DELIVERED

        run(attempts())

    @pytest.mark.parametrize("is_chunked", [False, True])
    @pytest.mark.parametrize("more", [0, 1])
    def test_the_bytes_of_the_body(self, run: Any, tmp_path: Path, more: int, is_chunked: bool) -> None:
        async def attempts() -> None:
            body = OK + " " * (ANSWER_MAX + more - len(OK))
            peer = Peer([chunked(body) if is_chunked else answer(body)])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == (("retry", "answer_too_long") if more else DELIVERED)

        run(attempts())

    @pytest.mark.parametrize("more", [0, 1])
    def test_the_bytes_behind_the_head(self, run: Any, tmp_path: Path, more: int) -> None:
        """Chunks may carry extensions (text after the size). They mean nothing here, but their bytes count for the
        limit.
        """

        async def attempts() -> None:
            chunks = chunked(OK)
            size = len(chunks) - chunks.index(b"\r\n\r\n") - 4
            note = b"c;" + b"x" * (WIRE_MAX + more - size - 1) + b"\r\n"
            peer = Peer([chunks.replace(b"c\r\n", note, 1)])
            async with listening(peer), Attempts(tmp_path, peer) as attempt:
                assert await attempt() == (("retry", "answer_too_long") if more else DELIVERED)

        run(attempts())


CAUSES: dict[str, tuple[Steps, str]] = {
    "closed at once": ([CLOSE], "connection_lost"),
    "reset at once": ([RESET], "connection_lost"),
    "closed in the head": ([b"HTTP/1.1 200 OK\r\nX", CLOSE], "connection_lost"),
    "closed in the body": ([SUCCESS[:-1], CLOSE], "incomplete_answer"),
    "reset in the body": ([SUCCESS[:-1], SOON, RESET], "incomplete_answer"),
    "closed in a chunk": ([chunked(OK)[:-9], CLOSE], "incomplete_answer"),
    "closed before the last chunk": ([chunked(OK, ""), CLOSE], "incomplete_answer"),
    "no http": ([b"220 mail.example ESMTP\r\n"], "bad_http"),
    "no status": ([b"HTTP/1.1 OK\r\n\r\n"], "bad_http"),
    "no colon": ([b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"], "bad_http"),
    "two lengths": ([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"], "bad_http"),
    "negative length": ([b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"], "bad_http"),
    "length of letters": ([b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"], "bad_http"),
    "endless length": ([b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n"], "bad_http"),
    "nul in a header": ([b"HTTP/1.1 200 OK\r\nX: \0\r\n\r\n"], "bad_http"),
    "no chunk": ([chunked(OK, "zz\r\n")], "bad_chunks"),
    "no chunk, later": ([chunked(OK, ""), SOON, b"zz\r\n"], "bad_chunks"),
    "no end of a chunk": ([chunked(OK).replace(b"}\r\n", b"}xx", 1)], "bad_chunks"),
    "too many trailers": ([chunked(OK, "0\r\n" + "X: x\r\n" * 2 * HEADERS_MAX + "\r\n")], "bad_chunks"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_what_is_no_answer_says_why_at_once(run: Any, tmp_path: Path, name: str) -> None:
    """No case waits for the time-out. The next attempt uses a new connection."""

    async def attempts() -> None:
        steps, cause = CAUSES[name]
        peer = Peer(steps, [REFUSAL])
        async with listening(peer), Attempts(tmp_path, peer) as attempt:
            assert await attempt() == ("retry", cause)
            assert await attempt() == REFUSED
            assert peer.connections == 2

    run(attempts())


def test_an_answer_that_ends_with_its_connection_is_whole(run: Any, tmp_path: Path) -> None:
    async def attempts() -> None:
        peer = Peer([b"HTTP/1.1 200 OK\r\n\r\n" + OK.encode(), CLOSE], [b"HTTP/1.0 200 OK\r\n\r\n", b"{}", CLOSE])
        async with listening(peer), Attempts(tmp_path, peer) as attempt:
            assert await attempt() == DELIVERED
            assert await attempt() == ("retry", "bad_answer")

    run(attempts())


def test_headers_of_9_kb_are_no_hindrance(run: Any, tmp_path: Path) -> None:
    async def attempts() -> None:
        peer = Peer([answer(OK, "200 OK", "Content-Security-Policy: " + "x" * 9000)])
        async with listening(peer), Attempts(tmp_path, peer) as attempt:
            assert await attempt() == DELIVERED

    run(attempts())


@contextlib.contextmanager
def verifying(context: ssl.SSLContext) -> Iterator[Peer]:
    """A server that OpenSSL itself serves, because asyncio's closes the connection without sending the alert.

    After a refusal, it reads until the client has closed. Closing with unread bytes would reset the connection, and the
    alert might be lost.
    """
    peer = Peer()

    def serve() -> None:
        with contextlib.suppress(OSError):  # the socket is closed: the test is over
            while True:
                connection, _ = server.accept()
                with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as secured:
                    try:
                        secured.do_handshake()
                        peer.requests += bool(secured.recv(65536))
                        secured.sendall(SUCCESS)
                    except ssl.SSLError:
                        with contextlib.suppress(OSError):
                            while socket.socket.recv(secured, 65536):
                                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        peer.port = server.getsockname()[1]
        thread = threading.Thread(target=serve)
        thread.start()
        yield peer
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
@pytest.mark.parametrize(
    ("shown", "detail"),
    [
        (None, "certificate required|handshake failure"),
        ("unknown", "unknown ca"),
        ("expired", "certificate expired"),
        ("good", ""),
    ],
)
def test_a_certificate_that_is_refused_is_told_as_tls(
    run: Any, tmp_path: Path, version: ssl.TLSVersion, shown: str | None, detail: str
) -> None:
    """In TLS 1.3 the refusal comes when the client takes the handshake for finished."""
    authority, unknown = (make(tmp_path, name, authority=True) for name in ("authority", "stranger"))
    server, _ = make(tmp_path, "server", authority), make(tmp_path, "good", authority)
    make(tmp_path, "unknown", unknown)
    make(tmp_path, "expired", authority, ends=-DAY / 2)
    context = tls.server_context(server.cert, server.key, authority.cert)
    context.minimum_version = context.maximum_version = version
    keys = {"client_cert_file": f"{shown}.crt", "client_key_file": f"{shown}.key"} if shown else {}

    async def attempts() -> None:
        with verifying(context) as peer:
            async with Attempts(tmp_path, peer, ca_file="authority.crt", **keys) as attempt:
                found = await attempt.outcome()
        if shown == "good":
            assert (found.verdict, peer.requests) == ("delivered", 1)
        else:
            assert (found.reason, peer.requests) == ("tls", 0)
            assert re.search(detail, found.detail, re.IGNORECASE), found.detail

    run(attempts())


def test_what_openssl_says_stands_in_the_history_and_in_the_log(run: Any, tmp_path: Path, clock: HandClock) -> None:
    authority = make(tmp_path, "authority", authority=True)
    server = make(tmp_path, "server", authority)
    context = tls.server_context(server.cert, server.key, authority.cert)

    async def attempts() -> None:
        with verifying(context) as peer, hear() as events:
            toml = operator_table(
                "acme", f"https://127.0.0.1:{peer.port}/", ca_file="authority.crt", schedule=["1s"], timeout="10s"
            )
            async with bench(tmp_path, clock, toml) as b:
                await b.end()
                for _ in range(2):
                    await b.round()
                    await b.skip_to(await b.row())
                row = await b.row()
        assert (row.state, row.last_error) == ("dead", "tls")
        found = [(entry["error"], entry["answer"], "certificate required" in entry["detail"]) for entry in history(row)]
        assert found == [("tls", None, True)] * 2
        told = {event.name: event.facts for event in events if event.name in ("delivery.retry", "delivery.dead")}
        assert [(facts["reason"], facts["detail"]) for facts in told.values()] == [
            ("tls", history(row)[0]["detail"])
        ] * 2

    def history(row: Delivery) -> list[dict[str, Any]]:
        return json.loads(row.history)  # type: ignore[no-any-return]

    run(attempts())
