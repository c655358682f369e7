"""Clients and operators that keep every acknowledgement and every notice, to compare them with what is stored."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
from processes import Process
from simulated import Simulated

from lmdaemon.workbench.journal import missed

TOKEN = "tok-3n"
# A daemon learns the time of a PostgreSQL server only from the server's answers. On one machine an answer takes at most
# this long (ms)
ANSWER_MS = 50

OPERATOR = """
[operators.{name}]
provider_id = "{name}"
endpoint = "/{name}"
notify = true
url = "{url}"
allow_private_network = true
"""


def now_at() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Acknowledged:
    """Everything that was answered for one session, with the wall time (ms) before each request was sent."""

    opened: bool = False
    idle_ms: int = 0
    heard_at: int = 0
    end: tuple[str, Any] | None = None  # reason, endedAt (None if the answer does not contain it)
    # For each call: what, URL, sent at, answered at, status
    calls: list[tuple[str, str, int, int, int]] = field(default_factory=list)


class Witness:
    """A game server and a provider in one. It calls the daemon and keeps what was acknowledged."""

    def __init__(self, daemon: Process, client: aiohttp.ClientSession) -> None:
        self.daemon = daemon
        self.client = client
        self.sessions: dict[tuple[str, str], Acknowledged] = defaultdict(Acknowledged)
        self.answers: Counter[tuple[str, int]] = Counter()
        self.gone = 0  # calls without an answer, because the daemon was killed

    async def _call(self, known: Acknowledged, what: str, method: str, url: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON body; status 0 if the connection broke."""
        sent_at, status = now_at(), 0
        try:
            async with self.client.request(method, url, json=body) as answer:
                text = await answer.read()
                status = answer.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            self.gone += 1
            return 0, None
        finally:
            known.calls.append((what, url, sent_at, now_at(), status))
        self.answers[what, answer.status] += 1
        assert answer.status < 500 or answer.status == 503, (what, answer.status, text)
        return answer.status, json.loads(text) if text else None

    def _path(self, operator: str, session_id: str) -> str:
        return f"{self.daemon.api}/v1/operators/{operator}/sessions/{session_id}"

    async def open(self, operator: str, session_id: str, idle_s: int) -> int:
        sent_at = now_at()
        body = {"playerId": "p", "token": TOKEN, "idleTimeoutSeconds": idle_s}
        status, _ = await self._call(
            self.sessions[operator, session_id], "open", "PUT", self._path(operator, session_id), body
        )
        known = self.sessions[operator, session_id]
        if status in (200, 201):
            known.opened, known.idle_ms, known.heard_at = True, idle_s * 1000, sent_at
        return status

    async def touch(self, operator: str, session_id: str) -> int:
        sent_at = now_at()
        status, answer = await self._call(
            self.sessions[operator, session_id], "touch", "POST", self._path(operator, session_id) + "/touch"
        )
        known = self.sessions[operator, session_id]
        if status == 204:
            assert known.end is None, "a touch was acknowledged after the end"
            known.heard_at = max(known.heard_at, sent_at)
        elif status == 410:
            self._note_end(known, answer["session"]["reason"], answer["session"]["endedAt"])
        else:
            assert status != 404 or not known.opened, "an acknowledged session is unknown"
        return status

    async def close(self, operator: str, session_id: str) -> int:
        status, answer = await self._call(
            self.sessions[operator, session_id], "close", "POST", self._path(operator, session_id) + "/close"
        )
        if status == 200:
            self._note_end(self.sessions[operator, session_id], answer["reason"], answer["endedAt"])
        return status

    async def notice(self, operator: str, session_id: str) -> int:
        known = self.sessions[operator, session_id]
        body = {"providerId": operator, "sessionId": session_id, "externalPlayerId": "p", "token": TOKEN}
        status, answer = await self._call(known, "notice", "POST", f"{self.daemon.server}/{operator}", body)
        if status == 200:
            assert answer["error"] == 0, answer
            known.end = known.end or ("any", None)
        return status

    @staticmethod
    def _note_end(known: Acknowledged, reason: str, ended_at: str) -> None:
        assert known.end is None or known.end[1] in (None, ended_at), "a session ended twice"
        known.end = (reason, ended_at)


async def game_server(witness: Witness, name: str, operators: list[str], rng: Random, over: asyncio.Event) -> None:
    """Plays one session after the other as a game server does, and goes on after a daemon was killed."""
    number = 0
    while not over.is_set():
        operator, session_id = rng.choice(operators), f"{name}-{number}"
        number += 1
        if rng.random() < 0.2:
            await asked(lambda o=operator, s=session_id: witness.notice(o, s), rng)
            continue
        # One value for all repetitions of the opening, because a repetition would not change it
        idle_s = rng.choice((1, 2))
        await asked(lambda o=operator, s=session_id, i=idle_s: witness.open(o, s, i), rng)
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(rng.random() * 0.6)
            await asked(lambda o=operator, s=session_id: witness.touch(o, s), rng)
        match rng.randrange(3):
            case 0:
                await asked(lambda o=operator, s=session_id: witness.close(o, s), rng)
            case 1:
                await asked(lambda o=operator, s=session_id: witness.notice(o, s), rng)


async def asked(call: Callable[[], Awaitable[int]], rng: Random) -> None:
    """Repeats a call until it is answered, as a caller without an answer does."""
    while await call() in (0, 503):
        await asyncio.sleep(0.05 + rng.random() * 0.1)


def check(
    witness: Witness, wallets: dict[str, Simulated], sinks: int, may_repeat: int, within_ms: int = 0
) -> dict[str, int]:
    """Compares what was acknowledged with what is stored and with what the operators received, once nothing is live or
    pending.

    `within_ms`: how far the clock of the stored times may be behind the witness's clock. Returns figures: sessions,
    notices that arrived, repeats.
    """
    daemon = witness.daemon
    assert daemon.rows("PRAGMA integrity_check") == [("ok",)]
    rows = {
        (operator, session_id): (number, reason, seen_at, ended_at)
        for number, operator, session_id, reason, seen_at, ended_at in daemon.rows(
            "SELECT id, operator, session_id, reason, seen_at, ended_at FROM session"
        )
    }
    deliveries = defaultdict(list)
    for session, sink, state, webhook_id, attempts in daemon.rows(
        "SELECT session, sink, state, 'msg_' || id || '_' || nonce, attempts FROM delivery"
    ):
        deliveries[session].append((sink, state, webhook_id, attempts))
    for key, known in witness.sessions.items():
        if not (known.opened or known.end):
            continue  # nothing about this session was acknowledged
        assert key in rows, f"{key} was acknowledged and is lost"
        _, reason, seen_at, ended_at = rows[key]
        said = f"{key}: {known}, {rows[key]}"
        assert reason is not None, f"{said} lives for ever"
        assert seen_at + within_ms >= known.heard_at, (
            f"{said}: a touch is lost that came {known.heard_at - seen_at} ms later"
        )
        if known.end is not None:
            assert known.end[0] in (reason, "any"), f"{said} ended as {known.end}, and as {reason}"
        if reason == "inactivity" and known.opened:
            assert ended_at - known.heard_at >= known.idle_ms - within_ms, f"{said} ended early"
    arrived = repeats = 0
    for (operator, session_id), (number, *_) in rows.items():
        mine = deliveries[number]
        assert len({sink for sink, *_ in mine}) == len(mine) == sinks, f"{session_id}: {mine}"
        assert {state for _, state, *_ in mine} == {"delivered"}, f"{session_id}: {mine}"
        (webhook_id,) = [one[2] for one in mine if one[0] == "http"]
        told = wallets[operator].journal.sessions.get(session_id)
        assert told is not None, f"{session_id} did not reach its operator"
        assert told.webhook_id == webhook_id, f"{session_id}: another id"
        assert told.accepted >= 1, f"{session_id} was not accepted by its operator"
        arrived += told.attempts
        repeats += told.accepted - 1
    for one in wallets.values():  # each notice came with one body and one id
        assert missed(one.journal.tally, {}) == [], one.journal.evidence
    strangers = {
        session_id
        for operator, one in wallets.items()
        for session_id in one.journal.sessions
        if (operator, session_id) not in rows
    }
    assert not strangers, "ends that nobody made"
    assert repeats <= may_repeat, f"{repeats} repeats, at most {may_repeat} were in flight"
    # A line that counts suppressed lines names no session
    told = Counter((one["operator"], one["session"]) for one in daemon.events("session.ended") if "session" in one)
    assert not [key for key, times in told.items() if times > 1], "an end was told twice"
    return {"sessions": len(rows), "arrived": arrived, "repeats": repeats}


async def settled(daemon: Process, until: Callable[..., Any], within_s: float = 60.0) -> None:
    """Waits until no session is live and no delivery is pending."""

    def quiet() -> bool:
        _, answer = daemon.call("GET", daemon.api + "/v1/operators")
        return all(one["live"] == one["pending"] == 0 for one in answer["items"])

    async def asked() -> bool:
        return await asyncio.to_thread(quiet)

    await until(asked, within_s)
