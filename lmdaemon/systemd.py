"""The service manager's side: sd_notify messages and sockets handed over. A no-op where systemd is not.

Called by `daemon` alone. Source: sd_notify(3), sd_listen_fds(3). Written by hand: the packages for it are abandoned, or
a binary wheel for these few lines.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

FIRST_FD = 3  # SD_LISTEN_FDS_START

Address = str | tuple[str, int]  # of a listening socket: a path, or host and port


class Notifier:
    """Sends state to the service manager, and takes its variables out of the environment: no child inherits them."""

    def __init__(self, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        watchdog_pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self._socket: socket.socket | None = None
        # Half the limit, as sd_watchdog_enabled(3) advises; None: nobody watches.
        self.watchdog_s = int(watchdog_us) / 2e6 if watchdog_us.isdigit() and watchdog_pid == str(os.getpid()) else None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            self._socket.connect("\0" + address[1:] if address[0] == "@" else address)

    def send(self, **state: str) -> None:
        """`send(READY="1", STATUS="…")`: one datagram; a manager that does not listen is no reason to stop."""
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
        """RELOADING with its time stamp, which Type=notify-reload needs and Type=notify ignores."""
        self.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def starting(self, within_s: float, status: str) -> None:
        """The start may take this long from now on: more than its TimeoutStartSec, where need be."""
        self.send(EXTEND_TIMEOUT_USEC=_usec(within_s), STATUS=status)

    def stopping(self, within_s: float, status: str) -> None:
        """STOPPING, which may take this long: more than its TimeoutStopSec, where need be."""
        self.send(STOPPING="1", EXTEND_TIMEOUT_USEC=_usec(within_s), STATUS=status)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _usec(seconds: float) -> str:
    return str(int(seconds * 1e6))


def listening_sockets(environment: "os._Environ[str] | dict[str, str]" = os.environ) -> list[tuple[str, socket.socket]]:
    """Sockets handed over by socket activation, with their FileDescriptorName; empty without it."""
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for index in range(int(count)):
        handed_over = socket.socket(fileno=FIRST_FD + index)
        handed_over.setblocking(False)
        os.set_inheritable(handed_over.fileno(), False)
        found.append((names[index] if index < len(names) else "", handed_over))
    return found


def assign(
    found: Sequence[tuple[str, socket.socket]], wanted: Mapping[str, Address]
) -> tuple[dict[str, socket.socket], list[socket.socket]]:
    """Which handed-over socket serves which listener: by name ("server", "api"), else by address. And those that serve
    none.
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
    """Path, or host and port, that a socket is bound to."""
    at = bound.getsockname()
    return at[:2] if isinstance(at, tuple) else os.fsdecode(at)
