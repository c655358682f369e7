"""Reads single values of the file: durations, addresses, networks, names and paths. No I/O."""

import base64
import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache

import msgspec

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DURATION_MAX_S = 3650 * 86400.0
_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "must be 1 to 64 letters, digits, dots, hyphens or underscores, a letter or digit first"
# Names that environment variables usually have. Another value of a key `…_env` is not shown: it may be the secret.
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# Characters of a path (RFC 3986, section 3.3), except percent-escapes. Clients send all others escaped, so that they
# would never match
PATH = re.compile(r"/[A-Za-z0-9/._~!$&'()*+,;=:@-]*")


class Duration(float):
    """A span in seconds, written `"250ms"`, `"30s"`, `"15m"`, `"2h"` or `"7d"`.

    Milliseconds are made of it with `round`: `int` would make 4006 of 4.007 s, which is a little less as a float.
    """


class Listen(msgspec.Struct, frozen=True):
    """Where to listen: host and port, or a unix socket's path."""

    text: str
    host: str = ""
    port: int = 0
    unix: str = ""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address. Names other than localhost count as reachable from
        outside.
        """
        if self.unix or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")


@lru_cache(256)
def names_itself(host: str, listen: Listen) -> bool:
    """Whether a Host header, with any port, has a loopback name or the configured address.

    In DNS rebinding, where the name of a hostile web page resolves to this machine, the header has the page's name.
    """
    match = _HOST.fullmatch(host.lower())
    name = (match[1] or match[2] or "") if match else ""
    return bool(name) and (name == listen.host.lower() or Listen(host, host=name).loopback)


def duration(text: object) -> Duration:
    """Reads a duration. Raises ValueError with the rule."""
    match = re.fullmatch(r"([0-9]{1,12})(ms|s|m|h|d)", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('must be a duration such as "250ms", "30s", "15m", "2h" or "7d"')
    seconds = int(match[1]) * _UNITS_MS[match[2]] / 1000
    if seconds > DURATION_MAX_S:
        raise ValueError('must be at most "3650d"')
    return Duration(seconds)


def spell(span: Duration) -> str:
    """A duration as it is written in the file, such as "15m", in the largest unit that gives a whole number."""
    thousandths = round(span * 1000)
    for unit, length_ms in reversed(_UNITS_MS.items()):
        count, rest = divmod(thousandths, length_ms)
        if count and not rest:
            return f"{count}{unit}"
    return "0s"


def listen(text: object) -> Listen:
    """Reads a listen address. Raises ValueError with the rule."""
    rule = 'must be "host:port", "[v6]:port" or "unix:/path"'
    if not isinstance(text, str):
        raise ValueError(rule)  # noqa: TRY004 - one kind of error for one kind of finding
    if text.startswith("unix:"):
        if not text.startswith("unix:/") or "\0" in text or len(text.encode()) > 107 + len("unix:"):
            raise ValueError('must be "unix:" and an absolute path of at most 107 bytes')
        return Listen(text, unix=text.removeprefix("unix:"))
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([A-Za-z0-9_.-]+)):([0-9]{1,5})", text)
    if match is None:
        raise ValueError(rule)
    if match[1]:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise ValueError(rule) from None
    if int(match[3]) > 65535:
        raise ValueError("must have a port of at most 65535")
    return Listen(text, host=match[1] or match[2], port=int(match[3]))


def network(text: object) -> Network:
    """Reads a network or a single address. Raises ValueError with the rule."""
    rule = "must be a network such as 192.0.2.0/24 without host bits, or an address"
    if not isinstance(text, str):  # ip_network would take 8 for 0.0.0.8
        raise ValueError(rule)  # noqa: TRY004 - one kind of error for one kind of finding
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(rule) from None


def whsec(line: str) -> bytes:
    """Reads a Standard Webhooks signing secret. Raises ValueError with the rule, never with the value."""
    try:
        key = base64.b64decode(line.removeprefix("whsec_"), validate=True) if line.startswith("whsec_") else b""
    except ValueError:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("must be whsec_ followed by base64 of 24 to 64 bytes")
    return key


def endpoint_key(path: str) -> str:
    """The form in which endpoint paths are compared: lower case, repeated slashes as one, no slash at the end."""
    if "//" in path:
        path = re.sub("/{2,}", "/", path)
    return path.lower().rstrip("/") or "/"


def holds_everybody(networks: Iterable[Network]) -> bool:
    """Whether one of the networks contains every address."""
    return any(network.prefixlen == 0 for network in networks)
