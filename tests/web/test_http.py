"""What both listeners share: limits of bodies, clients' addresses behind proxies, bearer tokens, strict escapes in
paths, sockets.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from support import serving

from lmdaemon.config import values
from lmdaemon.config.settings import ApiToken
from lmdaemon.config.values import Listen, Network
from lmdaemon.limits import LIMITS
from lmdaemon.web.requests import (
    BodyTooLarge,
    BodyTooSlow,
    Ready,
    allowed,
    bearer,
    client_address,
    decode_segment,
    read_body,
)
from lmdaemon.web.sockets import bind

LIMIT = 10
Ask = Callable[..., Awaitable[str]]

# -- segments of a path


@pytest.mark.parametrize(
    ("raw", "decoded"),
    [
        ("plain", "plain"),
        ("", ""),
        ("a%2Fb", "a/b"),
        ("a%2fb", "a/b"),
        ("%C3%BC", "ü"),
        ("%F0%9D%84%9E", "𝄞"),
        ("%25", "%"),
        ("%2525", "%25"),
        ("a+b", "a+b"),
        ("%00", "\x00"),  # well-formed; whether it is a valid id is decided elsewhere
    ],
)
def test_a_segment_is_decoded(raw: str, decoded: str) -> None:
    assert decode_segment(raw) == decoded


@pytest.mark.parametrize("raw", ["%", "a%", "%2", "%zz", "%2g", "%%41", "% 1", "%+1", "%\u0661\u0661", "%0x1"])
def test_a_broken_escape_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match="broken percent-escape"):
        decode_segment(raw)


@pytest.mark.parametrize("raw", ["%FF", "%C3", "%ED%A0%80", "%C0%80", "%F4%90%80%80", "a%80"])
def test_what_is_not_utf_8_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        decode_segment(raw)


# -- answers that never change


@pytest.mark.parametrize("ready", [Ready(200, b'{"error":0}', "application/json"), Ready(204)])
async def test_a_ready_answer_says_what_aiohttps_own_would(ready: Ready) -> None:
    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return ready.ordinary()

    async with RawTestServer(handle) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        own = _parts(await reader.read())
        writer.close()
    assert own.pop(b"connection") == b"close"
    assert own.pop(b"server")
    ready_made = _parts(ready.whole)
    assert ready_made.pop(b"date")
    assert own.pop(b"date")
    assert ready_made == own


def _parts(answer: bytes) -> dict[bytes, bytes]:
    """An answer's headers by their names, its first line and its body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
    return {**headers, b"status": status, b"body": body}


async def test_a_touch_without_content_is_answered_alike_by_every_way(tmp_path: Path) -> None:
    """An answer 204 has neither a length nor a content type, whether it is a ready-made one or aiohttp's own."""
    async with serving(tmp_path, '[operators.acme]\nprovider_id = "luckymonaco"\n') as d:
        path = "/v1/operators/acme/sessions/s"
        async with d.client.put(d.api + path, json={"playerId": "p", "token": "tok-3n"}) as opened:
            assert opened.status == 201
        for headers in ({}, {"Connection": "close"}, {"Expect": "100-continue"}):
            async with d.client.post(d.api + path + "/touch", headers=headers) as touched:
                assert touched.status == 204
                assert "Content-Length" not in touched.headers
                assert "Content-Type" not in touched.headers
                assert "Date" in touched.headers


# -- bodies


@pytest.fixture
def body_s() -> float:
    return LIMITS.body_s


@pytest.fixture
async def reader(body_s: float) -> AsyncIterator[RawTestServer]:
    """A server that reads bodies of at most LIMIT bytes and notes how each reading ended."""

    async def handle(request: web.BaseRequest) -> web.Response:
        try:
            return web.Response(body=await read_body(request, LIMIT, body_s))
        except (BodyTooLarge, BodyTooSlow) as error:
            outcomes.append(type(error))
            return web.Response(text=type(error).__name__)

    outcomes: list[type] = []
    async with RawTestServer(handle) as server:
        server.outcomes = outcomes
        yield server


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"", ""),
        (b"x", "x"),
        (b"x" * LIMIT, "x" * LIMIT),
        (b"x" * (LIMIT + 1), "BodyTooLarge"),
        (b"x" * 100_000, "BodyTooLarge"),
    ],
    ids=["empty", "one", "limit", "over", "far over"],
)
async def test_a_body_is_read_up_to_its_limit(reader: RawTestServer, body: bytes, answer: str, announced: bool) -> None:
    parts = [body[start : start + 3] for start in range(0, len(body), 3)] if len(body) < 100 else [body]
    async with aiohttp.ClientSession() as client:
        async with client.post(reader.make_url("/"), data=body if announced else pieces(*parts)) as response:
            assert await response.text() == answer


async def begin_body(reader: RawTestServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request with a body of five bytes, but stops after two."""
    streams = await asyncio.open_connection(reader.host, reader.port)
    streams[1].write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
    await streams[1].drain()
    return streams


@pytest.mark.parametrize("body_s", [0.05])
async def test_a_body_that_does_not_come_is_given_up(reader: RawTestServer) -> None:
    answer, request = await begin_body(reader)
    async with asyncio.timeout(10):
        assert await answer.readuntil(b"BodyTooSlow")
    request.close()
    await request.wait_closed()


@pytest.mark.parametrize("body_s", [0.1])
async def test_a_body_that_drips_is_given_up_all_the_same(reader: RawTestServer) -> None:
    answer, request = await asyncio.open_connection(reader.host, reader.port)
    request.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def drip() -> None:
        for _ in range(LIMIT):  # each byte comes in time, but all of them together do not
            request.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.03)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(10):
        assert await answer.readuntil(b"BodyTooSlow")
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    request.close()
    await request.wait_closed()


@pytest.mark.parametrize("rest", [b"zz\r\n", b"-1\r\nx\r\n"], ids=["no size", "negative size"])
async def test_a_chunked_body_that_is_broken_ends_the_request(reader: RawTestServer, rest: bytes) -> None:
    answer, request = await asyncio.open_connection(reader.host, reader.port)
    request.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n" + rest)
    async with asyncio.timeout(10):
        status = await answer.readline()
    assert status.split()[1] in (b"200", b"400")  # 400 if aiohttp saw the error before the daemon's code
    request.close()
    await request.wait_closed()


# -- addresses


async def test_the_address_is_the_peers_or_what_a_trusted_proxy_says() -> None:
    cases = [
        # trusted proxies, X-Forwarded-For headers, address
        ([], [], "127.0.0.1"),
        ([], ["203.0.113.9"], "127.0.0.1"),
        (["10.0.0.0/8"], ["203.0.113.9"], "127.0.0.1"),
        (["127.0.0.1"], [], "127.0.0.1"),
        (["127.0.0.1"], ["203.0.113.9"], "203.0.113.9"),
        (["127.0.0.1"], ["198.51.100.1, 203.0.113.9"], "203.0.113.9"),
        (["127.0.0.1"], ["198.51.100.1", "203.0.113.9"], "203.0.113.9"),
        (["127.0.0.1", "203.0.113.0/24"], ["198.51.100.1, 203.0.113.9"], "198.51.100.1"),
        (["127.0.0.1", "203.0.113.0/24"], ["203.0.113.8, 203.0.113.9"], "203.0.113.8"),
        (["127.0.0.1"], ["2001:db8::1"], "2001:db8::1"),
        (["127.0.0.1"], ["[2001:db8::1]:4711"], "2001:db8::1"),
        (["127.0.0.1"], ["203.0.113.9:4711"], "203.0.113.9"),
        (["127.0.0.1"], ["::ffff:203.0.113.9"], "203.0.113.9"),
        (["127.0.0.1"], ["unknown"], "None"),
        (["127.0.0.1"], ["203.0.113.9, "], "None"),
        (["127.0.0.1"], ["203.0.113.9, garbage"], "None"),
        (["127.0.0.1"], [""], "None"),
    ]
    trusted: list[Network] = []

    async def handle(request: web.BaseRequest) -> web.Response:
        return web.Response(text=str(client_address(request, request.transport, trusted)))

    async with RawTestServer(handle) as server, aiohttp.ClientSession() as client:
        for proxies, forwarded, address in cases:
            trusted[:] = map(ip_network, proxies)
            headers = [("X-Forwarded-For", value) for value in forwarded]
            async with client.get(server.make_url("/"), headers=headers) as answer:
                assert await answer.text() == address, (proxies, forwarded)


async def test_the_peer_of_a_unix_socket_is_a_proxy_where_any_is_trusted(sockets: Path) -> None:
    trusted: list[Network] = []

    async def handle(request: web.BaseRequest) -> web.Response:
        return web.Response(text=str(client_address(request, request.transport, trusted)))

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.SockSite(runner, bind(unix(sockets / "s"))).start()
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(sockets / "s"))) as client:
        for proxies, address in (([], "None"), (["10.0.0.0/8"], "203.0.113.9")):
            trusted[:] = map(ip_network, proxies)
            async with client.get("http://x/", headers={"X-Forwarded-For": "203.0.113.9"}) as answer:
                assert await answer.text() == address
    await runner.cleanup()


@pytest.mark.parametrize(
    ("address", "networks", "inside"),
    [
        ("203.0.113.9", [], True),
        (None, [], True),
        ("203.0.113.9", ["203.0.113.0/24"], True),
        ("203.0.113.9", ["198.51.100.0/24", "203.0.113.9/32"], True),
        ("203.0.114.9", ["203.0.113.0/24"], False),
        ("2001:db8::1", ["203.0.113.0/24"], False),
        ("2001:db8::1", ["2001:db8::/32"], True),
        (None, ["0.0.0.0/0"], False),
    ],
)
def test_no_network_lets_everybody_in_and_any_only_its_own(
    address: str | None, networks: list[str], inside: bool
) -> None:
    known = None if address is None else ip_address(address)
    assert allowed(known, map(ip_network, networks)) is inside


# -- tokens


@pytest.mark.parametrize(
    ("header", "tokens", "valid"),
    [
        (None, ("one",), None),
        ("Bearer one", ("one",), "one"),
        ("bearer  one ", ("one",), "one"),
        ("Bearer two", ("one", "two"), "two"),
        ("Bearer on", ("one",), None),
        ("Bearer onee", ("one",), None),
        ("Bearer", ("one",), None),
        ("one", ("one",), None),
        ("Basic one", ("one",), None),
        ("Bearer ONE", ("one",), None),
        ("Bearer zwölf", ("zwölf",), "zwölf"),
    ],
)
async def test_a_bearer_token_is_one_of_those_configured(
    header: str | None, tokens: tuple[str, ...], valid: str | None
) -> None:
    configured = [ApiToken(token.encode(), f"name of {token}") for token in tokens]

    async def handle(request: web.BaseRequest) -> web.Response:
        found = bearer(request, configured)
        return web.Response(text="none" if found is None else found.name)

    headers = {} if header is None else {"Authorization": header}
    async with RawTestServer(handle) as server, aiohttp.ClientSession(headers=headers) as client:
        async with client.get(server.make_url("/")) as answer:
            assert await answer.text() == (f"name of {valid}" if valid else "none")


# -- sockets


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose path is short enough for a unix socket, whatever pytest's directory is."""
    monkeypatch.chdir(tmp_path)
    return Path()


def unix(path: Path) -> Listen:
    return Listen(f"unix:{path}", unix=str(path))


@pytest.fixture
def occupied() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def has_v6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


V6 = pytest.mark.skipif(not has_v6(), reason="this machine has no IPv6")


@pytest.mark.parametrize("text", ["127.0.0.1:0", pytest.param("[::1]:0", marks=V6), "localhost:0"])
def test_an_address_is_listened_on_without_blocking(text: str) -> None:
    with bind(values.listen(text)) as bound:
        assert bound.getsockname()[1] > 0
        assert not bound.getblocking()
        with socket.create_connection(bound.getsockname()[:2], timeout=5):
            pass


@V6
def test_a_v6_address_leaves_the_v4_one_to_others() -> None:
    with bind(values.listen("[::]:0")) as six:
        with bind(values.listen(f"0.0.0.0:{six.getsockname()[1]}")) as four:
            assert four.getsockname()[1] == six.getsockname()[1]


def test_a_taken_port_is_an_error_that_names_the_address(occupied: int) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{occupied}: ") as refused:
        bind(values.listen(f"127.0.0.1:{occupied}"))
    assert refused.value.errno == errno.EADDRINUSE


def test_an_address_of_another_machine_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        bind(values.listen("192.0.2.1:0"))


def test_a_unix_socket_is_for_owner_and_group_only(sockets: Path) -> None:
    before = os.umask(0)
    try:
        with bind(unix(sockets / "s")):
            assert stat.S_IMODE((sockets / "s").stat().st_mode) == 0o660
        assert os.umask(0) == 0  # the umask of the process is as before
    finally:
        os.umask(before)


def test_a_dead_unix_socket_is_replaced(sockets: Path) -> None:
    bind(unix(sockets / "s")).close()
    assert (sockets / "s").exists()
    with bind(unix(sockets / "s")), socket.socket(socket.AF_UNIX) as client:
        client.connect("s")


def test_a_live_unix_socket_is_left_alone(sockets: Path) -> None:
    with bind(unix(sockets / "s")), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(OSError, match="cannot listen on unix:s: "):
            bind(unix(sockets / "s"))
        client.connect("s")


def test_a_file_in_the_place_of_a_unix_socket_is_left_alone(sockets: Path) -> None:
    (sockets / "s").write_text("precious")
    with pytest.raises(OSError, match="cannot listen on unix:s: "):
        bind(unix(sockets / "s"))
    assert (sockets / "s").read_text() == "precious"
