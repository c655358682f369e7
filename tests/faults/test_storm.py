"""Many sessions are due at one instant, as when a crowd of players has lost its connection. They end in small steps,
and no other request waits for them.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import aiohttp
from chance import FULL
from processes import process
from simulated import simulated_operator
from support import open_store, until
from witness import OPERATOR, Witness

from lmdaemon.clock import Clock
from lmdaemon.store.contract import SWEEP_ROWS, Opening

CROWD = '[operators.crowd]\nprovider_id = "crowd"\nendpoint = ""\n'
OTHERS = 200
GRACE_S = 8  # time (s) to open the sessions of the others, and to measure for a while before the storm


async def gather_crowd(path: Path, size: int) -> None:
    """Adds `size` sessions to the file, all of them due at the same millisecond."""
    async with open_store(path, Clock()) as store:
        for first in range(0, size, 5000):
            names = range(first, min(first + 5000, size))
            await asyncio.gather(
                *(store.open_session(Opening("crowd", f"c{n}", "p", "t", None, 60_000, 0)) for n in names)
            )
    with contextlib.closing(sqlite3.connect(path)) as sql, sql:
        sql.execute("UPDATE session SET seen_ms = 0, due_ms = 60000")
        sql.execute("UPDATE clock SET service_ms = 60001")


async def timed(call: Callable[[], Awaitable[int]], pause_s: float, over: asyncio.Event) -> list[tuple[float, float]]:
    """Repeats a call until `over` is set. Returns when each call began and how long it took, in seconds. Each must be
    answered with success.
    """
    took = []
    while not over.is_set():
        began = time.monotonic()
        assert await call() in (200, 204)
        took.append((began, time.monotonic() - began))
        await asyncio.sleep(pause_s)
    return took


async def test_a_crowd_that_is_due_at_once_ends_in_small_steps(
    tmp_path: Path, rng: Random, measured: Callable[..., None]
) -> None:
    """Meanwhile all other requests are served."""
    size = 100_000 if FULL else 20_000
    await gather_crowd(tmp_path / "lmdaemon.sqlite3", size)
    async with simulated_operator() as acme, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        toml = f'[sessions]\nrestart_grace = "{GRACE_S}s"\n' + CROWD + OPERATOR.format(name="acme", url=acme.url)
        with process(tmp_path, toml) as daemon:
            witness, over = Witness(daemon, client), asyncio.Event()
            opened = await asyncio.gather(*(witness.open("acme", f"s{number}", 600) for number in range(OTHERS)))
            assert set(opened) == {201}
            told, largest_kib = 0, [daemon.memory_kib]
            calm_kib = largest_kib[0]

            async def touch() -> int:
                return await witness.touch("acme", f"s{rng.randrange(OTHERS)}")

            async def notice() -> int:
                nonlocal told
                told += 1
                return await witness.notice("acme", f"told{told}")

            async def health() -> int:
                largest_kib.append(daemon.memory_kib)
                async with client.get(daemon.api + "/health") as answer:
                    return answer.status

            def live() -> int:
                _, answer = daemon.call("GET", daemon.api + "/v1/operators")
                return int(next(one["live"] for one in answer["items"] if one["operator"] == "crowd"))

            async def asked() -> int:
                return await asyncio.to_thread(live)

            async with asyncio.TaskGroup() as group:
                touches = [group.create_task(timed(touch, 0.02, over)) for _ in range(8)]
                notices = [group.create_task(timed(notice, 0.05, over)) for _ in range(2)]
                healths = [group.create_task(timed(health, 0.03, over))]
                assert await asked() == size  # during the restart grace
                await until(lambda: _below(asked, size), 60)
                began = time.monotonic()
                await until(lambda: _below(asked, 1), 120)
                ended = time.monotonic()
                over.set()
            (steps, largest_step) = daemon.rows(
                "SELECT count(*), max(size) FROM (SELECT count(*) AS size FROM session WHERE reason = 'inactivity' "
                "GROUP BY ended_at)"
            )[0]
            expiry = daemon.events("sweeper.mass_expired")
    assert largest_step <= 2 * SWEEP_ROWS  # two steps may fall into one millisecond
    assert len(expiry) == 1
    assert max(largest_kib) - calm_kib < 64 * 1024
    figures = {}
    for name, tasks in (("touch", touches), ("notice", notices), ("health", healths)):
        all_of_them = [one for task in tasks for one in task.result()]
        calm = [took for at, took in all_of_them if at < began]
        storm = [took for at, took in all_of_them if began <= at < ended]
        assert len(storm) > 1, f"no {name} was answered during the storm"
        figures |= {f"{name}_p99_ms": f"{_p99_ms(calm)} calm, {_p99_ms(storm)} storm"}
    growth_mib = round((max(largest_kib) - calm_kib) / 1024, 1)
    measured(ended=size, steps=steps, ends_per_s=round(size / (ended - began)), **figures, growth_mib=growth_mib)


async def _below(asked: Callable[[], Awaitable[int]], bound: int) -> bool:
    return await asked() < bound


def _p99_ms(took: list[float]) -> float:
    return round(sorted(took)[int(len(took) * 0.99)] * 1000, 1) if took else 0.0
