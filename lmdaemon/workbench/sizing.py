"""Measures what sessions cost on this machine, with a daemon of its own whose database is on the disk to be measured.
The daemon's CPU time is measured, not elapsed time, so that this process and others on the machine have little effect.
"""

import asyncio
import contextlib
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from lmdaemon.model import counted

# Sessions that are opened, touched in turn, and closed again. In a short run there are fewer, SESSIONS_EACH_S for each
# second, but at least as many as are touched at the same time.
SESSIONS, SESSIONS_EACH_S = 10_000, 250
AT_ONCE = 16  # simultaneous requests, each on a connection of its own
BULK = 1000  # sessions in one bulk touch
# Simultaneous bulk touches, of different sessions, because several touches of one session in a transaction are written
# as one
BULKS_AT_ONCE = 4
START_S = 30.0
COPIED_EVERY_S = 0.2  # between two checks of whether everything is in the file
SETTLED_S = 60.0  # how long the deliveries of all ends may take

CONFIG = """\
[server]
listen = "unix:{sockets}/server"
[api]
listen = "unix:{sockets}/api"
[database]
path = "{database}"
[log]
level = "error"
[operators.size]
provider_id = "size"
notify = true
url = "http://127.0.0.1:{port}/"
allow_private_network = true
endpoint = ""
concurrency = 16
"""


class Costs(NamedTuple):
    """The costs of one session or touch on this machine: CPU seconds of the daemon, and bytes on the disk."""

    open_s: float
    touch_s: float  # with one touch a request
    bulk_touch_s: float  # with BULK touches a request
    end_s: float  # including its delivery
    live_bytes: float
    ended_bytes: float  # including its settled delivery
    memory_bytes: float  # memory of the whole daemon at the end


class SizingError(Exception):
    """The measurement failed; the text says why."""


async def measure(directory: Path, seconds: float, told: Callable[[str], None]) -> Costs:
    """Measures in an absolute `directory` for about `seconds`, plus the time to open and close the sessions.

    `told` is called with each step. Raises SizingError and OSError.
    """
    sessions = min(SESSIONS, max(BULK * BULKS_AT_ONCE, int(seconds * SESSIONS_EACH_S)))
    # The path of a unix socket has 107 bytes at most, so sockets have a directory with a short name
    with (
        tempfile.TemporaryDirectory(prefix="lmdaemon-size-", dir=directory) as judged,
        tempfile.TemporaryDirectory(prefix="lmdaemon-") as sockets,
    ):
        database = Path(judged) / "size.sqlite3"
        async with _operator() as port, _daemon(Path(sockets), database, port) as (process, client):
            daemon = _Daemon(database, client)
            names = [f"size-{number:08d}" for number in range(sessions)]
            empty_bytes = daemon.stored_bytes()
            told(f"opening {counted(sessions, 'session')}")
            open_s = await daemon.spent(daemon.each(names, daemon.open)) / sessions
            await daemon.until_copied()
            live_bytes = (daemon.stored_bytes() - empty_bytes) / sessions
            told("touching them one by one")
            touch_s = await daemon.repeated(seconds / 2, itertools.cycle(names), daemon.touch)
            told(f"touching {BULK} at a time")
            parts = [names[first : first + BULK] for first in range(0, sessions, BULK)]
            bulk_s = await daemon.repeated(seconds / 2, itertools.cycle(parts), daemon.touch_many, BULKS_AT_ONCE) / BULK
            told("ending them")
            end_s = await daemon.spent(daemon.end_all(names)) / sessions
            memory = (await daemon.metrics())["process_resident_memory_bytes"]
            process.terminate()
            if await process.wait():
                raise SizingError(f"the daemon that was measured stopped with exit code {process.returncode}")
            ended_bytes = (daemon.stored_bytes() - empty_bytes) / sessions
    return Costs(open_s, touch_s, bulk_s, end_s, live_bytes, ended_bytes, memory)


@asynccontextmanager
async def _operator() -> AsyncIterator[int]:
    """Serves an operator that accepts every delivery; gives its port."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{"error":0}'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def _daemon(
    sockets: Path, database: Path, port: int
) -> AsyncIterator[tuple[asyncio.subprocess.Process, aiohttp.ClientSession]]:
    """A daemon with this database, as a process of its own, and a client of its private API."""
    config, api = sockets / "config.toml", sockets / "api"
    config.write_text(CONFIG.format(sockets=sockets, database=json.dumps(str(database))[1:-1], port=port))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lmdaemon", "serve", "--config", str(config)), stderr=asyncio.subprocess.PIPE
    )
    connector = aiohttp.UnixConnector(str(api), limit=AT_ONCE)
    try:
        async with aiohttp.ClientSession("http://localhost", connector=connector) as client:
            until = time.monotonic() + START_S
            while not api.is_socket():
                if process.returncode is not None or time.monotonic() > until:
                    assert process.stderr is not None  # noqa: S101 - it is a pipe
                    said = (await process.stderr.read(1000)).decode(errors="replace") if process.returncode else ""
                    raise SizingError(f"the daemon to be measured does not start: {said.strip()}")
                await asyncio.sleep(0.05)
            yield process, client
    except aiohttp.ClientError as error:
        raise SizingError(f"the daemon that was measured does not answer: {error}") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class _Daemon:
    """Calls of the daemon that is measured."""

    def __init__(self, database: Path, client: aiohttp.ClientSession) -> None:
        self._database = database
        self._client = client
        self._sessions = "/v1/operators/size/sessions"

    async def _ask(self, method: str, path: str, **options: Any) -> bytes:
        async with self._client.request(method, path, **options) as answer:
            body = await answer.read()
            if answer.status >= 300:
                raise SizingError(f"the daemon that was measured answered {answer.status} to {method} {path}")
            return body

    async def open(self, name: str) -> None:
        facts = {"playerId": f"player-{name}", "token": f"token-{name}-0123456789abcdef"}
        await self._ask("PUT", f"{self._sessions}/{name}", json=facts)

    async def touch(self, name: str) -> None:
        await self._ask("POST", f"{self._sessions}/{name}/touch")

    async def touch_many(self, names: Sequence[str]) -> None:
        await self._ask("POST", f"{self._sessions}/touch", json={"sessionIds": names})

    async def close(self, name: str) -> None:
        await self._ask("POST", f"{self._sessions}/{name}/close")

    async def each(self, names: Sequence[str], call: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Calls the function with each item, AT_ONCE at a time."""
        left = iter(names)

        async def work() -> None:
            for name in left:
                await call(name)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def end_all(self, names: Sequence[str]) -> None:
        """Closes the sessions, and waits until every end is delivered."""
        await self.each(names, self.close)
        until = time.monotonic() + SETTLED_S
        while (await self.metrics())['lmdaemon_deliveries_pending{operator="size"}']:
            if time.monotonic() > until:
                raise SizingError(f"deliveries were not settled within {SETTLED_S:g} s")
            await asyncio.sleep(0.2)

    async def repeated(
        self,
        seconds: float,
        given: Iterator[Any],
        call: Callable[[Any], Coroutine[Any, Any, None]],
        at_once: int = AT_ONCE,
    ) -> float:
        """CPU seconds that the daemon spends on one call, measured by repeating it for `seconds`, `at_once` at a
        time.
        """
        calls, until = 0, time.monotonic() + seconds

        async def work() -> None:
            nonlocal calls
            while time.monotonic() < until:
                await call(next(given))
                calls += 1

        async def all_of_them() -> None:
            await asyncio.gather(*(work() for _ in range(at_once)))

        spent_s = await self.spent(all_of_them())
        return spent_s / max(calls, 1)

    async def spent(self, work: Coroutine[Any, Any, None]) -> float:
        """Awaits `work`; returns the CPU seconds that the daemon has spent meanwhile."""
        before = (await self.metrics())["process_cpu_seconds_total"]
        await work
        return (await self.metrics())["process_cpu_seconds_total"] - before

    async def metrics(self) -> dict[str, float]:
        """The daemon's metrics by series."""
        lines = (await self._ask("GET", "/metrics")).decode().splitlines()
        return {series: float(value) for series, _, value in (one.rpartition(" ") for one in lines if one[:1] != "#")}

    async def until_copied(self) -> None:
        """Waits until the write-ahead log is empty, so that everything committed is in the database file."""
        wal = self._database.with_name(f"{self._database.name}-wal")
        for _ in range(int(START_S / COPIED_EVERY_S)):
            if not wal.stat().st_size:
                return
            await asyncio.sleep(COPIED_EVERY_S)

    def stored_bytes(self) -> int:
        """Size of the database file."""
        return self._database.stat().st_size
