"""Clocks: time that is not idle time ends no session, and no session lives for ever because of it."""

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from chance import FULL
from processes import Process
from simulated import simulated_operator
from support import until
from witness import OPERATOR, Witness, check, settled

from lmdaemon.sweeper import PERSIST_S

SESSIONS = 20
IDLE_S = 15  # longer than a busy machine takes between two touches
TOML = """
[delivery]
schedule = ["200ms", "200ms", "200ms", "200ms", "200ms", "200ms"]
[sessions]
restart_grace = "{grace}"
downtime = "{downtime}"
"""
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@contextlib.asynccontextmanager
async def watched(
    directory: Path,
    *,
    grace: str = "0s",
    downtime: str = "pause",
    environment: dict[str, str] | None = None,
) -> AsyncIterator[tuple[Process, Witness]]:
    """A daemon, and a witness that keeps every acknowledgement. At the end, the acknowledgements are compared with what
    became of the sessions.
    """
    async with simulated_operator() as acme, aiohttp.ClientSession() as client:
        toml = TOML.format(grace=grace, downtime=downtime) + OPERATOR.format(name="acme", url=acme.url)
        daemon = Process(directory, toml)
        try:
            await asyncio.to_thread(daemon.start)
            witness = Witness(daemon, client)
            yield daemon, witness
            await settled(daemon, until)
            assert await asyncio.to_thread(daemon.stop) == 0
            check(witness, {"acme": acme}, sinks=1, may_repeat=4)
        finally:
            daemon.kill()


async def open_all(witness: Witness, idle_s: int) -> None:
    opened = await asyncio.gather(*(witness.open("acme", f"s{number}", idle_s) for number in range(SESSIONS)))
    assert set(opened) == {201}


async def touch_all(witness: Witness) -> set[int]:
    return set(await asyncio.gather(*(witness.touch("acme", f"s{number}") for number in range(SESSIONS))))


async def test_time_in_which_the_daemon_is_stopped_ends_no_session(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    stop_s = 60 if FULL else 8
    async with watched(tmp_path) as (daemon, witness):
        await open_all(witness, 6)  # shorter than the stop, but longer than a busy machine takes for these calls
        daemon.popen.send_signal(signal.SIGSTOP)
        await asyncio.sleep(stop_s)  # the stop is the fault to be tested
        daemon.popen.send_signal(signal.SIGCONT)
        assert await touch_all(witness) == {204}
        # A busy machine may add stalls of its own
        await until(lambda: [one for one in daemon.events("clock.stalled") if one["stall_s"] >= stop_s - 1.5], 40)
    measured(stopped_s=stop_s, sessions=SESSIONS, ended_early=0)


@pytest.mark.parametrize("downtime", ["pause", "count"])
async def test_a_long_downtime_is_idleness_only_where_the_configuration_says_so(
    tmp_path: Path, downtime: str, measured: Callable[..., None]
) -> None:
    # If the downtime counts, a session can be saved only during the restart grace
    async with watched(tmp_path, grace={"pause": "2s", "count": "8s"}[downtime], downtime=downtime) as (
        daemon,
        witness,
    ):
        await open_all(witness, 600)
        daemon.kill()
        with contextlib.closing(sqlite3.connect(daemon.path)) as sql, sql:  # as if the daemon had last run a day ago
            sql.execute("UPDATE clock SET wall_at = wall_at - 86400000")
        await asyncio.to_thread(daemon.start)
        # During the restart grace all sessions are alive, and one of them is saved
        assert {row[0] for row in daemon.rows("SELECT reason FROM session")} == {None}
        assert await witness.touch("acme", "s0") == 204
        if downtime == "count":
            await until(lambda: daemon.rows("SELECT count(*) FROM session WHERE reason IS NULL") == [(1,)], 60)
            for known in witness.sessions.values():
                known.idle_ms = 0  # a day has passed that the witness has not seen
            assert await witness.touch("acme", "s0") == 204
        else:
            await asyncio.sleep(3)  # longer than the restart grace
            assert await touch_all(witness) == {204}
        for number in range(SESSIONS):
            await witness.close("acme", f"s{number}")
    measured(downtime="24h", sessions=SESSIONS, ended_early=0)


async def test_a_crash_loop_ends_nobody_early_and_keeps_nobody_alive_for_ever(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    starts, idle_s = (50, 20) if FULL else (8, 8)
    async with watched(tmp_path) as (daemon, witness):
        await witness.open("acme", "forgotten", idle_s)
        await witness.open("acme", "touched", idle_s)
        ended_after, start = None, 0
        while start < starts or (ended_after is None and start < 10 * starts):
            start += 1
            served_ms = daemon.rows("SELECT service_ms FROM clock")[0][0]
            # A long run stores its clock every PERSIST_S, a short run sooner, because crashes may come this often
            kept = lambda ms=served_ms: daemon.rows("SELECT service_ms FROM clock")[0][0] > ms  # noqa: E731
            await until(kept, 0.9 * PERSIST_S)
            assert await witness.touch("acme", "touched") == 204
            if ended_after is None and daemon.rows("SELECT 1 FROM session WHERE reason = 'inactivity'"):
                ended_after = start
            daemon.kill()
            await asyncio.to_thread(daemon.start)
        assert ended_after is not None, "a session that nobody touches outlived every crash"
    measured(starts=start, idle_s=idle_s, ended_in_life=ended_after, ended_early=0)


@pytest.mark.skipif(FAKETIME is None, reason="needs Debian's libfaketime to set a process's wall clock")
async def test_a_wall_clock_that_is_set_ends_no_session_and_delays_no_notice(
    tmp_path: Path, measured: Callable[..., None]
) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    steps = ["+3600", "+0", "-3600", "+0", "+86400", "+0"] if FULL else ["+3600", "+0", "-3600"]
    async with simulated_operator() as acme, aiohttp.ClientSession() as client:
        toml = TOML.format(grace="0s", downtime="pause") + OPERATOR.format(name="acme", url=acme.url)
        daemon = Process(tmp_path, toml, environment)
        try:
            await asyncio.to_thread(daemon.start)
            witness = Witness(daemon, client)
            await open_all(witness, IDLE_S)
            for number, step in enumerate(steps):
                acme.play("error 100")  # the delivery waits for a retry, at a stored wall time, when the clock is set
                await witness.open("acme", f"closed{number}", 60)
                await witness.close("acme", f"closed{number}")
                await until(lambda n=number: f"closed{n}" in acme.journal.sessions, 40)
                offset.write_text(step)
                acme.play("ok")
                for _ in range(6):  # the process reads the file with the offset once a second
                    touched = time.monotonic()
                    assert await touch_all(witness) == {204}
                    await asyncio.sleep(0.3)
                await until(lambda n=number: acme.journal.sessions[f"closed{n}"].accepted, 40)
            await settled(daemon, until)  # all sessions end, because no more touches come
            assert time.monotonic() - touched >= IDLE_S
            assert await asyncio.to_thread(daemon.stop) == 0
        finally:
            daemon.kill()
    reasons = daemon.rows("SELECT reason, count(*) FROM session GROUP BY reason ORDER BY reason")
    assert reasons == [("closed", len(steps)), ("inactivity", SESSIONS)]
    measured(steps=len(steps), sessions=SESSIONS, ended_early=0)
