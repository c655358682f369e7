"""Sessions: opened, touched, and ended once, at their exact deadline; notices about sessions that ended elsewhere."""

import asyncio

import pytest
from clocks import HandClock
from engines import Engine
from msgspec.structs import replace as replaced
from operations import BODY, IDLE_MS, found, notice, opening
from support import live

from lmdaemon.model import Session
from lmdaemon.store import contract
from lmdaemon.store.contract import Dead, NewDelivery, Store


class TestOpening:
    async def test_an_opened_session_is_on_disk_when_the_answer_comes(self, engine: Engine, db: Store) -> None:
        assert (await db.open_session(opening())).outcome == "created"
        assert [(row["operator"], row["session_id"]) for row in engine.rows("session")] == [("acme", "s")]

    async def test_opening_the_same_again_is_a_touch_and_nothing_else(self, db: Store, clock: HandClock) -> None:
        first = (await db.open_session(opening(attributes='{"a":1}'))).session
        live(clock, db, 4)
        again = await db.open_session(opening(idle_ms=99_000, attributes='{"b":2}'))
        assert again.outcome == "open"
        assert again.session == await found(db)
        assert again.session.seen_ms == first.seen_ms + 4000
        assert again.session._replace(seen_ms=first.seen_ms, seen_at=first.seen_at) == first

    @pytest.mark.parametrize("change", [{"player_id": "q"}, {"token": "other"}, {"token": None}])
    async def test_opening_with_other_facts_is_refused_and_changes_nothing(
        self, db: Store, clock: HandClock, change: dict[str, str]
    ) -> None:
        first = (await db.open_session(opening())).session
        live(clock, db, 1)
        assert (await db.open_session(opening(**change))).outcome == "differs"
        assert await found(db) == first

    async def test_an_ended_session_cannot_be_opened_again(self, db: Store) -> None:
        await db.open_session(opening())
        ended = await db.end("acme", "s")
        again = await db.open_session(opening())
        assert (again.outcome, again.session) == ("ended", ended)

    async def test_the_same_id_at_two_operators_is_two_sessions(self, db: Store) -> None:
        await db.open_session(opening())
        assert (await db.open_session(opening(operator="other"))).outcome == "created"
        await db.end("acme", "s")
        assert (await found(db, operator="other")).reason is None


class TestTouching:
    async def test_the_requests_that_opened_and_closed_a_session_are_kept(self, db: Store) -> None:
        await db.open_session(replaced(opening("s"), request_id="opens"))
        await db.open_session(replaced(opening("s"), request_id="touches"))
        await asyncio.gather(db.end("acme", "s", "closes"), db.end("acme", "s", "is too late"))
        known = await db.session("acme", "s")
        assert known is not None
        assert (known[0].opened_request, known[0].ended_request) == ("opens", "closes")
        shown = await db.shown_session("acme", "s")
        assert shown is not None
        assert (shown[0].opened_request, shown[0].ended_request) == ("opens", "closes")

    async def test_touched_unknown_and_ended_are_told_apart(self, db: Store) -> None:
        for session_id in ("a", "b", "gone"):
            await db.open_session(opening(session_id))
        await db.end("acme", "gone")
        assert await db.touch("acme", ["a", "x", "b", "gone", "a", "x"]) == (2, ["x"], ["gone"])

    async def test_neighbours_in_one_batch_get_their_own_answers(self, db: Store) -> None:
        await db.open_session(opening("a"))
        await db.open_session(opening("b", operator="other"))
        answers = await asyncio.gather(
            db.touch("acme", ["a", "b"]),
            db.touch("other", ["a", "b"]),
            db.touch("acme", ["a"]),
            db.touch("none", ["a"]),
        )
        assert answers == [(1, ["b"], []), (1, ["a"], []), (1, [], []), (0, ["a"], [])]

    @pytest.mark.parametrize("session_id", ["'; DROP TABLE session; --", '"quoted"', "\\u0041", "ü→漢", " ", "[1]"])
    async def test_any_id_is_found_as_it_was_opened(self, db: Store, session_id: str) -> None:
        await db.open_session(opening(session_id))
        assert (await db.touch("acme", [session_id])).touched == 1
        assert (await found(db, session_id)).session_id == session_id


class TestExpiry:
    async def test_no_session_ends_before_its_idle_time_and_each_ends_at_it(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening())
        live(clock, db, 10)
        assert (await db.end_due(idle=True)).ended == 0
        live(clock, db, 0.002)
        assert (await db.end_due(idle=True)).ended == 1
        session = await found(db)
        assert session.reason == "inactivity"
        assert session.ended_at == clock.wall_ms()
        assert session.ended_at - session.seen_at >= IDLE_MS

    async def test_a_touch_moves_the_deadline_without_touching_the_index(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening())
        live(clock, db, 9)
        await db.touch("acme", ["s"])
        live(clock, db, 2)
        # The session is looked at once, and its next look is set to its deadline
        assert await db.end_due(idle=True) == (0, 1)
        assert db.next_due_ms == (await found(db)).deadline_ms
        live(clock, db, 8.002)
        assert (await db.end_due(idle=True)).ended == 1

    async def test_a_touch_queued_before_the_sweep_wins_and_one_after_it_is_refused(
        self, db: Store, clock: HandClock
    ) -> None:
        await db.open_session(opening("early"))
        await db.open_session(opening("late"))
        live(clock, db, 11)
        _, swept, late = await asyncio.gather(
            db.touch("acme", ["early"]), db.end_due(idle=True), db.touch("acme", ["early", "late"])
        )
        assert swept.ended == 1
        assert late == (1, [], ["late"])

    async def test_without_idle_only_lifetimes_end(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening("idle"))
        await db.open_session(opening("old", lifetime_ms=5000))
        live(clock, db, 11)
        assert (await db.end_due(idle=False)).ended == 1
        assert (await found(db, "old")).reason == "max_lifetime"
        assert (await found(db, "idle")).reason is None

    async def test_max_lifetime_counts_wall_time_and_no_touch_extends_it(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening(lifetime_ms=60_000))
        clock.advance(59)
        await db.touch("acme", ["s"])
        assert (await db.end_due(idle=True)).ended == 0
        clock.advance(1)
        await db.touch("acme", ["s"])
        assert (await db.end_due(idle=True)).ended == 1
        assert (await found(db)).reason == "max_lifetime"

    async def test_a_sweep_is_bounded_and_takes_the_oldest_first(self, db: Store, clock: HandClock) -> None:
        await asyncio.gather(*(db.open_session(opening(f"{number:03}")) for number in range(contract.SWEEP_ROWS)))
        live(clock, db, 1)
        await db.open_session(opening("young"))
        live(clock, db, 11)
        assert await db.end_due(idle=True) == (contract.SWEEP_ROWS, contract.SWEEP_ROWS)
        assert (await found(db, "young")).reason is None
        assert await db.end_due(idle=True) == (1, 1)
        assert db.next_due_ms is None

    async def test_an_operators_crowd_lets_the_end_of_another_in(self, db: Store, clock: HandClock) -> None:
        """The one is due after the first of the crowd and before the last."""
        await asyncio.gather(*(db.open_session(opening(f"early-{n:03}")) for n in range(contract.SWEEP_ROWS)))
        live(clock, db, 1)
        await db.open_session(opening("one", operator="other"))
        live(clock, db, 1)
        await asyncio.gather(*(db.open_session(opening(f"late-{n:03}")) for n in range(contract.SWEEP_ROWS)))
        live(clock, db, 11)
        for _ in range(2):
            assert (await db.end_due(idle=True)).ended >= contract.SWEEP_ROWS
        assert (await found(db, "one", "other")).reason == "inactivity"

    async def test_sessions_of_an_unconfigured_operator_wait_and_do_not_block(
        self, db: Store, clock: HandClock
    ) -> None:
        await db.open_session(opening("orphan", operator="removed", lifetime_ms=5000))
        await db.open_session(opening("s"))
        live(clock, db, 11)
        assert (await db.end_due(idle=True)).ended == 1
        assert (await found(db, "orphan", "removed")).reason is None
        # The session is looked at again later, or when its operator is configured again
        assert db.next_due_ms is None or db.next_due_ms > db.service_clock.now_ms()

    async def test_sessions_of_an_operator_that_is_long_away_cost_little(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening("s"))
        db.configure(frozenset({"other"}), lambda session: [])
        live(clock, db, 10 + 4000)
        assert (await db.end_due(idle=True)).ended == 0
        assert db.next_due_ms is None or db.next_due_ms - db.service_clock.now_ms() > 400_000

    async def test_a_session_whose_operator_is_configured_again_ends_in_time(self, db: Store, clock: HandClock) -> None:
        await asyncio.gather(db.open_session(opening("s")), db.open_session(opening("old", lifetime_ms=5000)))
        db.configure(frozenset({"other"}), lambda session: [])
        live(clock, db, 11)
        assert (await db.end_due(idle=True)).ended == 0
        db.configure(frozenset({"acme", "other"}), lambda session: [])
        await db.touch("acme", ["s"])
        live(clock, db, 9.9)
        await db.end_due(idle=True)
        assert (await found(db, "s")).reason is None
        live(clock, db, 0.2)
        await db.end_due(idle=True)
        assert (await found(db, "s")).reason == "inactivity"
        assert (await found(db, "old")).reason == "max_lifetime"

    async def test_an_operator_that_is_configured_again_has_a_grace_for_touches(
        self, db: Store, clock: HandClock
    ) -> None:
        await db.open_session(opening("s"))
        db.configure(frozenset({"other"}), lambda session: [])
        live(clock, db, 30)
        db.configure(frozenset({"acme", "other"}), lambda session: [], grace_ms=2000)
        await db.open_session(opening("new"))
        assert db.ends_at_ms(await found(db, "s")) == db.service_clock.now_ms() + 2000
        new = await found(db, "new")
        assert db.ends_at_ms(new) == new.deadline_ms
        live(clock, db, 1.9)
        assert (await db.end_due(idle=True)).ended == 0
        live(clock, db, 0.2)
        assert (await db.end_due(idle=True)).ended == 1
        assert (await found(db, "new")).reason is None

    async def test_a_stalled_daemon_ends_nothing(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening())
        live(clock, db, 9)
        clock.advance(3600)  # nobody read the clock in this time: the daemon was stopped, suspended or blocked
        assert (await db.end_due(idle=True)).ended == 0
        clock.step_wall(-7200)
        live(clock, db, 1.002)
        assert (await db.end_due(idle=True)).ended == 1


class TestOneEnd:
    async def test_whoever_comes_first_ends_it_and_the_others_get_the_stored_result(
        self, db: Store, clock: HandClock
    ) -> None:
        await db.open_session(opening())
        live(clock, db, 11)
        swept, closed, recorded, again = await asyncio.gather(
            db.end_due(idle=True), db.end("acme", "s"), db.record(notice()), db.record(notice())
        )
        assert (swept.ended, recorded, again) == (1, "repeated", "repeated")
        assert closed is not None
        assert closed.reason == "inactivity"
        assert len((await db.deliveries(operator="acme", sink=None, state=None, limit=9, after=None)).rows) == 1

    async def test_the_end_and_its_deliveries_are_one_transaction(self, db: Store) -> None:
        def broken(session: Session) -> list[NewDelivery]:
            raise RuntimeError("the sink's body cannot be made")

        await db.open_session(opening())
        db.sinks_of = broken
        with pytest.raises(RuntimeError):
            await db.end("acme", "s")
        assert (await found(db)).reason is None
        db.sinks_of = lambda session: [NewDelivery("http", BODY), NewDelivery("plugin:x", b"")]
        await db.end("acme", "s")
        known = await db.session("acme", "s")
        assert known is not None
        assert [delivery.sink for delivery in known[1]] == ["http", "plugin:x"]
        assert len({delivery.webhook_id for delivery in known[1]}) == 2

    async def test_a_sink_whose_body_cannot_be_made_is_dead_with_its_reason(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", b"", "must send 'token'")]
        await db.open_session(opening())
        await db.end("acme", "s")
        (delivery,) = (await db.deliveries(operator=None, sink=None, state="dead", limit=9, after=None)).rows
        assert (delivery.last_error, delivery.settled_at) == ("must send 'token'", delivery.created_at)
        assert await db.retry_dead("acme", Dead()) == 0  # the delivery cannot be sent, so a retry cannot help
        again = await db.retry_one(delivery.webhook_id)
        assert again is not None
        after = await db.delivery(delivery.webhook_id)
        assert after is not None
        assert after._replace(token=None) == delivery  # a page does not show the token


class TestNotices:
    async def test_a_notice_ends_an_open_session(self, db: Store) -> None:
        await db.open_session(opening())
        assert await db.record(notice(extra='{"x":1}')) == "ended"
        session = await found(db)
        assert (session.reason, session.extra, session.token) == ("reported", '{"x":1}', "secret")

    async def test_an_unknown_session_is_recorded_as_ended(self, db: Store) -> None:
        assert await db.record(notice()) == "ended"
        assert await db.record(notice(token="late")) == "repeated"
        session = await found(db)
        assert (session.reason, session.token, session.player_id) == ("reported", "secret", "p")
        assert (await db.touch("acme", ["s"])).ended == ["s"]

    @pytest.mark.parametrize(
        ("change", "opened", "verdict"),
        [
            ({"accept_unknown": False}, False, "unknown_session"),
            ({"compare_token": True}, False, "bad_token"),
            ({"compare_token": True, "token": "wrong"}, True, "bad_token"),
            ({"compare_token": True, "token": None}, True, "bad_token"),
            ({"player_id": "q"}, True, "player_mismatch"),
        ],
    )
    async def test_a_refused_notice_changes_nothing(
        self, db: Store, change: dict[str, object], opened: bool, verdict: str
    ) -> None:
        if opened:
            await db.open_session(opening())
        before = await db.session("acme", "s")
        assert await db.record(notice(**change)) == verdict
        assert await db.session("acme", "s") == before

    async def test_a_repeat_with_another_player_is_refused_for_ever(self, db: Store) -> None:
        await db.record(notice())
        assert await db.record(notice(player_id="q")) == "player_mismatch"
        assert await db.record(notice()) == "repeated"
