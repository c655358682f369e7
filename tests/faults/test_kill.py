"""kill -9 at every line between queue and commit and between claim and settled row, and at random moments under
load.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import aiohttp
from chance import FULL
from processes import Process
from simulated import simulated_operator
from support import until
from witness import OPERATOR, Witness, check, game_server, settled

INTERRUPTED = (sys.executable, str(Path(__file__).with_name("interrupted.py")))
HOOK = """
import pathlib

async def told(event):
    refused = pathlib.Path(__file__).with_name(event.session_id)
    if event.session_id.startswith("refused") and not refused.exists():
        refused.touch()
        raise RuntimeError("not now")
"""
TOML = """
[sessions]
restart_grace = "0s"
[delivery]
schedule = ["100ms", "200ms", "300ms"{more}]
[plugins.hook]
use = "told_hook:told"
[log]
level = "debug"  # every line, so that an end that is logged twice would show
""".format(more=', "500ms"' * 40)  # so many waits that none of thousands of deliveries fails often enough to be dead
IN_FLIGHT = 4  # the concurrency of a lane
LEFT_S = 10  # idle time (s) of a session that a call should end, in case the kill comes before that call
MOODS = {"calm": "ok", "moody": "10%: error 100", "ill": "30%: error 100"}


async def work(witness: Witness, life: int) -> None:
    """Makes each kind of call: a session that is left alone, one that is touched and closed, a notice about an unknown
    session, and a notice that ends a session.
    """
    await witness.open("acme", f"left-{life}", 1)
    await witness.open("acme", f"refused-{life}", LEFT_S)
    await witness.touch("acme", f"refused-{life}")
    await witness.close("acme", f"refused-{life}")
    await witness.notice("acme", f"told-{life}")
    await witness.open("acme", f"reported-{life}", LEFT_S)
    await witness.notice("acme", f"reported-{life}")
    await witness.touch("acme", f"left-{life - 1}")


async def test_killed_at_any_line_it_loses_nothing_and_ends_nothing_twice(
    tmp_path: Path, rng: Random, measured: Callable[..., None]
) -> None:
    """What was acknowledged before the kill is still there, and each session has ended exactly once."""
    (tmp_path / "told_hook.py").write_text(HOOK)
    async with (
        simulated_operator("30%: error 100", seed=rng.randrange(1000)) as acme,
        aiohttp.ClientSession() as client,
    ):
        toml = TOML + OPERATOR.format(name="acme", url=acme.url)
        environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        daemon = Process(tmp_path, toml, environment, INTERRUPTED)
        witness = Witness(daemon, client)
        try:
            daemon.environment["REACHED"] = str(tmp_path / "reached")
            await asyncio.to_thread(daemon.start)
            await work(witness, 0)
            await settled(daemon, until)
            assert await asyncio.to_thread(daemon.stop) == 0
            points = (tmp_path / "reached").read_text().split()
            assert len(points) > 80
            chosen = points if FULL else rng.sample(points, 30)
            del daemon.environment["REACHED"]
            killed = 0
            for life, point in enumerate(chosen, 1):
                daemon.environment["KILL_AT"] = point
                daemon.spawn()
                killed += await lived(daemon, witness, life)
            daemon.environment.clear()
            daemon.environment.update(environment)
            await asyncio.to_thread(daemon.start)
            await settled(daemon, until)
            assert await asyncio.to_thread(daemon.stop) == 0
        finally:
            daemon.kill()
    assert killed >= 0.9 * len(chosen)
    figures = check(witness, {"acme": acme}, sinks=2, may_repeat=killed * IN_FLIGHT)
    measured(points=len(points), killed=killed, **figures, lost=0, doubled=0)


async def lived(daemon: Process, witness: Witness, life: int) -> bool:
    """Runs the daemon once. It should be killed at its line. If it does not reach the line, it is killed when its work
    is done. Returns whether it reached the line.
    """

    def serves_or_dead() -> bool:
        if daemon.popen.poll() is not None:
            return True
        try:
            return daemon.call("GET", daemon.api + "/health")[0] == 200
        except OSError:
            return False

    async def up() -> bool:
        return await asyncio.to_thread(serves_or_dead)

    await until(up, 60)
    if daemon.popen.poll() is None:
        await work(witness, life)
    await until(lambda: daemon.popen.poll() is not None or has_done_all(daemon), 60)
    died = daemon.popen.poll() is not None
    daemon.kill()
    return died


def has_done_all(daemon: Process) -> bool:
    """Whether the daemon has ended and delivered everything that this run can cause. Sessions that wait for LEFT_S may
    still be live.
    """
    left = "SELECT 1 FROM session WHERE reason IS NULL AND idle_ms = 1000 UNION ALL "
    return not daemon.rows(left + "SELECT 1 FROM delivery WHERE state = 'pending'")


async def test_killed_at_random_under_load_every_acknowledgement_holds(
    tmp_path: Path, rng: Random, measured: Callable[..., None]
) -> None:
    clients, kills = (200, 50) if FULL else (100, 8)
    async with contextlib.AsyncExitStack() as stack:
        wallets = {
            name: await stack.enter_async_context(simulated_operator(script, seed=rng.randrange(1000)))
            for name, script in MOODS.items()
        }
        toml = TOML.partition("[plugins")[0]
        toml += "".join(OPERATOR.format(name=name, url=one.url) for name, one in wallets.items())
        daemon = Process(tmp_path, toml)
        stack.callback(daemon.kill)
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        witness, over = Witness(daemon, http), asyncio.Event()
        await asyncio.to_thread(daemon.start)
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                chance = Random(rng.random())
                group.create_task(game_server(witness, f"c{number}", list(wallets), chance, over))
            for _ in range(kills):
                await asyncio.sleep(0.3 + rng.random())
                daemon.kill()
                await asyncio.to_thread(daemon.start)
            over.set()
        await settled(daemon, until)
        assert await asyncio.to_thread(daemon.stop) == 0
        figures = check(witness, wallets, sinks=1, may_repeat=kills * IN_FLIGHT * len(wallets))
        acknowledged = sum(times for (_, status), times in witness.answers.items() if status < 300)
        assert witness.gone > kills
        measured(clients=clients, kills=kills, acknowledged=acknowledged, unanswered=witness.gone, **figures, lost=0)
