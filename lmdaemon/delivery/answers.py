"""The daemon's side of a connection to an operator: one answer for each request, within bounds.

aiohttp parses; this module decides where an answer begins and ends. Bytes that come before a request or after an answer
must never settle a delivery. An answer that arrived whole must not be lost because of bytes that came with it.
"""

import re
import ssl
from asyncio import AbstractEventLoop, BaseTransport
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader

from lmdaemon.causes import Cause

HEAD_MAX = 64 * 1024  # bytes of an answer's status line and headers
HEADERS_MAX = 1000  # most headers: each is a Python object, so their number costs the event loop more than their bytes
INTERIM_MAX = 15  # most interim (1xx) responses before the final one; HTTP has no limit. Source: RFC 9110 §15.2
# How every answer is read: a compressed one as it is, within the bounds, and never unpacked.
READING: Mapping[str, Any] = {
    "auto_decompress": False,
    "max_line_size": HEAD_MAX,
    "max_field_size": HEAD_MAX,
    "max_headers": HEADERS_MAX,
    "read_until_eof": True,
}
WIRE_MAX = 1024 * 1024  # most bytes that are read after the head, with chunk sizes, extensions and trailers

_HEAD_END = re.compile(rb"[^\r\n]\r?\n\r?\n")
_HEAD_END_MAX = 5  # most bytes that _HEAD_END matches
_LENGTH = re.compile(rb"\ncontent-length: *([0-9]{1,6})\r?\n", re.IGNORECASE)


class AnswerError(aiohttp.ClientError):
    """What the operator has sent is not one whole answer to the request. `detail` quotes nothing of it."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.detail = detail


class AnswerProtocol(ResponseHandler):
    """Feeds aiohttp's parser one head at a time.

    Given a whole segment, the parser would drop a complete answer if the bytes after it are invalid.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__(loop)
        self.address = ""  # the peer's: `203.0.113.7:443`, `[2001:db8::7]:443`
        self._begin()

    def connection_made(self, transport: BaseTransport) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        host, port, *_ = transport.get_extra_info("peername") or ("", 0)
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _begin(self) -> None:
        self._interim = 0
        self._body: StreamReader | None = None  # the body of the final answer, once the head of that answer is complete
        # Bytes of the body that are still to come; None if the head does not tell its length
        self._left: int | None = None
        self._on_wire = 0  # bytes received after the head
        self._begin_head()

    def _begin_head(self) -> None:
        self._head_size = self._head_lines = 0
        self._head_tail = b""  # the last bytes received: the end of a head may be split between two segments

    def set_response_params(self, **params: Any) -> None:
        """Called by aiohttp when a request is about to be sent on this connection."""
        self._begin()
        if self._tail:
            self._tail = b""
            # The connection is not closed here, because sending on a closed one would hide this cause
            self.set_exception(AnswerError("unsolicited_answer"))
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with the bytes that have arrived."""
        if self._parser is None or not data:
            super().data_received(data)
            return
        while data and self._body is None and self._exception is None:
            data = self._head_received(data)
        if data and self._body is not None:
            self._body_received(self._body, data)

    def _head_received(self, data: bytes) -> bytes:
        """Parses the bytes that belong to the head, and returns the rest.

        A body that ends with the segment is parsed in the same call: a second call would take a tenth of the time of a
        delivery.
        """
        end, is_whole = self._head_end(data)
        self._head_size += end
        self._head_lines += data.count(b"\n", 0, end)
        if self._head_size > HEAD_MAX:
            self._fail(AnswerError("headers_too_large", f"more than {HEAD_MAX} bytes"))
        elif self._head_lines > HEADERS_MAX + 2:  # 2: the status line and the empty line
            self._fail(AnswerError("headers_too_large", f"more than {HEADERS_MAX} headers"))
        else:
            length = _LENGTH.search(data, 0, end)
            if not is_whole:
                self._head_tail = (self._head_tail + data)[1 - _HEAD_END_MAX :]
            elif length is not None and end + int(length[1]) == len(data):
                end = len(data)
            super().data_received(data[:end])
        return data[end:]

    def _head_end(self, data: bytes) -> tuple[int, bool]:
        """How many bytes of the data belong to the head, and whether it ends with them."""
        at = -1 if self._head_tail else data.find(b"\r\n\r\n")
        if at > 0:
            return at + 4, True  # the usual case
        found = _HEAD_END.search(self._head_tail + data)
        return (len(data), False) if found is None else (found.end() - len(self._head_tail), True)

    def _body_received(self, body: StreamReader, data: bytes) -> None:
        if body.is_eof():
            self._drop()
            return
        self._on_wire += len(data)
        if self._on_wire > WIRE_MAX:
            self._fail(AnswerError("answer_too_long", f"more than {WIRE_MAX} bytes on the wire"))
            return
        super().data_received(data[: self._left])
        if self._left is None:
            is_more = body.is_eof() and not data.endswith(b"\n")  # a body in chunks ends with an empty line
        else:
            self._left -= len(data)
            is_more = self._left < 0
        if is_more:
            self._drop()

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Called by aiohttp for each head that it has parsed."""
        message, body = data
        if self._body is not None:
            self._drop()  # a second answer belongs to no request
            return
        if 100 <= message.code < 200 and message.code != 101:
            self._interim += 1
            self._begin_head()
        else:
            self._body = body
            length = message.headers.get("Content-Length", "")
            if not message.chunked and length.isascii() and length.isdigit():
                self._left = int(length)
        super().feed_data(data, size)
        if self._interim > INTERIM_MAX:
            self._fail(AnswerError("too_many_interim", f"more than {INTERIM_MAX}"))

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """Called, also by aiohttp, when something is wrong with the connection or with what came over it."""
        body = self._body
        if body is not None and body.is_eof():
            self.force_close()  # the answer is complete; what is wrong comes after it
            return
        if isinstance(exc, aiohttp.ClientOSError) and self._is_going:
            return  # writing failed; `connection_lost` follows and has the reason
        error = _told(exc, exc_cause, in_body=body is not None)
        super().set_exception(error)
        if body is not None and body.exception() is None:
            body.set_exception(error)  # aiohttp does not tell the reader of the body that a chunk is broken

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by the event loop when the connection has ended."""
        super().connection_lost(exc)
        # The body refers to this protocol; such a cycle of references would wait for the garbage collector
        self._body = None

    @property
    def _is_going(self) -> bool:
        """Whether the connection is lost and `connection_lost` was not called yet."""
        return not self._connection_lost_called and self.transport is not None and self.transport.is_closing()

    def _fail(self, error: AnswerError) -> None:
        self.set_exception(error)
        self._drop()

    def _drop(self) -> None:
        """Closes the connection, so that nothing that still comes over it counts."""
        self.force_close()
        if self.transport is not None:
            self.transport.close()


def _told(exc: BaseException, cause: BaseException | None, *, in_body: bool) -> BaseException:
    """Returns the exception that the sender gets for one of aiohttp's."""
    if isinstance(cause, ssl.SSLError):
        # With TLS 1.3 a server refuses a client's certificate after the handshake. Source: RFC 8446 §4.4.2.4, §6.2
        return AnswerError("tls", str(cause))
    if isinstance(exc, HttpProcessingError):
        return AnswerError("bad_chunks" if in_body else "bad_http", _complaint(cause))
    return exc


def _complaint(error: BaseException | None) -> str:
    """The parser's message, without the received bytes that it quotes after an empty line."""
    text, shows_bytes, _ = str(getattr(error, "message", "")).partition("\n\n")
    return " ".join(text.split()).rstrip(":") if shows_bytes else type(error).__name__


class Answer(aiohttp.ClientResponse):
    """aiohttp's answer, refused if bytes came before its request."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """As aiohttp.ClientResponse.start; also raises AnswerError."""
        protocol: Any = connection.protocol
        if protocol.should_close:
            # Bytes came before the request. Otherwise a server that answers twice would settle the next delivery.
            error = protocol.exception() or AnswerError("unsolicited_answer")
            connection.close()
            raise error
        return await super().start(connection)
