"""The verbs of the store on a real file: one end, exact deadlines, figures that are never counted, pages, pruning."""

import asyncio
import dataclasses
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest
from clocks import HandClock
from msgspec.structs import replace as replaced
from support import live, open_store, until

from lmdaemon import retry
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store import contract, rules
from lmdaemon.store.contract import Claim, NewDelivery, Opening, Recording, Settlement, StoreError
from lmdaemon.store.sqlite import batch as batches
from lmdaemon.store.sqlite import file as database
from lmdaemon.store.sqlite import pages, rows, store
from lmdaemon.store.sqlite.store import Store

IDLE_MS = 10_000
BODY = b'{"sessionId":"s"}'


@pytest.fixture
async def db(tmp_path: Path, clock: HandClock) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "test.sqlite3", clock) as opened:
        opened.configured = frozenset({"acme", "other"})
        opened.sinks_of = lambda session: [NewDelivery("http", BODY)]
        yield opened
        await assert_figures_are_true(opened)


async def assert_figures_are_true(db: Store) -> None:
    """What is kept up in every transaction is what counting would say, in memory and in the file."""

    def count(sql: sqlite3.Connection) -> tuple[dict[str, tuple[int, int, int]], dict[str, tuple[int, int, int]]]:
        kept = {name: figures for name, *figures in sql.execute("SELECT name, live, pending, dead FROM operator")}
        statement = """
            SELECT name, (SELECT count(*) FROM session WHERE operator = name AND reason IS NULL),
                         (SELECT count(*) FROM delivery WHERE operator = name AND state = 'pending'),
                         (SELECT count(*) FROM delivery WHERE operator = name AND state = 'dead') FROM operator"""
        return kept, {name: counted for name, *counted in sql.execute(statement)}

    kept, counted = await db._db.read(count)
    assert kept == counted
    assert {name: list(dataclasses.astuple(figures)) for name, figures in db.figures.items()} == counted


def opening(session_id: str = "s", operator: str = "acme", **changes: object) -> Opening:
    return replaced(Opening(operator, session_id, "p", "secret", None, IDLE_MS, 0), **changes)  # type: ignore[arg-type]


def notice(session_id: str = "s", operator: str = "acme", **changes: object) -> Recording:
    row = Recording(operator, session_id, "p", "secret", False, True, None, IDLE_MS)
    return replaced(row, **changes)  # type: ignore[arg-type]


async def found(db: Store, session_id: str = "s", operator: str = "acme") -> Session:
    known = await db.session(operator, session_id)
    assert known is not None
    return known[0]


class TestOpening:
    async def test_an_opened_session_is_on_disk_when_the_answer_comes(self, db: Store) -> None:
        assert (await db.open_session(opening())).outcome == "created"
        with closing(sqlite3.connect(db.path)) as sql:
            assert sql.execute("SELECT operator, session_id FROM session").fetchall() == [("acme", "s")]

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
        assert await db.end_due(idle=True) == (0, 1)  # looked at once, and put where it belongs
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

    async def test_sessions_of_an_operator_that_is_not_configured_wait_and_do_not_block(
        self, db: Store, clock: HandClock
    ) -> None:
        await db.open_session(opening("orphan", operator="removed", lifetime_ms=5000))
        await db.open_session(opening("s"))
        live(clock, db, 11)
        assert (await db.end_due(idle=True)).ended == 1
        assert (await found(db, "orphan", "removed")).reason is None
        assert db.next_due_ms is not None  # it is looked at again later
        assert db.next_due_ms > db.service_clock.now_ms()

    async def test_a_stalled_daemon_ends_nothing(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening())
        live(clock, db, 9)
        clock.advance(3600)  # stopped, suspended or blocked: nobody read the clock
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
        assert await db.retry_dead("acme", 0) == 0  # trying again cannot help
        again = await db.retry_one(delivery.webhook_id)
        assert again is not None
        assert (await db.delivery(delivery.webhook_id)) == delivery


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


class TestRestart:
    async def test_a_restart_takes_up_clock_deadlines_figures_and_gates(self, tmp_path: Path, clock: HandClock) -> None:
        path = tmp_path / "restart.sqlite3"
        async with open_store(path, clock) as first:
            first.configured = frozenset({"acme"})
            await first.open_session(opening())
            live(clock, first, 4)
            await first.touch("acme", ["s"])
            live(clock, first, 3)
            await first.set_gate("acme", lambda gate: dataclasses.replace(gate, failures=7))
            due_ms, service_ms = first.next_due_ms, first.service_clock.now_ms()
        clock.advance(100_000)
        async with open_store(path, clock) as second:
            second.configured = frozenset({"acme"})
            assert (second.next_due_ms, second.service_clock.now_ms()) == (due_ms, service_ms)
            assert (second.live, second.gate("acme").failures) == (1, 7)
            live(clock, second, 7)
            assert (await second.end_due(idle=True)).ended == 0  # the downtime did not count
            live(clock, second, 0.002)
            assert (await second.end_due(idle=True)).ended == 1

    async def test_downtime_counts_when_asked_to(self, tmp_path: Path, clock: HandClock) -> None:
        path = tmp_path / "restart.sqlite3"
        async with open_store(path, clock) as first:
            await first.open_session(opening())
        clock.advance(11)
        async with open_store(path, clock, count_downtime=True) as second:
            second.configured = frozenset({"acme"})
            assert (await second.end_due(idle=True)).ended == 1

    async def test_a_wall_clock_that_went_back_during_downtime_takes_nothing_away(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        path = tmp_path / "restart.sqlite3"
        async with open_store(path, clock) as first:
            await first.open_session(opening())
            live(clock, first, 5)
            await first.probe()
            before_ms = first.service_clock.now_ms()
        clock.step_wall(-7200)
        async with open_store(path, clock, count_downtime=True) as second:
            assert second.service_clock.now_ms() == before_ms

    async def test_idleness_stands_still_while_nothing_can_be_stored(self, db: Store, clock: HandClock) -> None:
        await db.open_session(opening())
        blocker = sqlite3.connect(db.path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError):
            await db.touch("acme", ["s"])
        frozen_ms = db.service_clock.now_ms()
        live(clock, db, 60)
        assert db.service_clock.now_ms() == frozen_ms
        blocker.execute("ROLLBACK")
        blocker.close()
        await db.probe()
        live(clock, db, 2)
        assert db.service_clock.now_ms() == frozen_ms + 2000


async def kept(db: Store) -> tuple[str, list[bytes]]:
    """What the file has of a session's token: in its own row, and in the bodies of its deliveries."""
    known = await db.session("acme", "s")
    assert known is not None
    return str(known[0].token), [delivery.body for delivery in known[1]]


async def one_delivery(db: Store, session_id: str = "s", operator: str = "acme") -> Delivery:
    await db.open_session(opening(session_id, operator=operator))
    await db.end(operator, session_id)
    known = await db.session(operator, session_id)
    assert known is not None
    return known[1][0]


def attempt(**facts: object) -> dict[str, object]:
    return {"at": 1, "durationMs": 2, "status": None, "code": None, "error": None} | facts


class TestDeliveries:
    async def test_a_settled_delivery_keeps_its_history_and_its_body(self, db: Store, clock: HandClock) -> None:
        first = await one_delivery(db)
        failed = attempt(status=500, error="status_500")
        await db.settle(Settlement(first, "pending", 5000, 1, failed))
        second = await db.delivery(first.webhook_id)
        assert second is not None
        assert (second.attempts, second.step, second.last_status, second.last_error) == (1, 1, 500, "status_500")
        await db.settle(Settlement(second, "delivered", 0, 1, attempt(status=200, code="0")))
        third = await db.delivery(first.webhook_id)
        assert third is not None
        assert (third.state, third.attempts, third.last_error, third.body) == ("delivered", 2, None, b"")
        assert [one["status"] for one in json.loads(third.history)] == [500, 200]

    async def test_the_history_keeps_the_latest_attempts_only(self, db: Store) -> None:
        delivery = await one_delivery(db)
        for number in range(rules.HISTORY_MAX + 5):
            await db.settle(Settlement(delivery, "pending", 0, 0, attempt(at=number)))
            again = await db.delivery(delivery.webhook_id)
            assert again is not None
            delivery = again
        history = json.loads(delivery.history)
        assert (len(history), history[-1]["at"]) == (rules.HISTORY_MAX, rules.HISTORY_MAX + 4)
        assert delivery.attempts == rules.HISTORY_MAX + 5

    async def test_a_delivery_is_settled_once(self, db: Store) -> None:
        delivery = await one_delivery(db)
        await db.settle(Settlement(delivery, "delivered", 0, 0, attempt(status=200)))
        await db.settle(Settlement(delivery, "dead", 0, 0, attempt(status=500)))
        known = await db.delivery(delivery.webhook_id)
        assert known is not None
        assert known.state == "delivered"
        assert db.figures_of("acme") == contract.Figures(live=0, pending=0, dead=0)

    async def test_a_delivery_that_two_results_of_one_batch_are_of_is_settled_once(self, db: Store) -> None:
        twice, other = await one_delivery(db, "twice"), await one_delivery(db, "other")
        results = [
            Settlement(twice, "delivered", 0, 0, attempt(status=200)),
            Settlement(other, "dead", 0, 0, attempt(status=500)),
            Settlement(twice, "dead", 0, 0, attempt(status=500)),
        ]
        await asyncio.gather(*(db.settle(one) for one in results))
        known = [await db.delivery(one.webhook_id) for one in (twice, other)]
        assert [one and one.state for one in known] == ["delivered", "dead"]
        assert db.figures_of("acme") == contract.Figures(live=0, pending=0, dead=1)

    async def test_a_wrong_nonce_finds_nothing(self, db: Store) -> None:
        delivery = await one_delivery(db)
        for webhook_id in (f"msg_{delivery.id}_0", "msg_1", "", "msg_", "msg_x_y", f"msg_{'9' * 30}_0", "msg_²_0"):
            assert await db.delivery(webhook_id) is None
            assert await db.retry_one(webhook_id) is None

    async def test_lanes_are_claimed_earliest_due_first(self, db: Store, clock: HandClock) -> None:
        first, second = await one_delivery(db, "first"), await one_delivery(db, "second")
        await one_delivery(db, "elsewhere", "other")
        await db.settle(Settlement(first, "pending", 9000, 1, attempt()))
        lanes = [Claim("acme", "http", [], 5), Claim("acme", "plugin:x", [], 5), Claim("other", "http", [], 1)]
        claimed = await db.claimable(lanes)
        assert [[row.session_id for row in rows] for rows in claimed] == [["second", "first"], [], ["elsewhere"]]
        assert second.due_at < claimed[0][1].due_at
        (rest,) = await db.claimable([Claim("acme", "http", [second.id], 5)])
        assert [row.session_id for row in rest] == ["first"]

    async def test_any_number_of_lanes_is_claimed_each_with_its_own_rows_the_earliest_due_first(
        self, db: Store, clock: HandClock
    ) -> None:
        names = [f"operator-{number}" for number in range(2 * store.LANES_AT_ONCE + 1)]
        first = [await one_delivery(db, operator=name) for name in names]
        again = await db.settle(Settlement(first[-1], "pending", 5000, 1, attempt()))
        clock.advance(1)
        second = [await one_delivery(db, "later", name) for name in names]
        lanes = await db.claimable([Claim(name, "http", [], 2) for name in names])
        assert lanes[:-1] == [list(pair) for pair in zip(first, second, strict=True)][:-1]
        assert [row.due_at for row in lanes[-1]] == [second[-1].due_at, again.due_at]
        assert await db.claimable([]) == []

    async def test_a_token_goes_when_nothing_can_need_it_any_more_and_is_still_known_again(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", session.token.encode()), NewDelivery("plugin:a", b"")]
        await db.open_session(opening(token="tok-3n"))
        await db.end("acme", "s")
        known = await db.session("acme", "s")
        assert known is not None
        http, plugin = known[1]
        await db.settle(Settlement(http, "delivered", 0, 0, attempt()))
        assert await kept(db) == ("tok-3n", [b"", b""])  # the plug-in is to be told it
        await db.settle(Settlement(plugin, "dead", 0, 0, attempt()))
        assert (await kept(db))[0] == "tok-3n"  # and may be, by hand
        await db.retry_dead("acme", 0)
        await db.settle(Settlement(plugin, "delivered", 0, 0, attempt()))
        digest, bodies = await kept(db)
        assert "tok-3n" not in digest
        assert bodies == [b"", b""]
        repeat = notice(token="tok-3n", compare_token=True)
        assert await db.record(repeat) == "repeated"
        assert await db.record(replaced(repeat, token="another")) == "bad_token"
        assert await db.record(replaced(repeat, token=digest)) == "bad_token"

    async def test_a_delivered_token_is_in_no_file_once_the_daemon_is_idle(
        self, db: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither in the file, also where its pages became free, nor in what was committed, nor in its index."""
        monkeypatch.setattr(database, "IDLE_S", 0.05)
        tokens = ["fSYFZMScpZ01FhR26r59GexREh1xHgEY", "large-" * 600]
        db.sinks_of = lambda session: [NewDelivery("http", f"body with {session.token}".encode())]
        for number, token in enumerate(tokens):
            await db.open_session(opening(str(number), token=token))
            await db.end("acme", str(number))
        files = [Path(f"{db.path}{suffix}") for suffix in ("", "-wal", "-shm")]

        def found() -> list[bool]:
            content = b"".join(file.read_bytes() for file in files)
            return [token[:30].encode() in content for token in tokens]

        (rows,) = await db.claimable([Claim("acme", "http", [], 9)])
        assert found() == [True, True]
        await asyncio.gather(*(db.settle(Settlement(row, "delivered", 0, 0, attempt())) for row in rows))
        await until(lambda: found() == [False, False])

    async def test_a_token_that_nobody_is_told_goes_with_the_end(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", b"", "no playerId")]
        await db.open_session(opening(token="tok-3n"))
        await db.end("acme", "s")
        assert "tok-3n" not in (await kept(db))[0]

    async def test_gates_change_atomically_under_concurrent_results(self, db: Store) -> None:
        rows = [await one_delivery(db, str(number)) for number in range(4)]
        failed = lambda gate, now_at: dataclasses.replace(gate, failures=gate.failures + 1)  # noqa: E731
        await asyncio.gather(*(db.settle(Settlement(row, "pending", 0, 1, attempt(), gate=failed)) for row in rows))
        assert db.gate("acme").failures == 4

    async def test_dead_deliveries_come_back_ten_a_second_over_all_calls(self, db: Store, clock: HandClock) -> None:
        for number in range(12):
            await db.settle(Settlement(await one_delivery(db, str(number)), "dead", 0, 3, attempt()))
        since = clock.wall_ms()
        clock.advance(60)
        late = await one_delivery(db, "late")
        await db.settle(Settlement(late, "dead", 0, 3, attempt()))
        assert await db.retry_dead("acme", clock.wall_ms()) == 1
        assert await db.retry_dead("acme", since) == 12
        assert await db.retry_dead("acme", 0) == 0
        (rows,) = await db.claimable([Claim("acme", "http", [], 99)])
        assert [row.due_at - clock.wall_ms() for row in rows] == [100 * place for place in range(13)]
        assert {(row.step, row.aged_from_at) for row in rows} == {(0, clock.wall_ms())}

    async def test_a_hold_does_not_age_what_waits(self, db: Store, clock: HandClock) -> None:
        before = await one_delivery(db, "before")
        await db.set_gate("acme", lambda gate: retry.hold(gate, clock.wall_ms(), "gone"))
        clock.advance(50)
        during = await one_delivery(db, "during")
        clock.advance(50)
        ages = [
            retry.age_ms(row.aged_from_at, row.held_base_ms, db.gate("acme"), clock.wall_ms())
            for row in (before, during)
        ]
        assert ages == [0, 0]
        await db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
        clock.advance(7)
        ages = [
            retry.age_ms(row.aged_from_at, row.held_base_ms, db.gate("acme"), clock.wall_ms())
            for row in (before, during)
        ]
        assert ages == [7000, 7000]
        assert db.gate("acme") == Gate(held_total_ms=100_000)

    async def test_the_oldest_pending_is_found_without_counting(self, db: Store, clock: HandClock) -> None:
        first = await one_delivery(db, "first")
        clock.advance(5)
        second = await one_delivery(db, "second")
        assert await db.oldest_pending(["acme", "other"]) == {"acme": first.created_at, "other": None}
        await db.settle(Settlement(first, "delivered", 0, 0, attempt()))
        assert await db.oldest_pending(["acme"]) == {"acme": second.created_at}


class TestPages:
    async def test_sessions_are_listed_newest_first_without_loss_or_doubles(self, db: Store) -> None:
        for number in range(7):
            await db.open_session(opening(f"s{number}", player_id=f"p{number % 2}"))
            if number % 3 == 0:
                await db.end("acme", f"s{number}")
        await db.open_session(opening("elsewhere", operator="other"))
        everything = [f"s{number}" for number in reversed(range(7))]
        ended = [name for name in everything if int(name[1]) % 3 == 0]
        active = [name for name in everything if name not in ended]
        for state, expected in ((None, everything), ("ended", ended), ("active", active)):
            for player_id in (None, "p0", "p1"):
                names = [name for name in expected if player_id in (None, f"p{int(name[1]) % 2}")]
                assert await walk_sessions(db, state, player_id) == names

    async def test_deliveries_are_listed_newest_first_for_every_filter(self, db: Store) -> None:
        for number in range(6):
            operator = "acme" if number % 2 else "other"
            delivery = await one_delivery(db, str(number), operator)
            state = ("pending", "delivered", "dead")[number % 3]
            if state != "pending":
                await db.settle(Settlement(delivery, state, 0, 0, attempt()))  # type: ignore[arg-type]
        for operator in (None, "acme", "other", "nobody"):
            for sink in (None, "http", "plugin:x"):
                for state in (None, "pending", "delivered", "dead"):
                    expected = [
                        str(number)
                        for number in reversed(range(6))
                        if operator in (None, "acme" if number % 2 else "other")
                        and sink in (None, "http")
                        and state in (None, ("pending", "delivered", "dead")[number % 3])
                    ]
                    assert await walk_deliveries(db, operator, sink, state) == expected


async def walk_sessions(db: Store, state: str | None, player_id: str | None) -> list[str]:
    names, after = [], None
    while True:
        page = await db.sessions("acme", state=state, player_id=player_id, limit=2, after=after)
        names += [session.session_id for session in page.rows]
        if page.next is None:
            return names
        after = page.next


async def walk_deliveries(db: Store, operator: str | None, sink: str | None, state: str | None) -> list[str]:
    names, after = [], None
    while True:
        page = await db.deliveries(operator=operator, sink=sink, state=state, limit=2, after=after)
        names += [delivery.session_id for delivery in page.rows]
        if page.next is None:
            return names
        after = page.next


class TestPruning:
    async def test_what_ended_long_ago_goes_and_pending_or_recent_stays(self, db: Store, clock: HandClock) -> None:
        settled = await one_delivery(db, "settled")
        await db.settle(Settlement(settled, "delivered", 0, 0, attempt()))
        dead = await one_delivery(db, "dead")
        await db.settle(Settlement(dead, "dead", 0, 0, attempt()))
        await one_delivery(db, "pending")
        just_settled = await one_delivery(db, "just settled")
        await db.open_session(opening("active"))
        clock.advance(100)
        await one_delivery(db, "recent")
        await db.settle(Settlement(just_settled, "delivered", 0, 0, attempt()))
        assert await db.prune(clock.wall_ms() - 50_000, (0, 0)) == (2, None)
        left = await db.sessions("acme", state=None, player_id=None, limit=9, after=None)
        assert {session.session_id for session in left.rows} == {"pending", "just settled", "active", "recent"}
        assert await db.delivery(settled.webhook_id) is None

    async def test_pruning_goes_on_behind_what_must_stay(
        self, db: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rules, "PRUNE_ROWS", 2)
        for number in range(5):
            delivery = await one_delivery(db, str(number))
            if number > 2:
                await db.settle(Settlement(delivery, "delivered", 0, 0, attempt()))
        clock.advance(10)
        pruned, after = 0, (0, 0)
        for _ in range(9):
            count, go_on = await db.prune(clock.wall_ms(), after)
            pruned += count
            if go_on is None:
                break
            after = go_on
        assert pruned == 2

    async def test_a_pruned_session_may_be_opened_again(self, db: Store, clock: HandClock) -> None:
        delivery = await one_delivery(db)
        await db.settle(Settlement(delivery, "delivered", 0, 0, attempt()))
        clock.advance(10)
        await db.prune(clock.wall_ms(), (0, 0))
        assert (await db.open_session(opening())).outcome == "created"
        await db.end("acme", "s")
        known = await db.session("acme", "s")
        assert known is not None
        assert known[1][0].webhook_id != delivery.webhook_id


class TestBatches:
    """Neighbours of one kind are one statement; each of them gets the answer that it would get alone."""

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


class TestOneWay:
    """One statement where nothing must be looked up; after a wrong guess the batch is decided again, with facts."""

    async def test_touches_of_active_sessions_are_not_looked_at_again(
        self, db: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await asyncio.gather(*(db.open_session(opening(name)) for name in "abc"), db.record(notice("over")))
        monkeypatch.setattr(batches.Written, "_look_closer", fail_with(AssertionError("looked at again")))
        statements = await trace(db)
        one, many = await asyncio.gather(db.touch("acme", ["a"]), db.touch("acme", ["b", "c", "b"]))
        assert (one, many) == ((1, [], []), (2, [], []))
        assert [statement.split()[0] for statement in statements] == ["INSERT"]

    @pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), MemoryError()])
    async def test_a_touch_that_cannot_be_looked_up_fails_alone(
        self, db: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """What was committed with it is answered: nobody may be told that it was refused."""
        await db.open_session(opening("a"))
        monkeypatch.setattr(batches, "fetch", fail_with(error))
        unknown, recorded = await asyncio.gather(
            db.touch("acme", ["a", "none"]), db.record(notice("new")), return_exceptions=True
        )
        monkeypatch.undo()
        assert isinstance(unknown, StoreError)
        assert recorded == "ended"
        assert db.refused["reading_failed"] == 1
        assert (await found(db, "new")).reason == "reported"

    async def test_after_a_wrong_guess_facts_are_read_until_no_session_was_known(self, db: Store) -> None:
        await db.record(notice("s"))
        statements = await trace(db)

        async def ways(name: str) -> list[str]:
            statements.clear()
            await db.record(notice(name))
            return [statement.split()[0] for statement in statements]

        guessed, looked_up = ["INSERT"], ["BEGIN", "SELECT", "INSERT", "COMMIT"]
        assert await ways("1") == guessed
        assert await ways("s") == guessed + looked_up
        assert await ways("s") == looked_up
        assert await ways("2") == looked_up
        assert await ways("3") == guessed
        assert await ways("s") == guessed + looked_up
        statements.clear()
        await db.touch("acme", ["s"])  # a touch guesses nothing
        assert [statement.split()[0] for statement in statements] == ["INSERT", "SELECT"]

    @pytest.mark.parametrize(("more", "first"), [(0, "INSERT"), (1, "BEGIN")])
    async def test_at_most_300_operations_are_decided_on_the_event_loop(self, db: Store, more: int, first: str) -> None:
        statements = await trace(db)
        await asyncio.gather(*(db.open_session(opening(str(number))) for number in range(300 + more)))
        assert statements[0].split()[0] == first
        assert db.live == 300 + more

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
        await db.settle(Settlement(delivery, "dead", 0, 1, attempt(error="x"), gate=retry_of(failed=True)))
        late = Settlement(delivery, "delivered", 0, 1, attempt(status=200), gate=retry_of(failed=True))
        settled, touched = await asyncio.gather(db.settle(late), db.touch("acme", ["s"]))
        assert (settled.before.failures, settled.after.failures) == (1, 2)
        assert touched == (0, [], ["s"])
        kept = await one_delivery(db)
        assert (kept.state, kept.attempts, kept.last_error) == ("dead", 1, "x")
        assert db.figures_of("acme") == contract.Figures(live=0, pending=0, dead=1)

    async def test_a_wait_that_is_queued_while_the_wall_clock_goes_back_stays_as_long(
        self, db: Store, clock: HandClock
    ) -> None:
        """Kept waits go back with the clock; the wait of a result in the same batch is right already."""
        db.sinks_of = lambda session: [NewDelivery("http", b"{}"), NewDelivery("plugin:x", b"")]
        await db.record(notice())
        (first,), (second,) = await db.claimable([Claim("acme", sink, [], 1) for sink in ("http", "plugin:x")])
        await db.settle(Settlement(first, "pending", 7_000_000, 1, attempt(error="x")))
        clock.step_wall(-3600)
        settled = await db.settle(Settlement(second, "pending", 60_000, 1, attempt(error="x")))
        assert settled.due_at == clock.wall_ms() + 60_000
        (first,), (second,) = await db.claimable([Claim("acme", sink, [], 1) for sink in ("http", "plugin:x")])
        assert second.due_at == settled.due_at
        assert first.due_at == clock.wall_ms() + 7_000_000


async def trace(db: Store) -> list[str]:
    """The statements of the writer from now on."""
    statements: list[str] = []

    def note(statement: str) -> None:
        if statement not in statements[-1:]:  # told once more for each statement of its trigger
            statements.append(statement)

    await db._db._writer.run(lambda sql: sql.set_trace_callback(note))
    return statements


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def retry_of(failed: bool) -> Callable[[Gate, int], Gate]:
    return lambda gate, now_at: dataclasses.replace(gate, failures=gate.failures + 1 if failed else 0)


@pytest.mark.parametrize(("crowd", "transactions"), [(True, [1, 1, 1]), (False, [3])])
async def test_a_sweep_of_a_crowd_makes_nobody_wait_who_came_before_it(
    db: Store, crowd: bool, transactions: list[int]
) -> None:
    await db.open_session(opening())
    sizes: list[int] = []

    class Sizes(contract.StoreObserver):
        def committed(self, operations: int, took_s: float) -> None:
            sizes.append(operations)

    db.observe(Sizes())
    await asyncio.gather(db.touch("acme", ["s"]), db.end_due(idle=True, crowd=crowd), db.touch("acme", ["s"]))
    assert sizes == transactions


STATEMENTS = {
    name: re.sub(r"NEW\.\w+", "1", statement)
    for module in (rows, batches, pages, store)
    for name, statement in vars(module).items()
    if isinstance(statement, str) and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", statement)
}
# How a statement finds the rows it is about.
BY = {
    "_SESSION_BY_KEY": "(operator=? AND session_id=?)",
    "SESSIONS_BY_KEY": "(operator=? AND session_id=?)",
    "TOUCH": "SEARCH session USING INDEX sqlite_autoindex_session_1 (operator=? AND session_id=?)",
    "STATES": "(operator=? AND session_id=?)",
    "END": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "DUE": "INDEX session_due (due_ms<?)",
    "DUE_LIFETIME": "INDEX session_lifetime (lifetime_at>? AND lifetime_at<?)",
    "NEXT": "INDEX session_due",
    "MOVE_DUE": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "MOVE_LIFETIME": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "_LANE": "INDEX delivery_due (operator=? AND sink=?)",
    "SETTLE": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "FORGET_TOKENS": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "REVIVE": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "DEAD": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "_DIED": "INDEX delivery_dead (operator=? AND settled_at>?)",
    "_OF_LANE": "COVERING INDEX delivery_lane (operator=? AND sink=? AND state=? AND rowid<?)",
    "_DELIVERIES_OF": "(session=?)",
    "_OLDEST_PENDING": "COVERING INDEX delivery_lane (operator=? AND sink=? AND state=?)",
    "ENDED_BEFORE": "INDEX session_ended_at (ended_at>? AND ended_at<?)",
    "_SESSIONS_OF": "INTEGER PRIMARY KEY",
    "_DELIVERIES_OF_ALL": "(session=?)",
    "OLD_DELIVERIES": "(session=?)",
    "PENDING_OF": "INTEGER PRIMARY KEY",
    "PRUNE_DELIVERIES": "(session=?)",
    "PRUNE_SESSIONS": "INTEGER PRIMARY KEY",
}
# The first row of an index, no more; and what is pending, once after the wall clock was set back.
SCANS = {"NEXT": "SCAN session USING INDEX session_due", "SET_BACK": "SCAN delivery USING INDEX delivery_due"}


@pytest.mark.parametrize("name", sorted(STATEMENTS.keys() - {"WRITE_BATCH", "PUT_CLOCK"}))
async def test_every_statement_goes_through_an_index(db: Store, name: str) -> None:
    statement = STATEMENTS[name]
    arguments = {"operator": "x"} if ":operator" in statement else ["1"] * statement.count("?")
    plan = await explain(db, statement, arguments)
    assert BY.get(name, "") in plan
    scans = re.findall(r"SCAN (?:session|delivery|operator|clock|d|s)\b[^|]*", plan)
    assert [scan.strip() for scan in scans] == ([SCANS[name]] if name in SCANS else [])


def test_every_expected_plan_is_of_a_statement_that_there_is() -> None:
    assert STATEMENTS.keys() >= BY.keys() | SCANS.keys()


async def explain(db: Store, statement: str, arguments: object) -> str:
    def read(sql: sqlite3.Connection) -> str:
        return " | ".join(row[3] for row in sql.execute("EXPLAIN QUERY PLAN " + statement, arguments))  # type: ignore[arg-type]

    return await db._db.read(read)
