"""Posts one body to one URL and reads the answer. What an answer means is decided in `retry`.

It must never read more of an answer than its bounds allow, follow a redirect, or accept an answer that came before its
request.
"""

import asyncio
import base64
import hashlib
import hmac
import math
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cache, partial

import aiohttp
from yarl import URL

from lmdaemon import tls
from lmdaemon.causes import Cause
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.config.target import Target
from lmdaemon.delivery.answers import READING, Answer, AnswerError, AnswerProtocol
from lmdaemon.delivery.exchange import Exchange, read_some
from lmdaemon.delivery.resolver import Resolver
from lmdaemon.dialects import type_of_body
from lmdaemon.version import __version__

ANSWER_MAX = 16 * 1024  # bytes read of an answer's body
# Servers close idle connections after 5 s (Node), 15 s or more. If one does so while a request is sent, the attempt has
# failed, because a POST is not repeated blindly (aiohttp#7363). So the daemon closes idle connections first.
KEEPALIVE_S = 4.0
# Parts of texts of asyncio and the system, which `_in_words` replaces or removes
_CONNECT = re.compile(r"\[Errno (\d+)\] Connect call failed \('([^']*)', (\d+)[^)]*\)")
_NUMBER = re.compile(r"\[Errno -?\d+\] ")


class Unreachable(Exception):  # noqa: N818 - a result, judged as a failed attempt
    """An attempt without an answer. `cause` is the word for why; `detail` says more, where more is known."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.detail = detail


class Sender:
    """Posts bodies to URLs. It has two client sessions: one for operators with private networks, one for the others.

    A connection is used again only with the TLS context it was made with, so not after a reload that changes the
    context. `keepalive_s` is how long an idle connection is kept; `traces` are aiohttp's trace configurations.
    """

    def __init__(
        self, clock: Clock, *, keepalive_s: float = KEEPALIVE_S, traces: Sequence[aiohttp.TraceConfig] = ()
    ) -> None:
        self._clock = clock
        self._keepalive_s = keepalive_s
        self._traces = list(traces)
        self._clients: dict[bool, aiohttp.ClientSession] = {}
        # By the operator's name; each is made again after a reload
        self._exchanges: dict[str, tuple[Operator, Exchange]] = {}

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
        self._exchanges.clear()

    def _client(self, *, guarded: bool) -> aiohttp.ClientSession:
        if guarded not in self._clients:
            connector = aiohttp.TCPConnector(
                limit=0,  # no shared limit, by which one operator could delay another; each lane has its own slots
                keepalive_timeout=self._keepalive_s,
                ttl_dns_cache=10,
                resolver=Resolver(guarded=guarded),
            )
            connector._factory = partial(AnswerProtocol, loop=asyncio.get_running_loop())  # type: ignore[assignment]
            self._clients[guarded] = aiohttp.ClientSession(
                connector=connector,
                response_class=Answer,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=READING["auto_decompress"],
                trust_env=False,
                max_line_size=READING["max_line_size"],
                max_field_size=READING["max_field_size"],
                max_headers=READING["max_headers"],
                trace_configs=self._traces,
            )
        return self._clients[guarded]

    async def post(
        self, operator: Operator, webhook_id: str, body: bytes, reached: Callable[[str], None] | None = None
    ) -> tuple[int, Mapping[str, str], bytes, bool]:
        """Makes one attempt at the operator's URL. `reached` is called with the address of the connection.

        Returns status, headers, at most ANSWER_MAX bytes of the body, and whether these are all of it. Raises
        Unreachable.
        """
        headers = request_headers(operator, webhook_id, body, self._clock.wall_ms() / 1000)
        exchange = self._exchange(operator)
        try:
            async with asyncio.timeout(operator.policy.timeout_s):
                return await exchange.post(headers, body, ANSWER_MAX, reached)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _unreachable(error) from error

    def _exchange(self, operator: Operator) -> Exchange:
        """The Exchange for the operator's URL, a new one after a reload. Raises Unreachable."""
        known, exchange = self._exchanges.get(operator.name, (None, None))
        if known is operator and exchange is not None:
            return exchange
        target = _reachable(operator)
        connector = self._client(guarded=not operator.allow_private_network).connector
        assert connector is not None  # noqa: S101 - the session is not closed
        context = operator.tls.context if target.url.scheme == "https" else None
        exchange = Exchange(connector, target.url, context)
        self._exchanges[operator.name] = (operator, exchange)
        return exchange

    async def ask(
        self,
        operator: Operator,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes],
        *,
        method: str = "POST",
        url: URL | None = None,
    ) -> tuple[int, Mapping[str, str], bytes, bool]:
        """Makes any request to the operator's URL, or to `url`, with the bounds of `post`. Raises Unreachable."""
        url = url or _reachable(operator).url
        try:
            response = await self._client(guarded=not operator.allow_private_network).request(
                method,
                url,
                ssl=operator.tls.context if url.scheme == "https" else True,
                data=body or None,
                headers=headers,
                allow_redirects=False,
                timeout=_deadline(operator.policy.timeout_s),
            )
            try:
                answer = await read_some(response.content, ANSWER_MAX + 1)
                if len(answer) > ANSWER_MAX:
                    response.close()  # to read the rest would cost more than a new connection
                return response.status, response.headers, answer[:ANSWER_MAX], len(answer) <= ANSWER_MAX
            finally:
                response.release()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _unreachable(error) from error


@cache
def _deadline(timeout_s: float) -> aiohttp.ClientTimeout:
    """One deadline for the whole attempt, to the millisecond.

    By default aiohttp rounds times of 5 s and more up to the next full second.
    """
    return aiohttp.ClientTimeout(total=timeout_s, ceil_threshold=math.inf)


def _reachable(operator: Operator) -> Target:
    """The operator's target. Raises Unreachable if its address is private and that is not allowed."""
    target = operator.target
    assert target is not None  # noqa: S101 - an operator without a URL has nothing to send
    if target.private and not operator.allow_private_network:
        raise Unreachable("private_address")  # checked here: aiohttp asks no resolver for a literal address
    return target


def _unreachable(error: Exception) -> Unreachable:
    """The cause of a failure. The exception's own text is not used, because it may have a URL with its query in it."""
    if isinstance(error, AnswerError):
        return Unreachable(error.cause, error.detail)
    if isinstance(error, TimeoutError):
        return Unreachable("timeout")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Unreachable("tls", _in_words(error.certificate_error))
    if isinstance(error, aiohttp.ClientConnectorError):
        found = _in_words(error.os_error)
        if "private_address" in found:
            return Unreachable("private_address")
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return Unreachable("dns", found)
        return Unreachable("tls" if isinstance(error, aiohttp.ClientSSLError) else "connect", found)
    if isinstance(error, ssl.SSLError):
        return Unreachable("tls", _in_words(error))
    if isinstance(error, aiohttp.ServerDisconnectedError | OSError):
        number = getattr(error, "errno", None)
        return Unreachable("connection_lost", os.strerror(number) if number else "")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Unreachable("incomplete_answer")
    return Unreachable("invalid_url" if isinstance(error, ValueError) else "bad_http", type(error).__name__)


def _in_words(error: Exception) -> str:
    """OpenSSL's or the system's words without their numbers: `connection refused at 192.0.2.1:443`."""
    if isinstance(error, ssl.SSLError):
        return tls.said(error)

    def refused(found: re.Match[str]) -> str:
        number, host, port = found.groups()
        return f"{os.strerror(int(number)).lower()} at {f'[{host}]' if ':' in host else host}:{port}"

    return _NUMBER.sub("", _CONNECT.sub(refused, str(error)))


def request_headers(operator: Operator, webhook_id: str, body: bytes, now_s: float) -> dict[str, str]:
    """The headers of one attempt: the unchanging id and, with signing keys, a new Standard Webhooks signature.

    The Content-Type is that of the body, which may be older than a reload that changed the dialect. Source: Standard
    Webhooks, "Webhook headers": HMAC-SHA256 over id.timestamp.body, one signature for each key.
    """
    headers = {
        "Content-Type": type_of_body(body) if body else operator.sends.content_type,
        "User-Agent": f"lmdaemon/{__version__}",
        "Accept-Encoding": "identity",
        "webhook-id": webhook_id,
    }
    if operator.target is not None and operator.target.authorization is not None:
        headers["Authorization"] = operator.target.authorization
    if operator.signing_keys:
        stamp = str(int(now_s))
        signed = f"{webhook_id}.{stamp}.".encode() + body
        signatures = (
            base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in operator.signing_keys
        )
        headers["webhook-timestamp"] = stamp
        headers["webhook-signature"] = " ".join(f"v1,{signature}" for signature in signatures)
    return headers
