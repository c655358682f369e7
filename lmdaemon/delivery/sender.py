"""Posts one body to one URL and reads the answer: the client's side of HTTP.

What an answer means is `retry`'s business, when to send is `dispatcher`'s. It must never read more of an answer than
its bounds allow, follow a redirect, or take for an answer what came before its request.
"""

import asyncio
import base64
import hashlib
import hmac
import math
import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache, partial

import aiohttp
from yarl import URL

from lmdaemon.causes import Cause
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.delivery.answers import HEAD_MAX, HEADERS_MAX, Answer, AnswerError, AnswerProtocol
from lmdaemon.delivery.resolver import Resolver
from lmdaemon.version import __version__

ANSWER_MAX = 16 * 1024  # bytes read of an answer's body
# Servers close idle connections after 5 s (Node), 15 s or more. One that closes as we send costs an attempt, for a POST
# is never repeated blindly (aiohttp#7363); so give a connection up before the other side does.
KEEPALIVE_S = 4.0


class Unreachable(Exception):  # noqa: N818 - a result, judged as a failed attempt
    """An attempt that got no answer: `detail` says more than the word, and is empty where there is no more to say."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.detail = detail


class Sender:
    """Posts bodies to URLs: one client session where private networks are allowed, one where they are not, for the life
    of the process.

    A connection belongs to the TLS context that it was made with: another context, as after a reload, never gets it.
    `keepalive_s` is how long an idle one is kept, `traces` are told of what aiohttp does.
    """

    def __init__(
        self, clock: Clock, *, keepalive_s: float = KEEPALIVE_S, traces: Sequence[aiohttp.TraceConfig] = ()
    ) -> None:
        self._clock = clock
        self._keepalive_s = keepalive_s
        self._traces = list(traces)
        self._clients: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    def _client(self, *, guarded: bool) -> aiohttp.ClientSession:
        if guarded not in self._clients:
            connector = aiohttp.TCPConnector(
                limit=0,  # a shared limit would couple operators; each lane has its own slots
                keepalive_timeout=self._keepalive_s,
                ttl_dns_cache=10,
                resolver=Resolver(guarded=guarded),
            )
            connector._factory = partial(AnswerProtocol, loop=asyncio.get_running_loop())  # type: ignore[assignment]
            self._clients[guarded] = aiohttp.ClientSession(
                connector=connector,
                response_class=Answer,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a compressed answer is read as bytes of bounded number, never unpacked
                trust_env=False,
                max_line_size=HEAD_MAX,
                max_field_size=HEAD_MAX,
                max_headers=HEADERS_MAX,
                trace_configs=self._traces,
            )
        return self._clients[guarded]

    async def post(
        self, operator: Operator, webhook_id: str, body: bytes
    ) -> tuple[int, Mapping[str, str], bytes, bool]:
        """One attempt at the operator's URL: status, headers, at most ANSWER_MAX bytes of the answer, and whether
        that was all of it.

        Raises Unreachable.
        """
        headers = request_headers(operator, webhook_id, body, self._clock.wall_ms() / 1000)
        return await self.ask(operator, headers, body)

    async def ask(
        self,
        operator: Operator,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes],
        *,
        method: str = "POST",
        url: URL | None = None,
    ) -> tuple[int, Mapping[str, str], bytes, bool]:
        """Any request, with the bounds of `post`, to the operator's URL or another one. Raises Unreachable."""
        target = operator.target
        assert target is not None  # noqa: S101 - without one there is nothing to post to
        if target.private and not operator.allow_private_network:
            raise Unreachable("private_address")  # aiohttp asks no resolver for a literal address
        url = url or target.url
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
                answer = await _read_some(response)
                if len(answer) > ANSWER_MAX:
                    response.close()  # the rest of it is not worth a connection
                return response.status, response.headers, answer[:ANSWER_MAX], len(answer) <= ANSWER_MAX
            finally:
                response.release()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _unreachable(error) from error


@cache
def _deadline(timeout_s: float) -> aiohttp.ClientTimeout:
    """For the whole attempt, to the millisecond: aiohttp rounds those of 5 s and more up to the next full second."""
    return aiohttp.ClientTimeout(total=timeout_s, ceil_threshold=math.inf)


async def _read_some(response: aiohttp.ClientResponse) -> bytes:
    answer = await response.content.read(ANSWER_MAX + 1)
    while len(answer) <= ANSWER_MAX and not response.content.at_eof():
        part = await response.content.read(ANSWER_MAX + 1 - len(answer))
        if not part:
            break
        answer += part
    return answer


def _unreachable(error: Exception) -> Unreachable:
    """The cause in a word. The exception's own text may hold a URL with its query, so it is not used."""
    if isinstance(error, AnswerError):
        return Unreachable(error.cause, error.detail)
    if isinstance(error, TimeoutError):
        return Unreachable("timeout")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Unreachable("tls", str(error.certificate_error))
    if isinstance(error, aiohttp.ClientConnectorError):
        found = str(error.os_error)
        if "private_address" in found:
            return Unreachable("private_address")
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return Unreachable("dns", found)
        return Unreachable("tls" if isinstance(error, aiohttp.ClientSSLError) else "connect", found)
    if isinstance(error, ssl.SSLError):
        return Unreachable("tls", str(error))
    if isinstance(error, aiohttp.ServerDisconnectedError | OSError):
        number = getattr(error, "errno", None)
        return Unreachable("connection_lost", os.strerror(number) if number else "")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Unreachable("incomplete_answer")
    return Unreachable("invalid_url" if isinstance(error, ValueError) else "bad_http", type(error).__name__)


def request_headers(operator: Operator, webhook_id: str, body: bytes, now_s: float) -> dict[str, str]:
    """Headers of one attempt: the id that never changes and, with signing keys, a fresh Standard Webhooks signature.

    Source: Standard Webhooks, "Webhook headers": HMAC-SHA256 over id.timestamp.body, one signature for each key.
    """
    headers = {
        "Content-Type": operator.sends.content_type,
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
