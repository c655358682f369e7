"""Talks to systemd: state messages (sd_notify(3)) and sockets that it hands over (sd_listen_fds(3)).

Without systemd nothing happens. Written by hand, because the packages for it are abandoned or need a binary wheel for
these few lines.
"""

import errno
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

FIRST_FD = 3  # SD_LISTEN_FDS_START

Address = str | tuple[str, int]  # of a listening socket: a path, or host and port


class Notifier:
    """Sends state to the service manager. Its variables are removed from the environment, so that no child has them.

    Raises OSError, which names the variable and its socket, if that cannot be sent to.
    """

    def __init__(self, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        watchdog_pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self._socket: socket.socket | None = None
        # How often to feed the watchdog: half the limit, as sd_watchdog_enabled(3) advises. None: there is no watchdog.
        self.watchdog_s = int(watchdog_us) / 2e6 if watchdog_us.isdigit() and watchdog_pid == str(os.getpid()) else None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            try:
                self._socket.connect("\0" + address[1:] if address[0] == "@" else address)
            except OSError as error:
                self.close()
                raise OSError(error.errno, f"NOTIFY_SOCKET: {address}: {error.strerror or error}") from error

    def send(self, **state: str) -> None:
        """Sends one datagram, as in `send(READY="1", STATUS="…")`. Failures are ignored: they are no reason to stop."""
        if self._socket is None:
            return
        with suppress(OSError):
            self._socket.send(
                "\n".join(f"{key}={value}" for key, value in state.items()).encode(errors="backslashreplace")
            )

    @property
    def listening(self) -> bool:
        """Whether there is a service manager to talk to."""
        return self._socket is not None

    def reloading(self) -> None:
        """Sends RELOADING with its time stamp, which Type=notify-reload needs and Type=notify ignores."""
        self.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def starting(self, within_s: float, status: str) -> None:
        """Says that the start may take `within_s` from now on, even if TimeoutStartSec is shorter."""
        self.send(EXTEND_TIMEOUT_USEC=_usec(within_s), STATUS=status)

    def stopping(self, within_s: float, status: str) -> None:
        """Says that the daemon stops, which may take `within_s`, even if TimeoutStopSec is shorter."""
        self.send(STOPPING="1", EXTEND_TIMEOUT_USEC=_usec(within_s), STATUS=status)

    def close(self) -> None:
        """Closes the socket; nothing is sent any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _usec(seconds: float) -> str:
    return str(int(seconds * 1e6))


def listening_sockets(environment: "os._Environ[str] | dict[str, str]" = os.environ) -> list[tuple[str, socket.socket]]:
    """The sockets handed over by socket activation, each after its FileDescriptorName; empty without activation.

    Raises OSError, which names the socket, for one that connections cannot be accepted from.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for index in range(int(count)):
        name = names[index] if index < len(names) else ""
        try:
            found.append((name, _handed_over(FIRST_FD + index)))
        except OSError as error:
            which = f"file descriptor {FIRST_FD + index}" + (f" ({name})" if name else "")
            raise OSError(error.errno, f"LISTEN_FDS: {which}: {error.strerror or error}") from error
    return found


def _handed_over(descriptor: int) -> socket.socket:
    """The stream socket with this file descriptor. Raises OSError if it is no such socket, or a connection."""
    handed_over = socket.socket(fileno=descriptor)
    try:
        if handed_over.type != socket.SOCK_STREAM:
            raise OSError(errno.EOPNOTSUPP, "is no stream socket, which ListenStream= makes")
        if _is_connected(handed_over):
            raise OSError(errno.EINVAL, "is a connection, which Accept=yes makes")
    except OSError:
        handed_over.close()
        raise
    handed_over.setblocking(False)
    os.set_inheritable(handed_over.fileno(), False)
    return handed_over


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def assign(
    found: Sequence[tuple[str, socket.socket]], wanted: Mapping[str, Address]
) -> tuple[dict[str, socket.socket], list[socket.socket]]:
    """Assigns handed-over sockets to listeners, by name ("server", "api") or else by address.

    Returns the socket of each listener that has one, and the sockets that no listener uses.
    """
    assigned: dict[str, socket.socket] = {}
    for name, handed_over in found:
        if name in wanted:
            assigned.setdefault(name, handed_over)
    unused = [handed_over for _, handed_over in found if handed_over not in assigned.values()]
    for listener, address in wanted.items():
        same = [one for one in unused if address_of(one) == address]
        if same and listener not in assigned:
            assigned[listener] = same[0]
            unused.remove(same[0])
    return assigned, unused


def address_of(bound: socket.socket) -> Address:
    """The address that a socket is bound to: a path, or host and port."""
    at = bound.getsockname()
    return at[:2] if isinstance(at, tuple) else os.fsdecode(at)
