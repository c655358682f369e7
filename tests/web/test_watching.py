"""What watching clients are told: events as they happen, the figures of the last hour, and the list of daemons."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from clocks import HandClock
from documented import complaints
from support import LISTEN, Serving, operator_table, raw_connection, scripted_operator, serving, until

from lmdaemon.limits import LIMITS, Limits
from lmdaemon.model import ID_MAX
from lmdaemon.web import events, recent
from lmdaemon.web.events import Listener
from lmdaemon.web.recent import Counts, Recent
from lmdaemon.web.routes import CALLS

SCHEMAS = {name: kind.__name__ for call in CALLS for name, kind in call.events.items()}
OPERATORS = '[operators.acme]\nprovider_id = "a"\nendpoint = ""\n[operators.bravo]\nprovider_id = "b"\nendpoint = ""\n'
Event = tuple[str, dict[str, Any]]


class Stream:
    """The events of one answer. Each must be as the OpenAPI document says."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Event:
        async with asyncio.timeout(10):
            lines = [line for line in (await self.response.content.readuntil(b"\n\n")).decode().split("\n") if line]
            if lines[0].startswith("retry: "):
                return await self.next()
        name, data = lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))
        assert complaints(SCHEMAS[name], data) == []
        return name, data

    async def until(self, name: str) -> dict[str, Any]:
        while True:
            found, data = await self.next()
            if found == name:
                return data


@asynccontextmanager
async def listening(d: Serving, query: str = "") -> AsyncIterator[Stream]:
    async with d.client.get(d.api + "/v1/events" + query) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        stream = Stream(response)
        name, snapshot = await stream.next()
        assert (name, snapshot["snapshot"]) == ("figures", True)
        yield stream


async def call(d: Serving, method: str, path: str, **options: Any) -> Any:
    async with d.client.request(method, f"{d.api}/v1/{path}", **options) as answer:
        assert answer.status < 300
        return await answer.json()


async def open_and_close(d: Serving, operator: str = "acme", session: str = "s") -> None:
    path = f"operators/{operator}/sessions/{session}"
    await call(d, "PUT", path, json={"playerId": "p", "token": "t"})
    await call(d, "POST", path + "/close")


async def test_who_listens_hears_of_ends_results_and_operators(tmp_path: Path) -> None:
    async with scripted_operator({"error": 100}) as wallet:
        toml = operator_table("acme", wallet.url, schedule=["250ms", "250ms"])
        async with serving(tmp_path, toml) as d, listening(d) as stream:
            await open_and_close(d)
            ended = await stream.until("session.ended")
            assert (ended["operator"], ended["sessionId"], ended["reason"]) == ("acme", "s", "closed")
            again = await stream.until("delivery.retry")
            assert (again["state"], again["attempts"], again["code"]) == ("pending", 1, 100)
            assert again["dueAt"] is not None
            settled = await stream.until("delivery.settled")
            assert (settled["id"], settled["state"], settled["attempts"]) == (again["id"], "delivered", 2)
            await call(d, "POST", "operators/acme/hold")
            changed = await stream.until("operator.changed")
            assert (changed["operator"], changed["held"], changed["heldReason"]) == ("acme", True, "by_hand")


async def test_figures_come_by_themselves_with_what_has_changed(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d, listening(d) as stream:
        await open_and_close(d)
        await call(d, "PUT", "operators/acme/sessions/s2", json={"playerId": "p", "token": "t"})
        found = await stream.until("figures")
        while not found["operators"]:
            found = await stream.until("figures")
        assert [one["operator"] for one in found["operators"]] == ["acme"]
        while found["live"] != 1:
            found = await stream.until("figures")


async def test_the_first_event_of_a_stream_has_all_operators(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d:
        await call(d, "PUT", "operators/bravo/sessions/s", json={"playerId": "p", "token": "t"})
        await call(d, "POST", "operators/acme/hold")
        for _ in range(2):  # also for a client that comes back
            async with d.client.get(d.api + "/v1/events") as response:
                _, snapshot = await Stream(response).next()
            shown = {one["operator"]: (one["live"], one["held"]) for one in snapshot["operators"]}
            assert shown == {"acme": (0, True), "bravo": (1, False)}


async def test_who_listens_to_one_operator_hears_of_no_other(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d, listening(d, "?operator=bravo") as stream:
        await open_and_close(d, "acme", "theirs")
        await call(d, "POST", "operators/acme/hold")
        await open_and_close(d, "bravo", "ours")
        heard = []
        while not heard or heard[-1][0] != "session.ended":
            heard.append(await stream.next())
        assert "theirs" not in json.dumps(heard)
        assert {one["operator"] for name, data in heard if name == "figures" for one in data["operators"]} <= {"bravo"}
        assert heard[-1][1]["sessionId"] == "ours"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_who_listens_to_an_unknown_operator_is_refused(tmp_path: Path, method: str) -> None:
    """An operator's name in other upper and lower case is unknown, too. A stream in which nothing ever happens would
    hide such a mistake.
    """
    async with serving(tmp_path, OPERATORS) as d:
        for name in ("nobody", "Acme", "acme ", "a" * 300):
            async with d.client.request(method, d.api + "/v1/events", params={"operator": name}) as refused:
                assert refused.status == (400 if len(name) > ID_MAX else 404), name
                if method == "GET" and refused.status == 404:
                    assert (await refused.json())["code"] == "unknown-operator"
        assert d.events.listeners == 0


async def test_without_a_listener_nothing_is_made_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    event = events.event
    monkeypatch.setattr(events, "event", lambda name, document: made.append(name) or event(name, document))
    async with serving(tmp_path, OPERATORS) as d:
        await open_and_close(d)
        assert made == []
        assert d.events._ticking is None
        async with listening(d):
            assert d.events._ticking is not None
        await until(lambda: d.events._ticking is None)
        made.clear()
        await open_and_close(d, session="s2")
        assert made == []


async def test_one_listener_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS, limits=Limits(listeners_max=2)) as d, listening(d), listening(d):
        async with d.client.get(d.api + "/v1/events") as refused:
            assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
            assert (await refused.json())["code"] == "too-many-listeners"
        await call(d, "GET", "operators")  # other calls are not refused


async def test_a_listener_that_takes_nothing_is_dropped_and_delays_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection of that listener is cut as soon as its queue is full. The other listener gets every event."""
    async with serving(tmp_path, OPERATORS, limits=Limits(waiting_max=20)) as d, listening(d) as quick:
        async with raw_connection(d.api) as slow:
            await slow.send(b"GET /v1/events?operator=acme HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(lambda: d.events.listeners == 2)
            (stuck,) = [one for one in d.events._listeners if one.operator == "acme"]
            # The handler waits for ever and takes nothing from the queue
            monkeypatch.setattr(stuck, "_filled", asyncio.Event())
            for number in range(25):
                await open_and_close(d, session=f"s{number}")
            await until(lambda: d.events.listeners == 1)
            await slow.rest()  # the connection ends
        heard = [(await quick.until("session.ended"))["sessionId"] for _ in range(25)]
        assert heard == [f"s{number}" for number in range(25)]


async def test_what_happens_at_once_is_sent_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All listeners get the same events in one piece, in their order and before the figures that count them."""
    limits = Limits(gather_s=3600, figures_every_s=3600)
    pieces: list[bytes] = []
    put = Listener.put
    monkeypatch.setattr(Listener, "put", lambda self, told, events=1: pieces.append(told) or put(self, told, events))
    async with (
        serving(tmp_path, OPERATORS, limits=limits) as d,
        listening(d) as one,
        listening(d, "?operator=bravo") as other,
    ):
        pieces.clear()
        for number in range(5):
            await open_and_close(d, session=f"s{number}")
        await open_and_close(d, "bravo")
        d.events.tell_figures()
        ended = [piece.count(b"event: session.ended") for piece in pieces]
        assert sorted(ended) == [0, 0, 1, 6]  # the figures of each listener have no such event
        heard = [(await one.until("session.ended"))["sessionId"] for _ in range(6)]
        assert heard == [*(f"s{number}" for number in range(5)), "s"]
        assert (await other.until("session.ended"))["operator"] == "bravo"


async def test_more_than_is_gathered_does_not_wait(tmp_path: Path) -> None:
    limits = Limits(gather_s=3600, gathered_max=3, figures_every_s=3600)
    async with serving(tmp_path, OPERATORS, limits=limits) as d, listening(d) as stream:
        for number in range(3):
            await open_and_close(d, session=f"s{number}")
        assert [(await stream.until("session.ended"))["sessionId"] for _ in range(3)] == ["s0", "s1", "s2"]


async def test_a_queue_is_full_at_its_limit() -> None:
    aborted: list[bool] = []
    listener = Listener(None, lambda: aborted.append(True))
    for _ in range(LIMITS.waiting_max):
        listener.put(b"x")
    assert not listener.dropped
    listener.put(b"x")
    assert listener.dropped
    assert aborted == [True]


async def test_a_stop_ends_every_stream_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d:
        async with listening(d) as stream:
            d.daemon.stop()
            async with asyncio.timeout(10):
                await stream.response.content.read()  # the stream ends in good order
            await d.running


async def test_a_reload_with_other_operators_begins_anew(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d, listening(d) as stream:
        (tmp_path / "config.toml").write_text(LISTEN + OPERATORS.replace("bravo", "charlie"))
        await d.daemon.reload_once()
        snapshot = await stream.until("figures")
        while not snapshot["snapshot"]:
            snapshot = await stream.until("figures")
        assert {one["operator"] for one in snapshot["operators"]} == {"acme", "charlie"}


async def test_the_stream_of_an_operator_ends_when_that_is_removed(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d, listening(d, "?operator=bravo") as its, listening(d) as all_of_them:
        (tmp_path / "config.toml").write_text(LISTEN + OPERATORS.replace("bravo", "charlie"))
        await d.daemon.reload_once()
        async with asyncio.timeout(10):
            await its.response.content.read()  # to its orderly end
        await open_and_close(d, "charlie")
        assert (await all_of_them.until("session.ended"))["operator"] == "charlie"


async def test_a_token_is_needed_to_listen_where_one_is_configured(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("let-me-in")
    (tmp_path / "readers").write_text("console:only-look")
    toml = LISTEN + 'token_file = "token"\nread_token_file = "readers"\n' + OPERATORS
    async with serving(tmp_path, toml) as d:
        for path in ("events", "figures", "daemons"):
            async with d.client.get(f"{d.api}/v1/{path}") as refused:
                assert refused.status == 401
            headers = {"Authorization": "Bearer only-look"}
            async with d.client.get(f"{d.api}/v1/{path}", headers=headers) as answer:
                assert answer.status == 200


async def test_head_of_the_stream_is_answered_and_ends(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d, d.client.head(d.api + "/v1/events") as answer:
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
        assert d.events.listeners == 0


# -- the last hour


async def test_figures_show_what_happened_by_second_and_by_minute(tmp_path: Path) -> None:
    clock = HandClock()
    async with serving(tmp_path, OPERATORS, clock) as d:
        await open_and_close(d)
        await call(d, "PUT", "operators/bravo/sessions/s", json={"playerId": "p", "token": "t"})
        await call(d, "POST", "operators/bravo/sessions/touch", json={"sessionIds": ["s"]})
        clock.advance(2)
        found = await call(d, "GET", "figures")
        assert complaints("RecentFigures", found) == []
        assert [span["stepSeconds"] for span in found["spans"]] == [1, 60]
        for span in found["spans"]:
            series = {one["operator"]: one for one in span["series"]}
            assert series.keys() == {None, "acme", "bravo"}
            assert [sum(series[name]["ends"]) for name in (None, "acme", "bravo")] == [1, 1, 0]
            assert [sum(series[name]["touches"]) for name in (None, "acme", "bravo")] == [1, 0, 1]
        seconds, minutes = ({one["operator"]: one for one in span["series"]}[None] for span in found["spans"])
        assert seconds["ends"][-3:] == [1, 0, 0]
        assert sum(minutes["ends"][-2:]) == 1
        clock.advance(3600)
        later = await call(d, "GET", "figures")
        assert all(sum(one["ends"]) == 0 for span in later["spans"] for one in span["series"])


Totals = dict[str, tuple[int, int, int, int]]


def recent_of(totals: Totals, clock: HandClock, charted_max: int = LIMITS.charted_max) -> Recent:
    return Recent(totals.copy, lambda: 0.0, clock, charted_max)


@pytest.mark.slow
def test_the_hour_of_a_thousand_operators_takes_less_than_a_mebibyte() -> None:
    clock = HandClock()
    totals: Totals = {f"operator-{number}": (0, 0, 0, 0) for number in range(1000)}
    tracemalloc.start()
    try:
        kept = recent_of(totals, clock)
        before, _ = tracemalloc.get_traced_memory()
        for turn in range(1, 130):
            for name in totals:
                totals[name] = (turn * 1000, turn, turn, 0)
            clock.advance(1)
            kept.committed(1, 0.0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    _, series = kept.series()
    assert len(series) == LIMITS.charted_max + 1
    # Kept are the counters' values at the last look, once, and the figures of the last hour: 1,000 tuples
    assert after - before < 1024 * 1024
    assert sum(series[None][0][0]) == 59 * 1000 * 1000  # of all operators; the last second has just begun


def test_those_that_count_most_are_kept_from_the_next_minute_on() -> None:
    clock = HandClock()
    totals: Totals = dict.fromkeys("abc", (0, 0, 0, 0))
    kept = recent_of(totals, clock, 2)
    totals |= {"a": (1, 0, 0, 0), "b": (2, 0, 0, 0)}
    clock.advance(1)
    kept.committed(1, 0.0)
    totals["c"] = (100, 0, 0, 0)
    clock.advance(1)
    kept.committed(1, 0.0)
    assert set(kept.series()[1]) == {None, "a", "b"}
    totals["c"] = (200, 0, 0, 0)
    clock.advance(60)
    kept.committed(1, 0.0)
    _, series = kept.series()
    assert set(series) == {None, "b", "c"}
    assert sum(series[None][1][0]) == 203


def test_while_nothing_is_committed_nothing_is_looked_at() -> None:
    looks: list[int] = []
    clock = HandClock()
    kept = Recent(lambda: looks.append(1) or {}, lambda: 0.0, clock)
    looks.clear()
    clock.advance(500)
    assert looks == []
    kept.committed(1, 0.0)
    kept.committed(1, 0.0)  # counters are looked at once a second at most
    assert looks == [1]


def test_what_is_counted_anew_after_a_reload_takes_nothing_away() -> None:
    clock = HandClock()
    totals: Totals = {"a": (50, 0, 0, 0)}
    since = recent.Since(totals.copy, lambda: 0.0)
    totals["a"] = (3, 0, 0, 0)
    assert since.take() == {"a": Counts()}
    totals["a"] = (5, 0, 0, 0)
    assert since.take() == {"a": Counts(touches=2)}
    assert since.take() == {}
    clock.advance(1)


# -- daemons


async def test_on_sqlite_there_is_one_daemon_and_it_is_the_one_asked(tmp_path: Path) -> None:
    async with serving(tmp_path, OPERATORS) as d:
        found = await call(d, "GET", "daemons")
        assert complaints("DaemonList", found) == []
        (one,) = found["items"]
        assert one["self"]
        assert one["address"] == d.api.removeprefix("http://")
        assert (one["operators"], one["serviceLagMs"]) == (["acme", "bravo"], 0)
        assert one["since"] <= one["lastHeardAt"]
