"""Lanes that do not keep up with their deliveries are reported by name, with figures."""

import asyncio
import time
from pathlib import Path

from aiohttp import web
from clocks import HandClock
from support import bench, hear, operator_table, scripted_operator

from lmdaemon.delivery.pace import BEHIND_S, Pace


def test_what_comes_faster_than_it_goes_is_never_drained() -> None:
    pace = Pace()
    for second in range(0, 61, 5):
        pace.note(float(second), 9.0, 100 + 8 * second, is_settled=True)
    rates, outlook = pace.said(60.0, 4).split(": ")
    assert rates == "8.2 deliveries a second are added and 0.2 finished (p50 9 s), 580 wait"
    assert outlook == "never drained at this rate, concurrency 4 is the limit"


def test_what_goes_faster_than_it_comes_is_drained_in_a_time() -> None:
    pace = Pace()
    for second in range(0, 61, 5):
        pace.note(float(second), 0.5, 900 - second, is_settled=True)
    rates = "0 deliveries a second are added and 0.2 finished (p50 0.5 s), 840 wait"
    assert pace.said(60.0, 4) == f"{rates}: drained in 70 min"


def test_failures_leave_what_waits_where_it_is() -> None:
    pace = Pace()
    for second in range(0, 61, 5):
        pace.note(float(second), 1.0, 10, is_settled=False)
    assert "0 deliveries a second are added and 0 finished" in pace.said(60.0, 4)


def test_a_lane_is_behind_from_half_a_minute_until_nothing_waits() -> None:
    pace = Pace()
    turns = [pace.turned(overdue_s) for overdue_s in (BEHIND_S, BEHIND_S + 1, 20.0, 1.5, 0.5, 20.0)]
    assert turns == [False, True, False, False, True, False]


async def test_a_slow_operator_is_told_by_name_and_so_is_its_catching_up(tmp_path: Path, clock: HandClock) -> None:
    async def slow(_: web.Request) -> web.Response:
        clock.advance(9)
        return web.json_response({"error": 0})

    async with scripted_operator(*[slow] * 8) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
            for number in range(20):
                await b.end(f"s{number}")
            with hear() as events:
                seen: dict[tuple[str, str], str] = {}
                running = asyncio.create_task(b.dispatcher.run())
                deadline = time.monotonic() + 20
                while b.db.figures["acme"].pending and time.monotonic() < deadline:
                    seen |= b.dispatcher.lanes.behind
                    await asyncio.sleep(0)
                running.cancel()
    (told,) = (event for event in events if event.name == "delivery.behind")
    assert (told.level, told.facts["operator"], told.facts["sink"]) == ("warning", "acme", "http")
    assert "(p50 9 s)" in told.facts["pace"]
    assert seen.keys() == {("acme", "http")}
