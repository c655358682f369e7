"""Binds listening sockets, accepts connections on them, and says when that is impossible."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmdaemon import systemd
from lmdaemon.clock import ServiceClock
from lmdaemon.config.values import Listen
from lmdaemon.log import Log

BACKLOG = 512  # connections that the kernel keeps until they are accepted
ACCEPTS_AT_ONCE = 64  # connections accepted in one turn of the event loop
ACCEPT_AGAIN_S = 0.1  # wait after accepting has failed
# How long accepting must work again before the service clock goes on, so that touches that wait in the kernel are taken
# before sessions can end
ACCEPTING_S = 1.0

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

log = Log("http")


class Hearing:
    """The listeners that cannot accept connections now, with the reason (`deaf`).

    While there is such a listener, touches may not arrive, so the service clock is stopped and no session gets idle.
    """

    def __init__(self, clock: ServiceClock) -> None:
        self._clock = clock
        self.deaf: dict[str, str] = {}

    def lost(self, listener: str, reason: str) -> None:
        """A listener cannot accept connections."""
        if listener not in self.deaf:
            log.error("http.cannot_accept", listener=listener, reason=reason, note="sessions do not get idle meanwhile")
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
        """Stops accepting and closes the socket. A socket that systemd has handed over stays open in systemd."""
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
        """Stops watching the socket for ACCEPT_AGAIN_S: a connection that cannot be accepted would wake the loop at
        each turn.
        """
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        if self._timer is not None:
            self._timer.cancel()
        self._failing = True
        self._timer = loop.call_later(ACCEPT_AGAIN_S, self._try_again)
        self._lost(error.strerror or str(error))

    def _try_again(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        self._accept()  # fails without a free descriptor even if no client waits, so success shows that one is free


def turn_away(accepted: socket.socket, answer: bytes) -> None:
    """Sends an answer without a request, and closes the connection.

    What the client has sent is read first. Closing with unread bytes would send a reset, and many clients then lose the
    answer.
    """
    with accepted, suppress(OSError):
        accepted.send(answer)
        accepted.shutdown(socket.SHUT_WR)
        accepted.recv(65536)


def address_of(listen: Listen) -> systemd.Address:
    """The address to bind a socket to: a path, or host and port. Raises OSError, which names the address."""
    if listen.unix:
        return listen.unix
    host, port, *_ = _resolved(listen)[4]
    return host, port


def _resolved(listen: Listen) -> Any:
    """The first address of a host and port, from getaddrinfo. Raises OSError, which names the address."""
    try:
        first, *_ = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {listen.text}: {error.strerror}") from error
    return first


def bind(listen: Listen) -> socket.socket:
    """A bound socket. A unix socket gets mode 0660 and replaces a socket file that nobody serves. Raises OSError, which
    names the address.
    """
    if listen.unix:
        return _bind_unix(listen)
    family, kind, protocol, _, address = _resolved(listen)
    try:
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(address)
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {listen.text}: {error.strerror}") from error
    bound.setblocking(False)
    return bound


def _bind_unix(listen: Listen) -> socket.socket:
    path = Path(listen.unix)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()
        umask = os.umask(0o117)
        try:
            bound.bind(str(path))
        finally:
            os.umask(umask)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {listen.text}: {error.strerror}") from error
    bound.setblocking(False)
    return bound


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
