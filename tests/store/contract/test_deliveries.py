"""Deliveries: claimed, settled once, retried, and freed from secrets that nothing needs any more."""

import asyncio
import dataclasses
import hashlib
import json

from clocks import HandClock
from msgspec.structs import replace as replaced
from operations import attempt, kept, notice, one_delivery, opening

from lmdaemon import retry
from lmdaemon.model import Gate
from lmdaemon.store import contract, rules
from lmdaemon.store.contract import Claim, Dead, NewDelivery, Oldest, Settlement, Store


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

    async def test_any_number_of_lanes_is_claimed_each_with_its_own_rows(self, db: Store, clock: HandClock) -> None:
        """In each lane, the delivery that is due earliest comes first."""
        names = [f"operator-{number}" for number in range(65)]
        first = [await one_delivery(db, operator=name) for name in names]
        again = await db.settle(Settlement(first[-1], "pending", 5000, 1, attempt()))
        clock.advance(1)
        second = [await one_delivery(db, "later", name) for name in names]
        lanes = await db.claimable([Claim(name, "http", [], 2) for name in names])
        undigested = [[row._replace(body_digest=None) for row in pair] for pair in zip(first, second, strict=True)]
        assert [[row._replace(body_digest=None) for row in lane] for lane in lanes][:-1] == undigested[:-1]
        assert [row.due_at for row in lanes[-1]] == [second[-1].due_at, again.due_at]
        assert await db.claimable([]) == []

    async def test_a_token_that_nothing_needs_goes_and_is_still_recognised(self, db: Store) -> None:
        db.sinks_of = lambda session: [NewDelivery("http", session.token.encode()), NewDelivery("plugin:a", b"")]
        await db.open_session(opening(token="tok-3n"))
        await db.end("acme", "s")
        known = await db.session("acme", "s")
        assert known is not None
        http, plugin = known[1]
        await db.settle(Settlement(http, "delivered", 0, 0, attempt()))
        assert await kept(db) == ("tok-3n", [b"", b""])  # the plug-in has not been told yet, and needs the token
        await db.settle(Settlement(plugin, "dead", 0, 0, attempt()))
        assert (await kept(db))[0] == "tok-3n"  # a dead delivery can be retried by hand, so the token stays
        await db.retry_dead("acme", Dead())
        await db.settle(Settlement(plugin, "delivered", 0, 0, attempt()))
        digest, bodies = await kept(db)
        assert "tok-3n" not in digest
        assert bodies == [b"", b""]
        repeat = notice(token="tok-3n", compare_token=True)
        assert await db.record(repeat) == "repeated"
        assert await db.record(replaced(repeat, token="another")) == "bad_token"
        assert await db.record(replaced(repeat, token=digest)) == "bad_token"

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
        assert await db.retry_dead("acme", Dead(since_at=clock.wall_ms())) == 1
        assert await db.retry_dead("acme", Dead(since_at=since)) == 12
        assert await db.retry_dead("acme", Dead()) == 0
        (rows,) = await db.claimable([Claim("acme", "http", [], 99)])
        assert [row.due_at - clock.wall_ms() for row in rows] == [100 * place for place in range(13)]
        assert {(row.step, row.aged_from_at) for row in rows} == {(0, clock.wall_ms())}

    async def test_dead_deliveries_are_found_by_cause_death_and_end(self, db: Store, clock: HandClock) -> None:
        """The same selection is used for retrying and for counting."""
        ended_at, died_at = [], []
        for number, cause in enumerate(("timeout", "code_7", "timeout", "code_7")):
            ended_at.append(clock.wall_ms())
            delivery = await one_delivery(db, str(number))
            clock.advance(10)
            died_at.append(clock.wall_ms())
            await db.settle(Settlement(delivery, "dead", 0, 3, attempt(error=cause)))
            clock.advance(10)
        found = await db.find_dead("acme", Dead())
        assert found == (4, 4, died_at[0], {"timeout": 2, "code_7": 2})
        assert await db.find_dead("acme", Dead(cause="code_7")) == (2, 2, died_at[1], {"code_7": 2})
        assert await db.find_dead("acme", Dead(died_at[1], died_at[3])) == (
            2,
            2,
            died_at[1],
            {"code_7": 1, "timeout": 1},
        )
        ended = Dead(ended_since_at=ended_at[2], ended_until_at=ended_at[3])
        assert await db.find_dead("acme", ended) == (1, 1, died_at[2], {"timeout": 1})
        assert await db.find_dead("other", Dead()) == (0, 0, None, {})
        assert await db.retry_dead("acme", ended) == 1
        assert await db.retry_dead("acme", Dead(cause="status_500")) == 0
        assert await db.retry_dead("acme", Dead(), 2) == 2
        assert await db.find_dead("acme", Dead()) == (1, 1, died_at[3], {"code_7": 1})

    async def test_a_discarded_delivery_counts_as_dead_no_more(self, db: Store, clock: HandClock) -> None:
        """The delivery stays, with who discarded it, when and why. Calls for all dead deliveries leave it alone."""
        ids = []
        for number in range(3):
            delivery = await one_delivery(db, str(number))
            ids.append(delivery.webhook_id)
            await db.settle(Settlement(delivery, "dead", 0, 3, attempt(error="timeout" if number else "code_7")))
        assert await db.discard("acme", Dead(cause="timeout"), "ops", "they went bankrupt") == 2
        assert await db.discard("acme", Dead(cause="timeout"), "ops", "again") == 0
        assert db.figures_of("acme").dead == 1
        known = await db.delivery(ids[1])
        assert known is not None
        assert (known.state, known.attempts, known.last_error) == ("dead", 1, "timeout")
        assert json.loads(known.discarded or "") == {"at": clock.wall_ms(), "by": "ops", "note": "they went bankrupt"}
        page = await db.deliveries(operator="acme", sink=None, state="dead", limit=9, after=None)
        assert sum(one.discarded is not None for one in page.rows) == 2
        assert await db.retry_dead("acme", Dead()) == 1
        assert await db.find_dead("acme", Dead()) == (0, 0, None, {})
        assert db.figures_of("acme") == contract.Figures(live=0, pending=1, dead=0)

    async def test_one_is_discarded_once_and_can_be_wanted_again(self, db: Store) -> None:
        delivery = await one_delivery(db)
        name = delivery.webhook_id
        assert await db.discard_one("msg_99_" + "0" * 20, None, "no such delivery") is None
        pending = await db.discard_one(name, None, "too early")
        assert pending is not None
        assert (pending.state, db.figures_of("acme").pending) == ("pending", 1)
        await db.settle(Settlement(delivery, "dead", 0, 3, attempt(error="timeout")))
        for note, before in (("first", None), ("second", "first")):
            known = await db.discard_one(name, None, note)
            assert known is not None
            assert (json.loads(known.discarded)["note"] if known.discarded else None) == before
        assert db.figures_of("acme").dead == 0
        assert (await db.retry_one(name)) is not None
        again = await db.delivery(name)
        assert again is not None
        assert (again.state, again.discarded) == ("pending", None)
        assert db.figures_of("acme") == contract.Figures(live=0, pending=1, dead=0)

    async def test_discarded_deliveries_are_pruned_with_their_sessions(self, db: Store, clock: HandClock) -> None:
        await db.settle(Settlement(await one_delivery(db), "dead", 0, 3, attempt(error="timeout")))
        await db.discard("acme", Dead(), None, "over")
        clock.advance(10)
        assert (await db.prune(clock.wall_ms(), (0, 0))).sessions == 1
        assert db.figures_of("acme").dead == 0

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

    async def test_of_the_oldest_pending_is_told_when_it_is_due_and_why(self, db: Store, clock: HandClock) -> None:
        first = await one_delivery(db, "first")
        clock.advance(5)
        await one_delivery(db, "second")
        await db.settle(Settlement(first, "pending", 60_000, 1, attempt(error="timeout")))
        due_at = clock.wall_ms() + 60_000
        found = await db.oldest_waiting(["acme", "other"])
        assert found == {"acme": Oldest(first.created_at, "http", due_at, "timeout")}
        assert await db.oldest_waiting([]) == {}

    async def test_the_oldest_age_leaves_out_what_was_held_before(self, db: Store, clock: HandClock) -> None:
        assert await db.aging_shown(["acme"]) == {"acme": None}
        await db.set_gate("acme", lambda gate: retry.hold(gate, clock.wall_ms(), "by_hand"))
        clock.advance(60)
        await db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
        first = await one_delivery(db, "first")
        assert first.held_base_ms == 60_000
        clock.advance(5)
        await one_delivery(db, "second")
        assert await db.aging_shown(["acme", "other"]) == {"acme": first.created_at - 60_000, "other": None}

    async def test_what_was_sent_stays_provable_when_it_is_delivered(self, db: Store) -> None:
        row = await one_delivery(db)
        assert row.body_digest == hashlib.sha256(row.body).hexdigest()
        await db.settle(Settlement(row, "delivered", 0, 0, attempt()))
        shown = await db.delivery(row.webhook_id)
        assert shown is not None
        assert (shown.body, shown.body_digest) == (b"", row.body_digest)
