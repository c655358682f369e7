"""Real parts for the tests: an operator that answers by a script, a store on a real file, a daemon on real sockets."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from lmdaemon import plugins
from lmdaemon.clock import Clock
from lmdaemon.config import reader
from lmdaemon.config.settings import Settings
from lmdaemon.daemon import Daemon
from lmdaemon.delivery.dispatcher import Dispatcher
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.sinks import sinks_of
from lmdaemon.limits import LIMITS, Limits
from lmdaemon.model import Delivery
from lmdaemon.store.contract import Claim, Opening, Settled, Settlement, StoreObserver
from lmdaemon.store.sqlite.store import Store

SUCCESS = {"error": 0, "description": "Success"}
Answer = Callable[[web.Request], Any]


@dataclass
class Received:
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedOperator:
    """An operator's real HTTP server. It gives the answers of its script, one for each request, and then success for
    ever.

    An answer is a dict (JSON with status 200), a web.Response, or an async function of the request, which may wait for
    something that the test does. Tests without such functions can use `simulated_operator` instead, which also judges
    the requests.
    """

    script: list[Any] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    url: str = ""
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.received.append(Received(dict(request.headers), await request.read()))
        async with self._arrived:
            self._arrived.notify_all()
        answer = self.script.pop(0) if self.script else SUCCESS
        if callable(answer):
            answer = await answer(request)
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    async def wait_for(self, count: int) -> None:
        """Waits until `count` requests have come. Fails the test after 10 s."""
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) >= count)


@contextlib.asynccontextmanager
async def scripted_operator(*script: Any) -> AsyncIterator[ScriptedOperator]:
    responses = [id(answer) for answer in script if isinstance(answer, web.Response)]
    assert len(responses) == len(set(responses)), "a response can be sent once; the second request would wait in vain"
    operator = ScriptedOperator(list(script))
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", operator.handle)
    async with TestServer(app) as server:
        operator.url = str(server.make_url("/V4/SessionExpired"))
        yield operator


async def until(condition: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Waits until the condition holds, and lets other tasks run between two tries."""
    async with asyncio.timeout(within_s):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.005)


_Store = TypeVar("_Store", bound=Store)


@contextlib.asynccontextmanager
async def open_store(path: Path, clock: Clock, *, kind: type[_Store] = Store, **options: Any) -> AsyncIterator[_Store]:
    """A store on a real file with its writer running. Every operator counts as configured; no session has a sink."""
    store = await kind.open(path, clock, **options)
    writer = asyncio.create_task(store.run())
    try:
        yield store
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        await store.close()


class SlowStore(Store):
    """A store on a slow disk. What a test sets here is awaited before rows to be delivered are read, after they were
    read, and before a result is stored.
    """

    before_reading: Callable[[], Awaitable[object]] | None = None
    after_reading: Callable[[], Awaitable[object]] | None = None
    before_storing: Callable[[Settlement], Awaitable[object]] | None = None

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:
        if self.before_reading is not None:
            await self.before_reading()
        found = await super().claimable(lanes)
        if self.after_reading is not None:
            await self.after_reading()
        return found

    async def settle(self, settlement: Settlement) -> Settled:
        if self.before_storing is not None:
            await self.before_storing(settlement)
        return await super().settle(settlement)


class Commits(StoreObserver):
    """Counts the transactions that a store commits from now on."""

    def __init__(self, store: Any) -> None:
        self.made = 0
        store.observe(self)

    def committed(self, operations: int, took_s: float) -> None:
        self.made += 1


def operator_table(name: str, url: str, **keys: Any) -> str:
    values = {
        "provider_id": name,
        "notify": True,
        "url": url,
        "allow_private_network": True,
        "schedule": ["5s", "30s", "2m", "10m"],
        "endpoint": "",
    } | keys
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return f"\n[operators.{name}]\n" + "\n".join(lines) + "\n"


@dataclass
class Bench:
    """A store, a dispatcher and a clock moved by hand."""

    db: SlowStore
    clock: Any
    dispatcher: Dispatcher
    settings: Settings
    plugins: dict[str, Any] = field(default_factory=dict)

    async def end(self, session_id: str = "s", operator: str = "acme") -> None:
        await self.db.open_session(Opening(operator, session_id, "p", "tok-3n", None, 10_000, 0))
        await self.db.end(operator, session_id)

    async def round(self) -> float | None:
        """Runs one round of the dispatcher and all attempts that follow from it. Returns how long the next round may
        wait, in s.
        """
        await self.dispatcher.once()
        while self.dispatcher.in_flight:
            await self.dispatcher.drain(60)
            await self.dispatcher.once()
        return await self.dispatcher.once()

    async def row(self, session_id: str = "s", operator: str = "acme", sink: str = "http") -> Delivery:
        known = await self.db.session(operator, session_id)
        assert known is not None
        return next(delivery for delivery in known[1] if delivery.sink == sink)

    async def skip_to(self, row: Delivery) -> None:
        self.clock.advance(max(0, row.due_at - self.clock.wall_ms()) / 1000)


@contextlib.asynccontextmanager
async def bench(tmp_path: Path, clock: Any, toml: str) -> AsyncIterator[Bench]:
    settings = load(tmp_path / "config.toml", LISTEN + toml)
    async with open_store(tmp_path / "test.sqlite3", clock, kind=SlowStore) as db:
        sender = Sender(clock)
        dispatcher = Dispatcher(db, clock, sender, Random(7))
        loaded = {name: plugins.load(plugin, dispatcher.wake) for name, plugin in settings.plugins.items()}
        db.configure(frozenset(settings.operators), partial(sinks_of, settings))
        dispatcher.configure(settings, loaded)
        try:
            yield Bench(db, clock, dispatcher, settings, loaded)
        finally:
            await dispatcher.drain(0)
            await sender.close()


def load(path: Path, toml: str) -> Settings:
    path.write_text(toml)
    return reader.load(path)


@dataclass
class Serving:
    daemon: Daemon
    server: str
    api: str
    client: aiohttp.ClientSession
    running: "asyncio.Task[None]"

    # The daemon's internal parts, for what cannot be seen or caused from outside. Tests use them through these
    # properties only.

    @property
    def parts(self) -> Any:
        return self.daemon._parts

    @property
    def store(self) -> Any:
        return self.parts.store

    @property
    def sites(self) -> dict[str, Any]:
        return self.parts.listeners.sites

    @property
    def bounds(self) -> Any:
        return self.parts.bounds

    @property
    def sweeper(self) -> Any:
        return self.parts.sweeper

    @property
    def pruner(self) -> Any:
        return self.parts.pruner

    @property
    def dispatcher(self) -> Dispatcher:
        return self.parts.dispatcher

    @property
    def plugins(self) -> dict[str, Any]:
        return self.parts.reloader.plugins

    @property
    def metrics(self) -> Any:
        return self.parts.metrics

    @property
    def events(self) -> Any:
        return self.parts.events


LISTEN = '[server]\nlisten = "127.0.0.1:0"\n[api]\nlisten = "127.0.0.1:0"\n'


@contextlib.asynccontextmanager
async def serving(
    directory: Path, toml: str = "", clock: Clock | None = None, limits: Limits = LIMITS
) -> AsyncIterator[Serving]:
    """A whole daemon on real sockets with free ports. `toml` is added to a configuration with free ports, or is the
    whole configuration if it has a `[server]` table. The disk of this machine may be nearly full, which `/health`
    reports only if `limits` say so.
    """
    if limits.low_share == LIMITS.low_share:
        limits = limits._replace(low_share=0.0)
    text = toml if "[server]" in toml else LISTEN + toml
    daemon = Daemon(load(directory / "config.toml", text), clock=clock, rng=Random(1), limits=limits)
    running = asyncio.create_task(daemon.run())
    ready = asyncio.create_task(daemon.serving.wait())
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if running.done():
        await running
    try:
        async with aiohttp.ClientSession() as client:
            urls = {name: f"http://{host}:{port}" for name, (host, port, *_) in daemon.addresses.items()}
            yield Serving(daemon, urls["server"], urls["api"], client, running)
    finally:
        daemon.stop()
        async with asyncio.timeout(30):
            await running


async def scrape(daemon: Serving) -> dict[str, float]:
    """Reads `/metrics`: values by series, each series spelled as in the answer."""
    async with daemon.client.get(daemon.api + "/metrics") as answer:
        assert answer.status == 200
        lines = (await answer.text()).splitlines()
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def live(clock: Any, store: Store, seconds: float) -> None:
    """Moves the clock as for a daemon that hears touches: in steps of 1 s at most, so that service time counts each
    step.
    """
    whole, rest = divmod(seconds, 1)
    for step in [1.0] * int(whole) + ([rest] if rest else []):
        clock.advance(step)
        store.service_clock.now_ms()


@dataclass
class Event:
    """One log line of the daemon. The name of a line that other code logged is its message."""

    name: str
    facts: dict[str, Any]
    level: str
    traceback: str


@contextlib.contextmanager
def hear(logger: str = "lmdaemon") -> Iterator[list[Event]]:
    """Collects the events of every level that are logged in this context. Afterwards logging is set up as before."""
    events: list[Event] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            traceback = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
            facts = getattr(record, "facts", {})
            events.append(Event(record.getMessage(), facts, record.levelname.lower(), traceback))

    log = logging.getLogger(logger)
    before = (log.handlers[:], log.level, log.propagate)
    log.handlers[:], log.propagate = [Ear()], False
    log.setLevel(logging.DEBUG)
    try:
        yield events
    finally:
        log.handlers[:], log.propagate = before[0], before[2]
        log.setLevel(before[1])


@dataclass
class RawAnswer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class RawConnection:
    """A TCP connection on which the test writes and reads every byte itself."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> RawAnswer:
        """Reads the next answer, which may be an interim one (1xx)."""
        async with asyncio.timeout(10):
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {
                name.lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon
            }
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return RawAnswer(int(status.split()[1]), headers, body)

    async def rest(self) -> bytes:
        """Reads until the other side closes."""
        async with asyncio.timeout(10):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def raw_connection(url: str) -> AsyncIterator[RawConnection]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
