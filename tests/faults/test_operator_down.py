"""An operator is down for days, with a clock moved by hand: which attempts are made when, when the operator is held,
and how fast its deliveries follow afterwards. The daemon is restarted in the middle of each phase.
"""

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from aiohttp import web
from chance import FULL
from clocks import HandClock
from support import Bench, bench, operator_table, scripted_operator

from lmdaemon import retry
from lmdaemon.store.contract import RETRY_SPACING_MS, Dead

HOUR = 3600.0
SCHEDULE = ["5s", "30s", "2m", "10m", "30m", "2h", "5h", "10h", "10h"]
SESSIONS = 40
PILE = 400  # more deliveries than are tried in a day, so that some have never been tried and are due


class Outage:
    """An operator's server that is down or up, a daemon that is restarted again and again, and the time of each
    request.
    """

    def __init__(self, directory: Path, clock: HandClock, rng: Random) -> None:
        self.directory = directory
        self.clock = clock
        self.rng = rng
        self.down = True
        # Time in seconds, id, body, whether it was answered with success
        self.requests: list[tuple[float, str, bytes, bool]] = []
        self.restarts = 0
        self._until_restart_s = 0.0
        self._stack = contextlib.AsyncExitStack()
        self.toml = ""
        self.bench: Bench

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests.append((self.clock.mono, request.headers["webhook-id"], body, not self.down))
        return web.json_response({"error": 100 if self.down else 0}, status=503 if self.down else 200)

    async def restart(self) -> None:
        """Closes the store and dispatcher and makes new ones on the same file, as a restart does."""
        await self._stack.aclose()
        self._stack = contextlib.AsyncExitStack()
        self.bench = await self._stack.enter_async_context(bench(self.directory, self.clock, self.toml))
        self.restarts += 1
        self._until_restart_s = self.rng.uniform(0.5, 12 if FULL else 24) * HOUR

    async def stop(self) -> None:
        await self._stack.aclose()

    async def live(self, seconds: float) -> None:
        """Lets time pass, with a restart now and then."""
        left_s = seconds
        while left_s > 0:
            wait_s = await self.bench.round()
            step_s = min(left_s, 60.0 if wait_s is None else max(wait_s, 0.001))
            self.clock.advance(step_s)
            left_s -= step_s
            self._until_restart_s -= step_s
            if self._until_restart_s <= 0:
                await self.restart()

    async def end(self, *session_ids: str) -> None:
        for session_id in session_ids:
            await self.bench.end(session_id)

    async def states(self) -> dict[str, int]:
        counted: dict[str, int] = defaultdict(int)
        page = await self.bench.db.deliveries(operator=None, sink=None, state=None, limit=9999, after=None)
        assert page.next is None
        for one in page.rows:
            counted[one.state] += 1
        return dict(counted)

    @property
    def gate(self) -> Any:
        return self.bench.db.gate("acme")

    def since(self, first: int) -> list[tuple[float, str, bytes, bool]]:
        return self.requests[first:]


@contextlib.asynccontextmanager
async def outage(directory: Path, clock: HandClock, rng: Random) -> AsyncIterator[Outage]:
    made = Outage(directory, clock, rng)
    async with scripted_operator(*[made.answer] * 100_000) as operator:
        made.toml = operator_table("acme", operator.url, schedule=SCHEDULE, max_age="72h")
        await made.restart()
        try:
            yield made
        finally:
            await made.stop()


def check_identity(requests: list[tuple[float, str, bytes, bool]]) -> None:
    """Each delivery was sent with one and the same body, and never again after its success."""
    bodies: dict[str, set[bytes]] = defaultdict(set)
    done: set[str] = set()
    for _, webhook_id, body, answered in requests:
        bodies[webhook_id].add(body)
        assert webhook_id not in done, "sent again after it was delivered"
        if answered:
            done.add(webhook_id)
    assert {len(sent) for sent in bodies.values()} == {1}


async def test_a_day_down_is_probed_gently_and_then_everything_arrives(
    tmp_path: Path, clock: HandClock, rng: Random, measured: Callable[..., None]
) -> None:
    async with outage(tmp_path, clock, rng) as o:
        await o.end(*(f"s{number}" for number in range(PILE)))
        began = clock.mono
        await o.live(24 * HOUR)
        tried = [at - began for at, *_ in o.requests]
        # Five failures in a row open the breaker. Up to four further attempts were under way then; after that, one is
        # made at a time
        assert len([at for at in tried if at < 5]) <= 9
        steady = [at for at in tried if at > HOUR]
        gaps = [later - earlier for earlier, later in pairwise(steady)]
        assert min(gaps) >= 299.9, "a probe came before its pause was over"
        assert len(steady) <= 24 * 12
        assert o.gate.failures == len(tried)
        assert await o.states() == {"pending": PILE}
        o.down = False
        came_back = clock.mono
        await o.live(600)
        first = next(at for at, _, _, answered in o.requests if answered)
        assert first - came_back <= 300.1
        assert (await o.states())["delivered"] >= PILE - len(tried)  # the deliveries that had never been tried
        await o.live(12 * HOUR)  # the others wait as long as their schedule says
        assert await o.states() == {"delivered": PILE}
        check_identity(o.requests)
        measured(restarts=o.restarts, requests_in_24h=len(tried), back_after_s=round(first - came_back), lost=0)


async def test_five_days_of_failure_hold_it_and_a_release_brings_all_back(
    tmp_path: Path, clock: HandClock, rng: Random, measured: Callable[..., None]
) -> None:
    async with outage(tmp_path, clock, rng) as o:
        day = 0
        while o.gate.held_at is None and day < 7:
            await o.end(*(f"day{day}-{number}" for number in range(SESSIONS)))
            await o.live(24 * HOUR)
            day += 1
        assert o.gate.held_reason == "failing_for_days"
        held_after_days = (o.gate.held_at - o.gate.failing_since_at) / 86_400_000
        assert 5 <= held_after_days < 5.2
        before = await o.states()
        assert before.get("delivered", 0) == 0
        assert before["dead"] > 0  # the dead deliveries were older than max_age
        assert sum(before.values()) == day * SESSIONS

        # While the operator is held: nothing is sent, ends are recorded, and no delivery grows older
        silent = len(o.requests)
        await o.end(*(f"held-{number}" for number in range(SESSIONS)))
        await o.live(10 * 24 * HOUR)
        assert len(o.requests) == silent
        assert await o.states() == before | {"pending": before["pending"] + SESSIONS}

        # After the release, pending deliveries arrive. Dead ones arrive when they are retried, ten a second
        o.down = False
        await o.bench.db.set_gate("acme", lambda gate: retry.release(gate, clock.wall_ms()))
        await o.live(13 * HOUR)
        came = await o.states()
        assert came.keys() == {"delivered", "dead"}  # some more became too old before they were tried again
        assert came["delivered"] >= SESSIONS
        again = len(o.requests)
        assert await o.bench.db.retry_dead("acme", Dead()) == came["dead"]
        await o.restart()  # the restart keeps the pace of retries
        await o.live(60)
        assert await o.states() == {"delivered": (day + 1) * SESSIONS}
        replayed = sorted(at for at, *_ in o.since(again))
        assert len(replayed) == came["dead"]
        pace = [later - earlier for earlier, later in zip(replayed, replayed[10:], strict=False)]
        assert min(pace) >= 10 * RETRY_SPACING_MS / 1000 - 0.11
        check_identity(o.requests)
        measured(
            restarts=o.restarts,
            held_after_days=round(held_after_days, 2),
            dead=came["dead"],
            lost=0,
            replayed_per_s=round((len(replayed) - 1) / (replayed[-1] - replayed[0]), 1),
        )


async def test_a_restart_forgets_neither_breaker_nor_hold_nor_retry_after(
    tmp_path: Path, clock: HandClock, rng: Random
) -> None:
    async with outage(tmp_path, clock, rng) as o:
        await o.end(*(f"s{number}" for number in range(SESSIONS)))
        await o.live(HOUR)
        tried = len(o.requests)
        for _ in range(20):  # a daemon that had forgotten the breaker would try again after each restart
            await o.restart()
            await o.bench.round()
        assert len(o.requests) <= tried + 1
        await o.bench.db.set_gate("acme", lambda gate: retry.hold(gate, clock.wall_ms(), "by_hand"))
        await o.restart()
        await o.live(24 * HOUR)
        assert len(o.requests) <= tried + 1
        assert o.gate.held_reason == "by_hand"
