"""The private API, call by call, on a whole daemon (docs/session-api.md)."""

import asyncio
import contextlib
import hashlib
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from datetime import datetime
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from caller import ACME, CONFIG, EVERY_CALL, NO_CALLS, OPENING, SECRET, Caller
from clocks import HandClock
from multidict import CIMultiDict
from support import (
    LISTEN,
    ScriptedOperator,
    hear,
    live,
    raw_connection,
    scrape,
    scripted_operator,
    serving,
    until,
)

from lmdaemon.limits import LIMITS, Limits, StoreLimits
from lmdaemon.store.sqlite import pages
from lmdaemon.web.documents import read_time

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
FINAL = {"error": 120, "description": "no"}


async def ignore(event: object) -> None:
    """A plug-in hook that does nothing."""


@pytest.fixture
async def wallet() -> AsyncIterator[ScriptedOperator]:
    async with scripted_operator() as operator:
        yield operator


PATIENT = Limits(store=StoreLimits(look_s=60))


@pytest.fixture
def limits() -> Limits:
    return LIMITS


@pytest.fixture
async def api(tmp_path: Path, clock: HandClock, wallet: ScriptedOperator, limits: Limits) -> AsyncIterator[Caller]:
    async with serving(tmp_path, CONFIG.format(url=wallet.url), clock, limits) as daemon:
        yield Caller(daemon)


# -- PUT …/sessions/{sessionId}


async def test_opening_a_session_answers_201_with_the_session(api: Caller) -> None:
    opened = await api.open(attributes={"game": "roulette", "table": 7}, idleTimeoutSeconds=90)
    assert opened == {
        "operator": "acme",
        "sessionId": "s1",
        "playerId": "p1",
        "state": "active",
        "reason": None,
        "openedAt": "2026-09-21T14:13:20.000Z",
        "lastSeenAt": "2026-09-21T14:13:20.000Z",
        "expiresAt": "2026-09-21T14:14:50.001Z",
        "endedAt": None,
        "idleTimeoutSeconds": 90,
        "openedRequestId": None,
        "closedRequestId": None,
        "attributes": {"game": "roulette", "table": 7},
        "changed": True,
        "ignored": [],
    }
    del opened["changed"], opened["ignored"]
    assert await api.session() == opened | {"deliveries": []}


async def test_a_session_shows_which_requests_opened_and_closed_it(api: Caller) -> None:
    path = ACME + "/sessions/s1"
    opened = await api("PUT", path, 201, json=OPENING, headers={"X-Request-Id": "gs-1"})
    assert (opened["openedRequestId"], opened["closedRequestId"]) == ("gs-1", None)
    again = await api("PUT", path, 200, json=OPENING, headers={"X-Request-Id": "gs-2"})
    assert again["openedRequestId"] == "gs-1"
    await api("POST", path + "/close", 200, headers={"X-Request-Id": "gs-3"})
    await api("POST", path + "/close", 200, headers={"X-Request-Id": "gs-4"})  # the session had ended before
    shown = await api.session()
    assert (shown["openedRequestId"], shown["closedRequestId"]) == ("gs-1", "gs-3")


async def test_opening_again_answers_200_and_is_a_touch_and_nothing_else(api: Caller, clock: HandClock) -> None:
    opened = await api.open(attributes={"a": 1})
    live(clock, api.daemon.store, 60)
    again = await api(
        "PUT", ACME + "/sessions/s1", 200, json=OPENING | {"attributes": {"b": 2}, "idleTimeoutSeconds": 5}
    )
    assert again["lastSeenAt"] == "2026-09-21T14:14:20.000Z"
    assert again["expiresAt"] == "2026-09-21T14:24:20.001Z"
    assert (again["changed"], again["ignored"]) == (False, ["idleTimeoutSeconds", "attributes"])
    moved = {"lastSeenAt", "expiresAt", "changed", "ignored"}
    assert {k: v for k, v in again.items() if k not in moved} == {k: v for k, v in opened.items() if k not in moved}


@pytest.mark.parametrize(
    "other", [{"playerId": "p2"}, {"token": "another"}, {"playerId": "P1"}], ids=["player", "token", "player's case"]
)
async def test_opening_what_is_open_for_another_answers_409_and_touches_nothing(
    api: Caller, clock: HandClock, other: dict[str, str]
) -> None:
    await api.open()
    before = await api.session()
    clock.advance(1)
    await api("PUT", ACME + "/sessions/s1", 409, json=OPENING | other)
    assert (await api.session())["lastSeenAt"] == before["lastSeenAt"]
    assert (await api.session())["playerId"] == "p1"


async def test_a_token_where_there_was_none_differs(api: Caller) -> None:
    path = "/v1/operators/bravo/sessions/s1"
    await api("PUT", path, 201, json={"playerId": "p1"})
    await api("PUT", path, 409, json=OPENING)
    await api("PUT", path, 200, json={"playerId": "p1"})


async def test_opening_what_has_ended_answers_409_with_the_session(api: Caller) -> None:
    await api.open()
    ended = await api.close()
    problem = await api("PUT", ACME + "/sessions/s1", 409, json=OPENING)
    assert problem["session"] == ended
    assert (await api.session())["state"] == "ended"


BAD_OPENINGS: list[tuple[Any, str]] = [
    ({}, "playerId"),
    ({"playerId": "p1"}, "token"),
    ({"token": "t"}, "playerId"),
    (OPENING | {"playerid": "p1"}, "playerid"),
    (OPENING | {"sessionId": "s1"}, "sessionId"),
    (OPENING | {"playerId": 1}, "playerId"),
    (OPENING | {"playerId": None}, "playerId"),
    (OPENING | {"playerId": ""}, "playerId"),
    (OPENING | {"playerId": "x" * 257}, "playerId"),
    (OPENING | {"playerId": "a\nb"}, "playerId"),
    (OPENING | {"playerId": "a\x85b"}, "playerId"),
    (OPENING | {"token": None}, "token"),
    (OPENING | {"token": ""}, "token"),
    (OPENING | {"token": 7}, "token"),
    (OPENING | {"token": "x" * 4097}, "token"),
    (OPENING | {"idleTimeoutSeconds": 0}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": -1}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": 2592001}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": 1.5}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": 1e300}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": "60"}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": True}, "idleTimeoutSeconds"),
    (OPENING | {"idleTimeoutSeconds": None}, "idleTimeoutSeconds"),
    (OPENING | {"attributes": []}, "attributes"),
    (OPENING | {"attributes": None}, "attributes"),
    (OPENING | {"attributes": "{}"}, "attributes"),
    (OPENING | {"attributes": {"a": "x" * 4089}}, "attributes"),
    (OPENING | {"attributes": {"a": 2**64}}, "attributes"),
    (OPENING | {"attributes": {"a": [{"b": -(2**63) - 1}]}}, "attributes"),
    (OPENING | {"attributes": {"a": 123456789012345678901234567890}}, "attributes"),
    (OPENING | {"attributes": {"a": 1e30}}, "attributes"),
    ([], "object"),
    ("text", "object"),
    (5, "object"),
]


async def test_opening_with_a_bad_body_answers_400_naming_the_field(api: Caller, subtests: pytest.Subtests) -> None:
    for body, named in BAD_OPENINGS:
        with subtests.test(body=body):
            problem = await api("PUT", ACME + "/sessions/s1", 400, json=body)
            assert named in problem["detail"]
            await api("GET", ACME + "/sessions/s1", 404)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"playerId": "p1" "token": "t"}',
        b'{"playerId": "p1", "token": "t", "playerId": "p2"}',
        b'{"playerId": "\\ud800", "token": "t"}',
        b'{"playerId": "\xff", "token": "t"}',
        b'{"playerId": NaN, "token": "t"}',
        b'{"playerId": "p1", "token": "t"} {}',
        b'{"playerId": "p1", "token": "t", "attributes": {"a": 1e400}}',
        b'{"playerId": "p1", "token": "t", "attributes": {"a": Infinity}}',
        b'{"playerId": "p1", "token": "t", "attributes": {"a": 1, "a": 2}}',
        b'{"playerId": "p1", "token": "t", "attributes": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        '{"playerId": "p1", "token": "t"}'.encode("utf-16"),
        b'{"playerId": "p1", "token": "t", "idleTimeoutSeconds": 1' + b"0" * 400 + b"}",
        b"[" * 5000,
        b"null",
    ],
)
async def test_opening_with_broken_json_answers_400(api: Caller, body: bytes) -> None:
    await api("PUT", ACME + "/sessions/s1", 400, data=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"idleTimeoutSeconds": 1}, {"idleTimeoutSeconds": 1}),
        ({"idleTimeoutSeconds": 2592000}, {"idleTimeoutSeconds": 2592000}),
        ({"idleTimeoutSeconds": 60.0}, {"idleTimeoutSeconds": 60}),
        ({}, {"idleTimeoutSeconds": 600, "attributes": {}}),
        ({"attributes": {"a": "x" * 4088}}, {"attributes": {"a": "x" * 4088}}),
        ({"attributes": {"ü": [1, None, {"deep": True}]}}, {"attributes": {"ü": [1, None, {"deep": True}]}}),
        ({"attributes": {"a": [2**64 - 1, -(2**63), 0.1]}}, {"attributes": {"a": [2**64 - 1, -(2**63), 0.1]}}),
        ({"playerId": "x" * 256}, {"playerId": "x" * 256}),
        ({"token": "x" * 4096}, {"playerId": "p1"}),
    ],
    ids=["shortest", "longest", "whole", "default", "4 KiB", "nested", "numbers", "long player", "long token"],
)
async def test_what_is_within_the_bounds_opens(api: Caller, fields: dict[str, Any], shown: dict[str, Any]) -> None:
    opened = await api.open(**fields)
    assert {name: opened[name] for name in shown} == shown


@pytest.mark.parametrize(
    ("session_id", "changes", "named"),
    [
        ("a%26b", {}, "sessionId"),
        ("a=", {}, "sessionId"),
        ("s", {"playerId": "1&sessionId=V"}, "playerId"),
        ("s", {"token": "dG9rZW4="}, "token"),
    ],
)
async def test_what_would_be_hashed_ambiguously_is_not_opened(
    tmp_path: Path, session_id: str, changes: dict[str, str], named: str
) -> None:
    (tmp_path / "hash.key").write_text("key")
    toml = '[operators.acme]\nprovider_id = "p"\nhash_key_file = "hash.key"\ndialect = "pragmatic"\n'
    async with serving(tmp_path, toml) as daemon:
        api = Caller(daemon)
        problem = await api("PUT", f"{ACME}/sessions/{session_id}", 400, json=OPENING | changes)
        assert problem["detail"].startswith(f"{named}: must have no & and no =")
        await api("PUT", f"{ACME}/sessions/s", 201, json=OPENING)


async def test_what_another_dialect_brought_is_recorded_and_never_hashed(
    tmp_path: Path, wallet: ScriptedOperator
) -> None:
    (tmp_path / "hash.key").write_text("key")
    toml = CONFIG.format(url=wallet.url).replace("[operators.bravo]", 'hash_key_file = "hash.key"\n[operators.bravo]')
    toml = toml.replace("concurrency = 1", 'concurrency = 1\ndialect = "pragmatic"', 1)
    async with serving(tmp_path, toml) as daemon:
        api = Caller(daemon)
        notice = {"providerId": "luckymonaco", "sessionId": "s1", "externalPlayerId": "1&sessionId=V", "token": "t"}
        async with daemon.client.post(daemon.server + "/V4/SessionExpired", json=notice) as answer:
            assert (await answer.json())["error"] == 0
        delivery = await api.delivery_of()
        assert (delivery["state"], delivery["lastError"]) == ("dead", "ambiguous_hash")
    assert wallet.received == []


async def test_where_no_hash_is_sent_it_may_have_any_character(api: Caller) -> None:
    await api.open("a=b&c", playerId="d=e&f", token="g=h&i")


async def test_an_operator_whose_dialect_sends_no_token_needs_none(api: Caller) -> None:
    await api("PUT", "/v1/operators/bravo/sessions/s1", 201, json={"playerId": "p1"})


@pytest.mark.parametrize(("given", "shown"), [("60", "a string"), (True, "true"), (None, "null"), (1.5, "1.5")])
async def test_an_idle_time_that_is_none_is_shown(api: Caller, given: object, shown: str) -> None:
    problem = await api("PUT", ACME + "/sessions/s1", 400, json=OPENING | {"idleTimeoutSeconds": given})
    assert problem["detail"] == f"idleTimeoutSeconds: must be an integer from 1 to 2592000 (got {shown})"


@pytest.mark.parametrize(
    ("misplaced", "problem"),
    [
        ({"playerId": {"token": SECRET}}, "playerId: must be a string (got an object)"),
        ({"playerId": [SECRET]}, "playerId: must be a string (got an array)"),
        ({"attributes": SECRET}, "attributes: must be an object (got a string)"),
        ({"attributes": [SECRET]}, "attributes: must be an object (got an array)"),
        ({"idleTimeoutSeconds": SECRET}, "idleTimeoutSeconds: must be an integer from 1 to 2592000 (got a string)"),
        ({"token": {"value": SECRET}}, "token: must be a string"),
    ],
)
async def test_a_token_in_the_wrong_field_is_not_repeated(api: Caller, misplaced: Any, problem: str) -> None:
    """`Caller` fails the test if an answer has the token in it."""
    body = OPENING | misplaced
    with hear() as events:
        assert (await api("PUT", ACME + "/sessions/s1", 400, json=body))["detail"] == problem
        bulk = await api("POST", ACME + "/sessions", 400, json={"sessions": [{"sessionId": "s1"} | body]})
        assert bulk["detail"] == f"sessions[0].{problem}"
        await api("POST", ACME + "/sessions/touch", 400, json=body)
        await api("POST", ACME + "/sessions/touch", 400, json={"sessionIds": [body]})
    assert SECRET not in str(events)


async def test_a_deeply_nested_value_of_the_wrong_type_is_refused(api: Caller) -> None:
    deep = "[" * 300 + "]" * 300
    headers = {"Content-Type": "application/json"}
    answer = await api("POST", ACME + "/deliveries/retry", 400, data=f'{{"since":{deep}}}', headers=headers)
    assert answer["detail"] == "since: must be a string (got an array)"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json; charset=ISO-8859-1"},
        {"Content-Type": "application/json; utf-8;"},
        {"Content-Type": "application/json;"},
        {"Content-Type": "Application/JSON", "Content-Encoding": "utf-8"},
        {"Content-Type": "application/json", "Content-Encoding": "identity"},
    ],
)
async def test_json_is_read_whatever_parameters_and_charset_say(api: Caller, headers: dict[str, str]) -> None:
    await api("PUT", ACME + "/sessions/s1", 201, data=json.dumps(OPENING).encode(), headers=headers)


async def test_a_byte_order_mark_before_a_body_is_ignored(api: Caller) -> None:
    for method, path, expected, body in (
        ("PUT", ACME + "/sessions/s1", 201, OPENING),
        ("POST", ACME + "/sessions/touch", 200, {"sessionIds": ["s1"]}),
        ("POST", ACME + "/deliveries/retry", 202, {}),
    ):
        marked = b"\xef\xbb\xbf" + json.dumps(body).encode()
        await api(method, path, expected, data=marked, headers={"Content-Type": "application/json"})
    headers = {"Content-Type": "application/json"}
    await api("POST", ACME + "/deliveries/retry", 202, data=b"\xef\xbb\xbf", headers=headers)


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
@pytest.mark.parametrize(
    ("method", "path", "limit"),
    [
        ("PUT", ACME + "/sessions/s1", 64 * 1024),
        ("POST", ACME + "/sessions/touch", 4 * 1024 * 1024),
        ("POST", ACME + "/deliveries/retry", 64 * 1024),
    ],
)
async def test_a_body_over_its_limit_answers_413(
    api: Caller, method: str, path: str, limit: int, announced: bool
) -> None:
    headers = {"Content-Type": "application/json"}
    for size, expected in ((limit, 400), (limit + 1, 413)):
        body = b'"' + b"x" * (size - 2) + b'"'
        await api(method, path, expected, data=BytesIO(body) if announced else in_pieces(body), headers=headers)


# -- ids in the path


NO_IDS = [
    "%FF",
    "%ED%A0%80",
    "%C0%AF",
    "%",
    "%4",
    "%zz",
    "a%",
    "%00",
    "%0A",
    "%7F",
    "%C2%85",
    "x" * 257,
    "%F4%90%80%80",
]


@pytest.mark.parametrize(("method", "end"), [("PUT", ""), ("GET", ""), ("POST", "/touch"), ("POST", "/close")])
async def test_a_session_id_that_is_none_answers_400(
    api: Caller, method: str, end: str, subtests: pytest.Subtests
) -> None:
    body = {"json": OPENING} if method == "PUT" else {}
    for raw in NO_IDS:
        with subtests.test(raw):
            problem = await api(method, f"{ACME}/sessions/{raw}{end}", 400, **body)
            assert "sessionId" in problem["detail"]


@pytest.mark.parametrize(
    "session_id",
    [
        "a/b",
        "/",
        "...",
        "touch",
        "close",
        "ünïcode",
        "𝄞",
        "a b",
        "a+b",
        "100%",
        "%2F",
        "{x}",
        "a?b#c",
        "\u2028",
        "x" * 256,
    ],
)
async def test_any_id_round_trips_through_path_body_and_answer(api: Caller, session_id: str) -> None:
    # Every byte is escaped, also where that is not needed
    raw = "".join(f"%{byte:02X}" for byte in session_id.encode())
    path = f"{ACME}/sessions/{raw}"
    assert (await api("PUT", path, 201, json=OPENING))["sessionId"] == session_id
    assert (await api.session(session_id))["sessionId"] == session_id
    await api("POST", path + "/touch", 204)
    touched = await api("POST", ACME + "/sessions/touch", 200, json={"sessionIds": [session_id]})
    assert touched["touched"] == 1
    assert (await api("GET", ACME + "/sessions", 200))["items"][0]["sessionId"] == session_id
    assert (await api("POST", path + "/close", 200))["sessionId"] == session_id


@pytest.mark.parametrize("raw", [".", "..", "%2E", "%2e%2E", ".%2e"])
async def test_an_id_that_a_client_would_resolve_is_not_opened(api: Caller, raw: str) -> None:
    async with raw_connection(api.daemon.api) as peer:  # raw bytes, because an HTTP client would resolve the path
        body = json.dumps(OPENING).encode()
        head = f"PUT {ACME}/sessions/{raw} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await peer.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await peer.answer()
    assert answer.status == 400
    assert "resolved" in json.loads(answer.body)["detail"]
    assert (await api("GET", ACME + "/sessions", 200))["items"] == []


@pytest.mark.parametrize(("session_id", "raw"), [(".", "%2E"), ("..", "%2E%2E")])
async def test_such_an_id_that_a_notice_brought_is_reached_escaped(api: Caller, session_id: str, raw: str) -> None:
    notice = {"providerId": "luckymonaco", "sessionId": session_id, "externalPlayerId": "p1", "token": SECRET}
    async with api.daemon.client.post(api.daemon.server + "/V4/SessionExpired", json=notice) as answer:
        assert (await answer.json())["error"] == 0
    path = f"{ACME}/sessions/{raw}"
    assert (await api("GET", path, 200))["sessionId"] == session_id
    assert (await api("POST", path + "/close", 200))["reason"] == "reported"
    await api("POST", path + "/touch", 410)
    touched = await api("POST", ACME + "/sessions/touch", 200, json={"sessionIds": [session_id]})
    assert touched == {"touched": 0, "unknown": [], "ended": [session_id]}


async def test_ids_are_case_sensitive_and_belong_to_their_operator(api: Caller) -> None:
    await api.open("s")
    await api("GET", ACME + "/sessions/S", 404)
    await api("GET", "/v1/operators/bravo/sessions/s", 404)
    await api.open("s", operator="bravo", playerId="another")
    assert (await api.session("s"))["playerId"] == "p1"


# -- touch and close


async def test_touching_answers_204_and_moves_the_deadline(api: Caller, clock: HandClock) -> None:
    await api.open()
    live(clock, api.daemon.store, 120)
    assert await api("POST", ACME + "/sessions/s1/touch", 204) == ""
    touched = await api.session()
    assert touched["lastSeenAt"] == "2026-09-21T14:15:20.000Z"
    assert touched["expiresAt"] == "2026-09-21T14:25:20.001Z"


async def test_touching_what_has_ended_answers_410_with_the_session(api: Caller) -> None:
    await api.open()
    ended = await api.close()
    problem = await api("POST", ACME + "/sessions/s1/touch", 410)
    assert problem["session"] == ended
    assert ended["state"] == "ended"


async def test_touching_many_says_what_was_touched_counting_a_duplicate_once(api: Caller, clock: HandClock) -> None:
    for session_id in ("a", "b", "c"):
        await api.open(session_id)
    await api.close("c")
    clock.advance(1)
    ids = ["b", "nobody", "a", "c", "b", "nobody", "c", "a"]
    answer = await api("POST", ACME + "/sessions/touch", 200, json={"sessionIds": ids})
    assert answer == {"touched": 2, "unknown": ["nobody"], "ended": ["c"]}
    assert (await api.session("a"))["lastSeenAt"] == "2026-09-21T14:13:21.000Z"


async def test_touching_many_takes_ten_thousand_and_no_more(api: Caller) -> None:
    await api.open("5")
    ids = [str(number) for number in range(10_001)]
    answer = await api("POST", ACME + "/sessions/touch", 200, json={"sessionIds": ids[:10_000]})
    assert (answer["touched"], len(answer["unknown"]), answer["ended"]) == (1, 9_999, [])
    await api("POST", ACME + "/sessions/touch", 400, json={"sessionIds": ids})


async def test_touching_none_touches_none(api: Caller) -> None:
    answer = await api("POST", ACME + "/sessions/touch", 200, json={"sessionIds": []})
    assert answer == {"touched": 0, "unknown": [], "ended": []}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"sessionIds": None},
        {"sessionIds": "s1"},
        {"sessionIds": {"s1": 1}},
        {"sessionIds": ["s1", 5]},
        {"sessionIds": ["s1", None]},
        {"sessionIds": ["s1", ""]},
        {"sessionIds": ["s1", "a\x00"]},
        {"sessionIds": ["s1", "x" * 257]},
        {"sessionIds": ["s1"], "more": 1},
        ["s1"],
    ],
)
async def test_touching_many_with_a_bad_body_answers_400_and_touches_none(
    api: Caller, clock: HandClock, body: Any
) -> None:
    before = await api.open()
    clock.advance(1)
    await api("POST", ACME + "/sessions/touch", 400, json=body)
    assert (await api.session())["lastSeenAt"] == before["lastSeenAt"]


async def test_closing_answers_200_with_the_same_session_however_often(
    api: Caller, clock: HandClock, wallet: ScriptedOperator
) -> None:
    await api.open()
    closed = await api.close()
    assert (closed["state"], closed["reason"], closed["expiresAt"]) == ("ended", "closed", None)
    assert closed["endedAt"] == "2026-09-21T14:13:20.000Z"
    clock.advance(5)
    assert await api.close() == closed
    await api.settled()
    assert len(wallet.received) == 1


async def test_closing_after_a_notice_answers_with_the_reported_end(api: Caller) -> None:
    await api.open()
    notice = {"providerId": "luckymonaco", "sessionId": "s1", "externalPlayerId": "p1", "token": SECRET}
    async with api.daemon.client.post(api.daemon.server + "/V4/SessionExpired", json=notice) as answer:
        assert (await answer.json())["error"] == 0
    assert (await api.close())["reason"] == "reported"


async def test_closing_after_inactivity_answers_with_that_end(api: Caller, clock: HandClock) -> None:
    await api.open(idleTimeoutSeconds=2)
    live(clock, api.daemon.store, 2.1)
    api.daemon.sweeper.wake()

    async def ended() -> bool:
        return (await api.session())["state"] == "ended"

    await until(ended)
    closed = await api.close()
    assert (closed["reason"], closed["endedAt"]) == ("inactivity", "2026-09-21T14:13:22.100Z")


async def test_reading_never_counts_as_activity(api: Caller, clock: HandClock) -> None:
    opened = await api.open()
    live(clock, api.daemon.store, 30)
    for path in ("/sessions/s1", "/sessions", "/sessions?state=active&playerId=p1"):
        await api("GET", ACME + path, 200)
    for path in ("/v1/deliveries", "/v1/operators", "/health", "/metrics", "/openapi.json"):
        await api("GET", path)
    shown = await api.session()
    assert (shown["lastSeenAt"], shown["expiresAt"]) == (opened["lastSeenAt"], opened["expiresAt"])


# -- GET …/sessions


async def test_pages_of_sessions_lose_and_double_nothing_for_any_filter(api: Caller) -> None:
    known = []
    for number in range(23):
        await api.open(f"s{number}", playerId=f"p{number % 3}")
        if number % 4 == 0:
            await api.close(f"s{number}")
        known.append((f"s{number}", f"p{number % 3}", "ended" if number % 4 == 0 else "active"))
    await api.open("elsewhere", operator="bravo")
    for state, player, limit in product((None, "active", "ended"), (None, "p0", "p1", "nobody"), (1, 2, 5, 1000)):
        walked = await api.walk(ACME + "/sessions", limit, state=state, playerId=player)
        wanted = [s for s, p, st in reversed(known) if state in (None, st) and player in (None, p)]
        assert [session["sessionId"] for session in walked] == wanted, (state, player, limit)


async def test_a_page_that_is_exactly_full_is_the_last(api: Caller) -> None:
    for number in range(3):
        await api.open(f"s{number}")
    assert (await api("GET", ACME + "/sessions?limit=3", 200))["next"] is None
    assert (await api("GET", ACME + "/sessions?limit=2", 200))["next"] is not None


async def test_sessions_opened_while_pages_are_read_disturb_none(api: Caller) -> None:
    for number in range(6):
        await api.open(f"s{number}")
    page = await api("GET", ACME + "/sessions?limit=3", 200)
    await api.open("late")
    rest = await api("GET", f"{ACME}/sessions?limit=3&after={page['next']}", 200)
    found = [session["sessionId"] for session in page["items"] + rest["items"]]
    assert found == ["s5", "s4", "s3", "s2", "s1", "s0"]


async def test_a_page_holds_a_hundred_unless_told_otherwise(api: Caller) -> None:
    await asyncio.gather(*(api.open(f"s{number}") for number in range(101)))
    assert len((await api("GET", ACME + "/sessions", 200))["items"]) == 100
    assert len((await api("GET", ACME + "/sessions?limit=1000", 200))["items"]) == 101


BAD_QUERIES = [
    *("limit=0", "limit=1001", "limit=-1", "limit=", "limit=x", "limit=1.5", "limit=%D9%A3", "limit=1&limit=2"),
    *("after=0", "after=x", "after=", "after=-1", "after=1.0", "after=9999999999999999999", "after=1&after=1"),
    *("state=gone", "state=", "state=Active", "unknown=1", "Limit=5", "=1"),
]


@pytest.mark.parametrize("path", [ACME + "/sessions", "/v1/deliveries"])
async def test_a_bad_query_answers_400(api: Caller, path: str, subtests: pytest.Subtests) -> None:
    for query in BAD_QUERIES:
        with subtests.test(query):
            await api("GET", f"{path}?{query}", 400)


@pytest.mark.parametrize(
    "target",
    [
        ACME + "/sessions?playerId=",
        ACME + "/sessions?playerId=a%00",
        ACME + "/sessions?operator=acme",
        "/v1/deliveries?operator=",
        "/v1/deliveries?sink=" + "x" * 257,
        "/v1/deliveries?sink=nope",
        "/v1/deliveries?sink=HTTP",
        "/v1/deliveries?sink=plugin:",
        "/v1/deliveries?sink=plugin:none&operator=acme",
        "/v1/deliveries?playerId=p1",
        "/v1/operators?limit=1",
    ],
)
async def test_a_filter_that_is_none_answers_400(api: Caller, target: str) -> None:
    await api("GET", target, 400)


# -- deliveries


@pytest.fixture
async def delivered_everywhere(
    tmp_path: Path, clock: HandClock, wallet: ScriptedOperator, limits: Limits
) -> AsyncIterator[Caller]:
    """Two operators, each with a URL and a plug-in, and deliveries in every state."""
    second = CONFIG.format(url=wallet.url).replace(
        "[operators.bravo]",
        '[operators.bravo]\nnotify = true\nurl = "' + wallet.url + '"\nallow_private_network = true\nconcurrency = 1',
    )
    plugin = '[plugins.hook]\nuse = "tests.web.test_api:ignore"\n'
    async with serving(tmp_path, second + plugin, clock, limits) as daemon:
        api = Caller(daemon)
        for operator in ("acme", "bravo"):
            for number in range(12):
                await api.open(f"s{number}", operator=operator)
            wallet.script = [FINAL] * 3
            for number in range(9):
                await api.close(f"s{number}", operator=operator)
            await api.settled(operator)
            await api("POST", f"/v1/operators/{operator}/hold", 200)
            for number in range(9, 12):
                await api.close(f"s{number}", operator=operator)
        yield api


async def test_pages_of_deliveries_lose_and_double_nothing_for_any_filter(delivered_everywhere: Caller) -> None:
    api = delivered_everywhere

    async def plugins_done() -> bool:
        return not (await api("GET", "/v1/deliveries?sink=plugin:hook&state=pending", 200))["items"]

    await until(plugins_done)
    known = await api.walk("/v1/deliveries", 1000)
    numbers = [int(delivery["id"].split("_")[1]) for delivery in known]
    assert numbers == sorted(numbers, reverse=True)
    states = [(d["operator"], d["sink"], d["state"]) for d in known]
    assert {state: states.count(("acme", "http", state)) for state in ("pending", "delivered", "dead")} == {
        "pending": 3,
        "delivered": 6,
        "dead": 3,
    }
    assert states.count(("bravo", "plugin:hook", "delivered")) == 12
    filters = product(
        (None, "acme", "bravo", "nobody"),
        (None, "http", "plugin:hook"),
        (None, "pending", "delivered", "dead"),
        (1, 3, 1000),
    )
    for operator, sink, state, limit in filters:
        walked = await api.walk("/v1/deliveries", limit, operator=operator, sink=sink, state=state)
        wanted = [
            delivery
            for delivery in known
            if operator in (None, delivery["operator"])
            and sink in (None, delivery["sink"])
            and state in (None, delivery["state"])
        ]
        assert walked == wanted, (operator, sink, state, limit)


async def test_deliveries_of_a_plug_in_that_left_the_file_can_still_be_listed(
    delivered_everywhere: Caller, tmp_path: Path
) -> None:
    api = delivered_everywhere
    assert (await api("GET", "/v1/deliveries?sink=plugin:hook&operator=acme", 200))["items"]
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().partition("[plugins.hook]")[0])
    await api.daemon.daemon.reload_once()
    assert api.daemon.daemon.settings.plugins == {}
    assert len((await api("GET", "/v1/deliveries?sink=plugin:hook&operator=acme", 200))["items"]) == 12


async def test_a_page_ends_at_a_mebibyte_and_goes_on_behind_it(api: Caller) -> None:
    attributes = {"note": "x" * 4000}
    names = [f"{number}-{'🎲' * 250}" for number in range(300)]
    for first in range(0, len(names), 50):
        await asyncio.gather(*(api.open(name, attributes=attributes) for name in names[first : first + 50]))
    found, sizes, after = [], [], ""
    while True:
        response, page = await api.answer("GET", f"{ACME}/sessions?limit=1000{after}", 200)
        found += [session["sessionId"] for session in page["items"]]
        sizes.append(int(response.headers["Content-Length"]))
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert len(sizes) == 2
    assert 1024 * 1024 - 6000 < sizes[0] <= 1024 * 1024  # one more item would not have fitted
    assert sorted(found) == sorted(names)


def endless(sql: sqlite3.Connection, *_: object) -> None:
    sql.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n").fetchone()


@pytest.mark.parametrize("limits", [PATIENT])
async def test_what_people_read_delays_no_delivery_and_ends_when_they_leave(
    api: Caller, wallet: ScriptedOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as slow:
        slow.setattr(pages, "newest_deliveries", endless)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(30):
                reader = await stack.enter_async_context(raw_connection(api.daemon.api))
                await reader.send(b"GET /v1/deliveries HTTP/1.1\r\nHost: localhost\r\n\r\n")
            desk = api.daemon.store.db.reads.desk
            await until(lambda: desk.waiting == 30)
            await api.open()
            await api.close()
            await wallet.wait_for(1)
            assert (await api("GET", "/health", 200))["status"] == "pass"
            assert desk.waiting == 30
        await until(lambda: desk.waiting == 0)
    assert len((await api("GET", "/v1/deliveries", 200))["items"]) == 1


@pytest.mark.parametrize("limits", [Limits(store=StoreLimits(look_s=0.05))])
async def test_what_people_read_answers_503_when_it_takes_too_long(
    api: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "session_page", endless)
    problem = await api("GET", ACME + "/sessions", 503)
    assert problem["detail"] == "reading took longer than 0.05 s"


async def test_a_session_shows_its_deliveries(api: Caller, wallet: ScriptedOperator) -> None:
    await api.open()
    await api.close()
    await api.settled()
    delivery = await api.delivery_of()
    assert delivery == {
        "id": delivery["id"],
        "operator": "acme",
        "sessionId": "s1",
        "sink": "http",
        "state": "delivered",
        "attempts": 1,
        "createdAt": "2026-09-21T14:13:20.000Z",
        "nextAttemptAt": None,
        "settledAt": "2026-09-21T14:13:20.000Z",
        "lastStatus": 200,
        "lastCode": 0,
        "lastError": None,
        "attemptSince": None,
        "bodySha256": hashlib.sha256(wallet.received[0].body).hexdigest(),
        "discarded": None,
    }
    assert wallet.received[0].headers["webhook-id"] == delivery["id"]


async def test_a_delivery_tells_the_history_of_its_attempts(api: Caller, wallet: ScriptedOperator) -> None:
    wallet.script = [FINAL]
    await api.open()
    await api.close()
    await api.settled()
    listed = await api.delivery_of()
    shown = await api("GET", f"/v1/deliveries/{listed['id']}", 200)
    assert shown == listed | {"history": shown["history"], "request": shown["request"]}
    assert shown["bodySha256"] == hashlib.sha256(wallet.received[0].body).hexdigest()
    assert (shown["state"], shown["attempts"], shown["lastCode"]) == ("dead", 1, 120)
    assert shown["history"] == [
        {
            "at": "2026-09-21T14:13:20.000Z",
            "durationMs": 0,
            "status": 200,
            "code": 120,
            "error": "code_120",
            "url": wallet.url,
            "address": wallet.url.split("/")[2],
            "detail": '`error` is 120, internal error, do not retry ("no")',
            "answer": '{"error": 120, "description": "no"}',
        }
    ]


async def test_a_delivery_shows_the_request_that_the_operator_received(api: Caller, wallet: ScriptedOperator) -> None:
    wallet.script = [FINAL]
    await api.open()
    await api.close()
    await api.settled()
    request = (await api("GET", f"/v1/deliveries/{(await api.delivery_of())['id']}", 200))["request"]
    (received,) = wallet.received
    assert request["url"] == wallet.url + "?key=***"
    assert request["headers"] == dict(received.headers)
    assert json.loads(request["body"]) == json.loads(received.body) | {"token": "***"}


async def test_a_delivered_request_is_shown_with_its_whole_id(api: Caller, wallet: ScriptedOperator) -> None:
    await api.open()
    await api.close()
    await api.settled()
    delivery = await api("GET", f"/v1/deliveries/{(await api.delivery_of())['id']}", 200)
    (received,) = wallet.received
    assert delivery["state"] == "delivered"
    sent = dict(received.headers)
    del sent["Content-Length"]
    assert delivery["request"]["headers"] == sent
    assert delivery["id"] in delivery["request"]["curl"]


async def test_retrying_a_dead_delivery_answers_202_and_sends_the_same_again(
    api: Caller, wallet: ScriptedOperator
) -> None:
    wallet.script = [FINAL]
    await api.open()
    await api.close()
    await api.settled()
    dead = await api.delivery_of()
    assert (await api.operator())["dead"] == 1
    retried = await api("POST", f"/v1/deliveries/{dead['id']}/retry", 202)
    assert retried["id"] == dead["id"]
    await api.settled()
    shown = await api("GET", f"/v1/deliveries/{dead['id']}", 200)
    assert (shown["state"], shown["attempts"], len(shown["history"])) == ("delivered", 2, 2)
    assert (await api.operator())["dead"] == 0
    first, second = wallet.received
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == dead["id"]


async def test_retrying_what_is_not_dead_answers_409_and_sends_nothing(api: Caller, wallet: ScriptedOperator) -> None:
    await api.open()
    await api.close()
    await api.settled()
    await api("POST", f"/v1/deliveries/{(await api.delivery_of())['id']}/retry", 409)
    await api("POST", ACME + "/hold", 200)
    await api.open("waits")
    await api.close("waits")
    await api("POST", f"/v1/deliveries/{(await api.delivery_of('waits'))['id']}/retry", 409)
    assert len(wallet.received) == 1


async def test_retrying_what_can_never_be_sent_answers_409(tmp_path: Path, wallet: ScriptedOperator) -> None:
    toml = CONFIG.format(url=wallet.url).replace("[operators.acme]", '[operators.acme]\naccept = ["v4.01"]')
    async with serving(tmp_path, toml) as daemon:
        api = Caller(daemon)
        notice = {"providerId": "luckymonaco", "sessionId": "s1", "userId": "p1", "uuid": "u"}  # without a token
        async with daemon.client.post(daemon.server + "/V4/SessionExpired", json=notice) as answer:
            assert (await answer.json())["error"] == 0
        delivery = await api.delivery_of()
        assert delivery["state"] == "dead"
        await api("POST", f"/v1/deliveries/{delivery['id']}/retry", 409)
        assert (await api("POST", ACME + "/deliveries/retry", 202, json={}))["retried"] == 0
    assert wallet.received == []


async def dead_deliveries(api: Caller, wallet: ScriptedOperator, *session_ids: str) -> None:
    wallet.script = [FINAL] * len(session_ids)
    for session_id in session_ids:
        await api.open(session_id)
        await api.close(session_id)
    await api.settled()


def millis(time: str) -> int:
    assert RFC3339.fullmatch(time)
    return round(datetime.fromisoformat(time).timestamp() * 1000)


async def test_retrying_all_dead_spaces_them_to_ten_a_second_over_all_calls(
    api: Caller, wallet: ScriptedOperator
) -> None:
    await dead_deliveries(api, wallet, *(f"s{number}" for number in range(15)))
    assert await api("POST", ACME + "/deliveries/retry", 202, json={}) == {"retried": 15}

    async def pending() -> list[Any]:
        return await api.walk("/v1/deliveries", 100, state="pending")

    async def first_is_sent() -> bool:  # the other retries are paced, and the clock stands still
        return len(await pending()) == 14

    await until(first_is_sent)
    due = [millis(delivery["nextAttemptAt"]) for delivery in await pending()]
    start = millis("2026-09-21T14:13:20.000Z")
    assert sorted(due) == [start + 100 * number for number in range(1, 15)]
    assert await api("POST", ACME + "/deliveries/retry", 202) == {"retried": 0}


async def test_retrying_one_by_one_keeps_to_ten_a_second_too(api: Caller, wallet: ScriptedOperator) -> None:
    await dead_deliveries(api, wallet, "a", "b", "c")
    dead = await api.walk("/v1/deliveries", 100, state="dead")
    retried = [await api("POST", f"/v1/deliveries/{delivery['id']}/retry", 202) for delivery in dead]
    start = millis("2026-09-21T14:13:20.000Z")
    due = [millis(delivery["nextAttemptAt"]) - start for delivery in retried[1:]]  # the first may be delivered already
    assert due == [100, 200]


@pytest.mark.parametrize("limits", [Limits(store=StoreLimits(dead_max=5, dead_rows=2))])
async def test_one_call_retries_as_many_as_it_may_and_no_more(api: Caller, wallet: ScriptedOperator) -> None:
    await dead_deliveries(api, wallet, *(f"s{number}" for number in range(6)))
    await api("POST", ACME + "/hold", 200)
    for count in (5, 1, 0):
        assert await api("POST", ACME + "/deliveries/retry", 202) == {"retried": count}


async def test_retrying_since_a_time_leaves_what_died_before_it(
    api: Caller, clock: HandClock, wallet: ScriptedOperator
) -> None:
    await dead_deliveries(api, wallet, "old")
    clock.advance(60)
    await dead_deliveries(api, wallet, "new", "newer")
    await api("POST", ACME + "/hold", 200)
    for since, count in (
        ("2026-09-21T16:14:20+02:00", 2),
        ("2026-09-21T14:14:19.999Z", 0),
        ("2026-09-21T14:13:20z", 1),
    ):
        assert await api("POST", ACME + "/deliveries/retry", 202, json={"since": since}) == {"retried": count}


@pytest.mark.parametrize("limits", [PATIENT])
async def test_retrying_all_dead_is_done_by_one_call_at_a_time_for_an_operator(delivered_everywhere: Caller) -> None:
    api = delivered_everywhere
    store = api.daemon.store
    busy = asyncio.ensure_future(store.db.reads.look(endless))
    first = asyncio.ensure_future(api("POST", ACME + "/deliveries/retry", 202))
    other = asyncio.ensure_future(api("POST", "/v1/operators/bravo/deliveries/retry", 202))
    await until(lambda: store.db.reads.desk.waiting == 3)
    for _ in range(3):
        await api("POST", ACME + "/deliveries/retry", 409)
    busy.cancel()
    assert [await first, await other] == [{"retried": 3}, {"retried": 3}]
    assert await api("POST", ACME + "/deliveries/retry", 202) == {"retried": 0}


@pytest.mark.parametrize(
    ("leap", "plain"),
    [
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
        ("2016-12-31t23:59:60.25z", "2017-01-01T00:00:00.25Z"),
        ("2017-01-01T05:29:60+05:30", "2017-01-01T00:00:00Z"),
        ("2015-06-30T19:59:60-04:00", "2015-07-01T00:00:00Z"),
    ],
)
def test_a_leap_second_is_the_second_after_it(leap: str, plain: str) -> None:
    assert read_time(leap) == read_time(plain)


@pytest.mark.parametrize(
    "text",
    [
        *("2016-12-31T23:59:61Z", "2016-12-31T23:58:60Z", "2016-12-31T22:59:60Z", "2016-12-30T23:59:60Z"),
        *("2016-12-31T23:59:60+01:00", "9999-12-31T23:59:60Z"),
    ],
)
def test_a_second_60_elsewhere_than_at_the_end_of_a_month_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="RFC 3339"):
        read_time(text)


async def test_retrying_one_operators_deliveries_leaves_the_others(delivered_everywhere: Caller) -> None:
    api = delivered_everywhere
    assert await api("POST", ACME + "/deliveries/retry", 202, json={}) == {"retried": 3}
    assert (await api.operator("bravo"))["dead"] == 3


@pytest.mark.parametrize(
    "body",
    [
        *(
            {"since": value}
            for value in (None, 5, "", "yesterday", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z")
        ),
        {"since": "2026-09-21T14:13:20.001Z"},  # later than now
        *({"since": value} for value in ("2026-01-01T25:00:00Z", "2026-01-01 00:00:00Z", "0001-01-01T00:00:00+10:00")),
        *({name: "yesterday"} for name in ("until", "endedSince", "endedUntil")),
        {"reason": ""},
        {"limit": 0},
        {"dryRun": 1},
        {"before": "2026-01-01T00:00:00Z"},
        [],
    ],
)
async def test_retrying_with_a_bad_body_answers_400(api: Caller, body: Any) -> None:
    await api("POST", ACME + "/deliveries/retry", 400, json=body)


# -- operators


async def test_operators_are_listed_with_their_figures(api: Caller, clock: HandClock, wallet: ScriptedOperator) -> None:
    await dead_deliveries(api, wallet, "dead")
    await api("POST", ACME + "/hold", 200)
    await api.open("waits")
    await api.close("waits")
    await api.open("live")
    clock.advance(2.5)
    assert await api("GET", "/v1/operators", 200) == {
        "items": [
            {
                "operator": "acme",
                "notify": True,
                "dialect": "v4",
                "held": True,
                "heldReason": "by_hand",
                "heldSince": "2026-09-21T14:13:20.000Z",
                "heldBy": None,
                "heldNote": None,
                "heldUntil": None,
                "breaker": "closed",
                "breakerSince": None,
                "failedAttempts": 0,
                "failingSince": None,
                "lastFailure": None,
                "pausedSince": None,
                "endsWaitUntil": None,
                "live": 1,
                "pending": 1,
                "dead": 1,
                "oldestPendingSeconds": 2.5,
                "notBefore": None,
                "keptBack": "held since 2026-09-21T14:13:20Z: by_hand",
                "outlook": "held until somebody releases it; its deliveries do not age meanwhile",
            },
            {
                "operator": "bravo",
                "notify": False,
                "dialect": "v4.01",
                "held": False,
                "heldReason": None,
                "heldSince": None,
                "heldBy": None,
                "heldNote": None,
                "heldUntil": None,
                "breaker": "closed",
                "breakerSince": None,
                "failedAttempts": 0,
                "failingSince": None,
                "lastFailure": None,
                "pausedSince": None,
                "endsWaitUntil": None,
                "live": 0,
                "pending": 0,
                "dead": 0,
                "oldestPendingSeconds": None,
                "notBefore": None,
                "keptBack": None,
                "outlook": None,
            },
        ]
    }


async def test_a_held_operator_is_sent_nothing_until_it_is_released(api: Caller, wallet: ScriptedOperator) -> None:
    for _ in range(2):
        assert (await api("POST", ACME + "/hold", 200))["held"] is True
    await api.open()
    assert (await api.close())["state"] == "ended"
    assert (await api.operator())["pending"] == 1
    await api.open("s2")
    await api.close("s2")
    assert wallet.received == []
    for _ in range(2):
        assert (await api("POST", ACME + "/release", 200))["held"] is False
    await api.settled()
    assert len(wallet.received) == 2


async def test_a_hold_keeps_its_note_and_end_and_says_if_it_stood_already(api: Caller, clock: HandClock) -> None:
    held = await api("POST", ACME + "/hold", 200, json={"note": "they move", "forSeconds": 60})
    assert (held["changed"], held["heldNote"], held["heldUntil"]) == (True, "they move", "2026-09-21T14:14:20.000Z")
    again = await api("POST", ACME + "/hold", 200)
    assert (again["changed"], again["heldNote"], again["heldSince"]) == (False, "they move", held["heldSince"])
    longer = await api("POST", ACME + "/hold", 200, json={"forSeconds": 120})
    assert (longer["changed"], longer["heldNote"], longer["heldUntil"]) == (
        True,
        "they move",
        "2026-09-21T14:15:20.000Z",
    )
    assert (await api("POST", ACME + "/release", 200))["changed"] is True
    assert (await api("POST", ACME + "/release", 200))["changed"] is False


@pytest.mark.parametrize(
    "body", [{"note": ""}, {"note": "x" * 257}, {"note": "a\nb"}, {"forSeconds": 0}, {"forSeconds": 1.5}, {"for": 1}]
)
async def test_a_hold_with_a_note_or_an_end_that_breaks_its_rule_is_refused(api: Caller, body: Any) -> None:
    await api("POST", ACME + "/hold", 400, json=body)
    assert (await api.operator())["held"] is False


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ({"limit": 0}, "limit: must be an integer of at least 1 (got 0)"),
        ({"dryRun": 1}, "dryRun: must be true or false (got 1)"),
        ({"reason": ""}, 'reason: must be a string of 1 to 256 characters (got "")'),
        ({"since": "2026-02-01T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "since: must not be later than until"),
        (
            {"endedSince": "2026-02-01T00:00:00Z", "endedUntil": "2026-01-01T00:00:00Z"},
            "endedSince: must not be later than endedUntil",
        ),
    ],
)
async def test_a_choice_of_dead_ones_that_breaks_its_rule_is_refused(api: Caller, body: Any, rule: str) -> None:
    for verb, more in (("retry", {}), ("discard", {"note": "x"})):
        if verb == "retry" or "limit" not in body:
            problem = await api("POST", f"{ACME}/deliveries/{verb}", 400, json=body | more)
            assert problem["detail"] == rule


async def test_a_hold_for_a_time_ends_by_itself(api: Caller, clock: HandClock, wallet: ScriptedOperator) -> None:
    await api("POST", ACME + "/hold", 200, json={"forSeconds": 60})
    await api.open()
    await api.close()
    clock.advance(60)
    api.daemon.dispatcher.wake()
    await api.settled()
    assert len(wallet.received) == 1
    assert (await api.operator())["held"] is False


async def test_a_probe_tries_the_next_delivery_whatever_keeps_it_back(api: Caller, wallet: ScriptedOperator) -> None:
    await api("POST", ACME + "/hold", 200)
    await api.open()
    await api.close()
    await api.open("s2")
    await api.close("s2")
    wallet.script = [FINAL]
    dead = await api("POST", ACME + "/probe", 200)
    assert (dead["sessionId"], dead["state"], dead["history"][-1]["error"]) == ("s1", "dead", "code_120")
    delivered = await api("POST", ACME + "/probe", 200)
    assert (delivered["sessionId"], delivered["state"], delivered["attempts"]) == ("s2", "delivered", 1)
    assert (await api.operator())["held"] is True
    problem = await api("POST", ACME + "/probe", 409)
    assert problem["code"] == "nothing-to-send"


async def test_a_breaker_tells_of_the_last_failure_and_what_comes_next(api: Caller, wallet: ScriptedOperator) -> None:
    wallet.script = [{"error": 100}] * 5
    await api("POST", ACME + "/hold", 200)
    await api.open()
    await api.close()
    for _ in range(5):
        await api("POST", ACME + "/probe", 200)
    row = await api.delivery_of()
    shown = await api.operator()
    assert shown["keptBack"] == "held since 2026-09-21T14:13:20Z: by_hand"
    assert (shown["breaker"], shown["failedAttempts"], shown["lastFailure"]["reason"]) == ("open", 5, "code_100")
    assert shown["lastFailure"]["detail"] == "`error` is 100, internal error, please retry"
    wallet.script = [FINAL]
    assert (await api("POST", ACME + "/probe", 200))["id"] == row["id"]
    assert (await api.operator())["breaker"] == "closed"  # a final refusal is an answer, so the operator works


async def test_a_broken_operator_shows_its_breaker_and_when_it_may_be_sent_to(
    api: Caller, clock: HandClock, wallet: ScriptedOperator
) -> None:
    async def failing(_: object) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=500)

    async def pausing(_: object) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=503, headers={"Retry-After": "100"})

    wallet.script = [failing] * 4 + [pausing]
    for number in range(5):
        await api.open(f"s{number}")
        await api.close(f"s{number}")

    async def opened() -> bool:
        return (await api.operator())["breaker"] == "open"

    await until(opened)
    shown = await api.operator()
    assert 100_000 <= millis(shown["notBefore"]) - millis("2026-09-21T14:13:20.000Z") <= 120_000
    dies = "the first notice dies at 2026-09-24T14:13:20Z"  # the session ended 72 h before that
    assert shown["outlook"] == f"tried again at {shown['notBefore'][:19]}Z; {dies}"
    assert shown["breakerSince"] == shown["failingSince"] == shown["pausedSince"] == "2026-09-21T14:13:20.000Z"
    clock.advance(60)
    assert (await api.operator())["breaker"] == "half-open"
    released = await api("POST", ACME + "/release", 200)
    assert (released["breaker"], released["notBefore"]) == ("closed", None)


async def test_the_next_attempt_is_when_it_can_be_tried(
    api: Caller, clock: HandClock, wallet: ScriptedOperator
) -> None:
    async def pausing(_: object) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=503, headers={"Retry-After": "999999"})

    async def everywhere(session_id: str = "s1") -> str | None:
        """The time of the next attempt, which must be the same in the session, in the delivery and in the page."""
        shown = await api.delivery_of(session_id)
        one = await api("GET", f"/v1/deliveries/{shown['id']}", 200)
        (listed,) = [each for each in await api.walk("/v1/deliveries", 100) if each["id"] == shown["id"]]
        assert shown["nextAttemptAt"] == one["nextAttemptAt"] == listed["nextAttemptAt"]
        return str(shown["nextAttemptAt"]) if shown["nextAttemptAt"] else None

    async def attempted() -> bool:
        return (await api.delivery_of())["attempts"] == 1

    series = 'lmdaemon_operator_not_before_timestamp_seconds{operator="acme"}'
    wallet.script = [pausing]
    await api.open()
    await api.close()
    await until(attempted)
    in_an_hour = "2026-09-21T15:13:20.000Z"
    assert await everywhere() == (await api.operator())["notBefore"] == in_an_hour
    assert (await scrape(api.daemon))[series] == millis(in_an_hour) / 1000
    await api.open("s2")
    await api.close("s2")
    assert await everywhere("s2") == in_an_hour  # this delivery has never been tried
    await api("POST", ACME + "/hold", 200)
    assert await everywhere() is await everywhere("s2") is None
    assert (await api.operator())["notBefore"] is None
    assert (await scrape(api.daemon))[series] == 0
    await api("POST", ACME + "/release", 200)
    await until(lambda: len(wallet.received) == 2)  # s2 is sent, and s1 waits for its schedule
    assert millis("2026-09-21T14:13:24.000Z") <= millis(str(await everywhere())) <= millis("2026-09-21T14:13:26.000Z")
    clock.advance(6)
    api.daemon.dispatcher.wake()
    await api.settled()
    assert await everywhere() is await everywhere("s2") is None


@pytest.mark.parametrize(
    ("before", "after"), [("notify = true", "notify = false"), ("[operators.acme]", "[operators.a]")]
)
async def test_what_nobody_tries_has_no_next_attempt(
    api: Caller, wallet: ScriptedOperator, tmp_path: Path, before: str, after: str
) -> None:
    """An operator that no longer wants notices, and one that has left the file."""

    async def failing(_: object) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=500)

    async def next_attempts() -> list[str | None]:
        (listed,) = await api.walk("/v1/deliveries", 100)
        one = await api("GET", f"/v1/deliveries/{listed['id']}", 200)
        return [listed["nextAttemptAt"], one["nextAttemptAt"]]

    async def attempted() -> bool:
        return (await api.delivery_of())["attempts"] == 1

    wallet.script = [failing]
    await api.open()
    await api.close()
    await until(attempted)
    assert None not in await next_attempts()
    file = tmp_path / "config.toml"
    known = file.read_text()
    file.write_text(known.replace(before, after, 1))
    await api.daemon.daemon.reload_once()
    assert await next_attempts() == [None, None]
    file.write_text(known)
    await api.daemon.daemon.reload_once()
    assert None not in await next_attempts()


async def test_the_next_attempt_behind_an_open_breaker_is_its_probe(api: Caller, wallet: ScriptedOperator) -> None:
    async def failing(_: object) -> aiohttp.web.Response:
        return aiohttp.web.Response(status=500)

    async def opened() -> bool:
        return (await api.operator())["breaker"] == "open"

    wallet.script = [failing] * 5
    for number in range(6):
        await api.open(f"s{number}")
        await api.close(f"s{number}")
    await until(opened)
    probe_at = (await api.operator())["notBefore"]
    assert millis(probe_at) == millis("2026-09-21T14:13:25.000Z")
    assert (await api.delivery_of("s5"))["nextAttemptAt"] == probe_at
    due = [(await api.delivery_of(f"s{number}"))["nextAttemptAt"] for number in range(5)]
    assert min(due) >= probe_at
    assert max(due) > probe_at  # the schedule makes some wait longer


# -- the rest


async def test_head_answers_wherever_get_does_with_its_status_and_no_body(api: Caller) -> None:
    await api.open()
    await api.close()
    await api.settled()
    delivery = (await api.delivery_of())["id"]
    paths = ["/health", "/health/", "/metrics", "/openapi.json", "/v1/operators", "/v1/deliveries"]
    paths += [f"/v1/deliveries/{delivery}", ACME + "/sessions", ACME + "/sessions/s1", ACME + "/sessions/nobody"]
    for path in paths:
        got, _ = await api.answer("GET", path)
        async with api.daemon.client.head(api.daemon.api + path) as headed:
            assert (headed.status, headed.headers["Content-Type"]) == (got.status, got.headers["Content-Type"]), path
            assert int(headed.headers["Content-Length"]) > 0, path
            assert await headed.read() == b"", path
    async with api.daemon.client.head(api.daemon.api + ACME + "/hold") as headed:
        assert headed.status == 405


async def test_metrics_count_by_operator_and_name_no_session(api: Caller) -> None:
    await api.open("secret-session", playerId="secret-player")
    await api("POST", ACME + "/sessions/secret-session/touch", 204)
    response, text = await api.answer("GET", "/metrics", 200)
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'lmdaemon_sessions_live{operator="acme"} 1.0' in text
    assert re.search(r'lmdaemon_\w*touch\w*_total\{operator="acme"\} 1\.0', text)
    assert "secret" not in text


async def test_all_times_are_rfc_3339_in_utc(delivered_everywhere: Caller) -> None:
    api = delivered_everywhere
    sessions = (await api("GET", ACME + "/sessions", 200))["items"]
    deliveries = (await api("GET", "/v1/deliveries", 200))["items"]
    history = (await api("GET", f"/v1/deliveries/{deliveries[-1]['id']}", 200))["history"]
    health = [check for checks in (await api("GET", "/health", 200))["checks"].values() for check in checks]
    times = [
        value
        for item in sessions + deliveries + history + health
        for name, value in item.items()
        if (name.endswith("At") or name in ("at", "time")) and value is not None
    ]
    assert len(times) > 100
    assert [time for time in times if not RFC3339.fullmatch(time)] == []


# -- tokens


@pytest.fixture
async def guarded(tmp_path: Path, clock: HandClock) -> AsyncIterator[Caller]:
    (tmp_path / "tokens").write_text("token-one\n\n  token-twö  \n")
    toml = LISTEN + 'token_file = "tokens"\n' + CONFIG.format(url="http://127.0.0.1:1/")
    async with serving(tmp_path, toml, clock) as daemon:
        yield Caller(daemon)


async def test_a_page_from_elsewhere_can_change_nothing_without_a_token(api: Caller) -> None:
    """In this test the daemon has no token configured. The `Origin` header alone protects it."""
    await api.open()
    own = api.daemon.api
    with hear() as events:
        for path in ("/sessions/s1/close", "/sessions/s1/touch", "/hold"):
            for origin in ("https://elsewhere.example", "null", "", own.replace("http", "https"), own + "0", own + "/"):
                problem = await api("POST", ACME + path, 403, headers={"Origin": origin})
                assert repr(origin) in problem["detail"]
    assert (await api("GET", ACME + "/sessions/s1", 200))["state"] == "active"
    assert not (await api("GET", "/v1/operators", 200))["items"][0]["held"]
    told = [event.facts for event in events if event.name == "api.refused"]
    assert (told[0]["status"], told[0]["origin"]) == (403, "https://elsewhere.example")


async def test_every_origin_of_a_request_must_be_the_listeners_own(api: Caller) -> None:
    await api.open()
    own, other = api.daemon.api, "https://elsewhere.example"
    for origins in ([own, other], [other, own], [own, own, "null"], [f"{own}, {other}"]):
        headers = CIMultiDict(("Origin", origin) for origin in origins)
        assert (await api("POST", ACME + "/sessions/s1/close", 403, headers=headers))["code"] == "cross-origin"
    await api("POST", ACME + "/sessions/s1/touch", 204, headers=CIMultiDict([("Origin", own)] * 2))


async def test_a_page_that_this_address_has_served_may_change_what_it_likes(api: Caller) -> None:
    await api.open()
    await api("POST", ACME + "/sessions/s1/touch", 204, headers={"Origin": api.daemon.api})
    host = api.daemon.api.removeprefix("http://").replace("127.0.0.1", "LOCALHOST")
    headers = {"Origin": f"http://{host.lower()}", "Host": host}
    await api("POST", ACME + "/sessions/s1/close", 200, headers=headers)


ALSO = [("GET", "/health"), ("HEAD", "/health/"), ("OPTIONS", "/v1/operators"), ("GET", "/elsewhere")]


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8081",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "192.0.2.1:8081",
            "",
        ),
        *(
            "0.0.0.0:8081",
            "[::]:8081",
            "127.0.0.1@evil.example",
            "localhost:8081:x",
            "[::1",
            "169.254.169.254",
            "127.1",
        ),
        *("\u00fcvil.example", "x" * 300, "[evil.example]", "evil.localhost"),
    ],
)
async def test_a_page_whose_name_leads_here_sees_and_changes_nothing(api: Caller, host: str) -> None:
    await api.open(playerId="player-of-somebody")
    with hear() as events:
        for method, path in [*EVERY_CALL, *NO_CALLS, *ALSO]:
            async with raw_connection(api.daemon.api) as peer:
                await peer.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                head = await peer.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 421 "), (method, path, head)
            assert b"application/problem+json" in head
    assert (await api.session())["state"] == "active"
    told = [event.facts for event in events if event.name == "api.refused"]
    assert {(facts["status"], facts["host"]) for facts in told} == {(421, host[:100])}


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:1", "127.0.0.1:8081", "127.255.0.9", "[::1]", "[::1]:8081", "[0:0:0:0:0:0:0:1]:9"]
)
async def test_every_name_of_loopback_is_served_whatever_the_port(api: Caller, host: str) -> None:
    await api("GET", "/v1/operators", 200, headers={"Host": host})


async def test_who_sends_no_host_is_no_browser_and_is_served(api: Caller) -> None:
    async with raw_connection(api.daemon.api) as peer:
        await peer.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await peer.answer()).status == 200


async def test_no_browser_reaches_a_unix_socket_so_any_host_is_served_there(tmp_path: Path, clock: HandClock) -> None:
    toml = f'[server]\nlisten = "127.0.0.1:0"\n[api]\nlisten = "unix:{tmp_path}/api.sock"\n'
    async with serving(tmp_path, toml + CONFIG.format(url="http://127.0.0.1:1/"), clock):
        for host in ("lmdaemon", "evil.example", ""):
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/api.sock")
            writer.write(f"GET /v1/operators HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()


async def test_where_a_token_is_asked_for_neither_host_nor_origin_matters(guarded: Caller) -> None:
    headers = {"Authorization": "Bearer token-one", "Host": "proxy.example", "Origin": "https://console.example"}
    await guarded("GET", "/v1/operators", 200, headers=headers)
    await guarded("POST", ACME + "/hold", 200, headers=headers)


async def test_an_expectation_opens_no_door_and_is_refused_as_a_problem(guarded: Caller) -> None:
    for path in ("/v1/operators", "/v1/nothing", ACME + "/sessions/s/touch"):
        await guarded("POST", path, 401, headers={"Expect": "anything"})
        authorized = {"Authorization": "Bearer token-one", "Expect": "anything"}
        assert (await guarded("POST", path, 417, headers=authorized))["detail"] == "Expect must be 100-continue"


@pytest.mark.parametrize("authorization", ["Bearer token-one", "bearer  token-one ", "BEARER token-twö"])
async def test_each_of_the_tokens_opens_every_call(guarded: Caller, authorization: str) -> None:
    guarded.headers = {"Authorization": authorization}
    await guarded.open()
    for method, path in [*EVERY_CALL[1:], *NO_CALLS]:
        response, _ = await guarded.answer(method, path)
        assert response.status != 401, (method, path)


async def test_a_token_that_may_only_read_changes_nothing(tmp_path: Path, clock: HandClock) -> None:
    (tmp_path / "tokens").write_text("# who may change things\nops: token-that-changes\n")
    (tmp_path / "readers").write_text("grafana: token-that-reads\n")
    toml = LISTEN + 'token_file = "tokens"\nread_token_file = "readers"\n' + CONFIG.format(url="http://127.0.0.1:1/")
    async with serving(tmp_path, toml, clock) as daemon:
        api = Caller(daemon)
        api.headers = {"Authorization": "Bearer token-that-changes"}
        await api.open("s-1")
        api.headers = {"Authorization": "Bearer token-that-reads"}
        for method, path in [*EVERY_CALL, *NO_CALLS]:
            response, body = await api.answer(method, path)
            assert (response.status == 403) is (method != "GET"), (method, path)
            if response.status == 403:
                assert path == "/health" or body["detail"] == "this token may only read"
        await api("POST", ACME + "/sessions/s-1/touch", 403)
        assert (await api("GET", "/health", 200)).keys() > {"status"}
        assert (await api("GET", ACME + "/sessions/s-1", 200))["state"] == "active"
        for authorization in ("# who may change things", "ops: token-that-changes", "ops"):
            await api("GET", "/v1/operators", 401, headers={"Authorization": f"Bearer {authorization}"})


async def test_what_is_done_by_hand_is_logged_with_the_name_of_the_token(tmp_path: Path, clock: HandClock) -> None:
    (tmp_path / "tokens").write_text("ops: token-that-changes\ntoken-without-a-name\n")
    toml = LISTEN + 'token_file = "tokens"\n' + CONFIG.format(url="http://127.0.0.1:1/")
    async with serving(tmp_path, toml, clock) as daemon:
        with hear() as events:
            for token in ("token-that-changes", "token-without-a-name"):
                api = Caller(daemon)
                api.headers = {"Authorization": f"Bearer {token}"}
                for call in ("/hold", "/release", "/deliveries/retry"):
                    await api("POST", ACME + call)
    done = [
        event for event in events if event.name in ("operator.held", "operator.released", "delivery.retried_by_hand")
    ]
    assert [event.facts["by"] for event in done] == ["ops"] * 3 + [None] * 3
    assert "token-" not in repr(events)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_without_the_token_tells_only_the_status(guarded: Caller, method: str) -> None:
    await guarded(method, "/health/", 200)
    response, body = await guarded.answer(method, "/health", 200)
    assert response.headers["Content-Type"] == "application/health+json"
    if method == "GET":
        assert body == {"status": "pass"}
        full = await guarded("GET", "/health", 200, headers={"Authorization": "Bearer token-one"})
        assert full.keys() > {"status"}
    async with guarded.daemon.client.get(guarded.daemon.server + "/health") as public:
        assert await public.json(content_type=None) == {"status": "pass"}
