"""Operators that misbehave, on real sockets of this machine, in a thread beside the test.

A behaviour is a list of steps that follow when a request has been read: bytes are sent, a number is a pause in seconds,
HANG, CLOSE and RESET are what their names say. After the last step, the next request on the connection is read. The
workbench's simulated operator plays whole answers; these operators play single bytes, and even a TLS handshake that
never begins.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

# HANG lasts until the client goes away; CLOSE sends a FIN; RESET sends a RST
HANG, CLOSE, RESET = "hang", "close", "reset"
Step = bytes | float | str
Steps = Iterable[Step] | Callable[[], Iterable[Step]]
Door = Literal["plain", "mute", "full", "tls", "tls-untrusted", "tls-other-name"]


def answer(body: bytes | str, status: str = "200 OK", *headers: str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


SUCCESS = answer('{"error": 0, "description": "Success"}')


class Received:
    def __init__(self, head: bytes, body: bytes) -> None:
        self.path = head.split()[1].decode()
        self.webhook_id = _header(head, b"webhook-id")
        self.body = body


def _header(head: bytes, name: bytes) -> str:
    found = re.search(rb"\r\n" + name + rb": *([^\r]+)", head, re.IGNORECASE)
    assert found, head
    return found[1].decode()


class Operator:
    """One server with one behaviour. `open` counts its open connections, `played` the requests that it has finished."""

    def __init__(self, steps: Steps, door: Door = "plain") -> None:
        self.steps = steps
        self.door = door
        self.received: list[Received] = []
        self.connections = 0
        self.open = 0
        self.played = 0
        self.url = ""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stack = contextlib.ExitStack()

    def at(self, path: str) -> list[Received]:
        return [one for one in self.received if one.path == path]

    async def start(self, certificates: Path | None) -> None:
        listening = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = listening.getsockname()
        scheme = "https" if self.door.startswith("tls") or self.door == "mute" else "http"
        self.url = f"{scheme}://127.0.0.1:{address[1]}"
        if self.door == "full":
            listening.listen(0)
            for _ in range(4):  # one connection is queued; the others, and all later ones, get no answer to their SYN
                waiting = self._stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            return
        context = None
        if self.door.startswith("tls"):
            assert certificates is not None
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / f"{self.door}.pem")
        server = await asyncio.start_server(self._converse, sock=listening, ssl=context, backlog=512)
        self._stack.callback(server.close)

    async def stop(self) -> None:
        self._stack.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        # A cancellation comes only from `stop`. asyncio would report it as an error in this callback.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            try:
                if self.door == "mute":
                    await reader.read()
                while True:
                    self.received.append(await self._request(reader))
                    for step in self.steps() if callable(self.steps) else self.steps:
                        await self._play(step, reader, writer)
                    self.played += 1
            finally:
                self.open -= 1
                self._tasks.discard(task)
                writer.transport.abort()

    @staticmethod
    async def _request(reader: asyncio.StreamReader) -> Received:
        head = await reader.readuntil(b"\r\n\r\n")
        return Received(head, await reader.readexactly(int(_header(head, b"content-length"))))

    @staticmethod
    async def _play(step: Step, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
            await asyncio.sleep(0)  # while the buffer has space, `drain` alone lets no other task run
            # Over TLS, `drain` does not report that the client is gone
            if writer.transport.is_closing() or reader.at_eof() or reader.exception():
                raise ConnectionAbortedError
        elif isinstance(step, float):
            await asyncio.sleep(step)
        elif step == HANG:
            await reader.read()
            raise ConnectionAbortedError
        elif step == RESET:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            raise ConnectionAbortedError
        elif step == CLOSE:
            writer.close()
            await writer.wait_closed()
            raise ConnectionAbortedError


class Operators:
    """The thread in which the servers run."""

    def __init__(self, certificates: Path | None = None) -> None:
        self._certificates = certificates
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._all: list[Operator] = []

    def open(self, steps: Steps, door: Door = "plain") -> Operator:
        operator = Operator(steps, door)
        self.do(operator.start(self._certificates))
        self._all.append(operator)
        return operator

    def close(self, operator: Operator) -> None:
        self._all.remove(operator)
        self.do(operator.stop())

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def __enter__(self) -> "Operators":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for operator in list(self._all):
            self.close(operator)
        self.do(asyncio.sleep(0.05))  # transports report one or two turns of the loop later that they are closed
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def make_certificates(directory: Path) -> None:
    """Makes a self-signed certificate with its key for each TLS behaviour ("door")."""
    for door, name in (("tls", "IP:127.0.0.1"), ("tls-untrusted", "IP:127.0.0.1"), ("tls-other-name", "DNS:x.example")):
        file = directory / f"{door}.pem"
        command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={door}"
        command += f" -addext subjectAltName={name} -keyout {file}.key -out {file}.crt"
        subprocess.run(command.split(), check=True, capture_output=True)
        file.write_bytes(Path(f"{file}.key").read_bytes() + Path(f"{file}.crt").read_bytes())


def endless(*parts: bytes) -> Callable[[], Iterator[Step]]:
    """Sends the first parts once, and the last part for ever."""

    def steps() -> Iterator[Step]:
        yield from parts[:-1]
        while True:
            yield parts[-1]

    return steps


def dripping(at_once: bytes, slowly: bytes) -> Callable[[], Iterator[Step]]:
    """Sends `at_once` at once, and then one byte of `slowly` per second."""

    def steps() -> Iterator[Step]:
        yield at_once
        for byte in slowly:
            yield bytes([byte])
            yield 1.0

    return steps
