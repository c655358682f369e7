"""The two listeners: who is let in, how long a request may take to arrive, and how much memory strangers may hold.

Used by `daemon`, and by `api` to end what its client no longer waits for; the only module that knows aiohttp's server
from inside. It must not let one client, or one listener, take what the others need: connections, file descriptors,
memory.
"""

import asyncio
import errno
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from aiohttp import web

from lmdaemon import handshakes, http
from lmdaemon.clock import ServiceClock
from lmdaemon.config import Network
from lmdaemon.http import BACKLOG, Ready, inside
from lmdaemon.log import Log

HEAD_TIMEOUT_S = 10.0  # from the connect, or a later head's first byte, to the end of the head
KEEPALIVE_S = 75.0  # for which a connection may wait for its next request
WRITE_TIMEOUT_S = 30.0  # for which a client may take nothing of its answers
TAKEN_MIN = 4096  # bytes; a client that has taken less in that time has stalled
PATROL_S = 2.0  # how often the connections are looked at for the two times above; the precision of both

CONNECTIONS_MAX = 2000  # to one listener, where the files that may be open allow it
FILES_OWN = 64  # that the daemon has open besides connections: database, log, loop, lookups, what a plug-in may need
SHARES = {"server": 4, "api": 2}  # one address has at most one part in so many of a listener's connections
LINE_MAX = 4096  # bytes of the request line
HEADERS_MAX = 64  # and 8190 bytes each, aiohttp's own limit
HEAD_MAX = 32 * 1024  # bytes of all of it

ACCEPTS_AT_ONCE = 64  # then the other sockets get their turn
ACCEPT_AGAIN_S = 0.1  # after a failure
ACCEPTING_S = 1.0  # for which accepting has to work again before idleness passes: those who waited are heard first

# At a stop: what a client gets to ask that was let in but has asked nothing yet, or to end what it has begun; and what
# everybody gets whose request may be on the way.
HEARD_WITHIN_S = 1.0
HEARD_S = 0.05

# Of one connection that ended while it waited; the next may be had. Source: accept(2), "Error handling"
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
_TURNED_AWAY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

log = Log("http")


def connections_max(files: int, attempts: int) -> int:
    """How many connections each listener may have in a process that may open so many files and make so many attempts
    to deliver at the same time. The attempts get at most half of the files; the listeners get the same, so that neither
    takes what the other needs.
    """
    left = files - FILES_OWN - min(attempts, files // 2)
    return max(1, min(CONNECTIONS_MAX, left // 2))


class Hearing:
    """Which listeners cannot accept at the moment, and why. While there is one, touches may go unheard, so no idleness
    passes.
    """

    def __init__(self, clock: ServiceClock) -> None:
        self._clock = clock
        self.deaf: dict[str, str] = {}

    def lost(self, listener: str, reason: str) -> None:
        if listener not in self.deaf:
            log.error("http.cannot_accept", listener=listener, reason=reason, note="no idleness passes meanwhile")
        self.deaf[listener] = reason
        self._clock.freeze("listening")

    def regained(self, listener: str) -> None:
        if self.deaf.pop(listener, None) is not None:
            log.info("http.accepting_again", listener=listener)
        if not self.deaf:
            self._clock.thaw("listening")


class Acceptor:
    """Accepts on a listening socket and hands every connection to `admit`, with its peer's address.

    The loops' own servers do not tell when a file descriptor is missing: asyncio's sleeps for a second, uvloop's closes
    the connection. Here `lost(reason)` is told of it at once, `regained()` when accepting has worked for ACCEPTING_S.
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
        self._socket.listen(BACKLOG)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Accepts nobody more and closes the socket; one that systemd has handed over stays open there."""
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
        """Tries again later: until then the socket would wake the loop at each turn."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        if self._timer is not None:
            self._timer.cancel()
        self._failing = True
        self._timer = loop.call_later(ACCEPT_AGAIN_S, self._try_again)
        self._lost(error.strerror or str(error))

    def _try_again(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        self._accept()  # without a descriptor to be had it fails also when nobody waits, so success means something


def turn_away(accepted: socket.socket, peer: object = None) -> None:
    """Tells a client to come back later, and closes."""
    with accepted, suppress(OSError):
        accepted.send(_TURNED_AWAY)


class Connection(web.RequestHandler):
    """A connection with what aiohttp leaves open: a limit to the time for its first request, an answer to what is no
    HTTP that does not repeat it, and an end that cuts no request off.
    """

    __slots__ = ("_address", "_answered", "_head_timer", "_site", "made", "reader")

    def __init__(self, server: web.Server, site: "Site", address: str | None) -> None:
        options: Any = {
            "access_log": None,
            "keepalive_timeout": KEEPALIVE_S,
            "max_line_size": LINE_MAX,
            "max_headers": HEADERS_MAX,
            "lingering_time": http.BODY_TIMEOUT_S,  # for what is left of a body that nobody wanted
            "auto_decompress": False,  # a compressed body is refused by its header, so it must not be unpacked before
        }
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._site = site
        self._address = address
        self._answered = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self.made = False  # it has a transport, or had one
        self.reader: asyncio.Task[Any] | None = None  # a handler that is of no use when the client leaves

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made = True
        super().connection_made(transport)
        self._head_timer = asyncio.get_running_loop().call_later(HEAD_TIMEOUT_S, self._cut)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._site.left(self._address)
        if self._head_timer is not None:
            self._head_timer.cancel()
        if self.reader is not None:
            self.reader.cancel()
        super().connection_lost(exc)

    @property
    def unheard(self) -> bool:
        """Whether its client has been let in and has no answer yet."""
        return self._request_count == 0 or self._request_count > self._answered

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if self._site.closing:
            resp = resp.ordinary() if isinstance(resp, Ready) else resp
            resp.force_close()  # the client is told, and does not ask on a connection that is about to end
        done = await super().finish_response(request, resp, start_time)
        self._answered += 1
        return done

    def _cut(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        log.debug("http.malformed", peer=request.remote, error=type(exc).__name__)
        malformed = self._site.malformed
        answer = web.Response(body=malformed.body, status=status, content_type=malformed.content_type)
        answer.force_close()
        return answer


@contextmanager
def until_client_leaves(request: web.BaseRequest) -> Iterator[None]:
    """Cancels the handler when its client leaves meanwhile: for what changes nothing and takes its time."""
    connection = cast(Connection, request.protocol)  # a Site makes no other
    connection.reader = asyncio.current_task()
    try:
        yield
    finally:
        connection.reader = None


class Site(web.BaseSite):
    """Serves a runner's requests on a socket, to at most `most` connections at a time. `malformed` answers what is no
    HTTP; `listener` is its name in the configuration and the log. With `tls`, which may be replaced for the connections
    to come, it speaks TLS.
    """

    __slots__ = (
        "_acceptor",
        "_by_address",
        "_connecting",
        "_socket",
        "closing",
        "connections",
        "handshakes_failed",
        "listener",
        "malformed",
        "most",
        "share",
        "tls",
        "trusted_proxies",
        "turned_away",
    )

    def __init__(
        self,
        runner: web.BaseRunner,
        listening: socket.socket,
        malformed: web.Response,
        listener: str,
        hearing: Hearing,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner)
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
        self.tls = tls
        self.malformed = malformed
        self.most = CONNECTIONS_MAX
        self.share = SHARES[listener]
        self.trusted_proxies: Sequence[Network] = ()
        self.connections = 0  # open now, those still shaking hands included
        self.handshakes_failed = dict.fromkeys(handshakes.REASONS, 0)
        self.turned_away = {"listener": 0, "address": 0}  # connections beyond `most`, or beyond an address's share
        self.closing = False

    @property
    def name(self) -> str:
        return str(self._socket.getsockname())

    async def start(self) -> None:
        await super().start()
        self._acceptor.start()

    async def stop(self) -> None:
        """Accepts nobody more, and hears those who were: they cannot know that their request comes too late."""
        server, loop = self._runner.server, asyncio.get_running_loop()
        self.closing = True
        self._acceptor.close()
        await super().stop()
        since = loop.time()
        while server is not None and (waited_s := loop.time() - since) < HEARD_WITHIN_S:
            unheard = self._connecting or any(one.unheard for one in server.connections if isinstance(one, Connection))
            if waited_s >= HEARD_S and not unheard:
                break
            await asyncio.sleep(0.01)
        for task in self._connecting:  # a handshake that hangs
            task.cancel()

    def _admit(self, accepted: socket.socket, peer: Any) -> None:
        """Serves a connection, unless the listener or its address has as many as it may."""
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
                accepted.close()  # it waits for a handshake, and would not understand
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
        connection, context = Connection(server, self, address), self.tls
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
                self.left(address)

    def left(self, address: str | None) -> None:
        """One of its connections has ended."""
        self.connections -= 1
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _counted_as(self, peer: Any) -> str | None:
        """Whose share a connection comes out of: the peer's address, of IPv6 the network of 64 bits that one customer
        has; None for those without a share, which are trusted proxies and unix sockets.
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
