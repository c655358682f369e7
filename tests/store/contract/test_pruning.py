"""Pruning: which sessions are deleted, and which must stay."""

import pytest
from clocks import HandClock
from operations import attempt, one_delivery, opening

from lmdaemon.store import rules
from lmdaemon.store.contract import Settlement, Store


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
