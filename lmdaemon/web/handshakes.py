"""TLS handshakes on accepted connections: their bounds, and why one has failed.

The event loop's own TLS does the work.
"""

import socket
import ssl
from asyncio import sslproto
from typing import Any

from lmdaemon import tls
from lmdaemon.log import Log

GOODBYE_TIMEOUT_S = 1.0  # how long to wait for the peer's close_notify, which most peers do not send
# asyncio allocates this many bytes for each TLS connection, even an idle one; uvloop does not. With Python's 256 KiB,
# 2,000 connections would take 512 MiB. A TLS record has 16 KiB at most (RFC 8446, section 5.1).
READ_MAX = 32 * 1024
sslproto.SSLProtocol.max_size = READ_MAX

log = Log("http")


# OpenSSL's reasons, and the words for them in logs and metrics
_WORDS = {
    "HTTP_REQUEST": "plain_http",
    "HTTPS_PROXY_REQUEST": "plain_http",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "not_tls",
    "RECORD_LAYER_FAILURE": "not_tls",
    "BAD_RECORD_TYPE": "not_tls",
    "UNSUPPORTED_PROTOCOL": "old_version",
    "VERSION_TOO_LOW": "old_version",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_client_certificate",
    "CERTIFICATE_VERIFY_FAILED": "client_certificate_refused",
}
REASONS = (*dict.fromkeys(_WORDS.values()), "refused_by_peer", "closed", "timeout", "other")


def options(context: ssl.SSLContext | None, accepted: socket.socket, handshake_s: float) -> dict[str, Any]:
    """Arguments for `connect_accepted_socket`. With a context it speaks TLS, and a handshake may take `handshake_s`.

    Must be called in the connection's own task, because it sets a context variable that `lmdaemon.tls` reads there.
    """
    if context is None:
        return {}
    tls.handshaking.set(accepted)
    return {"ssl": context, "ssl_handshake_timeout": handshake_s, "ssl_shutdown_timeout": GOODBYE_TIMEOUT_S}


def tell(error: OSError, listener: str, peer: str | None) -> str:
    """Logs why a handshake failed, and returns the word for it."""
    word = _word(error)
    if word == "closed":  # load balancers that only check whether the port is open do this all the time
        log.info("tls.closed", listener=listener, peer=peer)
    else:
        detail = tls.said(error) if isinstance(error, ssl.SSLError) else None
        log.warning("tls.handshake_failed", listener=listener, peer=peer, reason=word, detail=detail)
    return word


def _word(error: OSError) -> str:
    if isinstance(error, ssl.SSLEOFError):
        return "closed"
    if isinstance(error, ssl.SSLError):
        name = str(error.reason)
        return "refused_by_peer" if "ALERT" in name else _WORDS.get(name, "other")
    # Both event loops raise ConnectionAbortedError when the time for the handshake is over
    return "timeout" if isinstance(error, ConnectionAbortedError | TimeoutError) else "closed"
