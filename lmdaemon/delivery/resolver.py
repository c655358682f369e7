"""Looks up the names in operators' URLs.

A lookup must never delay another one or the exit of the process, nor return addresses of a network that is not allowed.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

from aiohttp.abc import AbstractResolver, ResolveResult

from lmdaemon.config.egress import private_address

LOOKUPS_MAX = 256  # most lookups of one resolver at the same time, a thread each


class Resolver(AbstractResolver):
    """Looks up names, each on a thread of its own.

    In a shared pool, a few names whose servers do not answer would delay all others, and the exit of the process. With
    `guarded`, a name is refused if any of its addresses is this machine's or in a private network. That is checked at
    every connect, because a name may lead elsewhere the next time.
    """

    def __init__(self, *, guarded: bool) -> None:
        self.running = 0  # lookups under way
        self._guarded = guarded

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name. Raises OSError."""
        if self.running >= LOOKUPS_MAX:
            raise OSError(None, "too many lookups hang")
        self.running += 1
        try:
            future = _on_a_thread(partial(_addresses, host, port, family), self._ended)
        except RuntimeError as error:  # the system allows no further thread
            self._ended()
            raise OSError(None, "too many lookups hang") from error
        found = await future
        if self._guarded and any(private_address(address["host"]) for address in found):
            raise OSError(None, "private_address")
        return found

    def _ended(self) -> None:
        self.running -= 1

    async def close(self) -> None:
        """Does nothing, because nothing is kept open."""


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [
        ResolveResult(
            hostname=host,
            host=f"{address[0]}%{address[3]}" if len(address) == 4 and address[3] else str(address[0]),
            port=port,
            family=kind,
            proto=protocol,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for kind, _, protocol, _, address in found
    ]


_Found = TypeVar("_Found")


def _on_a_thread(function: Callable[[], _Found], ended: Callable[[], None]) -> "asyncio.Future[_Found]":
    """Runs a function on a thread that does not delay the exit of the process; `ended` is called on the event loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Found] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        ended()
        if not future.done():  # the attempt may have run into its time-out
            set_it()

    def work() -> None:
        set_it: Callable[[], None]
        try:
            set_it = partial(future.set_result, function())
        except Exception as error:
            set_it = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: nothing waits for the result
            loop.call_soon_threadsafe(settle, set_it)

    Thread(target=work, name="lookup", daemon=True).start()
    return future
