"""Attempts that a kill has interrupted: the next start reports each of them, once."""

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web
from clocks import HandClock
from support import bench, hear, operator_table, scripted_operator, until

from lmdaemon.delivery.dispatcher import Dispatcher
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.underway import PLACES, Underway
from lmdaemon.web.documents import with_history


def row(number: int, nonce: str = "ab" * 10) -> Any:
    class Row:
        id = number

    Row.nonce = nonce  # type: ignore[attr-defined]
    return Row


def test_the_next_run_finds_what_was_begun_and_not_what_was_ended(tmp_path: Path) -> None:
    first = Underway(tmp_path / "x")
    first.begin(row(7), 1000)
    first.begin(row(8), 2000)
    first.end(7)
    assert first.since == {8: 2000}
    # The first run has not closed its file, as after a kill
    second = Underway(tmp_path / "x")
    assert second.crashed
    assert second.lost == [(8, "msg_8_" + "ab" * 10, 2000)]
    second.forget(8)
    second.close()
    third = Underway(tmp_path / "x")
    assert (third.crashed, third.lost) == (False, [])
    third.close()


def test_more_attempts_than_there_are_places_are_not_noted(tmp_path: Path) -> None:
    noted = Underway(tmp_path / "x")
    for number in range(1, PLACES + 2):
        noted.begin(row(number), number)
    for number in range(1, PLACES + 2):
        noted.end(number)
    noted.begin(row(PLACES + 9), 5)
    assert [one.delivery for one in Underway(tmp_path / "x").lost] == [PLACES + 9]


def test_a_file_that_was_cut_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"something else")
    noted = Underway(tmp_path / "x")
    assert (noted.crashed, noted.lost) == (False, [])
    noted.close()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / "x").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        Underway(tmp_path / "x")
    assert (tmp_path / "other").read_bytes() == b"precious"


async def test_an_attempt_that_was_interrupted_stands_in_the_history(tmp_path: Path, clock: HandClock) -> None:
    """The operator has received two requests, and the history shows two attempts: the first without a result, the
    second with one.
    """

    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(3600)
        return web.Response()

    async with scripted_operator(never) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            sender = Sender(clock)
            noted = Underway(tmp_path / "attempts")
            killed = Dispatcher(b.db, clock, sender, Random(7), None, noted)
            killed.configure(b.settings, {})
            await b.end()
            began_at = clock.wall_ms()
            await killed.once()
            await operator.wait_for(1)
            number = (await b.row()).id
            assert killed.under_way_since(number) == began_at
            await killed.drain(0)  # ends without storing a result, as a kill does
            clock.advance(3)
            after = Dispatcher(b.db, clock, sender, Random(7), None, Underway(tmp_path / "attempts"))
            after.configure(b.settings, {})
            with hear() as events:
                running = asyncio.create_task(after.run())
                await until(lambda: b.db.figures["acme"].pending == 0)
            running.cancel()
            settled = await b.row()
            await sender.close()
    history = json.loads(settled.history)
    assert [(one["at"], one["error"]) for one in history] == [(began_at, "interrupted"), (began_at + 3000, None)]
    assert (settled.state, settled.attempts) == ("delivered", 2)
    assert [event.facts["count"] for event in events if event.name == "delivery.interrupted"] == [1]
    assert Underway(tmp_path / "attempts").lost == []


async def test_an_attempt_tells_where_it_was_sent(tmp_path: Path, clock: HandClock) -> None:
    async with scripted_operator(web.Response(status=500)) as operator:
        url = operator.url.replace("://", "://user:pass@") + "?key=geheim"
        async with bench(tmp_path, clock, operator_table("acme", url)) as b:
            await b.end()
            await b.round()
            await b.skip_to(await b.row())
            await b.round()
            history = with_history(await b.row(), b.db.gate("acme")).history
    address = operator.url.split("/")[2]
    assert [(one.url, one.address) for one in history] == [(operator.url, address)] * 2
