"""The workbench's simulated operator, for tests. It answers by its script and judges what the daemon sends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from lmdaemon.dialects import SHIPPED
from lmdaemon.workbench.journal import Journal
from lmdaemon.workbench.script import read_text
from lmdaemon.workbench.stage import Stage


@dataclass
class Simulated:
    stage: Stage
    journal: Journal
    url: str = ""

    def play(self, script: str, seed: int = 0) -> None:
        """Answers by another script from now on."""
        self.stage.script = read_text(script, seed)


@asynccontextmanager
async def simulated_operator(
    script: str = "",
    *,
    seed: int = 0,
    dialect: str = "v4",
    schedule: Sequence[float] = (),
    keys: Sequence[bytes] = (),
    hash_key: str | None = None,
    **options: Any,
) -> AsyncIterator[Simulated]:
    """Runs a simulated operator. `schedule` are the waits in seconds that the sender must keep; `options` are those of
    Stage.
    """
    journal = Journal(SHIPPED[dialect], schedule, keys, hash_key)
    stage = Stage(read_text(script, seed), journal, **options)
    await stage.open("127.0.0.1", 0)
    scheme = "https" if options.get("contexts") else "http"
    try:
        host = "localhost" if scheme == "https" else "127.0.0.1"
        yield Simulated(stage, journal, f"{scheme}://{host}:{stage.address[1]}/V4/SessionExpired")
    finally:
        await stage.close()


@contextmanager
def simulated_beside(script: str = "", **options: Any) -> Iterator[Simulated]:
    """The simulated operator on a thread of its own, for tests that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    operator = simulated_operator(script, **options)
    try:
        opened = asyncio.run_coroutine_threadsafe(operator.__aenter__(), loop).result(20)
        try:
            yield opened
        finally:
            asyncio.run_coroutine_threadsafe(operator.__aexit__(None, None, None), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
