"""The daemon's log: facts that connect the lines of one notice, and no flood of lines, whatever a peer sends."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from clocks import HandClock
from processes import FORKED, process, wait_for
from support import LISTEN, Event, Serving, bench, hear, operator_table, scripted_operator, serving

from lmdaemon.limits import Limits, StoreLimits
from lmdaemon.retry import BREAKER_OPENS_AT
from lmdaemon.store.contract import StoreError

OPERATORS = """
[operators.acme]
provider_id = "luckymonaco"
accept = ["v4.01"]
[operators.strict]
provider_id = "strict"
accept = ["v4"]
token_check = "partner"
partner_token_file = "tokens"
"""
V4_01 = {"providerId": "luckymonaco", "sessionId": "s-1", "userId": "p", "uuid": "9b0c1f1e-0000-4000-8000-000000000001"}
STRICT = {"providerId": "strict", "sessionId": "s-2", "externalPlayerId": "p", "token": "wr-0ng"}


def only(events: list[Event], name: str) -> Event:
    (found,) = [event for event in events if event.name == name]
    return found


async def notify(daemon: Serving, notice: dict[str, str], **headers: str) -> int:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    async with daemon.client.post(daemon.server + "/V4/SessionExpired", json=notice, headers=given) as answer:
        await answer.read()
        return answer.status


@pytest.fixture
def settings(tmp_path: Path) -> str:
    (tmp_path / "tokens").write_text("r-1ght\n")
    (tmp_path / "tokens").chmod(0o600)
    return OPERATORS


async def test_a_notice_is_logged_with_what_ties_its_lines_together(tmp_path: Path, settings: str) -> None:
    """The lines have the operator, the session, the uuid and the proxy's request id in common."""
    async with serving(tmp_path, settings) as d:
        with hear() as events:
            assert await notify(d, V4_01, X_Request_Id="req-4711") == 200
            assert await notify(d, V4_01) == 200
            assert await notify(d, STRICT, X_Request_Id="req-4712") == 200
    recorded = {"operator": "acme", "session": "s-1", "request": V4_01["uuid"], "dialect": "v4.01"}
    recorded["extra_left_out"] = None
    assert only(events, "notice.recorded").facts == recorded | {"request_id": "req-4711"}
    assert only(events, "notice.repeated").facts == recorded | {"request_id": None}
    refused = only(events, "notice.refused").facts
    assert (refused["operator"], refused["session"], refused["request_id"]) == ("strict", "s-2", "req-4712")
    assert (refused["meaning"], refused["code"]) == ("bad_token", 7)
    assert "wr-0ng" not in str(refused)


@pytest.mark.parametrize("given", ["x" * 65, "two words", "a=b", "{}", "Zürich", ""])
async def test_what_is_no_request_id_is_not_logged(tmp_path: Path, settings: str, given: str) -> None:
    async with serving(tmp_path, settings) as d:
        with hear() as events:
            assert await notify(d, V4_01, X_Request_Id=given) == 200
    assert only(events, "notice.recorded").facts["request_id"] is None


async def test_a_call_without_a_token_is_told_without_what_it_tried(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("r-1ght\n")
    (tmp_path / "tokens").chmod(0o600)
    async with serving(tmp_path, LISTEN + 'token_file = "tokens"\n') as d:
        with hear() as events:
            async with d.client.get(d.api + "/v1/operators", headers={"Authorization": "Bearer gu-3ss"}) as answer:
                assert answer.status == 401
    told = only(events, "api.unauthorized")
    assert (told.level, told.facts["peer"]) == ("warning", "127.0.0.1")
    assert "gu-3ss" not in str(told.facts)


async def test_what_is_refused_for_want_of_room_is_told(tmp_path: Path, settings: str) -> None:
    async with serving(tmp_path, settings, limits=Limits(store=StoreLimits(queue_max=0))) as d:
        with hear() as events:
            assert await notify(d, V4_01) == 503
            d.sites["server"].most = 0
            host, port = d.server.removeprefix("http://").split(":")

            def knock() -> bytes:
                with socket.create_connection((host, int(port)), timeout=20) as connection:
                    return connection.recv(64)

            assert (await asyncio.to_thread(knock)).startswith(b"HTTP/1.1 503")
            d.sites["server"].most = 2000
            with pytest.raises(StoreError):
                await d.store.db.reads.read(lambda sql: sql.execute("SELECT * FROM nothing"))
    assert only(events, "store.overloaded").facts["reason"] == "queue_full"
    assert only(events, "notice.not_stored").facts["session"] == "s-1"
    # `notice.not_stored` is its line already
    assert [event for event in events if event.name == "notice.not_taken"] == []
    assert only(events, "http.turned_away").facts["listener"] == "server"
    assert only(events, "store.reading_failed").level == "error"


async def test_every_change_over_the_api_is_told_with_its_request_and_who_asked(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("game-7:s3cret\n")
    (tmp_path / "tokens").chmod(0o600)
    toml = LISTEN + 'token_file = "tokens"\n[operators.acme]\nprovider_id = "p"\n'
    async with serving(tmp_path, toml) as d:
        with hear() as events:
            for number, (method, path, body) in enumerate(
                (
                    ("PUT", "sessions/s", {"playerId": "p", "token": "t"}),
                    ("POST", "sessions/s/close", None),
                    ("POST", "hold", None),
                    ("POST", "release", None),
                    ("POST", "deliveries/retry", {}),
                )
            ):
                headers = {"Authorization": "Bearer s3cret", "X-Request-Id": f"req-{number}"}
                url = f"{d.api}/v1/operators/acme/{path}"
                async with d.client.request(method, url, json=body, headers=headers) as answer:
                    assert answer.status < 300
    told = ("session.opened", "session.ended", "operator.held", "operator.released", "delivery.retried_by_hand")
    for number, name in enumerate(told):
        facts = only(events, name).facts
        assert (facts["by"], facts["request_id"]) == ("game-7", f"req-{number}")
    assert "s3cret" not in str(events)


async def test_touches_that_met_nothing_alive_are_told_with_their_request(tmp_path: Path, settings: str) -> None:
    async with serving(tmp_path, settings) as d:
        path = f"{d.api}/v1/operators/acme/sessions"
        headers = {"X-Request-Id": "gs7-1"}
        async with d.client.put(path + "/old", json={"playerId": "p", "token": "t"}):
            pass
        async with d.client.post(path + "/old/close"):
            pass
        with hear() as events:
            for session in ("nobody", "old"):
                async with d.client.post(f"{path}/{session}/touch", headers=headers):
                    pass
            many = {"sessionIds": ["old", *(f"n{number}" for number in range(5))]}
            async with d.client.post(path + "/touch", json=many, headers=headers) as answer:
                assert (await answer.json())["touched"] == 0
    told = [event.facts for event in events if event.name == "touch.refused"]
    expected = [
        ("unknown-session", "nobody", None),
        ("ended", "old", None),
        ("unknown-session", "n0, n1, n2", 5),
        ("ended", "old", None),
    ]
    assert [(one["code"], one["session"], one["count"]) for one in told] == expected
    assert {(one["operator"], one["request_id"]) for one in told} == {("acme", "gs7-1")}


async def test_hold_and_release_by_hand_are_told(tmp_path: Path, settings: str) -> None:
    async with serving(tmp_path, settings) as d:
        with hear() as events:
            for verb in ("hold", "release"):
                async with d.client.post(f"{d.api}/v1/operators/acme/{verb}") as answer:
                    assert answer.status == 200
    by_hand = {"operator": "acme", "reason": "by_hand", "by": None, "request_id": None, "note": None, "pending": 0}
    told = [(event.name, event.level, event.facts) for event in events]
    held = by_hand | {"until": None}
    released = by_hand | {"held_reason": "by_hand", "held_by": None, "held_s": told[1][2]["held_s"]}
    assert told == [("operator.held", "warning", held), ("operator.released", "info", released)]


async def test_a_breaker_that_opens_says_why_and_its_closing_is_told(tmp_path: Path, clock: HandClock) -> None:
    later = {"error": 100, "description": "later"}
    async with scripted_operator(*[later] * BREAKER_OPENS_AT) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url, schedule=["1s"] * 9)) as b:
            with hear() as events:
                await b.end()
                for _ in range(BREAKER_OPENS_AT + 1):
                    await b.round()
                    clock.advance(5)
    opened = only(events, "breaker.opened")
    assert (opened.level, opened.facts["reason"], opened.facts["failures"]) == ("warning", "code_100", BREAKER_OPENS_AT)
    facts = opened.facts
    assert (facts["detail"], facts["pending"]) == ('`error` is 100, internal error, please retry ("later")', 1)
    closed = only(events, "breaker.closed").facts
    assert (closed["reason"], closed["failed_attempts"], closed["pending"]) == ("answer", BREAKER_OPENS_AT, 0)
    assert closed["open_s"] == 5.0


async def test_a_plug_in_that_works_again_is_told(
    tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moody.py").write_text(
        "failures = 6\n"
        "async def ended(event):\n"
        "    global failures\n"
        "    failures -= 1\n"
        "    if failures >= 0: raise RuntimeError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    operator = '[operators.acme]\nprovider_id = "acme"\nschedule = ["1s", "1s", "1s", "1s", "1s", "1s", "1s"]\n'
    toml = '[delivery]\nschedule = ["1s", "1s", "1s", "1s", "1s", "1s", "1s"]\n' + operator
    async with bench(tmp_path, clock, toml + '[plugins.moody]\nuse = "moody:ended"\n') as b:
        with hear() as events:
            await b.end("first")
            for _ in range(8):
                await b.round()
                clock.advance(5)
            await b.end("second")
            await b.round()
    assert only(events, "delivery.recovered").facts == {"operator": "acme", "sink": "plugin:moody", "failed": 6}
    assert len([event for event in events if event.name == "delivery.delivered"]) == 2


# -- floods, at the default log level


def altogether(lines: list[dict[str, Any]]) -> int:
    """The number of events: logged ones, and suppressed ones, which the line at the daemon's stop counts."""
    return sum(line.get("suppressed", 1) for line in lines)


def test_a_peer_that_sends_nothing_but_bad_notices_fills_no_journal(tmp_path: Path, settings: str) -> None:
    with process(tmp_path, settings, command=FORKED) as daemon:
        url = daemon.server + "/V4/SessionExpired"
        for number in range(50):
            assert daemon.call("POST", url, STRICT | {"sessionId": f"s-{number}"})[1]["error"] == 7
            assert daemon.call("POST", url, {"providerId": "luckymonaco", f"field{number}": "x"})[1]["error"] != 0
            assert daemon.call("PUT", url, {})[0] == 405
        assert daemon.stop() == 0
        # At its stop, the daemon logs how many lines were suppressed
        refused, not_taken = daemon.events("notice.refused"), daemon.events("notice.not_taken")
        assert (altogether(refused), len(refused)) == (100, 4)
        assert (altogether(not_taken), len(not_taken)) == (50, 2)


def test_an_operator_that_is_down_fills_no_journal(tmp_path: Path) -> None:
    refusing = 'notify = true\nurl = "http://127.0.0.1:1/"\nallow_private_network = true\nconcurrency = 64\n'
    toml = '[operators.acme]\nprovider_id = "luckymonaco"\nendpoint = ""\n' + refusing
    with process(tmp_path, toml, command=FORKED) as daemon:
        sessions = f"{daemon.api}/v1/operators/acme/sessions"
        assert daemon.call("POST", f"{daemon.api}/v1/operators/acme/hold")[0] == 200
        for number in range(40):
            assert daemon.call("PUT", f"{sessions}/{number}", {"playerId": "p", "token": "t"})[0] == 201
            assert daemon.call("POST", f"{sessions}/{number}/close")[0] == 200
        assert daemon.call("POST", f"{daemon.api}/v1/operators/acme/release")[0] == 200
        wait_for(lambda: daemon.events("breaker.opened"))
        assert daemon.stop() == 0
        retried = daemon.events("delivery.retry")
        assert len(retried) == 2
        assert retried[0]["reason"] == "connect"
        assert retried[1].keys() == {"time", "level", "event", "operator", "sink", "reason", "suppressed"}
        assert retried[1]["suppressed"] >= BREAKER_OPENS_AT - 1
        assert len(daemon.events("breaker.opened")) == 1
