"""What both listeners use for HTTP: bodies of limited size, ready answers, the client's address, tokens.

It knows nothing of sessions and dialects, nor of connections, which are the business of `connection`.
"""

import asyncio
import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from aiohttp import web

from lmdaemon.config.settings import ApiToken
from lmdaemon.config.values import Network

RETRY_AFTER_S = "5"  # seconds until a client should try again after a 503

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

_REASONS = {status.value: status.phrase for status in HTTPStatus}

# A handler returns a Reply. Its type is Any, because aiohttp's types demand a response; `Connection` makes one of a
# Ready
Handler = Callable[[Any], Awaitable[Any]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BodyTooLarge(Exception):  # noqa: N818 - a verdict on a request
    """The body is longer than its limit in bytes (the argument)."""


class BodyTooSlow(Exception):  # noqa: N818
    """The body did not arrive in time, or broke off."""


class Ready:
    """An answer as bytes, for a frequent call; one that never changes can answer any number of requests.

    A Response of aiohttp can be sent only once, and making one is a large part of the cost of a touch. An answer with a
    body must have a `content_type`.
    """

    __slots__ = ("_second", "_whole", "body", "content_type", "status")

    def __init__(self, status: int, body: bytes = b"", content_type: str = "") -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self._second = 0
        self._whole = b""

    def ordinary(self) -> web.Response:
        """The same answer as aiohttp's Response."""
        return web.Response(body=self.body or None, status=self.status, content_type=self.content_type or None)

    @property
    def whole(self) -> bytes:
        """The bytes to send now, for HTTP/1.1 on a connection that stays open. Only the date in them changes."""
        second = int(time.time())
        if second != self._second:
            body = self.body
            length = b"%d\r\n" % len(body) if self.content_type else b""
            self._whole = b"".join((_head(self.status, self.content_type), length, _date(second), body))
            self._second = second
        return self._whole


def busy_answer(body: bytes, content_type: str) -> bytes:
    """A whole 503 that ends its connection, for clients whose request is not read."""
    return (
        f"HTTP/1.1 503 {_REASONS[503]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Retry-After: {RETRY_AFTER_S}\r\nConnection: close\r\n\r\n"
    ).encode() + body


class Head(Protocol):
    """What can be read of a request before its body has arrived."""

    @property
    def headers(self) -> Any:
        """The headers: aiohttp's mapping, by name without regard to case, in which a header may stand twice."""


Reply = web.StreamResponse | Ready


@lru_cache(maxsize=16)
def _head(status: int, content_type: str) -> bytes:
    """The head of an answer without its date; if it has a body, up to the length of that."""
    entity = f"Content-Type: {content_type}\r\nContent-Length: " if content_type else ""
    return f"HTTP/1.1 {status} {_REASONS[status]}\r\n{entity}".encode()


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    """The date of an answer, in seconds since 1970, and the end of its head."""
    return f"Date: {formatdate(second, usegmt=True)}\r\n\r\n".encode()


async def read_body(request: web.BaseRequest, limit: int, within_s: float) -> bytes:
    """The body, if it has `limit` bytes at most and arrives within `within_s`, with or without Content-Length.

    Raises BodyTooLarge and BodyTooSlow.
    """
    if request.content.is_eof():  # the usual case: it has arrived with the headers, so no time-out is needed
        body = request.content.read_nowait()
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body
    if request.content_length is not None and request.content_length > limit:
        raise BodyTooLarge(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(within_s):
            while part := await request.content.readany():
                size += len(part)
                if size > limit:
                    raise BodyTooLarge(limit)
                parts.append(part)
    except (TimeoutError, OSError, web.RequestPayloadError) as error:
        raise BodyTooSlow from error
    return b"".join(parts)


def request_id(request: Head) -> str | None:
    """The X-Request-Id that a proxy or a client has set, so that the request can be found in its logs; None if it is
    missing, too long, or has other characters than _REQUEST_ID allows.
    """
    given = request.headers.get("X-Request-Id")
    return given if given and _REQUEST_ID.fullmatch(given) else None


def decode_segment(raw: str) -> str:
    """One segment of a path, percent-decoded strictly. Raises ValueError for a broken escape; if it were tolerated,
    different broken paths would mean the same id.
    """
    if "%" not in raw:
        return raw
    for escape in raw.split("%")[1:]:
        if len(escape) < 2 or not all(digit in "0123456789abcdefABCDEF" for digit in escape[:2]):
            raise ValueError("must not contain a broken percent-escape")
    try:
        return unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("must be UTF-8") from None


def client_address(
    head: Head, transport: asyncio.BaseTransport | None, trusted_proxies: Sequence[Network]
) -> Address | None:
    """Where the request comes from: the peer, or behind trusted proxies the right-most address in X-Forwarded-For that
    is not one of them. A unix socket's peer counts as a trusted proxy if any is configured.

    None when it cannot be found out; then no allow list contains it.
    """
    peer = transport.get_extra_info("peername") if transport is not None else None
    address = _address(peer[0]) if isinstance(peer, tuple) and peer else None
    hops = [hop.strip() for header in head.headers.getall("X-Forwarded-For", []) for hop in header.split(",")]
    if not trusted_proxies or (peer and not inside(address, trusted_proxies)):
        return address
    while hops:
        address = _address(hops.pop())
        if not inside(address, trusted_proxies):
            break
    return address


def allowed(address: Address | None, networks: Iterable[Network]) -> bool:
    """Whether the address is in one of the networks; without networks, every address is allowed."""
    networks = tuple(networks)
    return not networks or inside(address, networks)


def inside(address: Address | None, networks: Iterable[Network]) -> bool:
    """Whether the address is in one of the networks."""
    return address is not None and any(address in network for network in networks)


def _address(text: str) -> Address | None:
    text = text.removeprefix("[").partition("]")[0].partition("%")[0]
    if text.count(":") == 1:  # an IPv4 address with a port, as some proxies write it
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def bearer(request: Head, tokens: Sequence[ApiToken]) -> ApiToken | None:
    """The configured token that the request carries; None if it carries none of them.

    All tokens are compared, each in constant time.
    """
    if not tokens:
        return None
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    given = text.strip().encode("utf-8", "surrogateescape")
    found = None
    for token in tokens:
        if hmac.compare_digest(given, token.secret):
            found = token
    return found if scheme.lower() == "bearer" else None
