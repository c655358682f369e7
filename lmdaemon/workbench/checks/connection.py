"""Checks of the endpoint's name, addresses and TLS, and of how it keeps connections open."""

import asyncio
import math
import socket
import ssl
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from yarl import URL

from lmdaemon.config.egress import private_address
from lmdaemon.delivery.resolver import Resolver
from lmdaemon.model import counted
from lmdaemon.tls import EXPIRES_SOON
from lmdaemon.workbench.bench import Bench, Check, Finding, Skip
from lmdaemon.workbench.exchanges import Exchange

ADDRESSES_MAX = 8
SLOW_MS = 1000


async def _addresses(bench: Bench) -> list[str]:
    """All addresses that the name resolves to, or the literal address itself. Raises OSError."""
    try:
        async with asyncio.timeout(bench.limits.connect_s):
            found = await Resolver(guarded=False).resolve(bench.host, _port(bench), socket.AF_UNSPEC)
    except TimeoutError:
        raise OSError(None, f"no answer within {bench.limits.connect_s:g} s") from None
    return list(dict.fromkeys(one["host"] for one in found))


def _port(bench: Bench) -> int:
    assert bench.operator.target is not None  # noqa: S101 - nobody is checked without a URL
    return bench.operator.target.url.port or 443


def _is_loopback(addresses: Sequence[str]) -> bool:
    return all(address == "::1" or address.startswith("127.") for address in addresses)


async def resolves(bench: Bench) -> Finding:
    """The name resolves, and every address accepts a connection.

    A sender may use any of the addresses; one that does not answer costs time, or an attempt, every now and then.
    """
    try:
        addresses = await _addresses(bench)
    except OSError as error:
        return Finding("fail", f"{bench.host} cannot be looked up: {error.strerror or error}")
    failed = []
    for address in addresses[:ADDRESSES_MAX]:
        if private_address(address) and not bench.operator.allow_private_network:
            continue  # the check connection.public reports such an address
        try:
            async with asyncio.timeout(bench.limits.connect_s):
                _, writer = await asyncio.open_connection(address, _port(bench))
            writer.close()
        except OSError as error:  # TimeoutError is an OSError
            failed.append(f"{address}: {error.strerror or 'no connection in time'}")
    if failed:
        return Finding("fail", f"of {len(addresses)} addresses {len(failed)} take no connection: {'; '.join(failed)}")
    return Finding("pass", ", ".join(addresses[:ADDRESSES_MAX]))


async def public(bench: Bench) -> Finding:
    """The address is one of the public Internet.

    The provider's sender refuses private addresses, so that no URL can lead into its own network.
    """
    try:
        addresses = await _addresses(bench)
    except OSError:
        raise Skip("the name cannot be looked up") from None
    if _is_loopback(addresses):
        raise Skip("the target is this machine")
    private = [address for address in addresses if private_address(address)]
    if not private:
        return Finding("pass", "no address is private")
    verdict = "warn" if bench.operator.allow_private_network else "fail"
    return Finding(verdict, f"{', '.join(private)}: reserved for private networks or special uses")  # type: ignore[arg-type]


async def _handshake(bench: Bench, context: ssl.SSLContext) -> tuple[str, dict[str, object]]:
    """The protocol version and the verified certificate. Raises OSError, of which ssl.SSLError is a subclass."""
    addresses = await _addresses(bench)
    if not bench.operator.allow_private_network and any(map(private_address, addresses)):
        raise Skip("the address is private")
    async with asyncio.timeout(bench.limits.connect_s):
        _, writer = await asyncio.open_connection(
            addresses[0], _port(bench), ssl=context, server_hostname=bench.host.rstrip(".")
        )
    found = writer.get_extra_info("ssl_object")
    version, certificate = str(found.version()), dict(found.getpeercert() or {})
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return version, certificate


async def tls(bench: Bench) -> Finding:
    """TLS 1.2 or newer, with a certificate that verifies for this name.

    Players' tokens go over this connection, and a sender that cannot verify it sends nothing.
    """
    if bench.is_https:
        try:
            version, _ = await _handshake(bench, bench.operator.tls.context)
        except ssl.SSLCertVerificationError as error:
            return Finding("fail", f"the certificate is not accepted: {error.verify_message}")
        except OSError as error:
            return Finding("fail", f"no TLS connection: {_why_no_tls(error, bench.limits.connect_s)}")
        return Finding("pass", version)
    try:
        addresses = await _addresses(bench)
    except OSError:
        raise Skip("the name cannot be looked up") from None
    if _is_loopback(addresses):
        raise Skip("plain HTTP on this machine")
    if all(map(private_address, addresses)):
        return Finding("warn", "plain HTTP: whoever can listen in this network reads the players' tokens")
    return Finding("fail", "plain HTTP: whoever listens on the way reads the players' tokens, and may answer instead")


def _why_no_tls(error: OSError, within_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"the handshake was not over within {within_s:g} s"
    if isinstance(error, ConnectionError) and not error.strerror:
        return "the server closed the connection during the handshake"
    return str(getattr(error, "reason", None) or error.strerror or error)


async def certificate_age(bench: Bench) -> Finding:
    """The certificate is valid for 21 days more.

    When it expires every notice fails at once, most often at night.
    """
    if not bench.is_https:
        raise Skip("no TLS")
    try:
        _, certificate = await _handshake(bench, bench.operator.tls.context)
    except OSError:
        raise Skip("no TLS connection: see connection.tls") from None
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    left = ends - datetime.fromtimestamp(bench.now_s(), UTC)
    text = f"valid until {ends:%Y-%m-%d}, {counted(left.days, 'day')}"
    return Finding("warn" if left < EXPIRES_SOON else "pass", text)


def _unverified() -> ssl.SSLContext:
    """A TLS context without verification, for finding out which versions a server speaks; no notice is sent over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def old_tls(bench: Bench) -> Finding:
    """TLS 1.0 and 1.1 are refused.

    They are broken and forbidden (RFC 8996); auditors ask whether they are refused.
    """
    if not bench.is_https:
        raise Skip("no TLS")
    context = _unverified()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the deprecated versions are tried on purpose
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    try:
        await _handshake(bench, _unverified())
    except OSError:
        raise Skip("no TLS connection: see connection.tls") from None
    try:
        version, _ = await _handshake(bench, context)
    except OSError:
        return Finding("pass", "TLS 1.0 and 1.1 are refused")
    return Finding("warn", f"{version} is still accepted")


async def plain_http(bench: Bench) -> Finding:
    """Plain HTTP on the same host takes no notice.

    A notice that is taken without TLS can be forged by anybody on the way.
    """
    if not bench.is_https:
        raise Skip("the URL itself is plain HTTP")
    assert bench.operator.target is not None  # noqa: S101
    url: URL = bench.operator.target.url
    plain = url.with_scheme("http").with_port(80 if _port(bench) == 443 else _port(bench))
    body = bench.notices.body(bench.notices.fields())
    one = await bench.post(body, url=plain, silence_counts=False)
    if one.cause in ("dns", "private_address"):
        raise Skip(bench.said(one))
    if one.accepted:
        return Finding("fail", f"port {plain.port} takes notices without TLS", (one,))
    return Finding("pass", f"not taken without TLS (port {plain.port})")


async def no_redirect(bench: Bench) -> Finding:
    """The exact URL answers by itself, without a redirect.

    Senders follow no redirect: it would carry a player's token to wherever it leads.
    """
    one = (await bench.first()).exchange
    if one.answer is None:
        raise Skip("there is no answer: see answer.valid")
    if 300 <= one.answer.status < 400:
        return Finding("fail", bench.said(one), (one,))
    return Finding("pass", "the URL answers by itself")


async def keepalive(bench: Bench) -> Finding:
    """Two requests go over one connection.

    A new connection and handshake for each notice makes bursts slow for both sides.
    """
    await bench.accepted()
    told = await bench.tell(keep=True)
    if not told.exchange.accepted:
        return Finding("fail", f"the second request on a connection: {bench.said(told.exchange)}", (told.exchange,))
    if told.exchange.reused:
        return Finding("pass", "two requests went over one connection")
    return Finding("warn", "the connection was closed after one request", (told.exchange,))


async def idle(bench: Bench) -> Finding:
    """A connection that was idle works, or was closed in order.

    If a firewall silently drops idle connections, the first attempt after a quiet minute fails.
    """
    await bench.accepted()
    told = await bench.tell(keep=True)
    if told.exchange.accepted:
        kept = "is still open" if told.exchange.reused else "had been closed in order"
        return Finding("pass", f"the idle connection {kept}")
    return Finding("fail", f"a request on an idle connection: {bench.said(told.exchange)}", (told.exchange,))


_AT_ONCE = ("idempotence.race", "behaviour.burst")
_CROWD = (
    "Serve several connections at once (workers, threads, an event loop), and let enough of them wait to be accepted "
    "(the listen backlog)."
)


async def speed(bench: Bench) -> Finding:
    """Answers come within a second (p95), and always within the time-out.

    A notice that is answered too late is sent again, and the slower the endpoint the longer a backlog takes.
    """
    other = ("strictness.slow-body", "connection.plain-http", *_AT_ONCE)
    alone = [one for check, some in bench.by_check.items() if check not in other for one in some]
    late = [one for one in alone if one.cause == "timeout"]
    if late:
        within = f"within {bench.operator.policy.timeout_s:g} s"
        return Finding("fail", f"no whole answer came {within}, {len(late)} of {len(alone)} times", late[:1])
    timed = _by_time(alone)
    if not timed:
        raise Skip("nothing was answered")
    p95 = timed[math.ceil(len(timed) * 0.95) - 1]
    text = f"p95 {p95.duration_ms} ms, slowest {timed[-1].duration_ms} ms of {len(timed)}"
    if p95.duration_ms > SLOW_MS:
        return Finding("warn", text, (timed[-1],))
    crowd = _by_time(one for check in _AT_ONCE for one in bench.by_check.get(check, ()))
    if crowd and crowd[-1].duration_ms > SLOW_MS:
        text += f", but {crowd[-1].duration_ms} ms when several come at once"
        return Finding("warn", text, (crowd[-1],), _CROWD)
    return Finding("pass", text)


def _by_time(some: Iterable[Exchange]) -> list[Exchange]:
    """The exchanges that were answered, the slowest last."""
    return sorted((one for one in some if one.answer is not None), key=lambda one: one.duration_ms)


CHECKS = (
    Check(
        "connection.resolves",
        "Correct the DNS records (A and AAAA), or let the server listen on all these addresses; open the firewall.",
        resolves,
    ),
    Check(
        "connection.public",
        "Give a URL that is reachable from outside; within one network the sender must be told to allow it.",
        public,
    ),
    Check(
        "connection.tls",
        "Serve the whole chain (leaf and intermediates) for the very name in the URL; TLS 1.2 or 1.3.",
        tls,
    ),
    Check(
        "connection.certificate-age",
        "Renew the certificate, and monitor its renewal.",
        certificate_age,
    ),
    Check(
        "connection.old-tls",
        "Set the server's minimum to TLS 1.2.",
        old_tls,
    ),
    Check(
        "connection.plain-http",
        "Refuse plain HTTP, or redirect it.",
        plain_http,
    ),
    Check(
        "connection.no-redirect",
        "Give the provider the URL that the redirect leads to (mind http/https, www, a trailing slash).",
        no_redirect,
        "first",
    ),
    Check(
        "connection.keepalive",
        "Let the server keep connections open for some seconds (keep-alive), and read bodies whole before answering.",
        keepalive,
        "first",
    ),
    Check(
        "connection.idle",
        "Close idle connections at the server (FIN), earlier than any firewall or balancer before it forgets them.",
        idle,
        "late",
    ),
    Check(
        "connection.speed",
        "Store the notice, answer, and do the slow work afterwards.",
        speed,
        "summary",
    ),
)
