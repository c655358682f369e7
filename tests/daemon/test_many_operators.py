"""Work that grows with the number of operators does not block the event loop: a thread does it, or it is done only for
what has changed.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clocks import HandClock
from support import LISTEN, bench, load, serving

from lmdaemon import metrics, reloader
from lmdaemon.config import reader, shown
from lmdaemon.web import administration, openapi


def operators(many: int) -> str:
    return "".join(
        f'[operators.op{number}]\nprovider_id = "p{number}"\nendpoint = "/e/{number}"\nnotify = true\n'
        f'url = "http://127.0.0.1:1/{number}"\nallow_private_network = true\n'
        for number in range(many)
    )


OPERATORS = operators(5)


def threads_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """The ids of the threads that call this function from now on."""
    called: list[int] = []
    function: Callable[..., Any] = getattr(module, name)

    def noting(*arguments: Any, **keywords: Any) -> Any:
        called.append(threading.get_ident())
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, noting)
    return called


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json"])
async def test_what_lists_all_operators_is_made_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    module, name = {"/metrics": (metrics, "generate_latest"), "/openapi.json": (openapi, "document")}[path]
    called = threads_of(monkeypatch, module, name)
    async with serving(tmp_path, OPERATORS) as d:
        async with d.client.get(d.api + path) as response:
            assert response.status == 200
            text = await response.text()
    assert called
    assert threading.get_ident() not in called
    assert path == "/openapi.json" or text.count("lmdaemon_sessions_live{") == 5


async def test_a_file_is_read_checked_and_compared_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, OPERATORS) as d:
        loads, changes = threads_of(monkeypatch, reader, "load"), threads_of(monkeypatch, reloader, "changes")
        digests = threads_of(monkeypatch, shown, "digest")
        (tmp_path / "config.toml").write_text(LISTEN + OPERATORS.replace('"p3"', '"other"'))
        await d.daemon.reload_once()
        assert d.daemon.settings.operators["op3"].provider_id == "other"
        assert len(loads) == len(digests) == 1
    assert changes
    assert threading.get_ident() not in loads + changes + digests


async def test_settings_are_digested_beside_the_event_loop_at_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest, by which daemons on one database compare settings, takes 0.1 s with 1,000 operators."""
    digests = threads_of(monkeypatch, shown, "digest")
    async with serving(tmp_path, OPERATORS):
        assert len(digests) == 1
    assert threading.get_ident() not in digests


async def test_a_reload_looks_at_lanes_that_have_changed_alone(tmp_path: Path, clock: HandClock) -> None:
    async with bench(tmp_path, clock, OPERATORS) as b:
        for _ in range(2):  # the first round stores the URLs, which changes the gates
            await b.dispatcher.once()
        before = list(b.dispatcher.lanes)
        changed = OPERATORS.replace("127.0.0.1:1/3", "127.0.0.1:1/elsewhere").replace('"p2"', '"p2"\nconcurrency = 9')
        b.dispatcher.configure(load(tmp_path / "config.toml", LISTEN + changed), {})
        assert list(b.dispatcher.lanes) == before
        changed_lanes = [b.dispatcher.lanes.get(name, "http") for name in ("op2", "op3")]
        assert changed_lanes[1] is not None
        assert changed_lanes[1].operator.url.endswith("/elsewhere")
        assert b.dispatcher._agenda.take(clock.wall_ms()) == changed_lanes


async def test_lanes_of_operators_that_left_are_not_looked_at(tmp_path: Path, clock: HandClock) -> None:
    async with bench(tmp_path, clock, OPERATORS) as b:
        b.dispatcher.configure(load(tmp_path / "config.toml", LISTEN), {})
        assert b.dispatcher._agenda.take(clock.wall_ms()) == []


async def test_counters_of_operators_that_stay_go_on_and_new_ones_begin_at_zero() -> None:
    counted = metrics.Metrics()
    counted.configure(["a", "b"], [("a", "http")], ["closed"])
    counted.touched("a", 3)
    counted.configure(["a", "c"], [("a", "http"), ("c", "http")], ["closed"])
    text = counted.text().decode()
    assert 'lmdaemon_touches_total{operator="a"} 3.0' in text
    assert 'lmdaemon_touches_total{operator="c"} 0.0' in text
    assert 'lmdaemon_delivery_attempts_total{operator="c",outcome="retry",sink="http"} 0.0' in text
    assert 'operator="b"' not in text


async def test_all_operators_are_listed_in_bounded_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = 2 * administration.OPERATORS_AT_ONCE + 1
    turns: list[float] = []
    sleep = administration.asyncio.sleep

    async def noting(delay: float, *rest: Any) -> Any:
        turns.append(delay)
        return await sleep(delay, *rest)

    async with serving(tmp_path, operators(many)) as d:
        monkeypatch.setattr(administration.asyncio, "sleep", noting)
        async with d.client.get(d.api + "/v1/operators") as response:
            items = (await response.json())["items"]
        monkeypatch.undo()
    assert [item["operator"] for item in items] == [f"op{number}" for number in range(many)]
    assert turns.count(0) >= 2
