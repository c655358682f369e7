"""Opening many sessions in one call, and finding sessions of all operators."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from caller import ACME, CONFIG, OPENING, SECRET, Caller
from documented import complaints
from support import LISTEN, serving

from lmdaemon.shapes import BULK_IDS_MAX

SESSIONS = ACME + "/sessions"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Caller]:
    async with serving(tmp_path, LISTEN + CONFIG.format(url="http://127.0.0.1:1/")) as daemon:
        yield Caller(daemon)


def many(*ids: str, **fields: Any) -> dict[str, Any]:
    return {"sessions": [{"sessionId": one} | OPENING | fields for one in ids]}


async def test_many_sessions_are_opened_and_told_apart(api: Caller) -> None:
    await api.open("old")
    await api.close("old")
    await api.open("open")
    await api.open("theirs", playerId="p2")
    found = await api("POST", SESSIONS, 200, json=many("old", "open", "theirs", "new", "new"))
    assert complaints("BulkOpened", found) == []
    assert found == {"opened": 1, "open": 2, "differs": ["theirs"], "ended": ["old"]}
    shown = await api.session("new")
    assert (shown["state"], shown["playerId"], shown["idleTimeoutSeconds"]) == ("active", "p1", 600)


async def test_ten_thousand_are_opened_in_one_call_and_one_more_is_refused(api: Caller) -> None:
    ids = [f"s{number}" for number in range(BULK_IDS_MAX)]
    assert (await api("POST", SESSIONS, 200, json=many(*ids)))["opened"] == BULK_IDS_MAX
    assert (await api("POST", SESSIONS, 200, json=many(*ids)))["open"] == BULK_IDS_MAX  # the call can be repeated
    assert (await api.operator())["live"] == BULK_IDS_MAX
    problem = await api("POST", SESSIONS, 400, json=many(*ids, "more"))
    assert problem["detail"] == "sessions: must be a list of at most 10000 sessions (got 10001)"


async def test_while_many_are_opened_others_are_served(api: Caller) -> None:
    """The longest wait of another call is far shorter than opening all of them takes."""
    await api.open("other")
    ids = [f"s{number}" for number in range(BULK_IDS_MAX)]
    body = json.dumps(many(*ids))
    opening = asyncio.create_task(api("POST", SESSIONS, 200, data=body, headers={"Content-Type": "application/json"}))
    touched = 0
    while not opening.done():
        await api("POST", SESSIONS + "/other/touch", 204)
        touched += 1
    await opening
    assert touched > 5


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "sessions: must be a list of at most 10000 sessions"),
        ({"sessions": {}}, "sessions: must be a list of at most 10000 sessions"),
        ({"sessions": [], "more": 1}, "more: is no field of this call; known are sessions"),
        ({"sessions": [1]}, "sessions[0]: must be an object"),
        (many("a") | many("a", ""), "sessions[1].sessionId: must not be empty"),
        (many("a", "b", playerId=5), "sessions[0].playerId: must be a string (got 5)"),
        (many("a", idleTimeoutSeconds=0), "sessions[0].idleTimeoutSeconds: must be an integer from 1 to 2592000"),
        (many("a", other=0), "sessions[0].other: is no field of this call"),
        ({"sessions": [OPENING]}, "sessions[0].sessionId: is required"),
        (
            {"sessions": [{"sessionId": "a", "playerId": "p"}]},
            "sessions[0].token: is required: dialect v4 must",
        ),
        (many("a", ".."), "sessions[1].sessionId: must not be . or .."),
        (many("a", attributes={"a": "x" * 5000}), "sessions[0].attributes: must be at most 4096 bytes"),
    ],
)
async def test_one_bad_session_among_many_opens_none_and_is_named(api: Caller, body: Any, detail: str) -> None:
    problem = await api("POST", SESSIONS, 400, json=body)
    assert problem["detail"].startswith(detail)
    assert (await api("GET", SESSIONS, 200))["items"] == []


async def test_a_contradiction_in_one_of_many_is_refused(api: Caller) -> None:
    body = b'{"sessions":[{"sessionId":"a","playerId":"p","playerId":"q","token":"t"}]}'
    problem = await api("POST", SESSIONS, 400, data=body, headers={"Content-Type": "application/json"})
    assert "twice" in problem["detail"]


async def test_a_secret_that_breaks_its_rule_is_not_repeated(api: Caller) -> None:
    problem = await api("POST", SESSIONS, 400, json=many("a", token=[SECRET]))
    assert problem["detail"] == "sessions[0].token: must be a string"


async def test_all_values_given_with_an_opening_of_many_are_kept(api: Caller) -> None:
    await api("POST", SESSIONS, 200, json=many("a", idleTimeoutSeconds=90.0, attributes={"table": 7}))
    shown = await api.session("a")
    assert (shown["idleTimeoutSeconds"], shown["attributes"]) == (90, {"table": 7})


# -- find


async def test_a_session_is_found_by_its_id_whoever_is_its_operator(api: Caller) -> None:
    await api.open("s-1")
    await api("PUT", "/v1/operators/bravo/sessions/s-1", 201, json={"playerId": "p2"})
    await api.open("s-2")
    found = await api("GET", "/v1/sessions?sessionId=s-1", 200)
    assert complaints("SessionPage", found) == []
    assert [(one["operator"], one["playerId"]) for one in found["items"]] == [("bravo", "p2"), ("acme", "p1")]
    found = await api("GET", "/v1/sessions?sessionId=s-1&playerId=p2", 200)
    assert [one["operator"] for one in found["items"]] == ["bravo"]
    assert (await api("GET", "/v1/sessions?sessionId=nobody", 200)) == {"items": [], "next": None}


async def test_a_players_sessions_of_all_operators_come_page_by_page(api: Caller) -> None:
    for number in range(5):
        await api.open(f"s-{number}")
        await api("PUT", f"/v1/operators/bravo/sessions/s-{number}", 201, json={"playerId": "p1"})
    seen: list[tuple[str, str]] = []
    after = ""
    while True:
        page = await api("GET", f"/v1/sessions?playerId=p1&limit=3{after}", 200)
        seen += [(one["operator"], one["sessionId"]) for one in page["items"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert seen == [(operator, f"s-{number}") for number in range(4, -1, -1) for operator in ("bravo", "acme")]


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("", "sessionId, playerId: one of them is required"),
        ("?operator=acme", "operator: is no parameter of this call"),
        ("?sessionId=", "sessionId: must not be empty"),
        ("?sessionId=a&limit=0", 'limit: must be an integer from 1 to 1000 (got "0")'),
        ("?sessionId=a&after=x", 'after: must be the `next` of a page (got "x")'),
    ],
)
async def test_a_search_that_cannot_be_made_says_why(api: Caller, query: str, detail: str) -> None:
    assert (await api("GET", "/v1/sessions" + query, 400))["detail"].startswith(detail)
