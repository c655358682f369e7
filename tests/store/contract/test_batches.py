"""Operations that come at the same time and may be written in one batch."""

import asyncio

import pytest
from clocks import HandClock
from engines import Engine
from msgspec.structs import replace as replaced
from operations import attempt, counted, notice, one_delivery, opening
from pair import PairEngine

from lmdaemon.store import contract
from lmdaemon.store.contract import Claim, NewDelivery, Recording, Settlement, Store


class TestBatches:
    """Operations of one kind that follow each other become one statement. Each gets the answer that it would get
    alone.
    """

    async def test_openings_of_one_batch_are_each_answered_for_themselves(self, db: Store) -> None:
        await db.open_session(opening("known"))
        await db.open_session(opening("over"))
        await db.end("acme", "over")
        names = ["a", "known", "b", "a", "over", "c", '\U0001f3b2 "ü\\', "1"]
        opened = await asyncio.gather(*(db.open_session(opening(name)) for name in names))
        assert [one.outcome for one in opened] == ["created", "open", "created", "open", "ended", *["created"] * 3]
        for one in opened:
            known = await db.session("acme", one.session.session_id)
            assert known is not None
            assert known[0] == one.session
        other = await asyncio.gather(*(db.open_session(opening("d", player_id=name)) for name in "pq"))
        assert [one.outcome for one in other] == ["created", "differs"]
        assert db.figures_of("acme").live == 7

    @pytest.mark.parametrize("many", [1, 2, 3, 4, 5, 63, 64, 65])
    async def test_any_number_of_arrivals_is_stored_with_the_touches_before_them(
        self, db: Store, clock: HandClock, many: int
    ) -> None:
        """Half of the arrivals are openings, the other half are notices of unknown sessions, with a delivery each."""
        db.sinks_of = lambda session: [NewDelivery("http", session.session_id.encode())]
        await db.open_session(opening("known", attributes='{"table":"🎲"}'))
        clock.advance(1)
        touched, *arrived = await asyncio.gather(
            db.touch("acme", ["known"]),
            *(db.open_session(opening(f"o{number}", attributes='{"a":[1,null]}')) for number in range(many)),
            *(db.record(notice(f"n{number}")) for number in range(many)),
        )
        assert touched == (1, [], [])
        assert [one.outcome for one in arrived[:many]] == ["created"] * many
        assert arrived[many:] == ["ended"] * many
        known = await db.session("acme", "known")
        assert known is not None
        assert known[0].seen_ms >= 1000
        for number, one in enumerate(arrived[:many]):
            stored = await db.session("acme", f"o{number}")
            assert stored == (one.session, [])
        stored = await db.session("acme", f"n{many - 1}")
        assert stored is not None
        assert (stored[0].reason, stored[1][0].body) == ("reported", f"n{many - 1}".encode())
        assert (db.live, db.figures_of("acme").pending) == (1 + many, many)

    async def test_notices_of_one_batch_are_each_answered_for_themselves(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", f"{session.session_id} {session.token}".encode())]
        await db.open_session(opening("live"))
        one = Recording("acme", "", "p", "tok-3n", False, True, '{"x":1}', 1000)
        asked = [
            replaced(one, session_id="new"),
            replaced(one, session_id="new"),
            replaced(one, session_id="new", player_id="q"),
            replaced(one, session_id="live"),
            replaced(one, session_id="live"),
            replaced(one, session_id="none", accept_unknown=False),
            replaced(one, session_id="none", compare_token=True),
            replaced(one, operator="other", session_id="new"),
            replaced(one, session_id="refused first", accept_unknown=False),
            replaced(one, session_id="refused first"),
        ]
        recorded = await asyncio.gather(*(db.record(notice) for notice in asked))
        assert recorded == [
            *("ended", "repeated", "player_mismatch", "ended", "repeated", "unknown_session", "bad_token", "ended"),
            *("unknown_session", "ended"),
        ]
        for operator, session_id in (("acme", "new"), ("acme", "live"), ("other", "new")):
            known = await db.session(operator, session_id)
            assert known is not None
            session, (delivery,) = known
            assert (session.reason, session.extra, delivery.session) == ("reported", '{"x":1}', session.id)
            assert delivery.body == f"{session_id} {session.token}".encode()
        assert (db.figures_of("acme").live, db.figures_of("acme").pending) == (0, 3)

    async def test_closings_of_one_batch_end_each_session_once(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", b"x")]
        for name in "ab":
            await db.open_session(opening(name))
        closed = await asyncio.gather(*(db.end("acme", name) for name in ("a", "b", "a", "none")))
        assert [session and (session.session_id, session.reason) for session in closed] == [
            *(("a", "closed"), ("b", "closed"), ("a", "closed"), None)
        ]
        assert (db.figures_of("acme").live, db.figures_of("acme").pending) == (0, 2)

    async def test_a_touch_before_the_opening_in_one_batch_meets_nothing(self, db: Store) -> None:
        touched, opened, again = await asyncio.gather(
            db.touch("acme", ["s"]), db.open_session(opening()), db.touch("acme", ["s"])
        )
        assert touched == (0, ["s"], [])
        assert opened.outcome == "created"
        assert again == (1, [], [])

    async def test_a_result_of_a_delivery_that_is_settled_changes_the_gate_alone(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", b"{}")]
        await db.record(notice())
        delivery = await one_delivery(db)
        await db.settle(Settlement(delivery, "dead", 0, 1, attempt(error="x"), gate=counted(failed=True)))
        late = Settlement(delivery, "delivered", 0, 1, attempt(status=200), gate=counted(failed=True))
        settled, touched = await asyncio.gather(db.settle(late), db.touch("acme", ["s"]))
        assert (settled.before.failures, settled.after.failures) == (1, 2)
        assert touched == (0, [], ["s"])
        kept = await one_delivery(db)
        assert (kept.state, kept.attempts, kept.last_error) == ("dead", 1, "x")
        assert db.figures_of("acme") == contract.Figures(live=0, pending=0, dead=1)

    async def test_a_wait_queued_while_the_wall_clock_goes_back_stays_as_long(
        self, engine: Engine, db: Store, clock: HandClock
    ) -> None:
        """Waits that are stored already are set back with the clock. The wait of a result in the same batch is computed
        with the new time and must not be.
        """
        db.sinks_of = lambda session: [NewDelivery("http", b"{}"), NewDelivery("plugin:x", b"")]
        await db.record(notice())
        (first,), (second,) = await db.claimable([Claim("acme", sink, [], 1) for sink in ("http", "plugin:x")])
        await db.settle(Settlement(first, "pending", 7_000_000, 1, attempt(error="x")))
        await engine.step_wall(clock, db, -3600)
        settled = await db.settle(Settlement(second, "pending", 60_000, 1, attempt(error="x")))
        assert settled.due_at == clock.wall_ms() + 60_000
        (first,), (second,) = await db.claimable([Claim("acme", sink, [], 1) for sink in ("http", "plugin:x")])
        assert second.due_at == settled.due_at
        assert first.due_at == clock.wall_ms() + 7_000_000

    async def test_a_slow_commit_hides_nothing_of_a_step_of_the_wall_clock(
        self, engine: Engine, db: Store, clock: HandClock
    ) -> None:
        class Slow(contract.StoreObserver):
            def committed(self, operations: int, took_s: float) -> None:
                clock.advance(5)

        db.observe(Slow())
        await db.probe()
        await engine.step_wall(clock, db, -3600)
        assert db.set_back_ms == 3_600_000


@pytest.mark.parametrize(("crowd", "transactions"), [(True, [1, 1, 1]), (False, [3])])
async def test_a_sweep_of_a_crowd_makes_nobody_wait_who_came_before_it(
    engine: Engine, db: Store, crowd: bool, transactions: list[int]
) -> None:
    if isinstance(engine, PairEngine):
        pytest.skip("of two daemons each has batches of its own")
    await db.open_session(opening())
    sizes: list[int] = []

    class Sizes(contract.StoreObserver):
        def committed(self, operations: int, took_s: float) -> None:
            sizes.append(operations)

    db.observe(Sizes())
    await asyncio.gather(db.touch("acme", ["s"]), db.end_due(idle=True, crowd=crowd), db.touch("acme", ["s"]))
    assert sizes == transactions
