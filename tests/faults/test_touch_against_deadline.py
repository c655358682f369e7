"""Touches close to the deadline, thousands of times: a touch in time keeps its session, and one that is answered 410
does not.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import aiohttp
from chance import FULL
from processes import process
from simulated import simulated_operator
from support import until
from witness import OPERATOR, Witness, check, settled

IDLE_S = 1
AROUND_S = 0.06  # touches come up to twice as long before the deadline, or once as long after it, and some much earlier
AT_ONCE = 250


async def meet(witness: Witness, session_id: str, rng: Random) -> tuple[int, bool]:
    """Opens a session and touches it about when it is due. Returns the status, and whether the answer came before the
    deadline.
    """
    began = time.monotonic()
    assert await witness.open("acme", session_id, IDLE_S) == 201
    opened = time.monotonic()  # the deadline is at the earliest IDLE_S after `began`, and usually IDLE_S after `opened`
    earliest = rng.choice((-2, -2, -10))
    await asyncio.sleep(opened + IDLE_S + rng.uniform(earliest, 1) * AROUND_S - time.monotonic())
    status = await witness.touch("acme", session_id)
    return status, time.monotonic() - began < IDLE_S


async def test_an_acknowledged_touch_keeps_the_session_a_refused_one_never(
    tmp_path: Path, rng: Random, measured: Callable[..., None]
) -> None:
    rounds = 24 if FULL else 8
    async with simulated_operator() as acme, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        toml = '[sessions]\nrestart_grace = "0s"\n' + OPERATOR.format(name="acme", url=acme.url)
        with process(tmp_path, toml) as daemon:
            witness = Witness(daemon, client)
            kept = gone = 0
            for number in range(rounds):
                met = await asyncio.gather(*(meet(witness, f"s{number}-{one}", rng) for one in range(AT_ONCE)))
                assert {status for status, in_time in met if in_time} <= {204}, "refused within the idle time"
                kept += sum(status == 204 for status, _ in met)
                gone += sum(status == 410 for status, _ in met)
            assert kept + gone == rounds * AT_ONCE
            assert kept > rounds
            assert gone > rounds
            await settled(daemon, until)
            assert await asyncio.to_thread(daemon.stop) == 0
            # No end was early, and no session was touched after its end
            check(witness, {"acme": acme}, sinks=1, may_repeat=0)
    measured(sessions=kept + gone, kept=kept, ended=gone, wrong=0)
