"""Lanes that do not keep up with their deliveries are reported by name, with figures."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from clocks import HandClock
from support import LISTEN, Bench, bench, hear, load, operator_table, scripted_operator

from lmdaemon import retry
from lmdaemon.delivery.lanes import Lane
from lmdaemon.delivery.pace import BEHIND_S, Pace
from lmdaemon.model import HTTP_SINK, Gate


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


def test_what_ends_together_is_no_rate() -> None:
    pace = Pace()
    for number in range(16):
        pace.note(100.0 + number * 1e-5, 2.5, 4, is_settled=True)
    assert pace.said(100.1, 16) == "too few attempts to tell how fast"


def test_what_was_settled_together_was_not_added() -> None:
    """Four answers at a time, stored in one transaction: what is pending after the first of them lacks all four."""
    pace = Pace()
    for second in range(0, 30, 10):
        for number in range(4):
            pace.note(second + number * 1e-5, 10.0, 96 - second * 4 // 10, is_settled=True)
    assert pace.said(20.0, 4).startswith("0 deliveries a second are added and 0.4 finished (p50 10 s), 88 wait")


def test_what_was_added_while_the_operator_was_kept_back_is_no_rate() -> None:
    pace = Pace()
    for second in range(0, 20, 5):
        pace.note(float(second), 1.0, 0, is_settled=True)
    pace.note(58.0, 1.0, 300, is_settled=True)
    assert pace.said(58.0, 4, open_s=3.0) == "too few attempts to tell how fast"


@pytest.mark.parametrize("a_second", [1, 5, 50, 500])
def test_the_pace_of_a_fast_lane_is_told_too(a_second: int) -> None:
    pace = Pace()
    for number in range(30 * a_second):
        pace.note(number / a_second, 0.01, 100_000 + number, is_settled=True)
    said = pace.said(30.0, 4)
    assert said.startswith(f"{2 * a_second:.2g} deliveries a second are added and {a_second:.2g} finished")


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


async def deliver_all(b: Bench) -> None:
    """Delivers until nothing is pending, and asserts that meanwhile no lane is told to be behind."""
    running = asyncio.create_task(b.dispatcher.run())
    deadline = time.monotonic() + 20
    while b.db.figures["acme"].pending and time.monotonic() < deadline:
        assert b.dispatcher.lanes.behind == {}
        await asyncio.sleep(0)
    running.cancel()
    assert b.db.figures["acme"].pending == 0


async def test_what_waited_for_the_end_of_a_hold_is_not_behind(tmp_path: Path, clock: HandClock) -> None:
    async def slow(_: web.Request) -> web.Response:
        clock.advance(0.6)
        return web.json_response({"error": 0})

    async with scripted_operator(*[slow] * 20) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
            await b.db.set_gate("acme", lambda gate: retry.hold(gate, clock.wall_ms(), "by_hand"))
            for number in range(20):
                await b.end(f"s{number}")
            clock.advance(38)
            with hear() as events:
                await b.db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
                await deliver_all(b)
    assert [event for event in events if event.name == "delivery.behind"] == []


async def test_what_waited_for_the_daemon_to_start_is_not_behind(tmp_path: Path, clock: HandClock) -> None:
    async def slow(_: web.Request) -> web.Response:
        clock.advance(0.6)
        return web.json_response({"error": 0})

    async with scripted_operator(*[slow] * 20) as operator:
        toml = operator_table("acme", operator.url, concurrency=1)
        async with bench(tmp_path, clock, toml) as b:
            for number in range(20):
                await b.end(f"s{number}")
        clock.advance(38)
        with hear() as events:
            async with bench(tmp_path, clock, toml) as b:
                await deliver_all(b)
    assert [event for event in events if event.name == "delivery.behind"] == []


@pytest.mark.parametrize(
    "shut",
    [
        lambda now_at: Gate(held_at=now_at),
        lambda now_at: Gate(failures=retry.BREAKER_OPENS_AT, probe_at=now_at + 5000),
        lambda now_at: Gate(not_before_at=now_at + 60_000),
    ],
    ids=["hold", "breaker", "Retry-After"],
)
def test_a_wait_for_a_slot_begins_when_the_gate_opens(tmp_path: Path, clock: HandClock, shut: Any) -> None:
    operator = load(tmp_path / "config.toml", LISTEN + operator_table("acme", "http://127.0.0.1:1/")).operators["acme"]
    lane, began_at = Lane(operator, HTTP_SINK, operator.policy, None), clock.wall_ms()
    lane.next_due_at = began_at
    lane.pace.is_behind = True
    gate = shut(began_at)
    lane.note_gate(gate, began_at)
    assert not lane.pace.is_behind
    assert lane.overdue_s(gate, began_at + 40_000) == 0
    lane.note_gate(Gate(), began_at + 60_000)
    assert lane.overdue_s(Gate(), began_at + 63_000) == 3
    lane.note_gate(Gate(failures=1), began_at + 64_000)  # changes of an open gate are of no importance
    assert lane.overdue_s(Gate(failures=1), began_at + 65_000) == 5


def test_a_wait_for_a_slot_survives_a_clock_that_is_set_back(tmp_path: Path, clock: HandClock) -> None:
    operator = load(tmp_path / "config.toml", LISTEN + operator_table("acme", "http://127.0.0.1:1/")).operators["acme"]
    lane, now_at = Lane(operator, HTTP_SINK, operator.policy, None), clock.wall_ms()
    lane.start_over(Gate(), now_at)
    lane.note_set_back(now_at - 3_600_000)
    lane.next_due_at = now_at - 3_600_000
    assert lane.overdue_s(Gate(), now_at - 3_590_000) == 10
