"""The listeners attacked from outside: broken and ambiguous HTTP over raw sockets to a whole daemon, and real mutual
TLS.

An ambiguous request is one whose end two readers may see in different places. It must be answered once, and the
connection must then be closed. What follows it may be another client's request to a proxy in front of the daemon, or a
second request to the daemon (request smuggling, RFC 9112 §11.2).
"""

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from certificates import make
from chance import FULL, examples
from clocks import HandClock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Serving, bench, operator_table, raw_connection, serving, until

from lmdaemon.limits import Limits

CONFIG = '[operators.acme]\nprovider_id = "luckymonaco"\n'
NOTICE = json.dumps(
    {"providerId": "luckymonaco", "sessionId": "s", "externalPlayerId": "p", "token": "tok-3n"}
).encode()
SMUGGLED = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /V4/SessionExpired HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SIDES = pytest.mark.parametrize("side", ["server", "api"])


def chunked(*headers: bytes, chunks: bytes = b"0\r\n\r\n") -> bytes:
    return POST + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + chunks


def sized(*lengths: bytes, body: bytes = SMUGGLED) -> bytes:
    return POST + b"".join(b"Content-Length:" + length + b"\r\n" for length in lengths) + b"\r\n" + body


AMBIGUOUS = {
    "length and chunks": chunked(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "chunks and length": chunked(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "two lengths": sized(b" 0", b" 33"),
    "a list of lengths": sized(b" 0, 33"),
    "a signed length": sized(b" +33"),
    "a negative length": sized(b" -1"),
    "a hexadecimal length": sized(b" 0x21"),
    "a length with a space": sized(b" 3 3"),
    "an empty length": sized(b""),
    "a length in other digits": sized(" ٣٣".encode()),
    "a huge length": sized(b" " + b"9" * 30),
    "an unknown coding": chunked(b"Transfer-Encoding: xchunked"),
    "chunked is not last": chunked(b"Transfer-Encoding: chunked, identity"),
    "chunked twice": chunked(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "a space before the colon": chunked(b"Transfer-Encoding : chunked"),
    "a folded header": chunked(b"Transfer-Encoding:\r\n chunked"),
    "a header that begins with a space": POST + b" X: y\r\n\r\n" + SMUGGLED,
    "a NUL in a name": chunked(b"Transfer-Encoding\0: chunked"),
    "a vertical tab": chunked(b"Transfer-Encoding:\x0bchunked"),
    "a size with 0x": chunked(b"Transfer-Encoding: chunked", chunks=b"0x0\r\n\r\n"),
    "a size with a sign": chunked(b"Transfer-Encoding: chunked", chunks=b"-1\r\n\r\n"),
    "a huge size": chunked(b"Transfer-Encoding: chunked", chunks=b"f" * 40 + b"\r\n"),
    "a chunk longer than its size": chunked(b"Transfer-Encoding: chunked", chunks=b"1\r\nab\r\n0\r\n\r\n"),
    "line feeds alone in chunks": chunked(b"Transfer-Encoding: chunked", chunks=b"0\n\n"),
    "a carriage return alone": POST.replace(b"\r\nHost", b"\rHost") + b"\r\n" + SMUGGLED,
    "no host": b"POST /V4/SessionExpired HTTP/1.1\r\n\n" + SMUGGLED,
    "no version": b"GET /health\r\n\r\n",
    "another version": b"GET /health HTTP/2.0\r\n\r\n",
    "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
}


async def answers(url: str, sent: bytes) -> list[int]:
    """The statuses of all answers to these bytes, read until the daemon closes the connection."""
    received = b""
    async with raw_connection(url) as peer:
        with contextlib.suppress(ConnectionError):
            await peer.send(sent)
            received = await peer.rest()
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received)]


@contextlib.asynccontextmanager
async def impatient(directory: Path) -> AsyncIterator[Serving]:
    """A daemon with short time-outs, so that requests that never end are cut soon."""
    async with serving(directory, CONFIG, limits=Limits(head_s=0.2, patrol_s=0.2, body_s=0.2)) as daemon:
        for site in daemon.sites.values():
            site.keepalive_s = 0.2
        yield daemon


async def still_answers(url: str) -> None:
    """A good request is answered. On a busy machine it may be cut a few times, because it was slow."""

    async def answered() -> bool:
        return await answers(url, SMUGGLED) == [200]

    await until(answered)


@SIDES
async def test_an_ambiguous_request_is_answered_once_and_ends_the_connection(
    tmp_path: Path, side: str, subtests: pytest.Subtests
) -> None:
    """The end of each of these requests can be seen in more than one place."""
    async with impatient(tmp_path) as daemon:
        for name, request in AMBIGUOUS.items():
            with subtests.test(name):
                found = await answers(getattr(daemon, side), request + SMUGGLED)
                assert len(found) <= 1, f"what was behind it was taken for a request: {found}"
                assert set(found) <= {400, 404, 405, 408, 415, 501}, found
                assert daemon.store.live == 0
                await still_answers(getattr(daemon, side))


async def test_requests_that_can_be_read_in_one_way_only_are_all_answered(tmp_path: Path) -> None:
    """The opposite case: after an unambiguous request, the next request on the connection is answered."""
    body = POST + b"Content-Length: %d\r\n\r\n%b" % (len(NOTICE), NOTICE)
    parts = b"%x\r\n%b\r\n0\r\n\r\n" % (len(NOTICE), NOTICE)
    async with serving(tmp_path, CONFIG) as daemon:
        sent = body + chunked(b"Transfer-Encoding: chunked", chunks=parts) + SMUGGLED
        assert await answers(daemon.server, sent) == [200, 200, 200]


# -- bytes at random


REQUESTS = [
    POST + b"Content-Length: %d\r\n\r\n%b" % (len(NOTICE), NOTICE),
    chunked(b"Transfer-Encoding: chunked", chunks=b"5\r\nabcde\r\n0\r\n\r\n"),
    b"PUT /v1/operators/acme/sessions/s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /v1/operators/acme/sessions?limit=1&after=2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    SMUGGLED,
]
PIECES = st.sampled_from(
    [b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\t", b"%00", b"%", b"..", b"//", b"?", b"#", b"\xff", b"chunked", b"0"]
) | st.binary(max_size=6)
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12), PIECES), max_size=6)


def edited(request: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, piece in edits:
        place = at % (len(request) + 1)
        request = request[:place] + piece + request[place + length :]
    return request


@contextlib.asynccontextmanager
async def fuzzed(directory: Path) -> AsyncIterator[Serving]:
    async with impatient(directory) as daemon:
        yield daemon
        for side in (daemon.server, daemon.api):
            await still_answers(side)
        sites, bounds = daemon.sites, daemon.bounds
        await until(lambda: not any(site.connections for site in sites.values()))
        await until(
            lambda: (bounds.strangers.used, bounds.known.used) == (0, 0)
        )  # no byte is counted twice or for ever


def test_no_bytes_bring_about_an_internal_error_or_stop_the_daemon(tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        daemon = runner.run(stack.enter_async_context(fuzzed(tmp_path)))

        @settings(
            max_examples=2000 if FULL else examples(150),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(st.sampled_from(REQUESTS), EDITS, st.sampled_from(["server", "api"]))
        def attack(request: bytes, edits: list[tuple[int, int, bytes]], side: str) -> None:
            found = runner.run(answers(getattr(daemon, side), edited(request, edits)))
            assert 500 not in found

        try:
            attack()
        finally:
            runner.run(stack.aclose())


# -- mutual TLS


@pytest.mark.parametrize(
    ("keys", "state", "error"),
    [
        pytest.param(("ca_file", "client_cert_file", "client_key_file"), "delivered", None, id="both sides are known"),
        pytest.param(("ca_file",), "pending", "connection_lost|tls", id="we show no certificate"),
        pytest.param(("client_cert_file", "client_key_file"), "pending", "tls", id="its authority is not ours"),
    ],
)
async def test_both_sides_of_mutual_tls_are_checked(
    tmp_path: Path, clock: HandClock, keys: tuple[str, ...], state: str, error: str | None
) -> None:
    authority = make(tmp_path, "ca", authority=True)
    for name in ("server", "client"):
        make(tmp_path, name, authority)
    files = {"ca_file": "ca.crt", "client_cert_file": "client.crt", "client_key_file": "client.key"}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.crt"))
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    reached = []

    async def handle(request: web.Request) -> web.Response:
        reached.append(request.transport.get_extra_info("peercert")["subject"] if request.transport else None)
        return web.json_response({"error": 0})

    app = web.Application()
    app.router.add_post("/", handle)
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=context)
    try:
        toml = operator_table("acme", f"https://127.0.0.1:{server.port}/", **{key: files[key] for key in keys})
        async with bench(tmp_path, clock, toml) as b:
            await b.end()
            await b.round()
            row = await b.row()
            assert row.state == state
            assert row.last_error is None if error is None else re.fullmatch(error, str(row.last_error))
    finally:
        await server.close()
    assert reached == ([((("commonName", "client"),),)] if state == "delivered" else [])
