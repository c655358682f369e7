"""Real parts for the tests: an operator that plays a script, a store on a real file, a daemon on real sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from lmdaemon import config
from lmdaemon.clock import Clock
from lmdaemon.daemon import Daemon
from lmdaemon.store import Store

SUCCESS = {"error": 0, "description": "Success"}
Answer = Callable[[web.Request], Any]


@dataclass
class Received:
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedOperator:
    """An operator's real HTTP server: plays the answers it was given, one a request, then success for ever.

    An answer is a dict (JSON with status 200), a web.Response, or an async function of the request.
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
        """Until `count` requests have come, or the test fails."""
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) >= count)


@contextlib.asynccontextmanager
async def scripted_operator(*script: Any) -> AsyncIterator[ScriptedOperator]:
    operator = ScriptedOperator(list(script))
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", operator.handle)
    async with TestServer(app) as server:
        operator.url = str(server.make_url("/V4/SessionExpired"))
        yield operator


async def until(condition: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Waits until the condition holds, turn by turn of the loop; for what another task or process has to do."""
    async with asyncio.timeout(within_s):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def open_store(path: Path, clock: Clock, **options: Any) -> AsyncIterator[Store]:
    """A store on a real file with its writer running; every operator is configured, no session has a sink."""
    store = await Store.open(path, clock, **options)
    writer = asyncio.create_task(store.run())
    try:
        yield store
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        await store.close()


def load(path: Path, toml: str) -> config.Settings:
    path.write_text(toml)
    return config.load(path)


@dataclass
class Serving:
    daemon: Daemon
    server: str
    api: str
    client: aiohttp.ClientSession
    running: "asyncio.Task[None]"


LISTEN = '[server]\nlisten = "127.0.0.1:0"\n[api]\nlisten = "127.0.0.1:0"\n'


@contextlib.asynccontextmanager
async def serving(directory: Path, toml: str = "", clock: Clock | None = None) -> AsyncIterator[Serving]:
    """A whole daemon on real sockets with free ports. `toml` adds to the configuration, or is all of it when it says
    where to listen.
    """
    text = toml if "[server]" in toml else LISTEN + toml
    daemon = Daemon(load(directory / "config.toml", text), clock=clock, rng=Random(1))
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


def live(clock: Any, store: Store, seconds: float) -> None:
    """Moves the clock while the daemon is listening: in steps that are no stall, each read as the sweeper would."""
    whole, rest = divmod(seconds, 1)
    for step in [1.0] * int(whole) + ([rest] if rest else []):
        clock.advance(step)
        store.service_clock.now_ms()
