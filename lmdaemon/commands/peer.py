"""Finds out which user listens at the other end of a connection on this machine.

While the daemon is down, any user can listen at its address and wait for a command that sends a token. Only Linux tells
which user a listener belongs to.
"""

import ipaddress
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENING = "0A"  # TCP_LISTEN of the kernel's tcp_states.h
_EVERY = (ipaddress.IPv4Address("0.0.0.0"), ipaddress.IPv6Address("::"))  # noqa: S104 - searched for, not bound to
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of the process that called listen(): unix(7)


class NobodyError(Exception):
    """Nobody listens any more at the address of the connection."""


def listener(connection: Any) -> int | None:
    """The id of the user who listens at the other end of a connected socket.

    None if it cannot be known, as on another machine or another system than Linux. Raises NobodyError.
    """
    if not sys.platform.startswith("linux"):
        return None
    if connection.family == socket.AF_UNIX:
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(found)[1])
    there, port = connection.getpeername()[:2]
    address = _plain(there)
    if not address.is_loopback and address != _plain(connection.getsockname()[0]):
        return None
    listeners = _listeners(port)
    if listeners is None:
        return None
    for one in (address, *_EVERY):  # the kernel prefers the listener with the exact address
        if one in listeners:
            return listeners[one]
    raise NobodyError


def _listeners(port: int) -> dict[Address, int] | None:
    """The users who listen on a TCP port, by address. None where the system has no such table.

    Source: proc_net_tcp in the kernel's documentation.
    """
    found: dict[Address, int] = {}
    told = False
    for table in _TABLES:
        with suppress(OSError):
            rows = table.read_text().splitlines()[1:]
            told = True
            for row in rows:
                _, local, _, state, _, _, _, uid, *_ = row.split()
                address, _, its_port = local.partition(":")
                if state == _LISTENING and int(its_port, 16) == port:
                    words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
                    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
                    found[_plain(str(ipaddress.ip_address(packed)))] = int(uid)
    return found if told else None


def _plain(text: str) -> Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
