"""A client of the running daemon's private API, for the commands."""

import asyncio
import ipaddress
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

import aiohttp
from yarl import URL

from lmdaemon import tls, trust
from lmdaemon.commands import peer
from lmdaemon.commands.shared import Failed, Usage, reason, say
from lmdaemon.config.settings import Settings
from lmdaemon.config.values import Listen

CHANGE_WITHIN_S = 60.0  # the longest change, a bulk retry, takes seconds; a daemon that takes longer than this hangs
# For reading. The slowest answer, /health while the store hangs, takes 6 s. Monitoring ends a check after 10 s
READ_WITHIN_S = 8.0
PAGE_MAX = 1000  # rows in one answer of the private API

SILENT_MAX_S = 15.0  # the longest silence of an event stream, which sends figures every second

ANY = "*"  # in a shape: any name
PROBLEM = {"status": int, "title": str, "detail": str, "session?": {"state": str}}


Shape = Any


def fits(value: object, shape: Shape) -> bool:
    """Whether a JSON value has a shape.

    A shape is a type or a tuple of types, a list with the shape of its items, or an object with the names that must be
    there and their shapes. A name with a question mark may be missing; ANY stands for all names.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if ANY in shape:
        return all(fits(item, shape[ANY]) for item in value.values())
    return all(
        fits(value[bare], inner) if (bare := name.rstrip("?")) in value else bare != name
        for name, inner in shape.items()
    )


class Unreachable(Failed):
    """The daemon cannot be reached or cannot serve now, but may later."""


class _Checked(aiohttp.BaseConnector):
    """Calls `check` with every new connection before a request is sent on it. Raises what the check raises."""

    check: Callable[[asyncio.BaseTransport], None]

    async def _create_connection(self, *args: Any, **options: Any) -> Any:
        protocol = await super()._create_connection(*args, **options)
        try:
            assert protocol.transport is not None  # noqa: S101 - it is connected
            self.check(protocol.transport)
        except BaseException:
            protocol.close()
            raise
        return protocol


class _Tcp(_Checked, aiohttp.TCPConnector):
    def __init__(self, check: Callable[[asyncio.BaseTransport], None]) -> None:
        super().__init__()
        self.check = check


class _Unix(_Checked, aiohttp.UnixConnector):
    def __init__(self, path: str, check: Callable[[asyncio.BaseTransport], None]) -> None:
        super().__init__(path)
        self.check = check


def _trusted(settings: Settings) -> frozenset[int]:
    """The users whose listener is trusted: root, the caller, and the owners of the configuration file and of the
    database's directory.
    """
    owners = {0, os.geteuid()}
    for path in (settings.file, settings.database.parent):
        with suppress(OSError):
            owners.add(path.stat().st_uid)
    return frozenset(owners)


class Client:
    """The private API of the running daemon, at the address in the configuration. Raises Failed and Usage.

    `cert` and `key` are the client certificate and its key, for a daemon that asks for one.
    """

    def __init__(self, settings: Settings, cert: Path | None = None, key: Path | None = None) -> None:
        self._address = settings.api.listen.text
        self._tls = _context(settings, cert, key)
        self._shows_certificate = self._tls is not None and cert is not None
        self._base = _base_url(settings.api.listen, "http" if self._tls is None else "https")
        self._unix = settings.api.listen.unix
        self._token = settings.api_tokens[0].secret.decode() if settings.api_tokens else None
        # Added to the message of a refusal (401): this user may not be able to read the daemon's token file
        self._hints = [warning for warning in settings.warnings if warning.startswith("api.token_")]
        self._trusted = _trusted(settings)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=_Unix(self._unix, self._check_peer) if self._unix else _Tcp(self._check_peer),
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            timeout=aiohttp.ClientTimeout(total=CHANGE_WITHIN_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def _check_peer(self, transport: asyncio.BaseTransport) -> None:
        """Raises Failed, before anything is sent, when the listener belongs to a user who is not trusted.

        Over TLS nothing is checked here, because the certificate has already proven who listens.
        """
        if transport.get_extra_info("ssl_object") is not None:
            return
        try:
            owner = peer.listener(transport.get_extra_info("socket"))
        except peer.NobodyError:
            raise Failed(f"daemon not reachable at {self._address}: it stopped during the request") from None
        if owner is not None and owner not in self._trusted:
            ours = ", ".join(sorted(map(trust.user_name, self._trusted)))
            raise Failed(
                f"what listens at {self._address} belongs to {trust.user_name(owner)}, and nothing was sent to it: "
                f"trusted are root, you, and the owners of the configuration and of the database's directory ({ours})"
            )

    async def call(
        self,
        method: str,
        *path: str,
        shape: Shape,
        query: Mapping[str, object] | None = None,
        body: object = None,
    ) -> Any:
        """Makes one call and returns the JSON of the answer, which has this shape.

        Raises Failed, also for an error document and for an answer of another shape.
        """
        within_s = READ_WITHIN_S if method == "GET" else CHANGE_WITHIN_S
        options: Any = {"timeout": aiohttp.ClientTimeout(total=within_s), "ssl": self._tls or True}
        with self._failing(within_s):
            async with self._session.request(method, self._url(path, query or {}), json=body, **options) as response:
                content, status, kind = await response.read(), response.status, response.content_type
        return self._answer(content, status, kind, shape)

    async def status_and_answer(self, method: str, *path: str, body: object = None) -> tuple[int, Any]:
        """Makes one call and returns the status and the answer's JSON, whatever they are. An answer without JSON is
        None.

        Raises Failed.
        """
        with self._failing(CHANGE_WITHIN_S):
            async with self._session.request(method, self._url(path, {}), json=body, ssl=self._tls or True) as response:
                content, status = await response.read(), response.status
        try:
            return status, json.loads(content) if content else None
        except (ValueError, RecursionError):
            return status, None

    async def events(self, *path: str, query: Mapping[str, object]) -> AsyncIterator[tuple[str, Any]]:
        """Server-sent events with their data, until the daemon ends the stream. Raises Unreachable when the connection
        is lost, or nothing has come for SILENT_MAX_S.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_MAX_S, sock_read=SILENT_MAX_S)
        options: Any = {"timeout": timeout, "ssl": self._tls or True}
        with self._failing(SILENT_MAX_S):
            async with self._session.get(self._url(path, query), **options) as response:
                if response.content_type != "text/event-stream":
                    self._answer(await response.read(), response.status, response.content_type, {})
                    raise Failed(f"what answers at {self._address} is no lmdaemon ({response.content_type})")
                name = ""
                async for line in response.content:  # an event has one line `event:` and one line `data:`
                    field, _, value = line.decode().rstrip("\n").partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        yield name, json.loads(value)

    def _answer(self, content: bytes, status: int, kind: str, shape: Shape) -> Any:
        """The JSON of an answer. Raises Failed where it is a problem, or does not have the shape."""
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        is_problem = kind == "application/problem+json"
        if not fits(answer, PROBLEM if is_problem else shape):
            raise Failed(f"what answers at {self._address} is no lmdaemon (status {status}, {kind})")
        if is_problem:
            refusal = Unreachable if status == 503 else Failed
            raise refusal("; ".join([_problem(answer), *(self._hints if status == 401 else ())]))
        return answer

    @contextmanager
    def _failing(self, within_s: float) -> Iterator[None]:
        """Turns errors of a connection into Failed, whose text is one line. A time-out comes after `within_s`."""
        try:
            yield
        except TimeoutError:
            advice = "keep the last lines of its log, such as journalctl -u lmdaemon -n 20, and restart it"
            waited = f"(waited {within_s:g} s)"
            raise Unreachable(f"daemon does not answer at {self._address} {waited}: it hangs; {advice}") from None
        except aiohttp.ClientConnectorCertificateError as error:
            why = "shows another certificate than api.tls_cert_file has: reload the daemon, or name its --config"
            raise Failed(f"what answers at {self._address} {why}") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            if refusal := _tls_refusal(error):
                raise Failed(f"no TLS with the daemon at {self._address}: {refusal}") from error
            if self._shows_certificate and not isinstance(error, aiohttp.ClientConnectorError):
                why = "perhaps it refuses --client-cert; then its log has tls.handshake_failed"
                raise Failed(f"the daemon at {self._address} has closed the connection: {why}") from error
            cause = getattr(error, "os_error", error)
            number = getattr(cause, "errno", None) or 0  # negative for errors of name resolution
            why = os.strerror(number) if number > 0 else reason(cause)
            where = (
                "the last lines of its log say why it ended, such as journalctl -u lmdaemon -n 20; if api.listen was "
                "changed since its start, name a file with the earlier one (--config FILE)"
            )
            raise Unreachable(f"daemon not reachable at {self._address}: is it running? ({why}); {where}") from error
        except aiohttp.ClientError as error:
            raise Failed(f"what answers at {self._address} is no lmdaemon ({type(error).__name__})") from error

    async def pages(self, wanted: int | None, *path: str, query: Mapping[str, object]) -> AsyncIterator[list[Any]]:
        """A list, page by page, up to `wanted` rows (None: all).

        Prints a message when there are more. Raises Failed.
        """
        shape: Shape = {"items": [{}], "next": (str, type(None))}
        after: str | None = None
        left = wanted
        while left is None or left > 0:
            limit = PAGE_MAX if left is None else min(left, PAGE_MAX)
            page = await self.call("GET", *path, shape=shape, query={**query, "limit": limit, "after": after})
            yield page["items"]
            after = page["next"]
            if after is None or not page["items"]:
                return
            left = None if left is None else left - len(page["items"])
        say(f"lmdaemon: {wanted} shown, there are more: --limit N or --all")

    def _url(self, path: Sequence[str], query: Mapping[str, object]) -> Any:
        given = {name: value for name, value in query.items() if value is not None}
        # Encoded here, and not by yarl: yarl would take a slash in an id, or the id "..", for parts of the path
        parameters = urlencode(given)
        return URL(f"{self._base}/{'/'.join(quote(part, safe='') for part in path)}?{parameters}", encoded=True)


def _context(settings: Settings, cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """A context that trusts only the certificate in the configuration; None where the daemon speaks no TLS.

    Raises Failed and Usage.
    """
    spoken = settings.tls.get("api")
    if spoken is None:
        unchecked = [warning for warning in settings.warnings if warning.startswith("api.tls_cert_file: unchecked")]
        if unchecked:  # without the certificate, the daemon cannot be told from another server
            raise Failed(f"{settings.file}: {unchecked[0]}")
        return None
    if settings.api.client_ca_file and cert is None:
        raise Usage("api.client_ca_file asks for a client's certificate: name one with --client-cert and --client-key")
    try:
        return tls.pinned_context(spoken.cert.certificates[0].der, cert, key)
    except OSError as error:
        raise Usage(f"--client-cert: {tls.unusable(error)}") from error


def _tls_refusal(error: BaseException) -> str | None:
    """OpenSSL's words for why a connection failed; None where it failed for another reason than TLS."""
    cause = getattr(error, "os_error", error)
    return tls.said(cause) if isinstance(cause, ssl.SSLError) else None


def _base_url(listen: Listen, scheme: str) -> str:
    if listen.unix:
        return f"{scheme}://localhost"
    host = listen.host
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # an address such as 0.0.0.0 can be listened on but not connected to
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"{scheme}://[{host}]:{listen.port}" if ":" in host else f"{scheme}://{host}:{listen.port}"


def _problem(document: Mapping[str, Any]) -> str:
    """An error document (RFC 9457) as one line, with the end of the session where it has one."""
    line = f"{document.get('status')} {document.get('title')}: {document.get('detail')}"
    session = document.get("session") or {}
    return line + (f" ({session.get('reason')}, {session['endedAt']})" if session.get("endedAt") else "")
