"""Deliveries to a real HTTP server as the operator: judging, retries, holds, breaker, isolation, stopping. The clock is
moved by hand.
"""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from aiohttp import web
from clocks import HandClock
from faults import look_up_by, not_found
from processes import free_ports
from standardwebhooks import Webhook
from support import LISTEN, Bench, bench, hear, load, operator_table, scripted_operator, until

from lmdaemon import retry
from lmdaemon.config import target
from lmdaemon.config.settings import Operator, Settings
from lmdaemon.delivery import lanes
from lmdaemon.delivery.attempts import Attempts
from lmdaemon.delivery.resolver import LOOKUPS_MAX, Resolver
from lmdaemon.delivery.sender import Sender, Unreachable, request_headers
from lmdaemon.delivery.sinks import compose, sinks_of
from lmdaemon.dialects import CannotEncode
from lmdaemon.model import Session, rfc3339
from lmdaemon.store.contract import Dead, Opening, Settlement, StoreObserver
from lmdaemon.store.sqlite import store

SCHEDULE = ["5s", "30s", "2m", "10m"]


def refused_url() -> str:
    """A URL at which connections are refused."""
    return f"http://127.0.0.1:{free_ports(1)[0]}/V4/SessionExpired"


class TestOneDelivery:
    async def test_an_end_reaches_the_operators_url_as_on_the_page(self, tmp_path: Path, clock: HandClock) -> None:
        async with scripted_operator() as operator, bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            await b.end()
            await b.round()
            (received,) = operator.received
            assert json.loads(received.body) == {
                "providerId": "acme",
                "sessionId": "s",
                "externalPlayerId": "p",
                "token": "tok-3n",
            }
            row = await b.row()
            assert received.headers["Content-Type"] == "application/json"
            assert received.headers["webhook-id"] == row.webhook_id
            assert (row.state, row.attempts, row.last_status, row.last_code) == ("delivered", 1, 200, 0)

    async def test_every_attempt_has_the_same_id_and_the_same_bytes(self, tmp_path: Path, clock: HandClock) -> None:
        answers = (web.Response(status=500), {"error": 100}, web.Response(text="<html>"))
        toml = operator_table("acme", "http://x/", dialect="v4.01", schedule=["5s"] * 9)
        async with scripted_operator(*answers) as operator:
            async with bench(tmp_path, clock, toml.replace("http://x/", operator.url)) as b:
                await b.end()
                for _ in range(4):
                    await b.round()
                    await b.skip_to(await b.row())
                assert len(operator.received) == 4
                assert len({received.body for received in operator.received}) == 1
                assert {received.headers["webhook-id"] for received in operator.received} == {
                    (await b.row()).webhook_id
                }
                assert (await b.row()).state == "delivered"

    async def test_failures_follow_the_schedule_and_end_dead_with_the_reason(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        """Each wait is the schedule's, within its jitter."""
        async with bench(tmp_path, clock, operator_table("acme", refused_url())) as b:
            await b.end()
            for step, wait_s in enumerate((5, 30, 120, 600)):
                await b.round()
                row = await b.row()
                assert (row.state, row.attempts, row.step) == ("pending", step + 1, step + 1)
                assert 0.8 * wait_s <= (row.due_at - clock.wall_ms()) / 1000 <= 1.2 * wait_s
                await b.skip_to(row)
                b.clock.advance(1e-3)
            await b.round()
            row = await b.row()
            assert (row.state, row.attempts, row.last_error) == ("dead", 5, "connect")
            assert len(json.loads(row.history)) == 5
            assert b.db.figures["acme"].dead == 1

    @pytest.mark.parametrize("code", [120, "120", 999, 120.0])
    async def test_a_final_code_is_never_tried_again(self, tmp_path: Path, clock: HandClock, code: object) -> None:
        async with scripted_operator({"error": code}) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.round()
                clock.advance(86400)
                await b.round()
                assert len(operator.received) == 1
                assert (await b.row()).state == "dead"

    async def test_a_delivery_older_than_max_age_is_dead_without_another_try(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        async with scripted_operator(web.Response(status=503)) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, max_age="1m", schedule=["2m"])) as b:
                await b.end()
                await b.round()
                await b.skip_to(await b.row())
                await b.round()
                row = await b.row()
                assert (row.state, row.last_error, row.attempts) == ("dead", "max_age", 1)
                assert len(operator.received) == 1

    async def test_nothing_is_sent_while_the_operator_has_not_asked_for_it(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        async with scripted_operator() as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, notify=False)) as b:
                await b.end()
                await b.round()
                known = await b.db.session("acme", "s")
                assert known is not None
                assert (known[1], operator.received) == ([], [])

    async def test_a_dead_delivery_retried_by_hand_starts_its_schedule_again(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        async with scripted_operator({"error": 120}) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.round()
                clock.advance(100 * 86400)  # older than max_age; but a retry by hand starts the age anew
                assert await b.db.retry_dead("acme", Dead()) == 1
                await b.round()
                row = await b.row()
                assert (row.state, row.attempts) == ("delivered", 2)


class TestHostileAnswers:
    @pytest.mark.parametrize(
        ("answer", "reason", "code"),
        [
            (web.json_response({"error": False}), "bad_answer", None),
            (web.json_response({}), "bad_answer", None),
            (web.json_response([0]), "bad_answer", None),
            (web.Response(text="OK"), "bad_answer", None),
            (web.json_response({"error": 100}), "code_100", 100),
            (web.json_response({"error": 7}), "code_7", 7),
            (web.json_response({"error": 0}, status=201), "status_201", 0),
            (web.json_response({"error": 0}, status=302, headers={"Location": "/elsewhere"}), "redirect", 0),
            (web.json_response({"error": 0, "pad": "x" * 20_000}), "answer_too_long", None),
            (web.json_response({"error": 0}, headers={"Content-Encoding": "gzip"}), "delivered", 0),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    async def test_each_is_judged_and_nothing_is_followed(
        self, tmp_path: Path, clock: HandClock, answer: web.Response, reason: str, code: int | None
    ) -> None:
        async def play(request: web.Request) -> web.Response:
            return web.Response(body=answer.body, status=answer.status, headers=answer.headers)

        async with scripted_operator(play) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.round()
                row = await b.row()
                assert len(operator.received) == 1
                # The body is JSON without any encoding, whatever the header says, and is read so
                if reason == "delivered":
                    assert row.state == "delivered"
                else:
                    assert (row.state, row.last_error, row.last_code) == ("pending", reason, code)

    async def test_an_answer_that_never_comes_is_cut_at_the_time_out(self, tmp_path: Path, clock: HandClock) -> None:
        async def hang(request: web.Request) -> web.Response:
            await asyncio.sleep(60)
            return web.Response()

        async with scripted_operator(hang) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, timeout="200ms")) as b:
                await b.end()
                await b.round()
                assert (await b.row()).last_error == "timeout"
                where = operator.url.split("/")[2]
                told = f"connected to {where}, no whole answer within 0.2 s"
                assert b.db.gate("acme").failed_detail == told

    async def test_a_body_that_drips_is_cut_at_the_same_deadline(self, tmp_path: Path, clock: HandClock) -> None:
        async def drip(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    await response.write(b" ")
                    await asyncio.sleep(0.05)
            return response

        async with scripted_operator(drip) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, timeout="300ms")) as b:
                await b.end()
                await b.round()
                assert (await b.row()).last_error == "timeout"

    async def test_an_endless_body_costs_no_more_than_the_limit(self, tmp_path: Path, clock: HandClock) -> None:
        sent = 0

        async def flood(request: web.Request) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while sent < 1 << 30:
                    await response.write(b"x" * 65536)
                    sent += 65536
            return response

        async with scripted_operator(flood) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.round()
                assert (await b.row()).last_error == "answer_too_long"
                assert sent < 1 << 24

    async def test_a_connection_lost_half_way_is_a_failed_attempt(self, tmp_path: Path, clock: HandClock) -> None:
        """The request is not sent a second time within the attempt."""
        connections = 0

        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
            await writer.drain()
            writer.transport.abort()

        server = await asyncio.start_server(reset, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, bench(tmp_path, clock, operator_table("acme", f"http://127.0.0.1:{port}/")) as b:
            await b.end()
            await b.round()
            row = await b.row()
            assert (row.state, row.attempts, connections) == ("pending", 1, 1)
            assert row.last_error in ("connection_lost", "incomplete_answer")


async def test_a_breaker_closes_after_its_pause_when_nothing_waits(tmp_path: Path, clock: HandClock) -> None:
    """Five deliveries are dead because their schedule had a single wait. No delivery is left that could probe whether
    the operator works again.
    """
    async with scripted_operator(*(web.Response(status=500) for _ in range(10))) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url, schedule=["1s"])) as b:
            with hear() as events:
                for number in range(5):
                    await b.end(f"s{number}")
                await b.round()
                for _ in range(20):
                    clock.advance(5)
                    await b.round()
            assert b.db.figures["acme"].dead == 5
            gate = b.db.gate("acme")
            assert (gate.failures, gate.opened_at, retry.breaker(gate, clock.wall_ms())) == (0, None, "closed")
    closed = [event.facts for event in events if event.name == "breaker.closed"]
    assert [(facts["reason"], facts["pending"]) for facts in closed] == [("time", 0)]


async def test_a_hold_ends_by_itself_and_is_told(tmp_path: Path, clock: HandClock) -> None:
    async with scripted_operator() as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            now_at = clock.wall_ms()
            await b.db.set_gate("acme", lambda gate: retry.hold(gate, now_at, "by_hand", until_at=now_at + 60_000))
            await b.end()
            assert await b.round() == 60.0
            clock.advance(60)
            with hear() as events:
                await b.round()
            assert len(operator.received) == 1
    (released,) = (event.facts for event in events if event.name == "operator.released")
    assert (released["reason"], released["held_s"]) == ("time", 60.0)


class TestHistory:
    """Of a failed attempt, the history keeps the beginning of the answer, without the secrets of the notice."""

    async def answers(self, tmp_path: Path, clock: HandClock, *script: Any, **keys: Any) -> list[dict[str, Any]]:
        """Makes one attempt for each answer in the script. Returns the entries of the history."""
        async with scripted_operator(*script) as operator:
            url = operator.url.replace("http://", "http://user:pass-w0rd@") + "?key=in-the-query"
            async with bench(tmp_path, clock, operator_table("acme", url, **keys)) as b:
                await b.end()
                for _ in script:
                    await b.round()
                    await b.skip_to(await b.row())
                history: list[dict[str, Any]] = json.loads((await b.row()).history)
                assert len(history) == len(script)
                return history

    async def test_a_failure_keeps_what_was_answered_and_a_success_does_not(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        script: list[Any] = [
            {"error": 100, "description": "später"},
            web.Response(status=503, text="<html>"),
            web.Response(status=204),
            web.Response(status=500, body=b"\xef\xbb\xbf\xff\0\n"),
            {"error": 0},
        ]
        history = await self.answers(tmp_path, clock, *script, schedule=["1s"] * 9)
        kept = [entry.get("answer", "none is kept") for entry in history]
        assert kept == ['{"error": 100, "description": "sp\\u00e4ter"}', "<html>", "", "\ufffd\0\n", "none is kept"]
        assert [entry.get("detail") for entry in history] == [
            '`error` is 100, internal error, please retry ("später")',
            "the body is HTML",
            "the body is empty",
            "the body is not UTF-8",
            None,
        ]

    async def test_what_is_said_of_a_failure_has_its_description_masked(self, tmp_path: Path, clock: HandClock) -> None:
        """The whole description is masked before it is cut, so that no part of a secret is left at the cut."""

        async def echo(request: web.Request) -> web.Response:
            token = json.loads(await request.read())["token"]
            return web.json_response({"error": 7, "description": f"no such token {token} " + "x" * 250 + token})

        (entry,) = await self.answers(tmp_path, clock, echo)
        said = '`error` is 7, bad parameters ("no such token *** '
        assert entry["detail"] == said + "x" * (256 - len(said))

    async def test_without_an_answer_there_is_none_but_what_is_known_besides(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        async with bench(tmp_path, clock, operator_table("acme", refused_url())) as b:
            await b.end()
            await b.round()
            (entry,) = json.loads((await b.row()).history)
            assert (entry["error"], entry["answer"]) == ("connect", None)
            assert re.fullmatch(r"connection refused at 127\.0\.0\.1:\d+", entry["detail"])

    @pytest.mark.parametrize("before", [0, 240, 250, 255, 256])
    async def test_a_secret_is_masked_wherever_the_text_is_cut(
        self, tmp_path: Path, clock: HandClock, before: int
    ) -> None:
        async def echo(request: web.Request) -> web.Response:
            token = json.loads(await request.read())["token"]
            secrets = f"{token} {request.headers['Authorization']} {request.query['key']} user pass-w0rd"
            return web.Response(status=500, text="." * before + secrets + "." * 300)

        (entry,) = await self.answers(tmp_path, clock, echo)
        masked = "." * before + "*** Basic *** *** *** ***" + "." * 300
        assert entry["answer"] == masked[:256]

    @pytest.mark.parametrize("before", [0, 1, 100, 250])
    async def test_of_a_secret_of_which_a_part_is_read_nothing_is_kept(
        self, tmp_path: Path, clock: HandClock, before: int
    ) -> None:
        """Masking shortens the complete copies of the token. So a copy that is cut at the end of what is read would
        move into the 256 characters that are kept.
        """
        token = "T0k3n" * 700

        async def echo(_: web.Request) -> web.Response:
            return web.Response(status=500, text="." * before + token * 9)

        async with scripted_operator(echo) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.db.open_session(Opening("acme", "s", "p", token, None, 10_000, 0))
                await b.db.end("acme", "s")
                await b.round()
                (entry,) = json.loads((await b.row()).history)
                # The first 8 KiB of the answer hold two whole tokens and a part
                assert entry["answer"] == ("." * before + "***" * 2)[:256]

    async def test_the_latest_fifty_are_kept_within_bounds(self, tmp_path: Path, clock: HandClock) -> None:
        script = [web.Response(status=500, body=b"\0" * 20_000) for _ in range(52)]
        async with scripted_operator(*script) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, schedule=["1s"] * 99)) as b:
                await b.end()
                for _ in script:
                    await b.round()
                    await b.db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
                    await b.skip_to(await b.row())
                row = await b.row()
                assert row.attempts == 52
                assert [len(entry["answer"]) for entry in json.loads(row.history)] == [256] * 50
                assert len(row.history) < 100_000


class TestGate:
    async def test_gone_holds_the_operator_and_spends_no_attempt(self, tmp_path: Path, clock: HandClock) -> None:
        async with scripted_operator(web.Response(status=410)) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end("first")
                await b.round()
                await b.end("second")
                clock.advance(86400)
                assert await b.round() is None  # the operator is held: nothing but a release can change that
                first = await b.row("first")
                assert (first.state, first.attempts, first.last_status) == ("pending", 0, 410)
                assert len(operator.received) == 1
                gate = b.db.gate("acme")
                assert (gate.held_reason, b.db.figures["acme"].pending) == ("gone", 2)
                await b.db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
                await b.round()
                assert [(await b.row(name)).state for name in ("first", "second")] == ["delivered"] * 2

    @pytest.mark.parametrize("status", [200, 429, 503])
    async def test_retry_after_delays_the_whole_operator(self, tmp_path: Path, clock: HandClock, status: int) -> None:
        answer = web.json_response({"error": 0}, status=status, headers={"Retry-After": "120"})
        async with scripted_operator(answer) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end("first")
                with hear("lmdaemon.delivery") as events:
                    await b.round()
                facts = {event.name: event.facts for event in events}
                assert facts["operator.paused"]["until"] == rfc3339(b.db.gate("acme").not_before_at)
                if status != 200:
                    wait_s = facts["delivery.retry"]["wait_s"]
                    assert wait_s == round(wait_s, 3)
                await b.end("second")
                wait_s = await b.round()
                assert wait_s == 60  # the dispatcher looks again once a minute; the Retry-After still applies
                clock.advance(119)
                await b.round()
                assert len(operator.received) == 1
                clock.advance(25.1)  # the jitter of a Retry-After only lengthens it
                await b.round()
                assert (await b.row("second")).state == "delivered"

    async def test_five_failures_open_the_breaker_and_one_probe_goes_at_a_time(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        down = [web.Response(status=500) for _ in range(7)]
        async with scripted_operator(*down) as operator:
            toml = operator_table("acme", operator.url, concurrency=1, schedule=["1s"] * 50)
            async with bench(tmp_path, clock, toml) as b:
                for number in range(20):
                    await b.end(str(number))
                await b.round()
                assert len(operator.received) == 5
                assert b.db.gate("acme").failures == 5
                for pause_s in (1, 2):  # the first wait of the schedule, then twice that
                    clock.advance(pause_s - 0.01)
                    await b.round()
                    before = len(operator.received)
                    clock.advance(0.02)
                    await b.round()
                    assert len(operator.received) == before + 1
                clock.advance(4.01)
                await b.round()  # the probe succeeds, and all other deliveries follow at once
                assert b.db.gate("acme").failures == 0
                clock.advance(2)
                await b.round()
                states = [(await b.row(str(number))).state for number in range(20)]
                assert states == ["delivered"] * 20

    async def test_waiting_for_a_broken_operator_spends_no_attempt(self, tmp_path: Path, clock: HandClock) -> None:
        down = [web.Response(status=500) for _ in range(5)]
        async with scripted_operator(*down) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=5)) as b:
                for number in range(5):
                    await b.end(f"down {number}")
                await b.round()
                await b.end("waiting")
                await b.round()
                assert (await b.row("waiting")).attempts == 0
                assert b.db.gate("acme").failures == 5

    async def test_five_days_of_nothing_but_failure_hold_the_operator(self, tmp_path: Path, clock: HandClock) -> None:
        async with bench(
            tmp_path, clock, operator_table("acme", refused_url(), max_age="30d", schedule=["90m"] * 99)
        ) as b:
            await b.end()
            for _ in range(5 * 24 + 40):
                await b.round()
                if b.db.gate("acme").held_at is not None:
                    break
                clock.advance(5400 * 1.2 + 1)
            assert b.db.gate("acme").held_reason == "failing_for_days"
            assert clock.wall_ms() - (await b.row()).created_at >= 5 * 86_400_000
            assert (await b.row()).state == "pending"

    async def test_gate_and_schedule_survive_a_restart(self, tmp_path: Path, clock: HandClock) -> None:
        url = refused_url()
        toml = operator_table("acme", url, concurrency=5)
        async with bench(tmp_path, clock, toml) as b:
            for number in range(5):
                await b.end(str(number))
            await b.round()
            before = (b.db.gate("acme"), await b.row("0"))
        async with bench(tmp_path, clock, toml) as b:
            assert (b.db.gate("acme"), await b.row("0")) == before
            assert before[0].failures == 5
            assert await b.round() is not None


class TestIsolation:
    async def test_a_hanging_operator_delays_no_other(self, tmp_path: Path, clock: HandClock) -> None:
        async def hang(request: web.Request) -> web.Response:
            await asyncio.sleep(60)
            return web.Response()

        async with scripted_operator(*[hang] * 4) as slow, scripted_operator() as fast:
            toml = operator_table("slow", slow.url) + operator_table("fast", fast.url)
            async with bench(tmp_path, clock, toml) as b:
                running = asyncio.create_task(b.dispatcher.run())
                for number in range(10):
                    await b.end(str(number), "slow")
                for number in range(10):
                    await b.end(str(number), "fast")
                await fast.wait_for(10)
                await until(lambda: b.db.figures["fast"].pending == 0)
                assert len(slow.received) == 4  # never more than its concurrency
                assert b.db.figures["slow"].pending == 10
                running.cancel()

    async def test_no_operator_gets_more_than_its_concurrency_at_once(self, tmp_path: Path, clock: HandClock) -> None:
        at_once = most = 0
        full = asyncio.Event()

        async def count(request: web.Request) -> web.Response:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            if at_once == 3:
                full.set()
            await full.wait()
            await asyncio.sleep(0.01)  # time in which a fourth request would arrive, if one were sent
            at_once -= 1
            return web.json_response({"error": 0})

        async with scripted_operator(*[count] * 30) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=3)) as b:
                running = asyncio.create_task(b.dispatcher.run())
                for number in range(30):
                    await b.end(str(number))
                await until(lambda: b.db.figures["acme"].pending == 0)
                assert (most, len(operator.received)) == (3, 30)
                running.cancel()

    async def test_a_row_settled_while_the_next_claim_is_read_is_not_sent_again(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        """The claim reads the first row while it is pending. Then the row is settled, and only then the claim
        returns.
        """
        answer_first = asyncio.Event()

        async def late(request: web.Request) -> web.Response:
            await answer_first.wait()
            return web.json_response({"error": 0})

        async with scripted_operator(late) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end("first")
                await b.dispatcher.once()
                await operator.wait_for(1)
                await b.end("second")

                async def first_is_settled() -> None:
                    answer_first.set()
                    await until(lambda: b.db.figures["acme"].pending == 1 and not b.dispatcher.in_flight)

                b.db.after_reading = first_is_settled
                await b.dispatcher.once()
                b.db.after_reading = None
                await b.round()
                sent = [json.loads(received.body)["sessionId"] for received in operator.received]
                assert sent == ["first", "second"]

    async def test_a_row_due_again_before_its_slot_is_free_is_not_forgotten(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        """Between the commit of a failed attempt and the end of its task comes a round, which finds the row still in
        flight.
        """
        async with scripted_operator(web.Response(status=500)) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                rounds: list[asyncio.Task[float | None]] = []

                class RoundAfterCommit(StoreObserver):
                    def delivery_due(self, name: str, sink: str, due_at: int) -> None:
                        if operator.received and not rounds:
                            clock.advance(60)
                            rounds.append(asyncio.create_task(b.dispatcher.once()))

                b.db.observe(RoundAfterCommit())
                await b.end()
                await b.round()
                await asyncio.gather(*rounds)
                await b.round()
                assert (await b.row()).state == "delivered"

    async def test_a_hold_of_the_url_leaves_plugins_alone(
        self, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "hook_alone.py").write_text("SEEN = []\nasync def hook(event):\n    SEEN.append(event)\n")
        monkeypatch.syspath_prepend(tmp_path)
        async with scripted_operator(web.Response(status=410)) as operator:
            toml = operator_table("acme", operator.url) + '[plugins.x]\nuse = "hook_alone:hook"\n'
            async with bench(tmp_path, clock, toml) as b:
                await b.end("first")
                await b.round()
                await b.end("second")
                await b.round()
                assert len(operator.received) == 1
                rows = [await b.row(name, sink="plugin:x") for name in ("first", "second")]
                assert [row.state for row in rows] == ["delivered"] * 2
                import hook_alone  # type: ignore[import-not-found]

                assert [event.id for event in hook_alone.SEEN] == [row.webhook_id for row in rows]


@contextlib.asynccontextmanager
async def dispatching(b: Bench) -> AsyncIterator["asyncio.Task[None]"]:
    running = asyncio.create_task(b.dispatcher.run())
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class OneAtATime:
    """An operator that gives each answer only when the test says so."""

    def __init__(self, *answers: Any) -> None:
        self._told: asyncio.Queue[None] = asyncio.Queue()
        self.script = [partial(self._answer, answer) for answer in answers]

    async def _answer(self, answer: Any, request: web.Request) -> Any:
        await self._told.get()
        return answer

    def answer(self) -> None:
        self._told.put_nowait(None)


async def some_turns() -> None:
    """Waits long enough for a request to reach an operator in this process, if one were sent."""
    for _ in range(200):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)


class Late:
    """Waits until the test lets it go on."""

    def __init__(self) -> None:
        self.called, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, *_: Any) -> None:
        self.called.set()
        await self.go_on.wait()


class TestReadingAhead:
    """Due rows are read before a slot is free for them, and a successful attempt leaves its slot before its result is
    stored.
    """

    OK: ClassVar = {"error": 0}

    async def test_an_attempt_is_followed_by_the_next_while_the_table_is_being_read(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        told = OneAtATime(*[self.OK] * 4)
        async with scripted_operator(*told.script) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=2)) as b:
                for number in range(9):
                    await b.end(str(number))
                async with dispatching(b):
                    await operator.wait_for(2)
                    b.db.before_reading = reading = Late()
                    told.answer()
                    await reading.called.wait()
                    told.answer()
                    await operator.wait_for(4)
                    assert sorted(b.dispatcher.lanes.attempting.values()) == [2]
                    reading.go_on.set()
                    told.answer()
                    told.answer()
                    await until(lambda: b.db.figures["acme"].pending == 0)
                    sent = [json.loads(received.body)["sessionId"] for received in operator.received]
                    assert sorted(sent) == [str(number) for number in range(9)]

    async def test_a_success_leaves_its_slot_before_it_is_stored_but_not_for_ever(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        """On a slow disk, at most twice the concurrency of attempts have no stored result. A kill would repeat
        those.
        """
        async with scripted_operator() as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=2)) as b:
                for number in range(9):
                    await b.end(str(number))
                b.db.before_storing = storing = Late()
                async with dispatching(b):
                    await operator.wait_for(4)
                    await until(lambda: b.dispatcher.lanes.attempting == {("acme", "http"): 0})
                    await some_turns()
                    assert len(operator.received) == 4
                    storing.go_on.set()
                    await until(lambda: b.db.figures["acme"].pending == 0)
                    assert len(operator.received) == 9

    async def test_a_failure_keeps_its_slot_until_it_is_stored(self, tmp_path: Path, clock: HandClock) -> None:
        async with scripted_operator(web.Response(status=500)) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
                await b.end("first")
                await b.end("second")
                b.db.before_storing = storing = Late()
                async with dispatching(b):
                    await storing.called.wait()
                    await some_turns()
                    assert len(operator.received) == 1
                    storing.go_on.set()
                    await operator.wait_for(2)

    @pytest.mark.parametrize(
        "answer",
        [
            web.Response(status=410),
            web.Response(status=503, headers={"Retry-After": "60"}),
            web.Response(status=500),
        ],
        ids=["gone", "retry after", "fifth failure"],
    )
    async def test_what_was_read_ahead_is_kept_back_with_the_rest(
        self, tmp_path: Path, clock: HandClock, answer: web.Response
    ) -> None:
        failures = retry.BREAKER_OPENS_AT if answer.status == 500 else 1
        script = [web.Response(status=500) for _ in range(failures - 1)]
        async with scripted_operator(*script, answer) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
                for number in range(failures + 2):
                    await b.end(str(number))
                async with dispatching(b):
                    await operator.wait_for(failures)
                    await until(lambda: not b.dispatcher.in_flight)
                    await some_turns()
                    assert len(operator.received) == failures
                    await b.db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
                    await operator.wait_for(failures + 2)

    async def test_what_was_read_ahead_goes_out_when_the_pause_is_over(self, tmp_path: Path, clock: HandClock) -> None:
        async with scripted_operator(web.Response(status=503, headers={"Retry-After": "20"})) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
                await b.end("first")
                await b.end("second")
                wait_s = await b.round()
                assert len(operator.received) == 1
                assert wait_s is not None
                assert 20 <= wait_s <= 24
                clock.advance(wait_s)
                await b.dispatcher.once()
                await operator.wait_for(2)

    async def test_a_stop_is_not_followed_by_what_was_read_ahead(self, tmp_path: Path, clock: HandClock) -> None:
        told = OneAtATime(self.OK)
        async with scripted_operator(*told.script) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
                await b.end("first")
                await b.end("second")
                async with dispatching(b):
                    await operator.wait_for(1)
                draining = asyncio.create_task(b.dispatcher.drain(10))
                told.answer()
                await draining
                await some_turns()
                assert len(operator.received) == 1
                assert b.db.figures["acme"].pending == 1

    async def test_what_was_being_read_when_its_operator_left_the_file_is_not_sent(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        async with scripted_operator() as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                b.db.before_reading = reading = Late()
                async with dispatching(b):
                    await reading.called.wait()
                    b.dispatcher.configure(load(tmp_path / "empty.toml", LISTEN), {})
                    reading.go_on.set()
                    await some_turns()
                    assert operator.received == []
                    b.dispatcher.configure(b.settings, {})
                    await until(lambda: b.db.figures["acme"].pending == 0)

    async def test_what_was_read_ahead_is_not_sent_for_an_operator_that_left(
        self, tmp_path: Path, clock: HandClock
    ) -> None:
        """A delivery that was read ahead is not sent once its operator has left the file."""
        told = OneAtATime(self.OK)
        async with scripted_operator(*told.script) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=1)) as b:
                await b.end("first")
                await b.end("second")
                async with dispatching(b):
                    await operator.wait_for(1)
                    b.dispatcher.configure(load(tmp_path / "empty.toml", LISTEN), {})
                    told.answer()
                    await until(lambda: b.db.figures["acme"].pending == 1)
                    await some_turns()
                    assert len(operator.received) == 1
                    b.dispatcher.configure(b.settings, {})
                    await until(lambda: b.db.figures["acme"].pending == 0)
                    assert len(operator.received) == 2


class TestStopping:
    @pytest.mark.parametrize("left", [False, True], ids=["there", "left the file"])
    async def test_a_bug_ends_the_dispatcher_loudly(
        self, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch, left: bool
    ) -> None:
        """The dispatcher also ends if the operator has left the file in the meantime."""
        told = OneAtATime({"error": 0})
        async with scripted_operator(*told.script) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                monkeypatch.setattr(Attempts, "settlement", lambda *_, **__: 1 / 0)
                await b.end()
                async with dispatching(b) as running:
                    await operator.wait_for(1)
                    if left:
                        b.dispatcher.configure(load(tmp_path / "empty.toml", LISTEN), {})
                        await some_turns()
                    told.answer()
                    with pytest.raises(ZeroDivisionError):
                        await asyncio.wait_for(running, 10)

    async def test_what_is_in_flight_is_finished_and_recorded(self, tmp_path: Path, clock: HandClock) -> None:
        release = asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            await release.wait()
            return web.json_response({"error": 0})

        async with scripted_operator(slow) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.dispatcher.once()
                await operator.wait_for(1)
                draining = asyncio.create_task(b.dispatcher.drain(10))
                await asyncio.sleep(0)
                release.set()
                await draining
                assert (await b.row()).state == "delivered"

    async def test_what_does_not_finish_in_time_stays_pending(self, tmp_path: Path, clock: HandClock) -> None:
        async def hang(request: web.Request) -> web.Response:
            await asyncio.sleep(60)
            return web.Response()

        async with scripted_operator(hang) as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.dispatcher.once()
                await operator.wait_for(1)
                await b.dispatcher.drain(0.05)
                row = await b.row()
                assert (row.state, row.attempts) == ("pending", 0)

    async def test_a_result_is_kept_until_the_store_takes_it(self, tmp_path: Path, clock: HandClock) -> None:
        """The disk fails between the answer and storing it. The row stays in flight and is not sent again."""
        async with scripted_operator() as operator:
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                blocker = store.sqlite3.connect(b.db.path, isolation_level=None)

                async def lock_first(request: web.Request) -> web.Response:
                    blocker.execute("BEGIN IMMEDIATE")
                    return web.json_response({"error": 0})

                operator.script.append(lock_first)
                running = asyncio.create_task(b.dispatcher.run())
                await until(lambda: b.db.failure is not None)
                blocker.execute("ROLLBACK")
                blocker.close()
                await until(lambda: b.db.figures["acme"].pending == 0)
                assert len(operator.received) == 1
                running.cancel()


class TestComposing:
    def settings(self, tmp_path: Path, **keys: Any) -> Settings:
        return load(
            tmp_path / "config.toml", operator_table("acme", "https://wallet.example/V4/SessionExpired", **keys)
        )

    def session(self, **changes: Any) -> Session:
        facts = {"operator": "acme", "session_id": "s", "player_id": "p", "token": "tok-3n", "reason": "closed"}
        times = dict.fromkeys(("id", "idle_ms", "opened_at", "seen_ms", "seen_at", "ended_at"), 1)
        empty = dict.fromkeys(("attributes", "extra", "lifetime_at"))
        return Session(**(facts | times | empty | changes))  # type: ignore[arg-type]

    def test_a_missing_token_is_said_instead_of_sending_half_a_notice(self, tmp_path: Path) -> None:
        operator = self.settings(tmp_path).operators["acme"]
        with pytest.raises(CannotEncode, match="dialect v4 must send 'token', which is not known here"):
            compose(operator, self.session(token=None))
        (impossible,) = sinks_of(self.settings(tmp_path), self.session(token=None))
        assert (impossible.body, impossible.impossible) == (b"", "missing_token")

    def test_an_operator_that_is_gone_has_no_sinks(self, tmp_path: Path) -> None:
        assert sinks_of(self.settings(tmp_path), self.session(operator="gone")) == []

    def test_signatures_verify_under_every_key_and_no_other(self, tmp_path: Path) -> None:
        keys = ["whsec_" + "A" * 32, "whsec_" + "B" * 32]
        (tmp_path / "signing").write_text("\n".join(keys))
        (tmp_path / "signing").chmod(0o600)
        operator = self.settings(tmp_path, signing_secret_file="signing").operators["acme"]
        body = compose(operator, self.session())
        headers = request_headers(operator, "msg_1_ab", body, time.time())
        for key in keys:
            assert Webhook(key).verify(body, headers) == json.loads(body)
        with pytest.raises(Exception, match="No matching signature"):
            Webhook("whsec_" + "C" * 32).verify(body, headers)


def towards(operator: Operator, url: str) -> Operator:
    """The operator with a URL that a configuration would refuse."""
    return msgspec.structs.replace(operator, url=url, target=target.read(url))


class TestEgress:
    async def test_a_name_that_leads_inside_is_refused_at_the_connect(self, clock: HandClock, tmp_path: Path) -> None:
        toml = operator_table("acme", "https://wallet.example/", allow_private_network=False)
        operator = load(tmp_path / "config.toml", toml).operators["acme"]
        sender = Sender(clock)
        # /etc/hosts resolves `localhost` to loopback on every machine, as a hostile DNS server could do with any name
        inside = ("localhost", "127.0.0.1", "[::1]", "169.254.169.254", "127.1", "2130706433", "0x7f000001")
        for host in inside:
            with pytest.raises(Unreachable, match="private_address"):
                await sender.post(towards(operator, f"http://{host}:9/"), "msg_1_ab", b"{}")
        await sender.close()

    async def test_a_public_name_whose_dns_points_inside_is_refused_at_the_connect(
        self, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One private address among a name's addresses is enough for a refusal."""
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 9)) for host in ("93.184.216.34", "127.0.0.1")]
        look_up_by(monkeypatch, lambda *_, **__: found)
        toml = operator_table("acme", "https://wallet.example/", allow_private_network=False)
        sender = Sender(clock)
        operator = load(tmp_path / "config.toml", toml).operators["acme"]
        with pytest.raises(Unreachable, match="private_address"):
            await sender.post(towards(operator, "http://wallet.example:9/"), "i", b"")
        await sender.close()

    async def test_proxies_of_the_environment_are_ignored(
        self, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A proxy would see every notice, and would resolve names without the daemon's check of addresses."""
        async with scripted_operator() as proxy, scripted_operator() as operator:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url)
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
                await b.end()
                await b.round()
            assert (len(proxy.received), len(operator.received)) == (0, 1)

    async def test_the_guard_refuses_every_name_with_a_private_address(self) -> None:
        with pytest.raises(OSError, match="private_address"):
            await Resolver(guarded=True).resolve("localhost", 80)


class TestALookup:
    async def test_names_that_are_never_found_delay_nobody_elses(
        self, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There are more such names than a pool would have threads."""
        hold, real = threading.Event(), socket.getaddrinfo
        hanging: list[str] = []

        def getaddrinfo(host: str, *rest: Any, **named: Any) -> Any:
            if host.startswith("dead"):
                hanging.append(host)
                hold.wait(20)
                raise socket.gaierror(socket.EAI_AGAIN, "no answer")
            return real("127.0.0.1", *rest, **named)

        look_up_by(monkeypatch, getaddrinfo)
        names = [f"dead{number}" for number in range(40)]
        toml = "".join(operator_table(name, f"http://{name}.example/", timeout="1s") for name in names)
        async with scripted_operator() as operator:
            port = operator.url.rpartition(":")[2]
            toml += operator_table("good", f"http://wallet.example:{port}")
            async with bench(tmp_path, clock, toml) as b:
                for name in [*names, "good"]:
                    await b.end("s", name)
                await b.round()
                await until(lambda: len(hanging) == 40)
                assert (await b.row("s", "good")).state == "delivered"
                assert {(await b.row("s", name)).last_error for name in names} == {"timeout"}
                assert {b.db.gate(name).failed_detail for name in names} == {"no connection within 1 s"}
                hold.set()

    async def test_a_name_that_is_not_found_is_a_failed_attempt(
        self, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        look_up_by(monkeypatch, not_found)
        async with bench(tmp_path, clock, operator_table("acme", "http://nobody.invalid/")) as b:
            await b.end()
            await b.round()
            assert ((await b.row()).last_error, (await b.row()).attempts) == ("dns", 1)

    async def test_a_thread_that_cannot_be_had_costs_one_attempt_and_no_later_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolver = Resolver(guarded=False)
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no thread")))
            with pytest.raises(OSError, match="lookups"):
                await resolver.resolve("localhost", 80)
        assert resolver.running == 0
        assert await resolver.resolve("localhost", 80)

    async def test_lookups_that_hang_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At most LOOKUPS_MAX lookups run at once. When one ends, another may begin."""
        go_on = threading.Event()
        found = socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
        look_up_by(monkeypatch, lambda *_, **__: go_on.wait(20) and found)
        resolver = Resolver(guarded=False)
        hanging = [asyncio.ensure_future(resolver.resolve("localhost", 80)) for _ in range(LOOKUPS_MAX)]
        await until(lambda: resolver.running == LOOKUPS_MAX)
        with pytest.raises(OSError, match="lookups"):
            await resolver.resolve("localhost", 80)
        go_on.set()
        assert all(await asyncio.gather(*hanging))
        assert await resolver.resolve("localhost", 80)


async def test_an_attempt_that_breaks_the_daemons_code_is_a_failed_attempt(
    tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that triggers a bug must not stop the daemon, or it would stop it again after each restart."""

    def judge(*_: Any, **__: Any) -> None:
        raise KeyError("tok-3n")

    async with scripted_operator() as operator, bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
        with hear() as events, monkeypatch.context() as broken:
            broken.setattr(retry, "judge", judge)
            await b.end()
            await b.round()
        row = await b.row()
        assert (row.state, row.attempts, row.last_error) == ("pending", 1, "internal_error")
        (failed,) = [event for event in events if event.name == "delivery.attempt_failed"]
        assert failed.facts["error"] == "KeyError"
        assert "tok-3n" not in str(failed)
        await b.skip_to(row)
        await b.round()
        assert (await b.row()).state == "delivered"


async def test_a_wall_clock_that_is_set_back_leaves_no_delivery_waiting(tmp_path: Path, clock: HandClock) -> None:
    """As after a start with a clock that is decades ahead and is set right later."""
    clock.step_wall(73 * 365 * 86400)
    toml = operator_table("acme", "http://x/")
    answers = [web.Response(status=500) for _ in range(5)]
    async with scripted_operator(*answers) as operator:
        async with bench(tmp_path, clock, toml.replace("http://x/", operator.url)) as b:
            for number in range(5):
                await b.end(f"s{number}")
            await b.round()
            assert b.db.gate("acme").failures == 5
            with hear() as events:
                clock.step_wall(-73 * 365 * 86400)
                for _ in range(10):  # each delivery waits as long as it was meant to, and no longer
                    await b.round()
                    clock.advance(6)
            assert "clock.set_back" in [event.name for event in events]
            assert {(await b.row(f"s{number}")).state for number in range(5)} == {"delivered"}


async def test_a_clock_set_back_between_answer_and_commit_delays_nothing(tmp_path: Path, clock: HandClock) -> None:
    """The wait was computed with the old time. The round that notices the new time does not correct the row in
    flight.
    """
    async with scripted_operator(web.Response(status=500)) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            b.db.before_storing = storing = Late()
            await b.end()
            await b.dispatcher.once()
            await storing.called.wait()
            clock.step_wall(-3600)
            await b.dispatcher.once()
            storing.go_on.set()
            await b.round()
            clock.advance(6)  # the first wait of the schedule
            await b.round()
            assert (await b.row()).state == "delivered"


async def test_a_wall_clock_set_back_while_nobody_ran_delays_no_delivery(tmp_path: Path, clock: HandClock) -> None:
    toml = operator_table("acme", "http://x/")
    async with scripted_operator(web.Response(status=429, headers={"Retry-After": "60"})) as operator:
        toml = toml.replace("http://x/", operator.url)
        async with bench(tmp_path, clock, toml) as b:
            for session_id in ("s", "behind"):
                await b.end(session_id)
            await b.round()
        clock.step_wall(-86400)
        async with bench(tmp_path, clock, toml) as b:
            await b.round()
            clock.advance(73)  # what Retry-After asked for, with the longest jitter
            await b.round()
            assert {(await b.row(one)).state for one in ("s", "behind")} == {"delivered"}


async def test_a_wall_clock_set_back_keeps_the_pace_of_retries_by_hand(tmp_path: Path, clock: HandClock) -> None:
    async with scripted_operator(*({"error": 120} for _ in range(30))) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            for number in range(30):
                await b.end(str(number))
            await b.round()
            assert await b.db.retry_dead("acme", Dead()) == 30
            await b.dispatcher.once()
            clock.step_wall(-3600)
            arrived = []
            for _ in range(30):
                await b.round()
                arrived.append(len(operator.received) - 30)
                clock.advance(0.1)
            assert max(later - earlier for earlier, later in pairwise(arrived)) <= 2  # at most ten retries a second
            assert arrived[-1] >= 29


async def test_what_is_under_way_is_not_sent_twice_to_who_left_and_came_back(tmp_path: Path, clock: HandClock) -> None:
    """The operator leaves the file and comes back while a notice to it is under way."""
    hold = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        await hold.wait()
        return web.json_response({"error": 0})

    async with scripted_operator(slow) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            await b.end()
            await b.dispatcher.once()
            await operator.wait_for(1)
            b.dispatcher.configure(load(tmp_path / "empty.toml", LISTEN), {})
            b.dispatcher.configure(b.settings, {})
            await b.dispatcher.once()
            assert b.dispatcher.in_flight == 1
            hold.set()
            await b.round()
            assert len(operator.received) == 1
            assert (await b.row()).state == "delivered"


async def test_what_waits_is_looked_at_once_a_minute_whatever_is_believed(tmp_path: Path, clock: HandClock) -> None:
    async with scripted_operator() as operator, bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
        await b.round()
        await b.end()
        lane = b.dispatcher.lanes.get("acme", "http")
        assert lane is not None
        lane.next_due_at = None  # the due row is forgotten, as by a bug
        wait_s = await b.round()
        assert wait_s is not None
        assert 1 < wait_s <= lanes.LOOK_AGAIN_MS / 1000
        clock.advance(wait_s)
        assert await b.round() is None  # nothing is pending, so the lane is not looked at again
        assert (await b.row()).state == "delivered"


async def test_slots_that_come_free_while_rows_are_read_forget_no_row(tmp_path: Path, clock: HandClock) -> None:
    """More attempts end than rows were read for. The other due rows are still in the table, and no other event wakes
    the lane.
    """
    release = [asyncio.Event() for _ in range(4)]
    waiting = iter(release)

    async def slow(request: web.Request) -> web.Response:
        await next(waiting).wait()
        return web.json_response({"error": 0})

    async with scripted_operator(*[slow] * 4) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url)) as b:
            for number in range(12):
                await b.end(str(number))
            await b.dispatcher.once()
            await operator.wait_for(4)
            release[0].set()
            await until(lambda: b.dispatcher.in_flight == 3)

            async def all_are_answered() -> None:
                for one in release:
                    one.set()
                await until(lambda: b.dispatcher.in_flight == 0)

            b.db.after_reading = all_are_answered
            await b.dispatcher.once()
            b.db.after_reading = None
            await b.round()
            assert {(await b.row(str(number))).state for number in range(12)} == {"delivered"}


async def test_nothing_begins_until_what_keeps_the_operator_back_is_stored(tmp_path: Path, clock: HandClock) -> None:
    """The operator has two slots. A success frees its slot while the other answer, which has a Retry-After, is not
    stored yet.
    """
    script = [web.Response(status=503, headers={"Retry-After": "60"}), web.json_response({"error": 0})]
    async with scripted_operator(*script) as operator:
        async with bench(tmp_path, clock, operator_table("acme", operator.url, concurrency=2)) as b:
            for name in ("a", "b", "c"):
                await b.end(name)
            stored = asyncio.Event()

            async def failures_wait(settlement: Settlement) -> None:
                if settlement.state == "pending":
                    await stored.wait()

            b.db.before_storing = failures_wait
            await b.dispatcher.once()
            await until(lambda: len(operator.received) == 2 and b.dispatcher.in_flight == 1)
            await b.dispatcher.once()
            assert b.dispatcher.in_flight == 1
            stored.set()
            await until(lambda: not b.dispatcher.in_flight)
            await b.dispatcher.once()
            assert len(operator.received) == 2
