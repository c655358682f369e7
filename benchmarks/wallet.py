"""A scripted operator that costs as little as the load generator: it answers notices with success, or never, and notes
when they arrive.

POST /ok is answered, POST /hang is not. GET /arrived returns when each session's first notice came (wall ms), and
forgets those times. The workbench's simulated operator is not used here, because it reads each notice and would cost
more than what is measured.
"""

import asyncio
import json
import re
import sys
import time
from typing import Any

from benchmarks.floors import SUCCESS, run, until_told
from benchmarks.load import as_from_elsewhere

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
ANSWER = HEAD % len(SUCCESS) + SUCCESS
SESSION = re.compile(rb'"sessionId":\s*"([^"]+)"')
LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)

arrived: dict[str, float] = {}


class Conversation(asyncio.Protocol):
    """One connection. Requests on it come one at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's transport is no asyncio.Transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not found or (length and len(body) < int(length[1])):
            return
        self._received = b""
        if head.startswith(b"GET /arrived"):
            self._transport.write(_listed())
        elif session := SESSION.search(body):
            arrived.setdefault(session[1].decode(), time.time() * 1000)
            if not head.startswith(b"POST /hang"):
                self._transport.write(ANSWER)


def _listed() -> bytes:
    body = json.dumps(arrived).encode()
    arrived.clear()
    return HEAD % len(body) + body


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Conversation, "127.0.0.1", port, backlog=512)
    async with server:
        await until_told()


if __name__ == "__main__":
    as_from_elsewhere()
    run(serve(**json.loads(sys.argv[2])))
