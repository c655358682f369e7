"""Serves frequent plain requests without most of the framework: no `web.Request`, task, coroutine or response is made.

aiohttp's own parser reads the requests, so it refuses the same ones. A request is plain if it is small and has arrived
whole in one piece, on a connection with nothing else under way, and if `Site.begin` finds that one change has to be
stored and nothing else to be done before the answer. All others are served by aiohttp, and so are unusual results.

This module exists for speed alone (docs/performance.md): without it everything works, only slower. It uses internals of
aiohttp's connection; `misfit` checks whether they are as expected.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import aiohttp
from aiohttp import HttpVersion11, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from lmdaemon.log import Log, place
from lmdaemon.web.connection import HEAD_END, Begun, Connection
from lmdaemon.web.memory import HELD_MIN
from lmdaemon.web.requests import Ready, Reply

# The private attributes of aiohttp's connection that this module uses, and what the parser must make of _TRIAL.
_CONNECTION = (
    *("_close", "_force_close", "_handler_waiter", "_keepalive_handle", "_keepalive_timeout", "_loop", "_manager"),
    *("_messages", "_next_keepalive_close_time", "_parser", "_paused", "_process_keepalive", "_request_count"),
    *("_request_handler", "_request_in_progress", "_upgraded", "_waiter", "transport"),
)
_MESSAGE = {"method": "POST", "path": "/x", "should_close": False, "upgrade": False, "chunked": False}
_TRIAL = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"

log = Log("http")


def connection_type() -> type[Connection]:
    """The class that serves connections: HotConnection, if it fits the installed aiohttp. Needs a running loop."""
    reason = misfit()
    if reason is None:
        return HotConnection
    log.warning(
        "http.slower", reason=reason, aiohttp=aiohttp.__version__, note="requests take longer, and nothing else changes"
    )
    return Connection


def misfit() -> str | None:
    """What is different in the installed aiohttp from what this module needs, found by a trial request; None if it
    fits.
    """
    if missing := [name for name in _CONNECTION if not hasattr(web.RequestHandler, name)]:
        return f"aiohttp's connection has no {', '.join(missing)}"
    if HttpRequestParser is HttpRequestParserPy:
        return "aiohttp's parser is the one written in Python"
    try:
        trial = web.RequestHandler(web.Server(_unused), loop=asyncio.get_running_loop())
        ((message, body),), upgraded, rest = trial._parser.feed_data(_TRIAL)  # type: ignore[union-attr]
        trial._parser.message_consumed()  # type: ignore[union-attr]
        found = {name: getattr(message, name) for name in _MESSAGE}
        whole = body.is_eof() and body.total_bytes == 2 and body.read_nowait() == b"{}"
        headers, url, version = message.headers["host"], message.url.raw_path, message.version
    except Exception as error:
        return f"aiohttp's parser cannot be used as expected: {type(error).__name__} at {place(error)}"
    if (
        found != _MESSAGE
        or not whole
        or (headers, url) != ("x", "/x")
        or version is not HttpVersion11
        or upgraded
        or rest
    ):
        return "aiohttp's parser reads a request differently"
    return None


async def _unused(_: web.BaseRequest) -> web.StreamResponse:
    raise NotImplementedError


class _Parsed:
    """Takes the parser's place for one call, and returns what the parser has already made of the bytes."""

    __slots__ = ("_made",)

    def __init__(self, made: Any) -> None:
        self._made = made

    def feed_data(self, data: bytes) -> Any:
        if isinstance(self._made, Exception):
            raise self._made
        return self._made


class HotConnection(Connection):
    """A connection that serves plain requests itself.

    aiohttp serves a connection in one task, which waits for the next request on the future `_waiter`. While a plain
    request is under way, this future is kept in `_idle` and `_waiter` is None: requests that arrive meanwhile are
    queued, and the task is not woken until the plain one is answered.
    """

    __slots__ = ("_begun", "_idle", "_message", "_stream")

    _begun: Begun
    _idle: "asyncio.Future[None]"
    _message: RawRequestMessage
    _stream: StreamReader

    def data_received(self, data: bytes) -> None:
        """Starts to serve a plain request, and passes everything else on to aiohttp."""
        waiter, parser = self._waiter, self._parser
        if (
            waiter is None  # a request is under way
            or self._account.held  # a part of a request has arrived before
            or self._paused  # the client does not take its answers
            or self._upgraded
            or waiter.done()
            or len(data) >= HELD_MIN
            or parser is None
        ):
            super().data_received(data)
            return
        made: Any
        try:
            made = parser.feed_data(data)
        except Exception as error:  # raised again by the stand-in, where aiohttp expects it
            made = error
        else:
            messages, upgraded, _ = made
            if len(messages) == 1 and not upgraded and self._takes(messages[0], data, waiter):
                return
        stand_in: Any = _Parsed(made)
        self._parser = stand_in
        try:
            super().data_received(data)
        finally:
            if self._parser is stand_in:  # a connection that was cut meanwhile has no parser
                self._parser = parser

    def _takes(
        self, parsed: tuple[RawRequestMessage, StreamReader], data: bytes, waiter: "asyncio.Future[None]"
    ) -> bool:
        """Starts to serve a request if it is plain; returns whether it is."""
        message, stream = parsed
        if stream is EMPTY_PAYLOAD:
            body, whole = b"", data.endswith(HEAD_END)
        else:
            body_at = data.find(HEAD_END) + len(HEAD_END)
            body, whole = data[body_at:], stream.is_eof() and body_at + stream.total_bytes == len(data)
        if (
            not whole
            or message.version is not HttpVersion11
            or message.should_close
            or message.upgrade
            or message.chunked
            or message.path[:1] != "/"
            or "Expect" in message.headers
        ):
            return False
        try:
            begun = self._site.begin(message, body, self.transport)
        except Exception:  # the ordinary way fails too, and logs and answers it
            return False
        if begun is None:
            return False
        self._message, self._stream, self._begun, self._idle = message, stream, begun, waiter
        self._request_count += 1
        self._request_in_progress = True
        self._waiter = None
        # The parser counts requests that wait, and stops at as many as aiohttp queues. This one is not queued: if it
        # were counted, aiohttp would not notice that the parser has stopped, and never have it go on
        self._parser.message_consumed()  # type: ignore[union-attr]
        self._arrival.head_since = None
        self._site.submit(begun.change, self._stored)
        return True

    def _stored(self, result: Any) -> None:
        """Answers a request, given the store's result or an exception. The store calls this, so it must not raise."""
        try:
            self._answer(result)
        except Exception as error:
            self._request_in_progress = False
            self._waiter = self._idle  # so that aiohttp's task ends too
            self.force_close()
            self._loop.call_exception_handler({"message": "a request cannot be answered", "exception": error})

    def _answer(self, result: Any) -> None:
        begun, transport = self._begun, self.transport
        try:
            ready = begun.ready(result)
        except Exception as error:
            ready, result = None, error
        reply = ready or _started(begun.answer_unusual(result))
        if transport is None or transport.is_closing():
            self._end()
        elif ready is None or self._close or self._force_close or self._site.closing:
            self._hand_over(reply)
        else:
            transport.write(ready.whole)
            self._answered += 1
            self._count()
            self._forget()
            self._request_in_progress = False
            self._waiter = self._idle
            if self._messages:  # the next request has arrived already
                self._idle.set_result(None)
            self._next_keepalive_close_time = close_at = self._loop.time() + self._keepalive_timeout
            if self._keepalive_handle is None:
                self._keepalive_handle = self._loop.call_at(close_at, self._process_keepalive)

    def _count(self) -> None:
        """Counts the request, as aiohttp does when it takes one from its queue."""
        if self._manager is not None:
            self._manager.requests_count += 1

    def _hand_over(self, reply: "Ready | asyncio.Task[Reply]") -> None:
        """Passes the request to aiohttp, with a handler that returns this reply."""
        handler = self._request_handler

        async def known(_: web.BaseRequest) -> Any:
            self._request_handler = handler
            return reply if isinstance(reply, Ready) else await reply

        self._request_handler = known
        self._messages.appendleft((self._message, self._stream))
        self._forget()
        self._waiter = self._idle
        self._idle.set_result(None)

    def _end(self) -> None:
        """Ends the request after its client has left."""
        self._count()
        self._forget()
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        self._waiter = self._idle
        self.force_close()

    def _forget(self) -> None:
        """Drops references to an answered request, so that an idle connection does not keep it in memory."""
        del self._message, self._stream, self._begun


_under_way: set[asyncio.Task[Reply]] = set()


def _started(reply: Coroutine[Any, Any, Reply]) -> asyncio.Task[Reply]:
    """Has a reply be made in a task, so that it is also logged and counted when its client has left."""
    task = asyncio.get_running_loop().create_task(reply)
    _under_way.add(task)  # the event loop itself keeps no reference to a task
    task.add_done_callback(_under_way.discard)
    return task
