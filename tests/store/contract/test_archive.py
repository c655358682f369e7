"""Ended sessions, as an export reads them while the daemon runs."""

import pytest
from clocks import HandClock
from engines import Engine
from operations import opening

from lmdaemon.store.contract import Store, Wanted

ENDS = [("acme", "a", "p1"), ("other", "a", "p1"), ("acme", "b", "p2"), ("acme", "c", "p1"), ("other", "d", "p2")]


class TestArchive:
    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (Wanted(), [0, 1, 2, 3, 4]),
            (Wanted("acme"), [0, 2, 3]),
            (Wanted(player_id="p1"), [0, 1, 3]),
            (Wanted("acme", "p1"), [0, 3]),
            (Wanted(session_id="a"), [0, 1]),
            (Wanted("other", session_id="a"), [1]),
            (Wanted(None, "p1", "a"), [0, 1]),
            (Wanted(None, "p2", "a"), []),
            (Wanted(player_id="nobody"), []),
        ],
    )
    async def test_what_is_wanted_comes_once_in_the_order_of_its_ends(
        self, db: Store, engine: Engine, clock: HandClock, wanted: Wanted, expected: list[int]
    ) -> None:
        """Tried are a single page, and pages that end before, among and after sessions that ended at the same time."""
        first_at = clock.wall_ms()
        for operator, session, player in ENDS:
            await db.open_session(opening(session, operator=operator, player_id=player))
            await db.end(operator, session)
            clock.advance(1)
        await db.open_session(opening("live", player_id="p1"))
        with engine.archive() as archive:
            for rows in (1, 2, 500):
                found, after = [], (first_at, 0)
                while after is not None:
                    page, after = archive.ended(wanted, after, clock.wall_ms() + 1, rows)
                    found += [(one.operator, one.session_id, one.player_id) for one, _ in page]
                assert found == [ENDS[place] for place in expected]
            assert len(archive.ended(wanted, (first_at, 0), first_at + 1).sessions) == (0 in expected)
