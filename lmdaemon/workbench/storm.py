"""Plays a provider against an endpoint: good, repeated, racing and malformed notices at a steady rate.

Notices are sent at their rate whether or not answers come, and the time of an answer counts from the moment at which
its notice was due. The delays that a stalled endpoint causes to later notices are therefore measured, too (no
coordinated omission).
"""

import asyncio
import time
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.workbench import explain
from lmdaemon.workbench.bench import run_id
from lmdaemon.workbench.exchanges import Exchange
from lmdaemon.workbench.figures import Figures
from lmdaemon.workbench.notices import Notices
from lmdaemon.workbench.wire import Wire

PROMISES = {
    "refused": "a good notice was answered, but not with success",
    "repeat_refused": "a repeat of a notice that was accepted was not answered with success",
    "race_lost": "of several equal notices at the same time, not all were answered with success",
    "taken": "a malformed notice was answered with success",
    "faulted": "a malformed notice was answered with a 5xx, or with a code that asks to try again",
    "unanswered": "no whole answer came in time",
}
RACING = 5
KINDS = ("good", "repeated", "racing", "malformed")


class Mix(NamedTuple):
    """`notices` in a run, `rate` in notices a second, and the weight of each kind."""

    notices: int = 200
    rate: float = 20.0
    shares: tuple[float, float, float, float] = (70, 15, 5, 10)


class Storm:
    """One run against one endpoint. The same seed sends the same kinds in the same order."""

    def __init__(
        self,
        operator: Operator,
        mix: Mix,
        seed: int,
        *,
        token: str | None = None,
        player: str | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._operator = operator
        self._mix = mix
        self._rng = Random(seed)  # noqa: S311 - must be repeatable, not secret
        self._notices = Notices(operator, run=run_id(), prefix="lmsim", token=token, player=player)
        self._clock = Clock()
        self._wire = Wire(operator, self._clock, per_second=None)
        self._tell = tell
        self._told: list[tuple[bytes, str]] = []  # notices that were accepted, for repeating them
        self.figures = Figures()

    async def run(self) -> dict[str, Any]:
        """Sends the notices and returns the report. If it is cancelled, returns a report of what was seen so far."""
        began = time.monotonic()
        tasks: set[asyncio.Task[None]] = set()
        try:
            await self._send("good", 0.0, began)  # so that there is a notice to repeat
            steady_from = time.monotonic()
            for number in range(1, self._mix.notices):
                due_at = steady_from + number / self._mix.rate
                if (wait_s := due_at - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                kind = self._rng.choices(KINDS, self._mix.shares)[0]
                task = asyncio.create_task(self._send(kind, self._rng.random(), due_at))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                self._tell(f"{number + 1} of {self._mix.notices} sent, {len(tasks)} under way")
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            self.figures.counts["interrupted"] = 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._wire.close()
        return self.figures.shown(PROMISES, time.monotonic() - began)

    async def _send(self, kind: str, chance: float, due_at: float) -> None:
        if kind == "repeated" and not self._told:
            kind = "good"
        self.figures.counts[kind] += 1
        if kind == "malformed":
            await self._malformed(chance, due_at)
            return
        if kind == "repeated":
            body, webhook_id = self._told[int(chance * len(self._told))]
        else:
            body, webhook_id = self._notices.body(self._notices.fields()), self._notices.webhook_id()
        copies = RACING if kind == "racing" else 1
        found = await asyncio.gather(*(self._post(body, webhook_id, due_at) for _ in range(copies)))
        promise = {"good": "refused", "repeated": "repeat_refused", "racing": "race_lost"}[kind]
        for one in found:
            if one.answer is not None and not one.accepted:
                self._broke(promise, one)
        if kind == "good" and found[0].accepted:
            self._told.append((body, webhook_id))

    async def _malformed(self, chance: float, due_at: float) -> None:
        bodies = self._notices.malformed()
        case, body = bodies[int(chance * len(bodies))]
        one = await self._post(body, self._notices.webhook_id(), due_at)
        if one.accepted:
            self._broke("taken", one, case)
        elif one.answer is not None and (
            one.answer.status >= 500 or one.code == self._operator.sends.codes.of("retry")
        ):
            self._broke("faulted", one, case)

    async def _post(self, body: bytes, webhook_id: str, due_at: float) -> Exchange:
        headers = self._notices.headers(body, self._clock.wall_ms() / 1000, webhook_id)
        one = await self._wire.send_now(body, headers)
        self._wire.exchanges.clear()
        self.figures.counts["requests"] += 1
        self.figures.counts["accepted" if one.accepted else "not_accepted"] += 1
        self.figures.timed("answer", time.monotonic() - due_at)
        if one.answer is None:
            self._broke("unanswered", one)
        return one

    def _broke(self, promise: str, one: Exchange, case: str = "") -> None:
        said = self._notices.mask()(explain.exchange(one, self._operator.sends))
        self.figures.broke(promise, f"{one.asked.headers.get('webhook-id')}: {case + ': ' if case else ''}{said}")
