"""What a store finds after a restart or a kill, and what an outage of the database does to service time."""

import contextlib
import dataclasses

import pytest
from clocks import HandClock
from engines import Engine
from operations import BODY, attempt, counted, one_delivery, opening
from support import live

from lmdaemon.model import Gate
from lmdaemon.store.contract import Figures, NewDelivery, Settlement, Store, StoreError


class TestRestart:
    async def test_a_restart_takes_up_clock_deadlines_figures_and_gates(self, engine: Engine, clock: HandClock) -> None:
        async with engine.open(clock) as first:
            first.configured = frozenset({"acme"})
            await first.end_due(idle=False)  # on an engine with owners, the store owns acme from here on
            await first.open_session(opening())
            live(clock, first, 4)
            await first.touch("acme", ["s"])
            live(clock, first, 3)
            await first.set_gate("acme", lambda gate: dataclasses.replace(gate, failures=7))
            due_ms, service_ms = first.next_due_ms, first.service_clock.now_ms()
        clock.advance(100_000)
        async with engine.open(clock) as second:
            second.configured = frozenset({"acme"})
            await second.end_due(idle=False)
            assert (second.next_due_ms, second.service_clock.now_ms()) == (due_ms, service_ms)
            assert (second.live, second.gate("acme").failures) == (1, 7)
            live(clock, second, 7)
            assert (await second.end_due(idle=True)).ended == 0  # the downtime does not count as idle time
            live(clock, second, 0.002)
            assert (await second.end_due(idle=True)).ended == 1

    async def test_a_restart_finds_every_fact_of_a_gate(self, engine: Engine, clock: HandClock) -> None:
        fields = dataclasses.fields(Gate)
        facts = {one.name: f"{one.name}!" if "str" in str(one.type) else place for place, one in enumerate(fields, 7)}
        async with engine.open(clock) as first:
            await first.set_gate("acme", lambda gate: Gate(**facts))  # type: ignore[arg-type]
        async with engine.open(clock) as second:
            assert second.gate("acme") == Gate(**facts)  # type: ignore[arg-type]

    async def test_downtime_counts_when_asked_to(self, engine: Engine, clock: HandClock) -> None:
        async with engine.open(clock) as first:
            await first.open_session(opening())
        clock.advance(11)
        async with engine.open(clock, count_downtime=True) as second:
            second.configured = frozenset({"acme"})
            assert (await second.end_due(idle=True)).ended == 1

    async def test_a_wall_clock_that_went_back_during_downtime_takes_nothing_away(
        self, engine: Engine, clock: HandClock
    ) -> None:
        async with engine.open(clock) as first:
            await first.open_session(opening())
            live(clock, first, 5)
            await first.probe()
            before_ms = first.service_clock.now_ms()
        clock.step_wall(-7200)
        async with engine.open(clock, count_downtime=True) as second:
            assert second.service_clock.now_ms() == before_ms

    async def test_idleness_stands_still_while_nothing_can_be_stored(
        self, engine: Engine, db: Store, clock: HandClock
    ) -> None:
        await db.open_session(opening())
        with engine.outage():
            with pytest.raises(StoreError):
                await db.touch("acme", ["s"])
            frozen_ms = db.service_clock.now_ms()
            live(clock, db, 60)
            assert db.service_clock.now_ms() == frozen_ms
        await db.probe()
        live(clock, db, 2)
        assert db.service_clock.now_ms() == frozen_ms + 2000

    async def test_what_was_acknowledged_before_a_kill_is_there_after_it(
        self, engine: Engine, clock: HandClock
    ) -> None:
        """Nothing that the killed store does afterwards is stored."""
        async with engine.open(clock) as first:
            first.configured, first.sinks_of = frozenset({"acme"}), lambda session: [NewDelivery("http", BODY)]
            await first.open_session(opening("live"))
            delivery = await one_delivery(first, "over")
            await first.settle(Settlement(delivery, "pending", 5000, 1, attempt(status=500), gate=counted(failed=True)))
            before = [await first.session("acme", name) for name in ("live", "over")]
            engine.kill()
            with contextlib.suppress(StoreError):
                await first.end("acme", "live")
        async with engine.open(clock) as second:
            assert [await second.session("acme", name) for name in ("live", "over")] == before
            assert (second.live, second.figures["acme"]) == (1, Figures(live=1, pending=1, dead=0))
            assert second.gate("acme").failures == 1
            assert second.service_clock.now_ms() <= first.service_clock.now_ms()
            assert (await second.touch("acme", ["live", "over"])) == (1, [], ["over"])
