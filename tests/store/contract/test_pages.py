"""The lists for people: newest first, nothing missing or twice, for every filter, without secrets."""

import asyncio

from clocks import HandClock
from engines import Engine
from operations import attempt, notice, one_delivery, opening

from lmdaemon.store.contract import PAGE_BYTES, NewDelivery, Opening, Settlement, Store


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

    async def test_a_session_that_was_only_reported_is_found(self, engine: Engine, clock: HandClock) -> None:
        """The operator has no session that was opened here, and no sink. The session is also found after a restart."""
        async with engine.open(clock) as first:
            first.configure(frozenset({"acme"}), lambda session: [])
            await first.record(notice())
            assert await finds(first, session_id="s")
            assert await finds(first, player_id="p")
        async with engine.open(clock) as second:
            second.configure(frozenset({"acme"}), lambda session: [])
            assert await finds(second, session_id="s")


async def finds(db: Store, session_id: str | None = None, player_id: str | None = None) -> bool:
    page = await db.find_sessions(session_id=session_id, player_id=player_id, limit=10, after=None)
    return [(one.operator, one.session_id) for one in page.rows] == [("acme", "s")]


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


async def test_pages_show_neither_token_nor_body_nor_what_nobody_sees(db: Store) -> None:
    db.sinks_of = lambda session: [NewDelivery("http", b"tok-3n")]
    await db.open_session(Opening("acme", "s", "p", "tok-3n", '{"a":1}', 1000, 0))
    await db.end("acme", "s")
    found = await db.shown_session("acme", "s")
    assert found is not None
    (listed,) = (await db.sessions("acme", state=None, player_id=None, limit=1, after=None)).rows
    (delivery,) = (await db.deliveries(operator=None, sink=None, state=None, limit=1, after=None)).rows
    stored = await db.session("acme", "s")
    assert stored is not None
    assert (stored[0].token, stored[1][0].body) == ("tok-3n", b"tok-3n")
    assert found[0] == listed == stored[0]._replace(token=None, extra=None)
    assert found[1] == [delivery] == [stored[1][0]._replace(token=None, body=b"")]
    assert await db.delivery(delivery.webhook_id) == stored[1][0]  # with its body, of which the request is shown


async def test_a_page_ends_at_its_bytes_and_the_next_goes_on_behind_it(db: Store) -> None:
    """Each session is on exactly one page. A page is at most one read step larger than its limit."""
    attributes = '{"a":"' + "x" * 4000 + '"}'
    count = 3 * PAGE_BYTES // (2 * len(attributes))
    await asyncio.gather(*(db.open_session(opening(str(number), attributes=attributes)) for number in range(count)))
    names: list[str] = []
    sizes, after = [], None
    while True:
        page = await db.sessions("acme", state=None, player_id=None, limit=1000, after=after)
        names += [session.session_id for session in page.rows]
        sizes.append(sum(len(session.attributes or "") for session in page.rows))
        if page.next is None:
            break
        after = page.next
    assert names == [str(number) for number in reversed(range(count))]
    assert len(sizes) > 1
    assert max(sizes) < 1.5 * PAGE_BYTES
