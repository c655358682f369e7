"""One POST and its answer over a connection of aiohttp's pool, without aiohttp's client session.

The pool, the connections, TLS and the parser are aiohttp's, and `AnswerProtocol` decides what counts as an answer. The
session makes a request object, a response object and a timer for each attempt; these cost more than everything else
(docs/performance.md). This module must send the same bytes as the session would and accept the same answers.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from aiohttp.streams import StreamReader
from yarl import URL

from lmdaemon.delivery.answers import READING, AnswerError

# No limits here, because the caller has its own deadline
_UNLIMITED = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None)


class Exchange:
    """Posts to one URL. A connection belongs to the TLS context that it was made with."""

    def __init__(self, connector: aiohttp.BaseConnector, url: URL, context: ssl.SSLContext | None) -> None:
        self._connector = connector
        # Never sent. It tells the pool which connections can be used, and how to make a new one.
        self._route = aiohttp.ClientRequest("POST", url, loop=asyncio.get_running_loop(), ssl=context or True)
        self._head = f"POST {self._route.url.raw_path_qs} HTTP/1.1\r\nHost: {self._route.headers['Host']}\r\n"

    async def post(
        self, headers: Mapping[str, str], body: bytes, most: int, reached: Callable[[str], None] | None = None
    ) -> tuple[int, Mapping[str, str], bytes, bool]:
        """Sends one request and reads the answer. The headers must not contain line breaks.

        `reached` is called with the address of the connection, before anything is sent.

        Returns status, headers, at most `most` bytes of the body, and whether these are all of it. Has no time limit.
        Raises AnswerError and what aiohttp's client raises.
        """
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{self._head}{lines}Accept: */*\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = await self._connector.connect(self._route, [], _UNLIMITED)
        try:
            protocol: Any = connection.protocol
            protocol.set_response_params(**READING)
            if protocol.should_close:
                # The answer was there before the request: without this check, a second answer of a server to one
                # delivery would be taken as the answer to the next one.
                raise protocol.exception() or AnswerError("unsolicited_answer")
            if reached is not None:
                reached(protocol.address)
            transport = protocol.transport
            if not transport.is_closing():  # if it is closing, `read` raises the reason
                transport.write(head.encode() + body)
            message, content = await protocol.read()
            while 100 <= message.code < 200 and message.code != 101:
                message, content = await protocol.read()
            answer = await read_some(content, most + 1)
        except BaseException:
            connection.close()
            raise
        connection.release()  # aiohttp closes it if a part of the answer was not read
        return message.code, message.headers, answer[:most], len(answer) <= most


async def read_some(content: StreamReader, most: int) -> bytes:
    """The first `most` bytes of a body, or all of it if it is shorter."""
    answer = await content.read(most)
    while len(answer) < most and not content.at_eof():
        part = await content.read(most - len(answer))
        if not part:
            break
        answer += part
    return answer
