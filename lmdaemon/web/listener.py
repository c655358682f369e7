"""The two listeners: they accept connections, and limit their number, the time a request may take, and memory.

It uses the internals of aiohttp's server. No client, and neither listener, may take what the others need: connections,
file descriptors, memory.
"""

import asyncio
import errno
import fcntl
import ipaddress
import re
import socket
import ssl
import sys
import termios
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from lmdaemon.clock import ServiceClock
from lmdaemon.config.values import Network
from lmdaemon.log import Log
from lmdaemon.web import handshakes
from lmdaemon.web import requests as http
from lmdaemon.web.requests import BACKLOG, Ready, inside

HEAD_TIMEOUT_S = 10.0  # from the connect, or from the first byte of a later head, to the end of the head
KEEPALIVE_S = 75.0  # how long a connection may wait for its next request
WRITE_TIMEOUT_S = 30.0  # how long a client may take nothing of its answers
TAKEN_MIN = 4096  # a client that takes fewer bytes than this in WRITE_TIMEOUT_S is cut
PATROL_S = 2.0  # how often connections are checked for HEAD_TIMEOUT_S and WRITE_TIMEOUT_S

CONNECTIONS_MAX = 2000  # most connections of one listener, where the limit of open files allows it
FILES_OWN = 64  # files kept for everything but connections: database, log, event loop, lookups, plug-ins
CUTS = ("head", "reader", "memory", "stop")  # why a connection is cut
SHARES = {"server": 4, "api": 2}  # one address may have a quarter of the server's connections, half of the API's
LINE_MAX = 4096  # bytes of the request line
HEADERS_MAX = 64
FIELD_MAX = 8190  # bytes of a header's name, and of its value
HEAD_MAX = 32 * 1024  # bytes of a whole head
HEAD_END = b"\r\n\r\n"
LINGER_S = 1.0  # how long bytes after a refused request are read and dropped; a reset would destroy the answer
STRANGERS_MAX = 6 * 1024**2  # most bytes that have arrived on both listeners and are not authenticated yet
HELD_MIN = 2048  # a connection that holds fewer bytes is not cut for lack of memory
KNOWN_MAX = 32 * 1024**2  # most bytes that have arrived and are authenticated, and of answers not taken yet

ACCEPTS_AT_ONCE = 64  # connections accepted in one turn of the event loop
ACCEPT_AGAIN_S = 0.1  # wait after accepting has failed
ACCEPTING_S = 1.0  # how long accepting has to work again before idle time passes, so that waiting touches come first

# Shutdown grace: 1 s for clients that have no answer yet or are in the middle of a request, 50 ms for everyone else
HEARD_WITHIN_S = 1.0
HEARD_S = 0.05

# Errors of a connection that ended before it was accepted; accepting can go on. Source: accept(2), "Error handling"
_NOT_OURS = {
    errno.ECONNABORTED,
    errno.EPERM,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    errno.EINTR,
}
_feed = web.RequestHandler.data_received
_TURNED_AWAY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

log = Log("http")


def connections_max(files: int, attempts: int) -> int:
    """The most connections of each listener, for a limit of open files and a number of simultaneous attempts.

    Attempts to deliver get at most half of the files. The two listeners get the same number, so that neither takes what
    the other needs.
    """
    left = files - FILES_OWN - min(attempts, files // 2)
    return max(1, min(CONNECTIONS_MAX, left // 2))


class Hearing:
    """The listeners that cannot accept connections now, with the reason (`deaf`).

    While there is one, touches may not get through, so the service clock is stopped.
    """

    def __init__(self, clock: ServiceClock) -> None:
        self._clock = clock
        self.deaf: dict[str, str] = {}

    def lost(self, listener: str, reason: str) -> None:
        """A listener cannot accept connections."""
        if listener not in self.deaf:
            log.error("http.cannot_accept", listener=listener, reason=reason, note="no idleness passes meanwhile")
        self.deaf[listener] = reason
        self._clock.freeze("listening")

    def regained(self, listener: str) -> None:
        """A listener accepts connections again."""
        if self.deaf.pop(listener, None) is not None:
            log.info("http.accepting_again", listener=listener)
        if not self.deaf:
            self._clock.thaw("listening")


class Acceptor:
    """Accepts connections on a listening socket and calls `admit` with each and its peer's address.

    The event loops' own servers do not report that no file descriptor is free: asyncio's sleeps for a second, uvloop's
    closes the connection. Here `lost(reason)` is called at once, and `regained()` when accepting has worked for
    ACCEPTING_S.
    """

    def __init__(
        self,
        listening: socket.socket,
        admit: Callable[[socket.socket, Any], None],
        lost: Callable[[str], None] = lambda reason: None,
        regained: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket = listening
        self._admit = admit
        self._lost = lost
        self._regained = regained
        self._failing = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to accept."""
        self._socket.listen(BACKLOG)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Stops accepting and closes the socket. One that systemd has handed over stays open in systemd."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        if self._timer is not None:
            self._timer.cancel()

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                accepted, peer = self._socket.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _NOT_OURS:
                    continue
                return self._fail(error)
            accepted.setblocking(False)
            self._admit(accepted, peer)
        if self._failing:
            self._failing = False
            self._timer = asyncio.get_running_loop().call_later(ACCEPTING_S, self._regained)
        return None

    def _fail(self, error: OSError) -> None:
        """Stops watching the socket for ACCEPT_AGAIN_S; meanwhile it would wake the loop at each turn."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        if self._timer is not None:
            self._timer.cancel()
        self._failing = True
        self._timer = loop.call_later(ACCEPT_AGAIN_S, self._try_again)
        self._lost(error.strerror or str(error))

    def _try_again(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        self._accept()  # without a free descriptor this fails even if no client waits, so success proves something


def turn_away(accepted: socket.socket, peer: object = None) -> None:
    """Answers 503 with Retry-After and closes the connection.

    What the client has sent is read first. Closing with unread bytes would send a reset, and many clients then lose the
    answer.
    """
    with accepted, suppress(OSError):
        accepted.send(_TURNED_AWAY)
        accepted.shutdown(socket.SHUT_WR)
        accepted.recv(65536)


class Memory:
    """The bytes that connections hold, at most `most` altogether.

    Beyond that, the connections that hold the most are cut, until a quarter is free. Connections that hold no more than
    a usual request are spared; their number is bounded.
    """

    def __init__(self, most: int, holders: "set[Connection]") -> None:
        self.most = most
        self.used = 0
        self._holders = holders

    def take(self, size: int) -> None:
        """Adds bytes that are held from now on."""
        self.used += size
        if self.used > self.most:
            self.make_room()

    def make_room(self) -> None:
        """Cuts connections, the largest holders first, until a quarter is free."""
        sizes = [(size, one) for one in self._holders if (size := one.holds(self)) >= HELD_MIN]
        for _, one in sorted(sizes, key=lambda found: found[0], reverse=True):
            if self.used <= self.most * 3 // 4:
                break
            one.cut("memory")


class Bounds:
    """The limits of memory that both listeners share.

    `strangers` counts bytes that have arrived and are not authenticated; `known` those that are, and the bytes of
    answers that clients have not taken yet.
    """

    def __init__(self) -> None:
        self.open: set[Connection] = set()
        self.strangers = Memory(STRANGERS_MAX, self.open)
        self.known = Memory(KNOWN_MAX, self.open)


class Connection(web.RequestHandler):
    """aiohttp's connection, with what it lacks.

    It limits the time and the size of every head, the memory that it holds, and the time in which a client takes
    nothing of its answers. Its answer to malformed HTTP does not repeat what was sent. Its end at a stop cuts off no
    request.

    aiohttp does not tell where in the received bytes a request ends, so they are counted: `_fed` bytes have come since
    the end of the last request, and the head among them had `_head_size`. `_head_since` is when the present head began.
    """

    __slots__ = (
        "_address",
        "_answered",
        "_body",
        "_fed",
        "_head_since",
        "_head_size",
        "_held",
        "_in_body",
        "_left",
        "_lost",
        "_memory",
        "_refused",
        "_site",
        "_stalled_since",
        "_unsent",
        "_untaken",
        "_wire",
        "made",
        "reader",
    )

    def __init__(self, server: web.Server, site: "Site", address: str | None) -> None:
        options: Any = {
            "access_log": None,
            "keepalive_timeout": site.keepalive_s,
            "max_line_size": LINE_MAX,
            "max_headers": HEADERS_MAX,
            "max_field_size": FIELD_MAX,
            "lingering_time": http.BODY_TIMEOUT_S,  # for the rest of a body that no handler has read
            "auto_decompress": False,  # compressed bodies are refused by their header and must not be unpacked before
        }
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._site = site
        self._address = address
        self._wire: Any = None  # the transport; aiohttp drops its reference when closing begins, which may take long
        self._answered = 0
        self._refused = False  # bytes that still come are dropped
        self._memory = site.bounds.strangers  # the Memory in which `_held` is counted
        self._held = 0  # bytes received and not answered yet
        self._unsent = 0  # bytes of answers that wait in the transport, counted in `bounds.known`
        self._fed = 0
        self._left = 0  # most bytes after the end of a request that may be the beginning of the next head
        self._head_size = 0
        self._head_since: float | None = None
        self._body: StreamReader = EMPTY_PAYLOAD  # of the latest request
        self._in_body = False  # whether more of this body is to come
        self._untaken = 0  # bytes of answers that the client had not taken yet when it last took some
        self._stalled_since: float | None = None
        self._lost: asyncio.Future[None] | None = None  # set while it lingers
        self.made = False  # whether it has, or had, a transport
        self.reader: asyncio.Task[Any] | None = None  # a handler that is cancelled when the client leaves

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.made = True
        self._wire = transport
        self._head_since = self._loop.time()
        self._site.made(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by the event loop."""
        self._note_unsent(0)
        if self._task_handler is None:
            self._free(self._held)
        else:
            self._task_handler.add_done_callback(lambda _: self._free(self._held))
        self._site.lost(self, self._address)
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
        if self.reader is not None:
            self.reader.cancel()
        super().connection_lost(exc)

    # -- what arrives

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. Counts what has arrived, and has aiohttp parse it."""
        if self._refused:
            return
        size, memory = len(data), self._memory
        self._held += size
        memory.used += size
        if memory.used > memory.most:
            memory.make_room()
            if self._refused:  # this connection was cut
                return
        before = self._request_count
        _feed(self, data)
        heads = self._request_count - before
        if heads == 1 and not self._fed and size < HELD_MIN:  # the usual case: a whole small request
            body = self._messages[-1][1]
            if body is EMPTY_PAYLOAD:
                whole = data.endswith(HEAD_END)
            else:
                whole = body.is_eof() and data.find(HEAD_END) + len(HEAD_END) + body.total_bytes == size
            if whole:
                self._body, self._head_since, self._left, self._in_body = body, None, 0, False
                return
        self._follow(heads, data)

    def _follow(self, heads: int, data: bytes) -> None:
        """Finds out what the bytes were: the ends of `heads` heads, or more of a head or of a body."""
        size, in_body = len(data), self._in_body
        if not size:
            self._follow_held_back(heads)
            return
        self._fed += size
        if heads:
            self._note_heads(heads, data)
        elif not in_body and self._fed > HEAD_MAX:
            self._refuse_head()
            return
        self._in_body = not self._body.is_eof()
        if self._in_body:
            return
        if data.endswith(HEAD_END) or self._fed == self._head_size + self._body.total_bytes:  # nothing is behind it
            self._fed = self._left = 0
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self._loop.time()
            if heads or in_body:  # only the parser knows how many of the bytes belong to the next head
                self._left, self._fed = size, 0

    def _follow_held_back(self, heads: int) -> None:
        """Notes what the parser found in bytes that it had held back, because nobody read the body before them."""
        if heads:
            self._note_heads(heads, b"")
        elif self._in_body != self._body.is_eof():
            return  # it found no end
        self._in_body = not self._body.is_eof()
        # Only the parser knows where in those bytes the latest request began, so its bytes are counted from here
        self._fed, self._left, self._head_size = (self._body.total_bytes if self._in_body else 0), 0, 0

    def _note_heads(self, heads: int, data: bytes) -> None:
        """Notes that heads are complete. Without data, they were complete in bytes that the parser had held back."""
        if self._fed > HEAD_MAX or not data:
            self._refuse_long_heads(heads)
        head, self._body = self._messages[-1]
        if isinstance(head, _ErrInfo):
            self._refused = True
        elif (len(data) >= HELD_MIN or not self._body.is_eof()) and self._site.knows(head):
            self._trust()
        if data:
            self._head_size = self._fed - len(data) + data.find(HEAD_END) + len(HEAD_END)
            self._head_since = None

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

    # -- what it holds

    def _trust(self) -> None:
        """Counts its bytes as a known client's, because its request is authenticated."""
        known = self._site.bounds.known
        if self._memory is not known:
            self._memory.used -= self._held
            self._memory = known
            known.take(self._held)

    def holds(self, memory: Memory) -> int:
        """The bytes of `memory` that cutting this connection would free."""
        held = self._received if self._memory is memory else 0
        return held + self._unsent if memory is self._site.bounds.known else held

    @property
    def _received(self) -> int:
        """The bytes received for requests whose handler does not run yet; a running handler keeps its request."""
        if not self._request_in_progress or not self._body.is_eof():
            return self._held
        waiting = len(self._messages)
        return self._held * waiting // (waiting + 1)

    def _free(self, size: int) -> None:
        self._memory.used -= size
        self._held -= size
        if not self._held:
            self._memory = self._site.bounds.strangers

    def _note_unsent(self, size: int) -> None:
        known = self._site.bounds.known
        known.used -= self._unsent
        self._unsent = size
        known.take(size)

    def pause_writing(self) -> None:
        """Called by the event loop when the client takes its answers too slowly."""
        super().pause_writing()
        self._note_unsent(self._wire.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Called by the event loop when the client has taken most of its answers."""
        self._note_unsent(0)
        self._stalled_since = None  # how much more it takes cannot be told from what is written from now on
        super().resume_writing()

    # -- how long it takes

    def look(self, now: float) -> None:
        """Cuts the connection if a head takes too long, or its client has taken too little for too long."""
        late = self._head_since is not None and now - self._head_since > HEAD_TIMEOUT_S
        if late and not self._request_in_progress:
            self.cut("head")
            return
        waiting = self._wire.get_write_buffer_size()
        if not waiting:
            self._stalled_since = None
            return
        untaken = waiting + _unacknowledged(self._wire)
        if self._stalled_since is None or untaken <= self._untaken - TAKEN_MIN:
            self._stalled_since, self._untaken = now, untaken
        elif now - self._stalled_since > WRITE_TIMEOUT_S:
            self.cut("reader")

    def cut(self, reason: str) -> None:
        """Ends the connection and frees its memory at once, without waiting until the loop reports its end.

        For lack of memory, a client that is not being answered is told to come back (503).
        """
        self._refused = True
        self._site.note_cut(reason, self._address)
        self._free(self._received)
        self._note_unsent(0)
        tell = reason == "memory" and not self._request_in_progress
        if tell:
            self._wire.write(_TURNED_AWAY)
        self.force_close()
        if not tell:
            self._wire.abort()  # close() would wait until the client has taken the rest
        self._parser = None
        woken = self._waiter is not None and self._waiter.done()  # aiohttp's task is about to take the first message
        self._messages.clear()
        if woken:
            self._messages.append(_error(BadHttpMessage("cut")))
        with suppress(Exception):  # the body may be in any state; a handler that reads it gets an error from aiohttp
            self._body.read_nowait()

    @property
    def arriving(self) -> bool:
        """Whether a request is incomplete: the first has not come yet, or one has begun."""
        return self._head_since is not None or not self._body.is_eof()

    @property
    def unheard(self) -> bool:
        """Whether the client has no answer yet to a request, or is sending one."""
        return self._request_count > self._answered or self.arriving

    @property
    def unfinished(self) -> bool:
        """Whether an answer is being made or sent."""
        return self._request_in_progress or bool(self._messages) or self._wire.get_write_buffer_size() > 0

    def finish(self) -> None:
        """Ends the connection when all complete requests are answered; an incomplete one is cut."""
        if not self._body.is_eof() or (self._head_since is not None and not self._request_in_progress):
            self.cut("stop")
        elif self._request_in_progress or self._messages:
            self.close()
        else:
            self.force_close()  # aiohttp's close() leaves an idle one open

    # -- what it answers

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Called by aiohttp to send an answer."""
        if isinstance(resp, Ready):
            resp = resp.ordinary() if self._site.closing else resp.to(request)
        if self._site.closing:
            resp.force_close()  # "Connection: close" tells the client not to send another request on it
        done = await super().finish_response(request, resp, start_time)
        self._answered += 1
        if self._held:
            kept = 0 if self._head_since is None else self._left + self._fed
            waiting = len(self._messages)
            # Frees the bytes of this request; several requests in a row are taken for equally long
            self._free(max(0, self._held - kept) // (waiting + 1) if waiting or kept else self._held)
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
    """Cancels the handler if its client leaves meanwhile. For handlers that change nothing and may take long."""
    connection = cast(Connection, request.protocol)  # a Site makes no other connections
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


_TWICE = re.compile(r"Duplicate '([A-Za-z-]{1,40})' header found\.")  # for names of a list in aiohttp
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


class Site(web.BaseSite):
    """One listener: serves a runner's requests on a socket, with at most `most` connections.

    `malformed` makes the answer to malformed HTTP from the reason; `listener` is its name in the configuration and the
    log. With `tls` it speaks TLS; it may be replaced, for new connections.
    """

    __slots__ = (
        "_acceptor",
        "_by_address",
        "_connecting",
        "_connection",
        "_open",
        "_patrol",
        "_socket",
        "bounds",
        "closing",
        "connections",
        "cuts",
        "direct",
        "handshakes_failed",
        "keepalive_s",
        "knows",
        "listener",
        "malformed",
        "most",
        "share",
        "stop_within_s",
        "tls",
        "trusted_proxies",
        "turned_away",
    )

    def __init__(
        self,
        runner: web.BaseRunner,
        listening: socket.socket,
        malformed: Callable[[str], web.Response],
        listener: str,
        hearing: Hearing,
        bounds: Bounds,
        tls: ssl.SSLContext | None = None,
        connection: type[Connection] = Connection,
    ) -> None:
        super().__init__(runner)
        self._connection = connection
        self.listener = listener
        self._socket = listening
        self._acceptor = Acceptor(
            listening,
            self._admit,
            lambda reason: hearing.lost(listener, reason),
            lambda: hearing.regained(listener),
        )
        self._connecting: set[asyncio.Task[None]] = set()
        self._by_address: Counter[str] = Counter()
        self._open: set[Connection] = set()
        self._patrol: asyncio.TimerHandle | None = None
        self.bounds = bounds
        self.tls = tls
        self.malformed = malformed
        self.most = CONNECTIONS_MAX
        self.share = SHARES[listener]
        self.trusted_proxies: Sequence[Network] = ()
        self.keepalive_s = KEEPALIVE_S
        self.knows: Callable[[Any], bool] = lambda head: False  # whether a head shows that its sender is known
        # Begins to handle a request that needs no task of its own; None for other requests
        self.direct: Callable[[Any], Coroutine[Any, Any, web.StreamResponse] | None] = lambda request: None
        self.stop_within_s = 10.0  # how long a stop waits for answers
        self.connections = 0  # open now, those in their TLS handshake included
        self.handshakes_failed = dict.fromkeys(handshakes.REASONS, 0)
        self.turned_away = {"listener": 0, "address": 0}  # connections beyond `most`, or beyond an address's share
        self.cuts = dict.fromkeys(CUTS, 0)  # connections cut, by reason
        self.closing = False

    @property
    def name(self) -> str:
        """The address, for aiohttp."""
        return str(self._socket.getsockname())

    async def start(self) -> None:
        """Begins to accept connections."""
        await super().start()
        self._acceptor.start()

    async def stop(self) -> None:
        """Stops accepting, and waits for requests of clients that were accepted, who cannot know that it stops.

        Requests that have arrived whole are then answered, within `stop_within_s`.
        """
        until = asyncio.get_running_loop().time() + self.stop_within_s
        self.closing = True
        self._acceptor.close()
        await super().stop()
        if self._connecting or self._open:
            await asyncio.sleep(HEARD_S)
        await self._until(
            lambda: not self._connecting and not any(one.unheard for one in self._open), HEARD_WITHIN_S - HEARD_S
        )
        for task in self._connecting:  # handshakes that take too long
            task.cancel()
        for one in list(self._open):
            one.finish()
        left_s = until - asyncio.get_running_loop().time()
        await self._until(lambda: not any(one.unfinished for one in self._open), left_s)
        for one in list(self._open):
            if one.unfinished:
                one.cut("stop")
        if self._patrol is not None:
            self._patrol.cancel()

    @staticmethod
    async def _until(condition: Callable[[], bool], within_s: float) -> None:
        """Waits until the condition is true, for `within_s` at most."""
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while loop.time() < end:
            if condition():
                break
            await asyncio.sleep(0.01)

    def _admit(self, accepted: socket.socket, peer: Any) -> None:
        """Serves a connection, or turns it away if the listener or its address has too many."""
        address = self._counted_as(peer)
        limit = None
        if self.connections >= self.most:
            limit = "listener"
        elif address is not None and self._by_address[address] >= max(1, self.most // self.share):
            limit = "address"
        if limit is not None:
            self.turned_away[limit] += 1
            facts = {"limit": limit, "connections": self.connections, "address": address}
            log.warning("http.turned_away", listener=self.listener, **facts)
            if self.tls is None:
                turn_away(accepted)
            else:
                accepted.close()  # the client expects a TLS handshake, not an answer
            return
        self.connections += 1
        if address is not None:
            self._by_address[address] += 1
        task = asyncio.get_running_loop().create_task(self._connect(accepted, peer, address))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, accepted: socket.socket, peer: Any, address: str | None) -> None:
        server = self._runner.server
        assert server is not None  # noqa: S101 - BaseSite has checked it
        connection, context = self._connection(server, self, address), self.tls
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, accepted, **handshakes.options(context, accepted)
            )
        except OSError as error:  # the handshake failed, or the client has gone
            if context is None:
                log.debug("http.not_connected", listener=self.listener, address=address, error=type(error).__name__)
            else:
                from_where = peer[0] if isinstance(peer, tuple) else None
                self.handshakes_failed[handshakes.tell(error, self.listener, from_where)] += 1
        finally:
            if not connection.made:
                accepted.close()
                self._leave(address)

    def _leave(self, address: str | None) -> None:
        """Counts the end of a connection."""
        self.connections -= 1
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def made(self, connection: Connection) -> None:
        """A connection has got its transport."""
        self._open.add(connection)
        self.bounds.open.add(connection)
        if self._patrol is None:
            self._patrol = asyncio.get_running_loop().call_later(PATROL_S, self._look_round)

    def lost(self, connection: Connection, address: str | None) -> None:
        """A connection has ended."""
        self._open.discard(connection)
        self.bounds.open.discard(connection)
        self._leave(address)

    def note_cut(self, reason: str, address: str | None) -> None:
        """Counts and logs a connection that was cut."""
        self.cuts[reason] += 1
        log.warning("http.cut", listener=self.listener, reason=reason, address=address)

    def _look_round(self) -> None:
        """Checks every connection, as long as there are any. A timer for each head would cost more."""
        loop = asyncio.get_running_loop()
        for one in list(self._open):
            one.look(loop.time())
        self._patrol = loop.call_later(PATROL_S, self._look_round) if self._open else None

    def _counted_as(self, peer: Any) -> str | None:
        """The address for which a connection is counted: the peer's, or its IPv6 network of 64 bits, as one customer
        has.

        None for trusted proxies and unix sockets, for which there is no limit for one address.
        """
        if not isinstance(peer, tuple):
            return None
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if inside(address, self.trusted_proxies):
            return None
        if address.version == 4:
            return str(address)
        return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"


class _Request(web.Request):
    """A request to the private side. Its answer has no Server header."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        await super()._prepare_hook(response)
        response.headers.popall(hdrs.SERVER, None)


class _BaseRequest(web.BaseRequest):
    """A request to the public side. Its answer has no Server header."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.popall(hdrs.SERVER, None)


def public_request(
    message: RawRequestMessage, payload: Any, protocol: Any, writer: Any, task: "asyncio.Task[None]"
) -> web.BaseRequest:
    """Makes the requests of a web.Server."""
    return _BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())


def private_request(make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    """The function that makes the requests of a web.Application, from aiohttp's own."""
    return partial(make, _cls=_Request)
