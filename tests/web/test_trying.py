"""Test notices and checks that are asked for over the private API: only the operator's endpoint sees them, and their
number is limited.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from documented import complaints
from endpoints import Endpoint, served
from faults import leads_inside, look_up_by
from support import LISTEN, Event, Serving, hear, operator_table, scripted_operator, serving, until

from lmdaemon import trials
from lmdaemon.dialects import SHIPPED
from lmdaemon.web.routes import CALLS
from lmdaemon.workbench import runner, trial
from lmdaemon.workbench.checks import CHECKS

SCHEMAS = {name: kind.__name__ for call in CALLS for name, kind in call.events.items()}
TOKEN = "a-token-that-may-change"


def acme(url: str, **keys: Any) -> str:
    """A table for the operator acme, with a schedule so long that no retry comes during a test."""
    return operator_table("acme", url, **({"provider_id": "luckymonaco", "schedule": ["1h"]} | keys))


async def post(d: Serving, what: str, status: int = 200, body: Any = None, operator: str = "acme") -> Any:
    async with d.client.post(f"{d.api}/v1/operators/{operator}/{what}", json=body) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    assert response.status == 200
    assert response.content_type == "text/event-stream"
    while text := (await response.content.readuntil(b"\n\n")).decode():
        first, second = text.strip().split("\n")
        name, data = first.removeprefix("event: "), json.loads(second.removeprefix("data: "))
        assert complaints(SCHEMAS[name], data) == []
        yield name, data


def of(name: str, lines: list[Event]) -> list[dict[str, Any]]:
    return [line.facts for line in lines if line.name == name]


def trial_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("trial ")]


@pytest.fixture
def _unpaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Runner", partial(runner.Runner, per_second=None))


@asynccontextmanager
async def hanging() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """An operator's endpoint that does not answer until the event is set."""
    go_on = asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        await go_on.wait()
        return web.json_response({"error": 0, "description": "Success"})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", wait)
    async with TestServer(app) as server:
        yield str(server.make_url("/V4/SessionExpired")), go_on
        go_on.set()


# -- a test notice


async def test_a_test_notice_shows_both_sides_and_nothing_is_stored(tmp_path: Path) -> None:
    async with scripted_operator() as wallet:
        async with serving(tmp_path, acme(wallet.url + "?key=in-the-query")) as d:
            with hear() as lines:
                sent = await post(d, "send")
            assert complaints("TestResult", sent) == []
            (received,) = wallet.received
            assert sent["request"]["headers"] == dict(received.headers)
            notice = json.loads(received.body)
            assert notice["sessionId"].startswith("lmdaemon-test-")
            assert json.loads(sent["request"]["body"]) == notice | {"token": "***"}
            assert notice["token"] not in json.dumps(sent)
            assert "in-the-query" not in json.dumps(sent)
            assert (sent["verdict"], sent["answer"]["status"]) == ("delivered", 200)
            assert d.store.figures_of("acme").pending == d.store.figures_of("acme").dead == 0
            (line,) = of("operator.tested", lines)
            assert (line["operator"], line["verdict"]) == ("acme", "delivered")


async def test_a_test_notice_has_the_ids_that_are_given(tmp_path: Path) -> None:
    async with scripted_operator() as wallet, serving(tmp_path, acme(wallet.url)) as d:
        await post(d, "send", body={"sessionId": "s-1", "playerId": "p-1"})
        notice = json.loads(wallet.received[0].body)
        assert (notice["sessionId"], notice["externalPlayerId"]) == ("s-1", "p-1")
        await post(d, "send", 400, body={"sessionId": ""})
        await post(d, "send", 400, body={"session": "s"})


async def test_neither_a_hold_hinders_a_test_notice_nor_its_failure_counts(tmp_path: Path) -> None:
    async with scripted_operator(*[{"error": 100}] * 9) as wallet, serving(tmp_path, acme(wallet.url)) as d:
        await post(d, "hold")
        before = d.store.gate("acme")
        for _ in range(6):  # five failures open a breaker
            sent = await post(d, "send")
            assert (sent["verdict"], sent["reason"]) == ("retry", "code_100")
            assert sent["meaning"].startswith("would be retried because code_100")
        assert d.store.gate("acme") == before


async def test_the_egress_rules_hold_for_a_test_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads to this machine. It is looked up, and nothing is sent."""
    async with scripted_operator() as wallet:
        url = wallet.url.replace("http:", "https:").replace("127.0.0.1", "wallet.example")
        table = acme(url, allow_private_network=False)
        async with serving(tmp_path, table) as d:
            look_up_by(monkeypatch, leads_inside)
            sent = await post(d, "send")
        assert (sent["answer"], sent["reason"]) == (None, "private_address")
        assert wallet.received == []


async def test_what_was_answered_is_read_and_masked_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile answer can make reading and masking slow, and other requests must not wait for it."""
    threads = []
    whole = trial.as_shown
    monkeypatch.setattr(
        trial, "as_shown", lambda *given: threads.append(threading.current_thread().name) or whole(*given)
    )
    async with scripted_operator() as wallet, serving(tmp_path, acme(wallet.url)) as d:
        await post(d, "send")
    assert threads == ["trial acme"]


async def test_an_operator_without_a_url_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, '[operators.acme]\nprovider_id = "a"\nendpoint = ""\n') as d:
        for what in ("send", "check", "probe"):
            assert (await post(d, what, 409))["code"] == "no-url"


async def test_what_the_dialect_cannot_say_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the-hash-key")
    keys = {"dialect": "pragmatic", "accept": ["pragmatic"], "hash_key_file": "key"}
    async with scripted_operator() as wallet, serving(tmp_path, acme(wallet.url, **keys)) as d:
        problem = await post(d, "send", 409, body={"sessionId": "a&b"})
        assert (problem["code"], len(wallet.received)) == ("cannot-be-sent", 0)
        assert (await post(d, "send"))["verdict"] == "delivered"


async def test_one_at_a_time_for_an_operator_and_a_few_of_all(tmp_path: Path) -> None:
    names = [f"op{number}" for number in range(trials.AT_ONCE_MAX + 1)]
    async with hanging() as (url, go_on):
        tables = "".join(operator_table(name, url) for name in names)
        async with serving(tmp_path, tables) as d:
            sending = [asyncio.create_task(post(d, "send", operator=name)) for name in names[:-1]]
            await until(lambda: len(trial_threads()) == trials.AT_ONCE_MAX)
            for what in ("send", "check"):
                problem = await post(d, what, 409, operator=names[0])
                assert problem["code"] == "busy"
                assert "for this operator" in problem["detail"]
                assert (await post(d, what, 409, operator=names[-1]))["code"] == "busy"
            go_on.set()
            assert [one["verdict"] for one in await asyncio.gather(*sending)] == ["delivered"] * len(sending)
            assert (await post(d, "send", operator=names[-1]))["verdict"] == "delivered"


async def test_a_read_only_token_may_try_nothing(tmp_path: Path) -> None:
    (tmp_path / "read").write_text("grafana:" + TOKEN)
    (tmp_path / "tokens").write_text("anna:another-token")
    tokens = LISTEN + 'token_file = "tokens"\nread_token_file = "read"\n'
    async with scripted_operator() as wallet, serving(tmp_path, tokens + acme(wallet.url)) as d:
        for what in ("send", "check"):
            url = f"{d.api}/v1/operators/acme/{what}"
            async with d.client.post(url, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
                assert (answer.status, (await answer.json())["code"]) == (403, "read-only")
        assert wallet.received == []


# -- the checks


@pytest.mark.usefixtures("_unpaced")
async def test_the_checks_tell_of_each_and_end_with_the_report(tmp_path: Path) -> None:
    async with served(Endpoint("HTML at malformed JSON", SHIPPED["v4.01"])) as endpoint:
        async with serving(tmp_path, acme(endpoint.url, dialect="v4.01", accept=["v4.01"])) as d:
            with hear() as lines:
                await check_to_the_end(d, lines)


async def check_to_the_end(d: Serving, lines: list[Event]) -> None:
    async with d.client.post(f"{d.api}/v1/operators/acme/check") as response:
        found = await all_of(response)
    *progress, (last, report) = found
    assert {name for name, _ in progress} == {"check.progress"}
    assert last == "check.report"
    ended = [data["result"] for _, data in progress if data["result"]]
    assert len(ended) == len(CHECKS) == progress[0][1]["total"]
    assert sorted(one["id"] for one in ended) == sorted(one["id"] for one in report["checks"])
    (failed,) = [one for one in report["checks"] if one["id"] == "strictness.malformed"]
    assert failed["verdict"] == "fail"
    assert "<h1>Server Error</h1>" in failed["evidence"][0]["answer"]["body"]
    assert report["counts"]["pass"] > 20
    assert d.store.figures_of("acme").live == 0
    await until(lambda: of("operator.checked", lines))
    (line,) = of("operator.checked", lines)
    assert line["failed"] >= 1
    assert line.get("stopped") is None


async def all_of(response: aiohttp.ClientResponse) -> list[tuple[str, Any]]:
    found = []
    async for one in events_of(response):
        found.append(one)
        if one[0] == "check.report":
            assert await response.content.read() == b""
            break
    return found


async def test_the_checks_end_when_their_client_leaves(tmp_path: Path) -> None:
    async with hanging() as (url, _), serving(tmp_path, acme(url)) as d:
        with hear() as lines:
            await leave_early(d, lines)
        assert (await d.client.get(d.api + "/v1/token")).status == 200


async def leave_early(d: Serving, lines: list[Event]) -> None:
    response = await d.client.post(f"{d.api}/v1/operators/acme/check")
    await anext(events_of(response))
    response.close()
    await until(lambda: of("operator.checked", lines))
    (line,) = of("operator.checked", lines)
    assert line["stopped"] == "the client left"
    await until(lambda: not trial_threads())


async def test_a_stop_of_the_daemon_ends_the_checks_with_what_they_found(tmp_path: Path) -> None:
    async with hanging() as (url, _), serving(tmp_path, acme(url)) as d:
        async with d.client.post(f"{d.api}/v1/operators/acme/check") as response:
            await anext(events_of(response))
            d.daemon.stop()
            name, report = (await all_of(response))[-1]
        assert (name, report["stopped"]) == ("check.report", "interrupted")
        await d.running
        assert trial_threads() == []


async def test_a_check_that_is_ended_at_once_has_begun_and_gives_what_it_has() -> None:
    """The check can be ended at whatever point its thread is."""

    async def work() -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return "what was found so far"
        return "all"

    for number in range(300):
        one = trials.Trial(work, may_end_early=True)
        one.start("trial")
        for _ in range(number % 20):
            await asyncio.sleep(0)
        one.end_early()
        assert await one.ended == "what was found so far"


async def test_work_that_is_interrupted_without_a_result_ends_all_the_same() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    one = trials.Trial(work, may_end_early=True)
    one.start("trial")
    with pytest.raises(RuntimeError, match="interrupted without a result"):
        await one.ended
