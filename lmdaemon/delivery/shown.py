"""A request to an operator as it may be shown to anybody: token, hash, signatures, user info and query are masked.

What stays readable is what the private side shows anyway: the ids of session and player, and the provider's id.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlencode

from lmdaemon import masks
from lmdaemon.config.settings import Operator
from lmdaemon.delivery.sender import request_headers
from lmdaemon.dialects import content_of_body
from lmdaemon.log import safe_url
from lmdaemon.masks import MASK, query_of
from lmdaemon.model import HTTP_SINK, Delivery

_BY_CURL = ("Host", "Accept", "Content-Length")  # headers that curl sends by itself


class Request(NamedTuple):
    """A request with its secrets masked. `body` is None where what was sent is no longer kept."""

    url: str
    headers: Mapping[str, str]
    body: str | None

    @property
    def curl(self) -> str:
        """The request as a command for a shell; the masks in it must be replaced by hand."""
        words = ["curl", self.url]
        for name, value in self.headers.items():
            if name not in _BY_CURL:
                words += ["-H", f"{name}: {value}"]
        return shlex.join([*words, "--data-binary", MASK if self.body is None else self.body])


def request_of(operator: Operator, row: Delivery, at_s: float) -> Request | None:
    """The request with which a delivery is sent to its operator's URL, with the settings in force and signed at `at_s`
    (wall time).

    None if nothing is sent by HTTP: for a plug-in, without a URL, or if a value is missing that the dialect must send.
    """
    if row.sink != HTTP_SINK or operator.target is None or row.body_digest is None:
        return None
    mask = masks.Mask(masks.secrets_of(operator))  # of headers: the token is sent in the body alone
    headers = own_headers(operator, row.body) | request_headers(operator, row.webhook_id, row.body, at_s)
    if not row.body:  # the body was deleted when it was delivered, so its length is not known
        del headers["Content-Length"]
    return Request(
        shown_url(operator.url),
        {name: shown_header(name, value, mask) for name, value in headers.items()},
        masked_body(operator, row.token, row.body) if row.body else None,
    )


def own_headers(operator: Operator, body: bytes) -> dict[str, str]:
    """The headers that the HTTP client adds by itself; a test compares them with those that a server receives."""
    host = (operator.target.url.host_port_subcomponent if operator.target is not None else None) or ""
    return {"Host": host, "Accept": "*/*", "Content-Length": str(len(body))}


def masked_body(operator: Operator, token: str | None, body: bytes) -> str:
    """The body as sent, in which only ids can be read: the values of those fields of the operator's dialect that hold
    no secret.

    It is masked field by field, because a short token may also be a part of an id.
    """
    readable = masks.readable_fields(operator)
    shown = {
        name: value if name in readable and value != token else MASK for name, value in masks.fields_of(body).items()
    }
    if content_of_body(body) == "json":
        return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
    return urlencode(shown, safe="*")


def shown_header(name: str, value: str, mask: Callable[[str], str]) -> str:
    """The value of a header that was sent, with secrets masked."""
    if name == "Authorization":  # masked whole, because `mask` does not find a user or password that is very short
        return f"Basic {MASK}"
    return value if name == "Host" else mask(value)


def shown_url(url: str) -> str:
    """The URL without user info and fragment, with the values in its query masked; their names tell an integrator
    enough. `url` may also be a path alone, as in a Location header.
    """
    path = url.partition("#")[0].partition("?")[0]
    shown = path if path.startswith("/") and not path.startswith("//") else safe_url(url)
    query = "&".join(f"{name}={MASK}" if name else MASK for name, _ in query_of(url))
    return f"{shown}?{query}" if "?" in url.partition("#")[0] else shown
