"""The two listeners: each serves connections on its socket, and limits their number.

No client may use up the connections, file descriptors and memory that other clients need, and neither listener those
that the other one needs.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http import RawRequestMessage

from lmdaemon.config.values import Network
from lmdaemon.log import Log
from lmdaemon.store.contract import Submit
from lmdaemon.web import handshakes
from lmdaemon.web.connection import Begin, Connection
from lmdaemon.web.memory import Bounds
from lmdaemon.web.requests import Head, inside
from lmdaemon.web.sockets import Acceptor, Hearing, turn_away

KEEPALIVE_S = 75.0  # how long a connection may wait for its next request
FILES_OWN = 64  # files kept for everything but connections: database, log, event loop, lookups, plug-ins
CUTS = ("head", "reader", "memory", "stop")  # why a connection is cut
SHARES = {"server": 4, "api": 2}  # one address may have a quarter of the server's connections, half of the API's

log = Log("http")


def connections_max(files: int, attempts: int, most: int) -> int:
    """How many connections each of the two listeners may have: `most`, or fewer if the limit of open files is low.

    `files` is that limit, and `attempts` the number of simultaneous attempts to deliver, for which at most half of the
    files are set aside.
    """
    left = files - FILES_OWN - min(attempts, files // 2)
    return max(1, min(most, left // 2))


class Site(web.BaseSite):
    """One listener: serves at most `most` connections on a socket, and only a share of these from one address. It turns
    others away with 503, or with TLS without an answer. A runner handles the requests.

    `malformed` makes the answer to malformed HTTP from the reason, `unavailable` the one to a client whose request is
    not read; `listener` is its name in the configuration and the log. With `tls` it speaks TLS; if `tls` is replaced,
    the new one is for new connections.
    """

    __slots__ = (
        "_acceptor",
        "_by_address",
        "_connecting",
        "_connection",
        "_open",
        "_patrol",
        "_socket",
        "begin",
        "bounds",
        "closing",
        "connections",
        "cuts",
        "handshakes_failed",
        "keepalive_s",
        "knows",
        "listener",
        "malformed",
        "most",
        "share",
        "stop_within_s",
        "submit",
        "tls",
        "trusted_proxies",
        "turned_away",
        "unavailable",
    )

    def __init__(
        self,
        runner: web.BaseRunner,
        listening: socket.socket,
        malformed: Callable[[str], web.Response],
        unavailable: Callable[[str], bytes],
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
        self.unavailable = unavailable
        self.most = bounds.limits.connections_max
        self.share = SHARES[listener]
        self.trusted_proxies: Sequence[Network] = ()
        self.keepalive_s = KEEPALIVE_S
        # Whether the head of a request has a valid token, so that its bytes count as a known client's (see `memory`)
        self.knows: Callable[[Head], bool] = lambda head: False
        self.begin: Begin = lambda *_: None  # for requests that `hot` may serve
        self.submit: Submit  # stores the change of a request that was begun; set together with `begin`
        self.stop_within_s = 10.0  # how long a stop waits for answers
        self.connections = 0  # open now, those in their TLS handshake included
        self.handshakes_failed = dict.fromkeys(handshakes.REASONS, 0)
        self.turned_away = {"listener": 0, "address": 0}  # connections beyond `most`, or beyond an address's share
        self.cuts = dict.fromkeys(CUTS, 0)  # connections cut, by reason
        self.closing = False

    @property
    def name(self) -> str:
        """The address as text, which aiohttp asks for."""
        return str(self._socket.getsockname())

    async def start(self) -> None:
        """Begins to accept connections."""
        await super().start()
        self._acceptor.start()

    async def stop(self) -> None:
        """Stops accepting, and ends all connections once their requests are answered.

        Clients cannot know of the stop, so they may still be sending requests. All of them have 50 ms for that. While
        a client has no answer yet or is in the middle of a request, the wait goes on, for 1 s in all. Requests that
        have arrived whole by then are answered. What is not answered `stop_within_s` after the call is cut.
        """
        until, limits = asyncio.get_running_loop().time() + self.stop_within_s, self.bounds.limits
        self.closing = True
        self._acceptor.close()
        await super().stop()
        if self._connecting or self._open:
            await asyncio.sleep(limits.heard_s)
        await self._until(
            lambda: not self._connecting and not any(one.unheard for one in self._open),
            limits.heard_within_s - limits.heard_s,
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
                turn_away(accepted, self.unavailable("too many connections"))
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
                lambda: connection, accepted, **handshakes.options(context, accepted, self.bounds.limits.handshake_s)
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
        """Notes a connection that has opened."""
        self._open.add(connection)
        self.bounds.open.add(connection)
        if self._patrol is None:
            self._patrol = asyncio.get_running_loop().call_later(self.bounds.limits.patrol_s, self._look_round)

    def lost(self, connection: Connection, address: str | None) -> None:
        """Notes a connection that has ended; `address` is the one that it was counted under."""
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
        self._patrol = loop.call_later(self.bounds.limits.patrol_s, self._look_round) if self._open else None

    def _counted_as(self, peer: Any) -> str | None:
        """The address that a connection is counted under: the peer's IPv4 address, or the /64 network of its IPv6
        address, which usually belongs to one customer.

        None for trusted proxies and unix sockets, whose connections are not limited by address.
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
    """Makes a request of the public side; passed to its web.Server."""
    return _BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())


def private_request(make: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    """Returns the function that makes the requests of the private side, from aiohttp's own for a web.Application."""
    return partial(make, _cls=_Request)
