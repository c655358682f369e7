"""Posts one body to one URL and reads the answer: the client's side of HTTP.

What an answer means is `retry`'s business, when to send is `delivery`'s. It must never read more of an answer than its
bounds allow, follow a redirect, or take for an answer what came before its request.
"""

import base64
import hashlib
import hmac
import math
import ssl
from collections.abc import Mapping
from functools import cache
from typing import Any

import aiohttp
from aiohttp.connector import Connection

from lmdaemon.clock import Clock
from lmdaemon.config import Operator
from lmdaemon.resolver import Resolver
from lmdaemon.version import __version__

ANSWER_MAX = 16 * 1024  # bytes read of an answer
INTERIM_MAX = 16  # interim answers (1xx) before it, and itself
# Servers close idle connections after 5 s (Node), 15 s or more. One that closes as we send costs an attempt, for a POST
# is never repeated blindly (aiohttp#7363); so give a connection up before the other side does.
KEEPALIVE_S = 4.0


class Unreachable(Exception):  # noqa: N818 - a result, judged as a failed attempt
    """An attempt that got no answer: the text is a short reason."""


class Answer(aiohttp.ClientResponse):
    """An answer that belongs to its request, and comes to an end."""

    _interim = 0

    @property
    def _continue(self) -> None:  # type: ignore[override]
        """Read by aiohttp at each interim answer, and never else. HTTP sets no limit to these, nor does aiohttp: a
        flood of them would keep the loop busy for all of its time-out. Source: RFC 9110 §15.2.
        """
        self._interim += 1
        if self._interim > INTERIM_MAX:
            raise aiohttp.ClientPayloadError("too many interim answers")

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Raises ServerDisconnectedError, ClientPayloadError beside aiohttp's own."""
        protocol: Any = connection.protocol
        if protocol.should_close:
            # Something was there before the request: a server that answers twice would settle the next delivery.
            connection.close()
            raise aiohttp.ServerDisconnectedError("an answer came before its request")
        return await super().start(connection)


class Sender:
    """Posts bodies to URLs: one client session where private networks are allowed, one where they are not, for the life
    of the process.

    A connection belongs to the TLS context that it was made with: another context, as after a reload, never gets it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._clients: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    def _client(self, *, guarded: bool) -> aiohttp.ClientSession:
        if guarded not in self._clients:
            connector = aiohttp.TCPConnector(
                limit=0,  # a shared limit would couple operators; each lane has its own slots
                keepalive_timeout=KEEPALIVE_S,
                ttl_dns_cache=10,
                resolver=Resolver(guarded=guarded),
            )
            self._clients[guarded] = aiohttp.ClientSession(
                connector=connector,
                response_class=Answer,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a compressed answer is read as bytes of bounded number, never unpacked
                trust_env=False,
            )
        return self._clients[guarded]

    async def post(
        self, operator: Operator, webhook_id: str, body: bytes
    ) -> tuple[int, Mapping[str, str], bytes, bool]:
        """One attempt at the operator's URL: status, headers, at most ANSWER_MAX bytes of the answer, and whether
        that was all of it.

        Raises Unreachable with a reason in a word.
        """
        target = operator.target
        assert target is not None  # noqa: S101 - without one there is nothing to post to
        if target.private and not operator.allow_private_network:
            raise Unreachable("private_address")  # aiohttp asks no resolver for a literal address
        headers = request_headers(operator, webhook_id, body, self._clock.wall_ms() / 1000)
        try:
            response = await self._client(guarded=not operator.allow_private_network).post(
                target.url,
                ssl=operator.tls.context if target.url.scheme == "https" else True,
                data=body,
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
        except TimeoutError:
            raise Unreachable("timeout") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreachable(_reason(error)) from error


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


def _reason(error: Exception) -> str:
    """A reason in a word. The exception's own text may hold a URL with its query, so it is not used."""
    if isinstance(error, aiohttp.InvalidURL):
        return "invalid_url"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "private_address" if "private_address" in str(error.os_error) else "dns"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError | ssl.SSLError):
        return "tls"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "private_address" if "private_address" in str(error.os_error) else "connect"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError | aiohttp.ClientOSError):
        return "connection_lost"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "incomplete_answer"
    return "invalid_answer"


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
