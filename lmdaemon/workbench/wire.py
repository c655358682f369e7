"""Sends the requests of a check run: limits their number and rate, and keeps them with their answers. It uses the
daemon's own client, so answers are read and judged as in production.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from yarl import URL

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.delivery.sender import Sender, Unreachable
from lmdaemon.workbench.exchanges import Answer, Asked, Exchange

REQUESTS_MAX = 120  # requests in a run
PER_SECOND = 5  # the most requests in any second
SILENT_MAX = 3  # requests in a row without an answer, after which nothing more is sent
_FOREVER_S = 1e9
_SILENT = ("timeout", "connect", "dns", "tls", "private_address")  # causes that count as no answer


class Stopped(Exception):  # noqa: N818 - a result: nothing more is sent, for the reason given
    """No request may be sent any more: all REQUESTS_MAX are used up, or SILENT_MAX in a row had no answer."""


class Wire:
    """Sends to the operator's URL, at most `per_second` requests in any second (None: no limit). `exchanges` keeps
    all exchanges.
    """

    def __init__(self, operator: Operator, clock: Clock, *, per_second: int | None = PER_SECOND) -> None:
        self.operator = operator
        self.clock = clock
        self.exchanges: list[Exchange] = []
        self.sent = 0
        self._per_second = per_second
        self._used_at: list[float] = []  # of each request of the last second: when it was answered, else when allowed
        self._silent = 0
        self._reused = False
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(self._on_reuse)
        self._sender = Sender(clock)
        self._idle = Sender(clock, keepalive_s=_FOREVER_S, traces=[trace])

    async def close(self) -> None:
        """Closes all connections."""
        await self._sender.close()
        await self._idle.close()

    def at_once(self, wanted: int) -> int:
        """How many requests may be sent at the same moment, `wanted` at most."""
        return min(wanted, self._per_second or wanted)

    @property
    def left(self) -> int:
        """How many requests may still be sent."""
        return REQUESTS_MAX - self.sent

    async def _on_reuse(self, *_: Any) -> None:
        self._reused = True

    async def take(self, count: int = 1) -> None:
        """Waits until `count` requests may be sent at once. Raises Stopped."""
        if self._silent >= SILENT_MAX:
            raise Stopped(f"{SILENT_MAX} requests in a row got no answer")
        if self.left < count:
            raise Stopped(f"the limit of {REQUESTS_MAX} requests is reached")
        self.sent += count
        if self._per_second is not None:
            while (wait_s := self._wait_s(count, self._per_second)) > 0:  # noqa: ASYNC110 - it waits for a time
                await asyncio.sleep(wait_s)
            self._used_at += [time.monotonic()] * count

    def _wait_s(self, count: int, per_second: int) -> float:
        now = time.monotonic()
        self._used_at = sorted(at for at in self._used_at if now - at < 1)
        over = min(len(self._used_at) + count - per_second, len(self._used_at))
        return self._used_at[over - 1] + 1 - now if over > 0 else 0.0

    def _answered(self, began: float) -> None:
        """Counts a request from its answer on: its way to the endpoint may have taken long, but by now it has come."""
        if self._per_second is not None:
            allowed = [at for at in self._used_at if at <= began]
            if allowed:
                self._used_at.remove(max(allowed))
            self._used_at.append(time.monotonic())

    async def send(self, body: bytes, headers: Mapping[str, str], **options: Any) -> Exchange:
        """Sends one request when it may be sent. Raises Stopped."""
        await self.take()
        return await self.send_now(body, headers, **options)

    async def send_now(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        method: str = "POST",
        url: URL | None = None,
        operator: Operator | None = None,
        slowly: AsyncIterator[bytes] | None = None,
        keep: bool = False,
        silence_counts: bool = True,
    ) -> Exchange:
        """Sends one request, for which `take` was called. `slowly` yields the parts of the body, in place of `body`.
        `keep` uses the one connection that stays open for the whole run.
        """
        asked = operator or self.operator
        sender = self._idle if keep else self._sender
        self._reused = False
        began = time.monotonic()
        answer, cause, detail = None, "", ""
        try:
            answer = Answer(*await sender.ask(asked, headers, slowly or body, method=method, url=url))
        except Unreachable as error:
            cause, detail = error.cause, error.detail
        finally:
            self._answered(began)
        took_ms = round((time.monotonic() - began) * 1000)
        shown_url = str(url) if url is not None else asked.url
        request = Asked(method, shown_url, headers, body)
        exchange = Exchange(request, answer, cause, detail, took_ms, reused=self._reused)
        if silence_counts:
            self._silent = self._silent + 1 if cause in _SILENT else 0
        self.exchanges.append(exchange)
        return exchange
