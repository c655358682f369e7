"""The HTTP API of several daemons: the daemon that owns an operator and the others give the same answers."""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engines import PostgresEngine
from support import Received, ScriptedOperator, Serving, operator_table, scripted_operator, serving, until

from lmdaemon.limits import Limits, StoreLimits

PLAYER = {"playerId": "p", "token": "tok-3n"}
NOTICE = {"providerId": "acme", "sessionId": "{s}", "externalPlayerId": "p", "token": "tok-3n"}
ACME = "/v1/operators/acme"
SESSION = ACME + "/sessions/{s}"
VOLATILE = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z|msg_\d+_[\w*]+|[0-9a-f]{64}|\"(durationMs|t)\":\d+|v1,[\w+/=]+|: 17\d{8}"
)


class Asked(NamedTuple):
    """A call with the status that it must get. `{s}` stands for a session made for the call, and `{d}` for its
    delivery.
    """

    status: int
    method: str
    path: str
    body: Any = None


CALLS = [
    Asked(404, "GET", SESSION),
    Asked(404, "POST", SESSION + "/touch"),
    Asked(404, "POST", SESSION + "/close"),
    Asked(201, "PUT", SESSION, PLAYER | {"attributes": {"table": 7}}),
    Asked(200, "PUT", SESSION, PLAYER),
    Asked(409, "PUT", SESSION, PLAYER | {"playerId": "q"}),
    Asked(204, "POST", SESSION + "/touch"),
    Asked(200, "POST", ACME + "/sessions/touch", {"sessionIds": ["{s}", "none"]}),
    Asked(200, "POST", ACME + "/sessions", {"sessions": [PLAYER | {"sessionId": one} for one in ("{s}", "{s}-2")]}),
    Asked(200, "GET", SESSION),
    Asked(200, "POST", SESSION + "/close"),
    Asked(200, "POST", SESSION + "/close"),
    Asked(410, "POST", SESSION + "/touch"),
    Asked(409, "PUT", SESSION, PLAYER),
    Asked(200, "POST", ACME + "/sessions/touch", {"sessionIds": ["{s}", "{s}-2", "none"]}),
    Asked(200, "POST", "/V4/SessionExpired", NOTICE | {"sessionId": "{s}-2"}),
    Asked(200, "POST", "/V4/SessionExpired", NOTICE | {"sessionId": "{s}-2"}),
    Asked(200, "POST", "/V4/SessionExpired", NOTICE | {"sessionId": "{s}-2", "externalPlayerId": "q"}),
    Asked(200, "POST", "/V4/SessionExpired", NOTICE | {"sessionId": "{s}-3"}),
    Asked(200, "GET", SESSION),
    Asked(200, "GET", "/v1/deliveries/{d}"),
    Asked(409, "POST", "/v1/deliveries/{d}/retry"),
    Asked(409, "POST", "/v1/deliveries/{d}/discard", {"note": "x"}),
    Asked(404, "POST", "/v1/deliveries/msg_1_none/retry"),
    Asked(200, "POST", ACME + "/hold", {"note": "so"}),
    Asked(200, "POST", ACME + "/hold"),
    Asked(200, "POST", ACME + "/release"),
    Asked(200, "POST", ACME + "/release"),
    Asked(409, "POST", ACME + "/probe"),
    Asked(202, "POST", ACME + "/deliveries/retry", {}),
    Asked(200, "POST", ACME + "/deliveries/discard", {"note": "x", "dryRun": True}),
    Asked(404, "POST", "/v1/operators/nobody/hold"),
]
# Lists and documents whose text must be the same from each daemon
READ = [
    "/v1/operators",
    ACME + "/sessions",
    ACME + "/sessions?state=ended&playerId=p&limit=2",
    "/v1/sessions?playerId=p",
    "/v1/deliveries",
    "/v1/deliveries?operator=acme&sink=http&state=delivered",
]


class Pair(NamedTuple):
    owner: Serving
    other: Serving
    operator: ScriptedOperator


@pytest.fixture
async def pair(postgres_engine: PostgresEngine, tmp_path: Path) -> AsyncIterator[Pair]:
    limits = Limits(store=StoreLimits(watch_s=0.02))
    async with AsyncExitStack() as stack:
        operator = await stack.enter_async_context(scripted_operator())
        toml = f'[database]\nurl = "{postgres_engine.as_url}"\n'
        toml += operator_table("acme", operator.url, endpoint="/V4/SessionExpired")
        daemons = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            daemons.append(await stack.enter_async_context(serving(tmp_path / name, toml, limits=limits)))

        async def settled() -> bool:
            known = [len(await one.store.daemons()) for one in daemons]
            owned = [one.store.owns("acme") for one in daemons]
            are_settled = all(one.store.membership.owners.is_settled for one in daemons)
            return known == [2, 2] and sum(owned) == 1 and are_settled

        await until(settled)
        yield Pair(*sorted(daemons, key=lambda one: not one.store.owns("acme")), operator)


def filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, names) for one in value]
    if isinstance(value, str):
        for name, stands_for in names.items():
            value = value.replace(name, stands_for)
    return value


async def answer(daemon: Serving, call: Asked, session: str) -> tuple[int, str]:
    """The status and text of the answer. What differs between two such calls is replaced."""
    names = {"{s}": session}
    if "{d}" in call.path:
        names["{d}"] = await delivered(daemon, session)
    base = daemon.server if call.path.startswith("/V4") else daemon.api
    asked = daemon.client.request(call.method, base + filled(call.path, names), json=filled(call.body, names))
    async with asked as told:
        text = await told.text()
        assert told.status == call.status, (call, text)
        if call.path.startswith("/V4"):
            assert '"error":0' in text.replace(" ", "") or "q" in str(call.body), text
        return told.status, VOLATILE.sub("~", text.replace(session, "{s}"))


async def delivered(daemon: Serving, session: str) -> str:
    async def found() -> str | None:
        async with daemon.client.get(f"{daemon.api}{ACME}/sessions/{session}") as told:
            (delivery,) = (await told.json())["deliveries"]
        return delivery["id"] if delivery["state"] == "delivered" else None

    return str(await until(found))


async def test_every_call_is_answered_alike_by_owner_and_others(pair: Pair) -> None:
    answers: list[list[tuple[int, str]]] = []
    for daemon, session in ((pair.owner, "at-owner"), (pair.other, "at-other")):
        answers.append([])
        for call in CALLS:
            if call.method == "GET" and call.status == 200:
                await delivered_if_ended(daemon, session)
            answers[-1].append(await answer(daemon, call, session))
            await look(pair)
    for call, at_owner, at_other in zip(CALLS, *answers, strict=True):
        assert at_owner == at_other, call
    for path in READ:
        texts = []
        for daemon in (pair.owner, pair.other):
            async with daemon.client.get(daemon.api + path) as told:
                assert told.status == 200
                texts.append(re.sub(r'"t":\d+', "", await told.text()))
        assert texts[0] == texts[1], path
    await same_health(pair)


async def delivered_if_ended(daemon: Serving, session: str) -> None:
    known = await daemon.store.session("acme", session)
    if known is not None and known[0].reason is not None:
        await delivered(daemon, session)


async def look(pair: Pair) -> None:
    """Makes each daemon read what the other has done, as it does within 300 ms when it runs."""
    for daemon in pair[:2]:
        await daemon.store.look()


async def same_health(pair: Pair) -> None:
    reports, daemons = [], []
    for daemon in pair[:2]:
        await daemon.store.look_for_strains()  # each daemon does this once a minute
        async with daemon.client.get(daemon.api + "/health") as told:
            reports.append({name: check[0]["status"] for name, check in (await told.json())["checks"].items()})
        async with daemon.client.get(daemon.api + "/v1/daemons") as told:
            rows = (await told.json())["items"]
            assert [row["name"] for row in rows if row["self"]] == [daemon.store.membership.introduction.name]
            daemons.append([(row["name"], row["version"], row["address"], row["operators"]) for row in rows])
    assert reports[0] == reports[1]
    assert daemons[0] == daemons[1]


async def test_a_hold_at_any_daemon_keeps_deliveries_back_at_once(pair: Pair) -> None:
    await answer(pair.other, Asked(200, "POST", ACME + "/hold"), "s")
    await until(lambda: pair.owner.store.gate("acme").held_at is not None, within_s=5)
    await answer(pair.other, Asked(201, "PUT", SESSION, PLAYER), "s")
    await answer(pair.other, Asked(200, "POST", SESSION + "/close"), "s")
    await until(lambda: pair.owner.store.figures_of("acme").pending == 1)
    assert pair.operator.received == []
    await answer(pair.other, Asked(200, "POST", ACME + "/release"), "s")
    await pair.operator.wait_for(1)
    first: Received = pair.operator.received[0]
    assert first.headers["webhook-id"] == await delivered(pair.other, "s")
