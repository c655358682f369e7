"""The listeners of a whole daemon, from raw sockets on both loops: connections, heads, memory and times are bounded."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
from support import LISTEN, raw_connection, serving, until

from lmdaemon import listener

SIDES = pytest.mark.parametrize("side", ["server", "api"])
CONFIG = '[operators.acme]\nprovider_id = "luckymonaco"\n'


@SIDES
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"tok-3n\r\n\r\n", id="no HTTP"),
        pytest.param(b"GET /tok-3n HTTP/9.9\r\n\r\n", id="no such version"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\ntok-3n\r\n\r\n", id="a header without a colon"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nX: tok-3n\0\r\n\r\n", id="NUL in a header"),
        pytest.param(b"GET /" + b"tok-3n" * 1000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", id="a long line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"tok-3n" * 2000 + b"\r\n\r\n", id="a long header"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"tok: tok-3n\r\n" * 100 + b"\r\n", id="many headers"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\ntok-3n", id="two lengths"
        ),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +6\r\n\r\ntok-3n", id="a signed length"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\ntok-3n",
            id="length and chunks",
        ),
    ],
)
async def test_what_is_no_http_is_answered_without_repeating_it(tmp_path: Path, side: str, sent: bytes) -> None:
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(getattr(daemon, side)) as peer:
        await peer.send(sent)
        answer = await peer.answer()
        assert answer.status == 400
        assert b"tok-3n" not in answer.body
        shape = ["error", "description"] if side == "server" else ["type", "title", "status", "detail"]
        assert list(json.loads(answer.body)) == shape
        assert await peer.rest() == b""  # nothing behind it is read as another request


@SIDES
async def test_a_head_that_drips_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 0.1)
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(getattr(daemon, side)) as peer:
        await peer.send(b"GET /health HTTP/1.1\r\nHost")
        assert await peer.rest() == b""


async def test_a_connection_that_has_asked_once_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 1)
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(daemon.server) as peer:
        for wait_s in (1.2, 0):  # longer than the limit: the wait itself is what is tested
            await peer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await peer.answer()).status == 200
            await asyncio.sleep(wait_s)


@SIDES
async def test_connections_are_bounded_and_the_one_too_many_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 2)
    trusting = LISTEN.replace("[api]", 'trusted_proxies = ["127.0.0.1"]\n[api]')  # so that no address has a share
    async with serving(tmp_path, trusting + CONFIG) as daemon, contextlib.AsyncExitStack() as stack:
        url = getattr(daemon, side)
        peers = [await stack.enter_async_context(raw_connection(url)) for _ in range(2)]
        for peer in peers:
            await peer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await peer.answer()).status == 200
        async with raw_connection(url) as third:
            assert (await third.answer()).status == 503
            assert await third.rest() == b""
        peers[0].writer.close()

        async def served() -> bool:
            async with raw_connection(url) as peer:
                await peer.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return (await peer.answer()).status == 200

        await until(served)


# -- stopping


@SIDES
async def test_who_was_let_in_is_heard_out_when_the_daemon_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(listener, "HEARD_WITHIN_S", 30)
    async with serving(tmp_path, CONFIG) as daemon, contextlib.AsyncExitStack() as stack:
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


async def test_who_was_let_in_and_asks_nothing_does_not_hold_a_stop_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEARD_WITHIN_S", 0.2)
    async with serving(tmp_path, CONFIG) as daemon, raw_connection(daemon.api) as peer:
        daemon.daemon.stop()
        assert await peer.rest() == b""
