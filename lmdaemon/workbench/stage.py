"""The server of a simulated operator: reads notices, and answers them or fails as the script says."""

import asyncio
import errno
import gzip
import os
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from lmdaemon.dialects import SUCCESS, answer
from lmdaemon.workbench.journal import Journal, Notice, verdict
from lmdaemon.workbench.script import Answer, Script

BODY_MAX = 1024 * 1024
_GOODBYE_S = 0.05  # how long closing waits for answers that are being sent; aiohttp takes 0 as no limit
_JSON = "application/json"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_HTML = "<!doctype html><html><body><h1>500 Internal Server Error</h1></body></html>"


class Stage:
    """The server. `tell` is called with a line for each notice, and must not raise. `contexts` has TLS contexts by the
    fault that they cause; the context without a fault is under "".
    """

    def __init__(
        self,
        script: Script,
        journal: Journal,
        *,
        contexts: dict[str, ssl.SSLContext] | None = None,
        tell: Callable[[str], None] = lambda line: None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.script = script
        self.journal = journal
        self._contexts = contexts
        self._tell = tell
        self._wall = wall
        self._monotonic = monotonic
        self._server: asyncio.Server | None = None
        self._protocols: web.Server
        self._back: asyncio.Task[None] | None = None
        self.address: tuple[str, int] = ("", 0)

    async def open(self, host: str, port: int) -> None:
        """Listens, with TLS if there are certificates. A host with a slash is the path of a unix socket, without a
        port. Raises OSError.
        """
        context = None
        if self._contexts:
            context = self._contexts[""]
            context.sni_callback = self._on_hello
        if self._server is None:
            self._protocols = web.Server(self._handle)
        loop = asyncio.get_running_loop()
        if "/" in host:
            _refuse_served(host)  # asyncio would take it away from the other program
            self._server = await loop.create_unix_server(self._protocols, host, ssl=context)
            self.address = (host, port)
        else:
            self._server = await loop.create_server(self._protocols, host, port, ssl=context, reuse_address=True)
            self.address = self._server.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        """Stops listening and ends the connections."""
        if self._back is not None:
            self._back.cancel()
        if self._server is not None:
            self._server.close()
            await self._protocols.shutdown(_GOODBYE_S)

    def _on_hello(self, connection: Any, name: str | None, context: ssl.SSLContext) -> int | None:
        fault = self.script.next_handshake()
        if not fault:
            return None
        self._tell(f"a handshake: tls {fault}")
        if fault == "refuse":
            return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE
        assert self._contexts is not None  # noqa: S101 - only a context of these has this callback
        connection.context = self._contexts[fault]
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET" and request.path == "/":
            return web.json_response(verdict(self.journal, {}))
        if request.method != "POST":
            return web.Response(status=405, headers={"Allow": "POST"})
        body = await request.content.read(BODY_MAX)
        while not request.content.at_eof() and len(body) < BODY_MAX:
            body += await request.content.read(BODY_MAX)
        headers = {name.lower(): value for name, value in request.headers.items()}
        notice = Notice(self._monotonic(), self._wall(), headers, body)
        arrival = self.journal.arrived(notice)
        chosen = self.script.next(arrival.session, arrival.attempt)
        if "malformed" in arrival.faults and chosen.accepts:
            chosen = Answer("error", self.journal.dialect.codes.of("bad_parameters"), text="Bad parameters")
        self._tell(self.journal.answered(arrival, notice, chosen))
        if chosen.after_s:
            await asyncio.sleep(chosen.after_s)
        return await self._play(request, chosen)

    async def _play(self, request: web.BaseRequest, chosen: Answer) -> web.StreamResponse:
        made = _whole(chosen)
        if made is not None:
            return made
        transport = request.transport
        if transport is None:
            return web.Response()
        match chosen.kind:
            case "hang":
                await asyncio.Event().wait()
            case "reset":
                transport.abort()
            case "garbage":
                transport.write(b"\x00\xff\x16\x03garbage, and no HTTP\r\n\r\n")
            case "truncate":
                transport.write(_HEAD + b"Content-Length: %d\r\n\r\n" % (len(SUCCESS) + 1) + SUCCESS[: chosen.number])
            case "interim":
                transport.write(b"HTTP/1.1 102 Processing\r\n\r\n" * chosen.number)
                return web.Response(body=SUCCESS, content_type=_JSON)
            case "drip":
                await self._drip(request, chosen.span_s)
            case "down":
                self._go_down(chosen.span_s)
        transport.close()
        return web.Response()

    async def _drip(self, request: web.BaseRequest, span_s: float) -> None:
        response = web.StreamResponse(headers={"Content-Length": str(len(SUCCESS)), "Content-Type": _JSON})
        with suppress(ConnectionError):
            await response.prepare(request)
            for at in range(len(SUCCESS)):
                await response.write(SUCCESS[at : at + 1])
                await asyncio.sleep(span_s)

    def _go_down(self, span_s: float) -> None:
        """Stops listening for a while, and cuts open connections."""

        async def down() -> None:
            assert self._server is not None  # noqa: S101 - a notice came over it
            host, port = self.address
            self._server.close()
            for protocol in list(self._protocols.connections):
                if protocol.transport is not None:
                    protocol.transport.abort()
            self._tell(f"down for {span_s:g} s")
            await asyncio.sleep(span_s)
            await self.open(host, port)
            self._tell("up again")

        if self._back is None or self._back.done():
            self._back = asyncio.create_task(down())


def _refuse_served(path: str) -> None:
    """Raises OSError if another program serves the unix socket with this path."""
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _whole(chosen: Answer) -> web.Response | None:
    """The response for an answer that is a complete HTTP response; None for other answers."""
    match chosen.kind:
        case "ok":
            return web.Response(body=SUCCESS, content_type=_JSON)
        case "error":
            return web.Response(body=answer(chosen.number, chosen.text or _said(chosen.number)), content_type=_JSON)
        case "status":
            headers = {"Retry-After": chosen.retry_after} if chosen.retry_after else {}
            return web.Response(status=chosen.number, headers=headers)
        case "json" | "body":
            return web.Response(body=chosen.body, content_type=_JSON)
        case "empty":
            return web.Response(content_type=_JSON)
        case "html":
            return web.Response(text=_HTML, content_type="text/html")
        case "redirect":
            return web.Response(status=302, headers={"Location": chosen.text})
        case "big":
            return web.Response(body=SUCCESS.ljust(chosen.number), content_type=_JSON)
        case "gzip-bomb":
            packed = gzip.compress(SUCCESS.ljust(chosen.number))
            return web.Response(body=packed, content_type=_JSON, headers={"Content-Encoding": "gzip"})
    return None


def _said(code: int) -> str:
    return "Success" if code == 0 else "Simulated"
