"""The private API of the running daemon, as its own commands use it. Called by `admin`."""

import ipaddress
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self
from urllib.parse import quote, urlencode

import aiohttp
from yarl import URL

from lmdaemon.command import Failed, reason, say
from lmdaemon.config import Listen, Settings

ANSWER_WITHIN_S = 60.0  # of the private API: a bulk retry takes seconds, anything longer is a daemon that hangs
PAGE_MAX = 1000  # rows in one answer of the private API


class Client:
    """The private API of the running daemon, found by the configuration. Raises Failed, with one clear line."""

    def __init__(self, settings: Settings) -> None:
        self._address = settings.api.listen.text
        self._base = _base_url(settings.api.listen)
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
            async with self._session.request(method, self._url(path, query or {}), json=body) as response:
                content, status, kind = await response.read(), response.status, response.content_type
        except TimeoutError:
            raise Failed(f"daemon does not answer at {self._address} (waited {ANSWER_WITHIN_S:g} s)") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
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


def _base_url(listen: Listen) -> str:
    if listen.unix:
        return "http://localhost"
    host = listen.host
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # "on every address" is where to listen; a client needs one of them
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{listen.port}" if ":" in host else f"http://{host}:{listen.port}"


def _segment(text: str) -> str:
    return quote(os.fsencode(text), safe="")


def _problem(document: Mapping[str, Any]) -> str:
    """An RFC 9457 document as one line; an ended session in it is named with its end."""
    line = f"{document.get('status')} {document.get('title')}: {document.get('detail')}"
    session = document.get("session") or {}
    return line + (f" ({session['reason']}, {session['endedAt']})" if session.get("endedAt") else "")
