"""TLS for listeners and for connections to others: contexts, and what is read out of certificates.

The same certificates are accepted on every Python. By default 3.13 is stricter than 3.11 (keyUsage, Authority Key
Identifier) and takes an intermediate for a trust anchor, which 3.11 does not. This module must never ask for a password
on the terminal, or put the content of a file into an error.
"""

import base64
import hashlib
import re
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

EXPIRES_SOON = timedelta(days=21)  # a certificate that expires within this time is warned about
_USE_HTTPS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 29\r\nConnection: close\r\n\r\n"
    b"This address speaks https://\n"
)
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which Python has no name for
_PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END", re.DOTALL)


class Certificate(NamedTuple):
    """One certificate of a file.

    `name` is its subject's common name, or another part of the subject where it has none.
    """

    name: str
    not_before: datetime
    not_after: datetime
    subject: bytes  # DER, compared with the next certificate's in a chain
    issuer: bytes  # DER
    der: bytes


class Pem(NamedTuple):
    """A file that was read. The digest of its content shows a change without a key being kept in memory.

    `certificates` are those of its certificates whose dates are watched.
    """

    path: Path
    digest: str
    certificates: tuple[Certificate, ...] = ()


class Profile:
    """How an operator's server is verified and which certificate is shown to it.

    The files are read when `context` is first asked for, and not again.
    """

    def __init__(self, ca: Pem | None, cert: Pem | None, key: Pem | None) -> None:
        self._paths = tuple(file and file.path for file in (ca, cert, key))

    @cached_property
    def context(self) -> ssl.SSLContext:
        """The context for connections to this operator. Raises OSError (ssl.SSLError is one)."""
        return client_context(*self._paths)


# -- contexts


def client_context(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """A context for connections to others. It trusts `ca_file`, or the system's CAs if that is None, and shows
    `cert_file`.

    Raises OSError (ssl.SSLError is one).
    """
    context = _alike(ssl.create_default_context(cafile=ca_file))
    if cert_file is not None:
        _load_pair(context, cert_file, key_file)
    return context


class _Unread(ssl.SSLContext):
    """A context that reads the system's certificates when it is used for the first time."""

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        self._read()
        return self.wrap_bio(*arguments, **options)

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        self._read()
        return self.wrap_socket(*arguments, **options)

    def _read(self) -> None:
        self.__class__ = ssl.SSLContext  # type: ignore[assignment]
        self.set_default_verify_paths()


@contextmanager
def system_certificates_unread() -> Iterator[None]:
    """Contexts that are made meanwhile read the system's certificates only when they are used.

    aiohttp makes two when it is imported. To read all certificates for them would take a sixth of the daemon's start,
    and 2 MiB. The daemon uses neither; a plug-in may.
    """

    def later(context: ssl.SSLContext) -> None:
        context.__class__ = _Unread

    ssl.SSLContext.set_default_verify_paths = later  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del ssl.SSLContext.set_default_verify_paths  # what it was inherited from is in force again


def pinned_context(certificate: bytes, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """A context for connections to one server, of which only this certificate (DER) is trusted.

    Its names and dates are not checked: an administrator must reach a daemon whose certificate has expired. Raises
    OSError (ssl.SSLError is one).
    """
    context = _alike(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.check_hostname = False
    context.load_verify_locations(cadata=certificate)
    context.verify_flags |= _NO_CHECK_TIME
    if cert_file is not None:
        _load_pair(context, cert_file, key_file)
    return context


def server_context(cert_file: Path, key_file: Path | None, client_ca_file: Path | None = None) -> ssl.SSLContext:
    """A context for a listener. With `client_ca_file` every client must show a certificate of that CA.

    Raises OSError (ssl.SSLError is one).
    """
    context = _alike(ServerContext(ssl.PROTOCOL_TLS_SERVER))
    context.options |= ssl.OP_NO_RENEGOTIATION  # in TLS 1.2 a client could ask for it without end
    if client_ca_file is not None:
        context.load_verify_locations(client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    _load_pair(context, cert_file, key_file)
    return context


def _alike(context: ssl.SSLContext) -> ssl.SSLContext:
    """The context, set to verify in the same way on every Python, with TLS 1.2 or newer and HTTP/1.1.

    Every trusted certificate is a trust anchor, a root or not, and no extension is required that 3.11 does not require.
    Source: the documentation of ssl.create_default_context, "Changed in version 3.13".
    """
    context.verify_flags = context.verify_flags & ~ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load_pair(context: ssl.SSLContext, cert_file: Path, key_file: Path | None) -> None:
    # Without a password, OpenSSL would ask for one on the terminal
    context.load_cert_chain(cert_file, key_file, password="")


# The socket of a connection. It is set by the code that begins the handshake, for `ServerContext.wrap_bio`
handshaking: ContextVar[socket.socket] = ContextVar("handshaking")


class ServerContext(ssl.SSLContext):
    """A context that tells the client why a handshake failed.

    Neither event loop does so: they close the connection and leave the alert that OpenSSL has made in its buffer. A
    client that shows no certificate, for example, would see nothing but a closed connection.
    """

    def __init__(self, protocol: int) -> None:  # SSLContext.__new__ has taken `protocol` already
        super().__init__()
        self.sslobject_class = _Handshake

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **options: Any) -> ssl.SSLObject:
        """As SSLContext.wrap_bio; also gives the handshake the buffer with its alerts, and the socket to send them
        to.
        """
        wrapped = super().wrap_bio(incoming, outgoing, *args, **options)
        if isinstance(wrapped, _Handshake):
            wrapped.alerts, wrapped.peer = outgoing, handshaking.get(None)
        return wrapped


class _Handshake(ssl.SSLObject):
    alerts: ssl.MemoryBIO
    peer: socket.socket | None

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            told = _USE_HTTPS if error.reason == "HTTP_REQUEST" else self.alerts.read()
            if self.peer is not None and told:
                with suppress(OSError):
                    self.peer.send(told)
            raise
        self.peer = None


def unusable(error: OSError) -> str:
    """Why files cannot be used for TLS, in words that are written after their key of the configuration."""
    if getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
        return "does not fit its key"
    return f"cannot be used for TLS: {said(error)}"


def damaged(error: OSError) -> bool:
    """Whether OpenSSL could not read a file. It does not say which one, where there are several."""
    return isinstance(error, ssl.SSLError) and error.reason is None and "PEM lib" in str(error)


def readable(certificates_file: Path) -> bool:
    """Whether OpenSSL can read the certificates in a file."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificates_file)
    except OSError:  # ssl.SSLError is an OSError
        return False
    return True


def said(error: OSError) -> str:
    """OpenSSL's or the system's words for an error, without the line of the interpreter's source that raised it."""
    if damaged(error):
        return "it is damaged"
    name = str(getattr(error, "reason", None) or "").replace("_", " ").lower()
    more = getattr(error, "verify_message", None)  # why a certificate was refused
    return (f"{name}: {more}" if more else name) or error.strerror or str(error)


# -- what certificates say


def holds_certificate(pem: bytes) -> bool:
    """Whether the content of a PEM file has a certificate in it."""
    return _PEM.search(pem) is not None


def holds_private_key(pem: bytes) -> bool:
    """Whether the content of a PEM file looks like a key without a passphrase.

    Passphrases are not supported: a passphrase could be kept nowhere safer than the key itself.
    """
    return b"PRIVATE KEY-----" in pem and b"ENCRYPTED" not in pem


def certificates(pem: bytes) -> list[Certificate]:
    """The certificates in the content of a PEM file, in its order. Raises ValueError for one that is damaged."""
    return [_read(base64.b64decode(body)) for body in _PEM.findall(pem)]


def ends_soon(one: Certificate, now: datetime) -> str | None:
    """A sentence, to be written after the key of its file, if a certificate is not valid now or expires soon."""
    if now >= one.not_after:
        return f"has expired on {_day(one.not_after)} ({one.name})"
    if now < one.not_before:
        return f"is not valid before {_day(one.not_before)} ({one.name})"
    if now >= one.not_after - EXPIRES_SOON:
        return f"expires on {_day(one.not_after)} ({one.name})"
    return None


def endings(pems: Mapping[str, Pem], now: datetime) -> Iterator[str]:
    """A sentence for each certificate in these files (by key) that is not valid now or expires within EXPIRES_SOON."""
    for key, pem in pems.items():
        for one in pem.certificates:
            if sentence := ends_soon(one, now):
                yield f"{key}: {sentence}: {pem.path}"


def out_of_order(chain: Sequence[Certificate]) -> str | None:
    """A sentence for a chain in which a certificate is not followed by its issuer's (RFC 5246, section 7.4.2)."""
    for one, other in pairwise(chain):
        if one.issuer != other.subject:
            order = f"has {other.name} after {one.name}, which {other.name} has not issued"
            return f"{order}: some clients will not trust that"
    return None


def starts_with_issuer(chain: Sequence[Certificate]) -> bool:
    """Whether the first certificate is the issuer of another one, as in a chain that is upside down."""
    return any(other.issuer == chain[0].subject for other in chain[1:])


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def digest(content: bytes) -> str:
    """A digest of a file's content, to see later whether it has changed."""
    return hashlib.sha256(content).hexdigest()


# -- DER (ITU-T X.690), as far as a certificate's dates and subject need it (RFC 5280, section 4.1)

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
_COMMON_NAME = bytes.fromhex("550403")  # 2.5.4.3
_ENCODINGS = {0x1E: "utf-16-be", 0x1C: "utf-32-be"}  # BMPString, UniversalString; the others are UTF-8 or ASCII


def _read(der: bytes) -> Certificate:
    """Reads one certificate from DER. Raises ValueError."""
    (_, certificate), *_ = _parts(der)
    (_, content), *_ = _parts(certificate)
    fields = [part for part in _parts(content) if part[0] != _VERSION]
    if len(fields) < 5:
        raise ValueError("a certificate has fewer fields than it must")
    (_, _), (_, _), (_, issuer), (_, validity), (_, subject), *_ = fields
    begins, ends, *_ = [_time(*part) for part in _parts(validity)]
    return Certificate(_subject(subject), begins, ends, subject, issuer, der)


def _parts(der: bytes) -> Sequence[tuple[int, bytes]]:
    """Tag and content of each of the DER values that follow one another. Raises ValueError."""
    return tuple(_walk(der))


def _walk(der: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(der):
        tag, size, at = der[at], int.from_bytes(der[at + 1 : at + 2]), at + 2
        if size > 0x80:  # the long form: the low bits are the number of bytes that hold the size
            size, at = int.from_bytes(der[at : at + size - 0x80]), at + size - 0x80
        if at + size > len(der):
            raise ValueError("a certificate ends before its end")
        yield tag, der[at : at + size]
        at += size


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # two digits; 50 is 1950 (RFC 5280, section 4.1.2.5.1)
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("a certificate has a date of an unknown kind")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _subject(name: bytes) -> str:
    attributes = [_parts(attribute) for _, group in _parts(name) for _, attribute in _parts(group)]
    texts = {kind[1]: value[1].decode(_ENCODINGS.get(value[0], "utf-8"), "replace") for kind, value, *_ in attributes}
    return texts.get(_COMMON_NAME) or next(reversed(texts.values()), "without a name")
