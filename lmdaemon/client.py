"""The private API of the running daemon, as its own commands use it. Called by `admin`."""

import ipaddress
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

import aiohttp
from yarl import URL

from lmdaemon import tls
from lmdaemon.command import Failed, Usage, reason, say
from lmdaemon.config import Listen, Settings

ANSWER_WITHIN_S = 60.0  # of the private API: a bulk retry takes seconds, anything longer is a daemon that hangs
PAGE_MAX = 1000  # rows in one answer of the private API


class Client:
    """The private API of the running daemon, found by the configuration. Raises Failed or Usage, with one clear line.

    `cert` and `key` are shown to a daemon that asks its clients for a certificate.
    """

    def __init__(self, settings: Settings, cert: Path | None = None, key: Path | None = None) -> None:
        self._address = settings.api.listen.text
        self._tls = _context(settings, cert, key)
        self._shows_certificate = self._tls is not None and cert is not None
        self._base = _base_url(settings.api.listen, "http" if self._tls is None else "https")
        self._unix = settings.api.listen.unix
        self._token = settings.api_tokens[0].secret.decode() if settings.api_tokens else None
        # With the daemon's credentials out of this user's reach, a refusal is no surprise, but should say so
        self._hints = [warning for warning in settings.warnings if warning.startswith("api.token_")]
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._unix) if self._unix else aiohttp.TCPConnector(),
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            timeout=aiohttp.ClientTimeout(total=ANSWER_WITHIN_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self, method: str, *path: str, query: Mapping[str, object] | None = None, body: object = None
    ) -> Any:
        """The JSON answered to one call; an error document is raised as Failed."""
        try:
            url = self._url(path, query or {})
            async with self._session.request(method, url, json=body, ssl=self._tls or True) as response:
                content, status, kind = await response.read(), response.status, response.content_type
        except TimeoutError:
            raise Failed(f"daemon does not answer at {self._address} (waited {ANSWER_WITHIN_S:g} s)") from None
        except aiohttp.ClientConnectorCertificateError as error:
            why = "shows another certificate than api.tls_cert_file has: reload it, or name its own --config"
            raise Failed(f"what answers at {self._address} {why}") from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            if refusal := _tls_refusal(error):
                raise Failed(f"no TLS with the daemon at {self._address}: {refusal}") from error
            if self._shows_certificate and not isinstance(error, aiohttp.ClientConnectorError):
                why = "it may not take --client-cert, as tls.handshake_failed in its log would say"
                raise Failed(f"the daemon at {self._address} has closed the connection: {why}") from error
            cause = getattr(error, "os_error", error)
            number = getattr(cause, "errno", None) or 0  # negative where no name could be resolved
            why = os.strerror(number) if number > 0 else reason(cause)
            raise Failed(f"daemon not reachable at {self._address}: is it running? ({why})") from error
        except aiohttp.ClientError as error:
            raise Failed(f"what answers at {self._address} is no lmdaemon ({type(error).__name__})") from error
        try:
            answer = json.loads(content)
        except ValueError:
            raise Failed(f"what answers at {self._address} is no lmdaemon (status {status}, {kind})") from None
        if kind == "application/problem+json":
            raise Failed("; ".join([_problem(answer), *(self._hints if status == 401 else ())]))
        return answer

    async def pages(self, wanted: int | None, *path: str, query: Mapping[str, object]) -> AsyncIterator[list[Any]]:
        """A list page by page, up to `wanted` rows; says so when there are more. None: all."""
        after: str | None = None
        left = wanted
        while left is None or left > 0:
            limit = PAGE_MAX if left is None else min(left, PAGE_MAX)
            page = await self.call("GET", *path, query={**query, "limit": limit, "after": after})
            yield page["items"]
            after = page["next"]
            if after is None:
                return
            left = None if left is None else left - len(page["items"])
        say(f"lmdaemon: {wanted} shown, there are more: --limit N or --all")

    def _url(self, path: Sequence[str], query: Mapping[str, object]) -> Any:
        given = {name: value for name, value in query.items() if value is not None}
        # Encoded here, byte by byte: an id may contain a slash, or not be UTF-8, which the daemon refuses. And taken as
        # it is: an id may be "..", which a URL would resolve.
        parameters = urlencode(given, errors="surrogateescape")
        return URL(f"{self._base}/{'/'.join(map(_segment, path))}?{parameters}", encoded=True)


def _context(settings: Settings, cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Trusts the certificate that the configuration names, and no other; None where the daemon speaks no TLS."""
    spoken = settings.tls.get("api")
    if spoken is None:
        unchecked = [warning for warning in settings.warnings if warning.startswith("api.tls_cert_file: unchecked")]
        if unchecked:  # without it, what answers cannot be told from somebody else
            raise Failed(f"{settings.file}: {unchecked[0]}")
        return None
    if settings.api.client_ca_file and cert is None:
        raise Usage("api.client_ca_file asks for a client's certificate: name one with --client-cert and --client-key")
    try:
        return tls.pinned_context(spoken.cert.certificates[0].der, cert, key)
    except OSError as error:
        raise Usage(f"--client-cert: {tls.unusable(error)}") from error


def _tls_refusal(error: BaseException) -> str | None:
    """OpenSSL's reason for a connection that failed, in its words; None where it is not about TLS."""
    cause = getattr(error, "os_error", error)
    return tls.said(cause) if isinstance(cause, ssl.SSLError) else None


def _base_url(listen: Listen, scheme: str) -> str:
    if listen.unix:
        return f"{scheme}://localhost"
    host = listen.host
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # "on every address" is where to listen; a client needs one of them
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"{scheme}://[{host}]:{listen.port}" if ":" in host else f"{scheme}://{host}:{listen.port}"


def _segment(text: str) -> str:
    return quote(os.fsencode(text), safe="")


def _problem(document: Mapping[str, Any]) -> str:
    """An RFC 9457 document as one line; an ended session in it is named with its end."""
    line = f"{document.get('status')} {document.get('title')}: {document.get('detail')}"
    session = document.get("session") or {}
    return line + (f" ({session['reason']}, {session['endedAt']})" if session.get("endedAt") else "")
