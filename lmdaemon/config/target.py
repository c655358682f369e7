"""Reads an operator's URL once, when the configuration is read, and makes of it what each attempt needs.

Path and query are requested byte for byte as they are written, because they may be signed. A URL that cannot be sent
like this is an error in the configuration, instead of a failure of every attempt. Errors must never repeat the URL; the
caller shows it masked.
"""

import base64
import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from yarl import URL

from lmdaemon.config.egress import private_address
from lmdaemon.log import NOT_A_URL, safe_url, stray_at

SHAPE_RULE = "must be a URL such as https://wallet.example/V4/SessionExpired"
USER_INFO_RULE = (
    "must have %2F, %3F, %23, %40, %5B and %5D for /?#@[] in user info, "
    "and %40 for an @ behind the host that may be the end of user info"
)
CHARACTERS_RULE = 'must not have spaces, control characters, \\, ", < or >'
ASCII_RULE = "must have percent-escapes for what is not ASCII in path and query, as its server expects them"
FRAGMENT_RULE = "must not have a #, because what follows it is never sent; %23 stands for the character"
HOST_RULE = "must have a host name, or an address without a zone, and a port from 1 to 65535 if any"
CREDENTIALS_RULE = "must have user and password in UTF-8 without control characters, and no %3A in the user (RFC 7617)"

_URL = re.compile(r"(https?)://([^/?#]+)([^#]*)(#?)", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9_.-]|[^\x00-\x7f])+)(?::([0-9]{0,5}))?")
_LABELS = re.compile(r"(?=.{1,254}$)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")  # RFC 1035, section 2.3.4


class Target(NamedTuple):
    """What an attempt needs of a URL.

    `url` has path and query as they are written, both as its path. It has no user info; `authorization` is the value of
    the header that is made of it. `private` says that the host is a private address, as far as that is known without a
    DNS lookup.
    """

    url: URL
    authorization: str | None
    private: bool

    def __repr__(self) -> str:
        return "Target(…)"  # the rest holds secrets


def read(text: str) -> Target:
    """Reads a URL. Raises ValueError with the rule that it breaks."""
    if stray_at(text):
        raise ValueError(USER_INFO_RULE)
    if not text.isprintable() or set(text) & set(' \\"<>'):
        raise ValueError(CHARACTERS_RULE)
    match = _URL.match(text)
    if match is None:
        raise ValueError(SHAPE_RULE)
    scheme, authority, requested, fragment = match.groups()
    if not requested.isascii():
        raise ValueError(ASCII_RULE)
    if fragment:
        raise ValueError(FRAGMENT_RULE)
    user_info, _, place = authority.rpartition("@")
    server = _server(scheme.lower(), place)
    # Every other part is valid, so the user info is at fault: it is unclear where it ends
    if safe_url(text) == NOT_A_URL:
        raise ValueError(USER_INFO_RULE)
    return Target(
        # The query is passed as a part of the path, because yarl would drop the "?" before an empty query
        server.with_path(requested or "/", encoded=True),
        _authorization(user_info),
        private_address(server.raw_host or ""),
    )


def _server(scheme: str, place: str) -> URL:
    """Scheme, host and port as a URL; an international name is encoded as in DNS. Raises ValueError."""
    match = _HOST.fullmatch(place)
    if match is None:
        raise ValueError(HOST_RULE)
    try:
        url = URL(f"{scheme}://{place}/")
    except ValueError:  # the text of the error is dropped, because it may quote the URL
        raise ValueError(HOST_RULE) from None
    host = url.raw_host or ""
    if url.port == 0 or not (":" in host or _LABELS.fullmatch(host)):
        raise ValueError(HOST_RULE)
    return url


def _authorization(user_info: str) -> str | None:
    """The value of the Authorization header for this user info, in UTF-8 (RFC 7617); None if it is empty.

    Raises ValueError.
    """
    try:
        user, _, password = (unquote_to_bytes(part).decode() for part in user_info.partition(":"))
    except UnicodeDecodeError:
        raise ValueError(CREDENTIALS_RULE) from None
    if ":" in user or re.search(r"[\x00-\x1f\x7f-\x9f]", user + password):
        raise ValueError(CREDENTIALS_RULE)
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode() if user or password else None
