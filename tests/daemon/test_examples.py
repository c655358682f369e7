"""The example plug-in as an integrator runs it: in a whole daemon, with a real HTTP server in the place of the
lobby.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support import SUCCESS, ScriptedOperator, scripted_operator, serving, until
from wires import TOKEN, notify, open_session, operator, query

from lmdaemon import Notice, SessionEnded
from lmdaemon.config.findings import ConfigError

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
QUICK = '[delivery]\nschedule = ["10ms", "10ms", "10ms", "10ms", "10ms"]\n'


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    sys.modules.pop("release_lock", None)


@pytest.fixture
async def lobby() -> AsyncIterator[ScriptedOperator]:
    async with scripted_operator() as server:
        yield server


def toml(options: str) -> str:
    return QUICK + operator() + f'[plugins.release_lock]\nuse = "release_lock:ReleaseLock"\noptions = {options}\n'


def url_of(lobby: ScriptedOperator) -> str:
    return f"{{ url = {json.dumps(lobby.url)} }}"


async def delivered(directory: Path) -> int:
    """Waits until the delivery to the plug-in is done. Returns how many attempts it took."""
    sql = "SELECT attempts FROM delivery WHERE sink = 'plugin:release_lock' AND state = 'delivered'"
    ((attempts,),) = await until(lambda: query(directory, sql))
    return int(attempts)


async def test_the_lock_is_released_once_when_the_lobby_acknowledges(tmp_path: Path, lobby: ScriptedOperator) -> None:
    async with serving(tmp_path, toml(url_of(lobby))) as s:
        await open_session(s)
        for _ in range(3):
            assert (await notify(s)).json == SUCCESS
        assert await delivered(tmp_path) == 1
        async with s.client.get(f"{s.api}/v1/operators/acme/sessions/s") as response:
            session = await response.json()
    (received,) = lobby.received
    lock = json.loads(received.body)
    assert received.headers["Idempotency-Key"] == session["deliveries"][0]["id"]
    assert (lock["playerId"], lock["sessionId"], lock["reason"]) == ("p", "s", "reported")
    assert lock["endedAt"][:19] == session["endedAt"][:19]
    assert TOKEN.encode() not in received.body


@pytest.mark.parametrize("status", [500, 404, 302])
async def test_it_is_tried_again_under_the_same_key_until_acknowledged(
    tmp_path: Path, lobby: ScriptedOperator, status: int
) -> None:
    lobby.script += [web.Response(status=status, headers={"Location": lobby.url}) for _ in range(2)]
    async with serving(tmp_path, toml(url_of(lobby))) as s:
        assert (await notify(s)).json == SUCCESS
        assert await delivered(tmp_path) == 3
    assert len(lobby.received) == 3
    assert len({received.headers["Idempotency-Key"] for received in lobby.received}) == 1
    assert len({received.body for received in lobby.received}) == 1


async def test_a_lobby_that_does_not_answer_is_given_up_in_time(tmp_path: Path, lobby: ScriptedOperator) -> None:
    """The plug-in gives up after the time-out in its options."""
    enough = asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        await enough.wait()
        return web.Response()

    lobby.script.append(hang)
    async with serving(tmp_path, toml(f"{{ url = {json.dumps(lobby.url)}, timeout = 2 }}")) as s:
        assert (await notify(s)).json == SUCCESS
        assert await delivered(tmp_path) == 2
    enough.set()


async def test_a_missing_option_stops_the_start_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.release_lock\.use: cannot be made: KeyError: 'url'"):
        async with serving(tmp_path, toml("{ }")):
            pytest.fail("it was started")


def test_it_stays_short_enough_to_be_copied() -> None:
    assert len((EXAMPLES / "release_lock.py").read_text().splitlines()) <= 60


def test_the_documents_name_every_field_of_an_event_and_a_notice() -> None:
    text = (EXAMPLES.parent / "plugins.md").read_text()
    for kind, heading in ((SessionEnded, "## The event"), (Notice, "## The notice")):
        section = text.partition(heading)[2].partition("\n## ")[0]
        named = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        assert named == [field.name for field in fields(kind)]


async def test_the_test_in_the_documentation_passes(lobby: ScriptedOperator) -> None:
    text = (EXAMPLES.parent / "plugins.md").read_text()
    code = text.partition("## Testing yours")[2].partition("```python")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    await names["test_the_lock_is_released"](lobby.url)
    assert [received.headers["Idempotency-Key"] for received in lobby.received] == ["msg_1_test"] * 2
