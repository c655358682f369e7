"""One connection to a listener: aiohttp's, with bounds for heads, time and memory.

It uses the internals of aiohttp's server.
"""

import asyncio
import fcntl
import re
import sys
import termios
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from lmdaemon.log import Log
from lmdaemon.store.contract import Operation, Submit
from lmdaemon.web.memory import HELD_MIN, Account, Bounds, Memory
from lmdaemon.web.requests import Head, Ready, Reply

TAKEN_MIN = 4096  # a client that takes fewer bytes than this in `Limits.write_s` is cut
LINE_MAX = 4096  # bytes of the request line
HEADERS_MAX = 64
FIELD_MAX = 8190  # bytes of a header's name, and of its value
HEAD_MAX = 32 * 1024  # bytes of a whole head
HEAD_END = b"\r\n\r\n"
# How long bytes after a refused request are read and dropped before the connection is closed. Closing with unread bytes
# would send a reset, and the client would lose the answer
LINGER_S = 1.0

_feed = web.RequestHandler.data_received

log = Log("http")


class Begun(Protocol):
    """A request for which one change has to be stored, and nothing else to be done before the answer."""

    @property
    def change(self) -> Operation[Any]:
        """What is to be stored."""

    def ready(self, result: Any) -> Ready | None:
        """Returns the answer to a usual result of the store, and logs and counts it. Returns None, and does nothing,
        for any other result, and for an exception in the place of a result.
        """

    def answer_unusual(self, result: Any) -> Coroutine[Any, Any, Reply]:
        """Returns the answer to a result for which `ready` returned None, or to an exception; logs and counts it."""


# Begins to handle a request, given its head, its body and the transport of its connection. None: aiohttp's way is taken
Begin = Callable[[RawRequestMessage, bytes, asyncio.Transport | None], Begun | None]


class Host(Protocol):
    """What a connection uses of its listener. `listener.Site` implements it and describes the attributes."""

    listener: str
    bounds: Bounds
    closing: bool
    keepalive_s: float
    knows: Callable[[Head], bool]
    begin: Begin
    submit: Submit
    malformed: Callable[[str], web.Response]
    unavailable: Callable[[str], bytes]

    def made(self, connection: "Connection") -> None:
        """Notes a connection that has opened."""

    def lost(self, connection: "Connection", address: str | None) -> None:
        """Notes a connection that is closed; `address` is the one that it was counted under."""

    def note_cut(self, reason: str, address: str | None) -> None:
        """Notes a connection that the daemon cuts; `reason` is one of `listener.CUTS`."""


class Arrival:
    """Knows where the bytes received last have ended: in a head (request line and headers), in a body, or at the end
    of a request.

    aiohttp does not tell where in the received bytes a request ends, so bytes are counted.
    """

    __slots__ = ("_head_size", "_in_body", "_left", "body", "fed", "head_since")

    def __init__(self) -> None:
        self.body: StreamReader = EMPTY_PAYLOAD  # of the latest request
        self.fed = 0  # bytes since the end of the last request
        self.head_since: float | None = None  # when the present head began (the loop's time); None: no head has begun
        self._head_size = 0  # how many of the `fed` bytes belong to the head
        self._in_body = False  # whether more of the body is to come
        self._left = 0  # upper bound: bytes after the end of a request that may belong to the next head

    def note_whole(self, body: StreamReader) -> None:
        """Notes that exactly one whole request has arrived. The request before it had ended, and no bytes follow."""
        self.body, self.head_since, self._left, self._in_body = body, None, 0, False

    @property
    def head_too_long(self) -> bool:
        """Whether more than HEAD_MAX bytes have arrived of a head that is not complete yet."""
        return not self._in_body and self.fed > HEAD_MAX

    @property
    def unfinished(self) -> bool:
        """Whether a request is incomplete. The first of a connection counts as begun when the connection opens."""
        return self.head_since is not None or not self.body.is_eof()

    @property
    def of_next_head(self) -> int:
        """The most bytes that may belong to a head that is not complete."""
        return 0 if self.head_since is None else self._left + self.fed

    def end_heads(self, body: StreamReader, data: bytes) -> None:
        """Notes that one or more heads are complete; `body` belongs to the last of them. `data` is as in `follow`."""
        self.body = body
        if data:
            self._head_size = self.fed - len(data) + data.find(HEAD_END) + len(HEAD_END)
            self.head_since = None

    def follow(self, heads: int, data: bytes, now: float) -> None:
        """Notes where `data`, the bytes received last, have ended. `heads` is how many heads they have completed.

        `fed` counts them already. Empty `data` means that the parser went on with bytes that it had held back.
        """
        if not data:
            self._follow_held_back(heads)
            return
        was_in_body, self._in_body = self._in_body, not self.body.is_eof()
        if self._in_body:
            return
        if data.endswith(HEAD_END) or self.fed == self._head_size + self.body.total_bytes:  # no bytes follow
            self.fed = self._left = 0
            self.head_since = None
        elif self.head_since is None:
            self.head_since = now
            if heads or was_in_body:  # only the parser knows how many of the bytes belong to the next head
                self._left, self.fed = len(data), 0

    def _follow_held_back(self, heads: int) -> None:
        if not heads and self._in_body != self.body.is_eof():
            return  # the parser has found neither the end of a head nor that of the body
        self._in_body = not self.body.is_eof()
        # Only the parser knows where in those bytes the latest request began, so bytes are counted from here on
        self.fed, self._left, self._head_size = (self.body.total_bytes if self._in_body else 0), 0, 0


class _Taking:
    """Judges whether a client takes its answers. While answers wait, it must take at least TAKEN_MIN bytes in each
    span of time that `too_slow` is given.
    """

    __slots__ = ("_since", "_untaken")

    def __init__(self) -> None:
        # When the client last took at least TAKEN_MIN bytes (the loop's time); None: no answers wait
        self._since: float | None = None
        self._untaken = 0  # bytes of answers that the client had not taken yet at `_since`

    def begin_again(self) -> None:
        """Forgets what was seen so far."""
        self._since = None

    def too_slow(self, transport: Any, now: float, within_s: float) -> bool:
        """Looks at what waits in the transport now. Returns whether the client has taken too little for more than
        `within_s`.
        """
        waiting = transport.get_write_buffer_size()
        if not waiting:
            self._since = None
            return False
        untaken = waiting + _unacknowledged(transport)
        if self._since is None or untaken <= self._untaken - TAKEN_MIN:
            self._since, self._untaken = now, untaken
            return False
        return now - self._since > within_s


class Connection(web.RequestHandler):
    """aiohttp's connection, with the limits that aiohttp's own lacks.

    It limits the time and the size of every head, the memory that it holds, and the time in which a client takes
    nothing of its answers. Its answer to malformed HTTP does not repeat what was sent. When the daemon stops, it still
    answers all requests that have arrived whole.
    """

    __slots__ = (
        *("_account", "_address", "_answered", "_arrival", "_lost", "_refused", "_site", "_taking", "_wire"),
        *("made", "reader"),
    )

    def __init__(self, server: web.Server, site: Host, address: str | None) -> None:
        options: Any = {
            "access_log": None,
            "keepalive_timeout": site.keepalive_s,
            "max_line_size": LINE_MAX,
            "max_headers": HEADERS_MAX,
            "max_field_size": FIELD_MAX,
            "lingering_time": site.bounds.limits.body_s,  # for the rest of a body that no handler has read
            "auto_decompress": False,  # compressed bodies are refused by their header and must not be unpacked before
        }
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._site = site
        self._address = address
        self._wire: Any = None  # the transport; aiohttp drops its reference when closing begins, which may take long
        self._answered = 0
        self._refused = False  # whether bytes that arrive from now on are dropped
        self._account = Account(site.bounds)
        self._arrival = Arrival()
        self._taking = _Taking()
        self._lost: asyncio.Future[None] | None = None  # made by `_linger`; done when the connection is lost
        self.made = False  # whether it has, or had, a transport
        self.reader: asyncio.Task[Any] | None = None  # a handler that is cancelled when the client leaves

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop when the connection is open."""
        self.made = True
        self._wire = transport
        self._arrival.head_since = self._loop.time()
        self._site.made(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by the event loop when the connection is closed. Frees what the connection holds."""
        account = self._account
        account.set_unsent(0)
        if self._task_handler is None:
            account.free(account.held)
        else:
            self._task_handler.add_done_callback(lambda _: account.free(account.held))
        self._site.lost(self, self._address)
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
        if self.reader is not None:
            self.reader.cancel()
        super().connection_lost(exc)

    # -- bytes that arrive

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. Counts what has arrived, and has aiohttp parse it."""
        if self._refused:
            return
        size, arrival = len(data), self._arrival
        self._account.take(size)
        if self._refused:  # this connection was cut for lack of memory
            return
        before = self._request_count
        _feed(self, data)
        heads = self._request_count - before
        if heads == 1 and not arrival.fed and size < HELD_MIN:  # the usual case: a whole small request
            body = self._messages[-1][1]
            if body is EMPTY_PAYLOAD:
                whole = data.endswith(HEAD_END)
            else:
                whole = body.is_eof() and data.find(HEAD_END) + len(HEAD_END) + body.total_bytes == size
            if whole:
                arrival.note_whole(body)
                return
        self._follow(heads, data)

    def _follow(self, heads: int, data: bytes) -> None:
        """Finds out where the bytes in `data` have ended. `heads` is how many heads they have completed.

        Empty `data` means that the parser went on with bytes that it had held back until the body before them was read.
        """
        arrival = self._arrival
        arrival.fed += len(data)
        if heads:
            if arrival.fed > HEAD_MAX or not data:
                self._refuse_long_heads(heads)
            head, body = self._messages[-1]
            arrival.end_heads(body, data)
            if isinstance(head, _ErrInfo):
                self._refused = True
            elif (len(data) >= HELD_MIN or not body.is_eof()) and self._site.knows(head):
                self._account.trust()
        elif data and arrival.head_too_long:
            self._refuse_head()
            return
        arrival.follow(heads, data, self._loop.time())

    def _refuse_long_heads(self, heads: int) -> None:
        """Refuses the first too long head among those that are now complete, and drops what comes after it."""
        for index in range(-heads, 0):
            message = self._messages[index][0]
            if not isinstance(message, _ErrInfo) and _head_size(message) > HEAD_MAX:
                for _ in range(-index):
                    self._messages.pop()
                self._refuse_head()
                return

    def _refuse_head(self) -> None:
        """Queues a refusal as aiohttp does, to be answered after the requests before it."""
        self._refused = True
        self._request_count += 1
        self._messages.append(_error(_LongHead("")))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- memory

    def holds(self, memory: Memory) -> int:
        """The bytes of `memory` that cutting this connection would free."""
        return self._account.of(memory, self._received)

    @property
    def _received(self) -> int:
        """The bytes received for requests whose handler does not run yet. A cut does not free those of the request
        whose handler runs, because the handler keeps them.
        """
        held = self._account.held
        if not self._request_in_progress or not self._arrival.body.is_eof():
            return held
        waiting = len(self._messages)
        return held * waiting // (waiting + 1)

    def pause_writing(self) -> None:
        """Called by the event loop when the client takes its answers too slowly."""
        super().pause_writing()
        self._account.set_unsent(self._wire.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Called by the event loop when the client has taken most of its answers."""
        self._account.set_unsent(0)
        self._taking.begin_again()  # what was unread before is not compared with the new answers that come now
        super().resume_writing()

    # -- time limits and the end

    def look(self, now: float) -> None:
        """Cuts the connection if a head takes too long, or its client has taken too little for too long."""
        began, limits = self._arrival.head_since, self._site.bounds.limits
        if began is not None and now - began > limits.head_s and not self._request_in_progress:
            self.cut("head")
        elif self._taking.too_slow(self._wire, now, limits.write_s):
            self.cut("reader")

    def cut(self, reason: str) -> None:
        """Ends the connection and frees its memory at once, without waiting until the loop reports the end.

        If the reason is lack of memory, a client that is not being answered gets a 503, so that it tries again.
        """
        self._refused = True
        self._site.note_cut(reason, self._address)
        self._account.free(self._received)
        self._account.set_unsent(0)
        tell = reason == "memory" and not self._request_in_progress
        if tell:
            self._wire.write(self._site.unavailable("too many bytes are waiting here"))
        self.force_close()
        if not tell:
            self._wire.abort()  # close() would wait until the client has taken the rest
        self._parser = None
        woken = self._waiter is not None and self._waiter.done()  # aiohttp's task is about to take the first message
        self._messages.clear()
        if woken:
            self._messages.append(_error(BadHttpMessage("cut")))
        with suppress(Exception):  # the body may be in any state; a handler that reads it gets an error from aiohttp
            self._arrival.body.read_nowait()

    @property
    def arriving(self) -> bool:
        """Whether a request is incomplete. The first counts as begun when the connection opens."""
        return self._arrival.unfinished

    @property
    def unanswered(self) -> int:
        """The number of requests whose head has arrived and that are not answered yet."""
        return self._request_count - self._answered

    @property
    def unheard(self) -> bool:
        """Whether the client waits for an answer, or has not finished sending a request."""
        return self.unanswered > 0 or self.arriving

    @property
    def unfinished(self) -> bool:
        """Whether a request waits for its answer, or an answer is being made or sent."""
        return self._request_in_progress or bool(self._messages) or self._wire.get_write_buffer_size() > 0

    def finish(self) -> None:
        """Ends the connection: at once if a request is incomplete or none is left to answer, else after all answers."""
        arrival = self._arrival
        if not arrival.body.is_eof() or (arrival.head_since is not None and not self._request_in_progress):
            self.cut("stop")
        elif self._request_in_progress or self._messages:
            self.close()
        else:
            self.force_close()  # aiohttp's close() leaves an idle connection open

    # -- answers

    async def finish_response(
        self, request: web.BaseRequest, resp: Reply, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Called by aiohttp to send an answer."""
        if isinstance(resp, Ready):
            resp = resp.ordinary()
        if self._site.closing:
            resp.force_close()  # "Connection: close" tells the client not to send another request on it
        done = await super().finish_response(request, resp, start_time)
        self._answered += 1
        account = self._account
        if account.held:
            kept = self._arrival.of_next_head
            waiting = len(self._messages)
            # Frees the bytes of this request. If other requests wait, all are assumed to be equally long
            account.free(max(0, account.held - kept) // (waiting + 1) if waiting or kept else account.held)
        if self._refused and not self._messages:
            await self._linger()
        return done

    async def _linger(self) -> None:
        """Waits while the client finishes sending, because a reset would keep it from reading the answer."""
        if self._force_close or self.transport is None:
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._lost = self._loop.create_future()
        await asyncio.wait({self._lost}, timeout=LINGER_S)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called by aiohttp to make the answer to malformed HTTP."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        reason = _complaint(exc)
        if self.transport is not None:  # the connection was not cut
            log.warning("http.malformed", listener=self._site.listener, reason=reason, peer=request.remote)
        self._refused = True
        answer = self._site.malformed(reason)
        answer.set_status(status)
        answer.force_close()
        return answer


@contextmanager
def until_client_leaves(request: web.BaseRequest) -> Iterator[None]:
    """Cancels the handler if its client leaves while the block runs. For handlers that change nothing and may take
    long.
    """
    connection = cast(Connection, request.protocol)  # all connections of a Site are of this class
    connection.reader = asyncio.current_task()
    try:
        yield
    finally:
        connection.reader = None


def _error(error: BadHttpMessage) -> tuple[_ErrInfo, StreamReader]:
    """A message, in the place of a request, that aiohttp answers as malformed."""
    return _ErrInfo(400, error, error.message), EMPTY_PAYLOAD


class _LongHead(BadHttpMessage):
    """A head is longer than HEAD_MAX."""


# A message of aiohttp; the names come from a fixed list in aiohttp, not from the request
_TWICE = re.compile(r"Duplicate '([A-Za-z-]{1,40})' header found\.")
_MISSING_HOST = "Missing 'Host' header in request."
_TLS = "Received HTTPS traffic on an HTTP port"


def _complaint(error: BaseException | None) -> str:
    """What is wrong with malformed HTTP, in words that repeat nothing of what was sent."""
    message = str(getattr(error, "message", ""))
    if isinstance(error, _LongHead):
        return f"headers too long: at most {HEAD_MAX} bytes altogether"
    if isinstance(error, LineTooLong):
        if message.startswith(f"Got more than {LINE_MAX} bytes"):
            return f"request line too long: at most {LINE_MAX} bytes"
        return f"header too long: at most {FIELD_MAX} bytes"
    if message == "Too many headers received":
        return f"too many headers: at most {HEADERS_MAX}"
    if twice := _TWICE.fullmatch(message):
        return f"header {twice[1]} stands twice"
    return {_MISSING_HOST: "header Host is missing", _TLS: "this address does not speak https://"}.get(
        message, "malformed HTTP"
    )


def _head_size(message: RawRequestMessage) -> int:
    """The size of a head in bytes, without white space that the parser has dropped."""
    return len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)


def _unacknowledged(transport: asyncio.BaseTransport) -> int:
    """Bytes that the kernel has not delivered to the peer yet; 0 if unknown. Source: SIOCOUTQ in tcp(7) and unix(7)."""
    with suppress(OSError):
        return int.from_bytes(
            fcntl.ioctl(transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4)), sys.byteorder
        )
    return 0
