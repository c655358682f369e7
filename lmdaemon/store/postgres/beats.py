"""The beat: a transaction that tells the other daemons how far this one has heard, when nothing else tells them."""

import asyncio
from contextlib import suppress
from random import Random

from lmdaemon.store.contract import Probe, StoreError
from lmdaemon.store.postgres.batch import Batch
from lmdaemon.store.postgres.company import Company
from lmdaemon.store.postgres.hints import Hints
from lmdaemon.store.postgres.paces import Paces
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.projection import Projection
from lmdaemon.store.writer import Writer

# From the last transaction to a beat for another daemon's deadline, at first; doubled while that deadline stays
BEAT_MIN_S = 0.01
BEAT_AFTER_S = 0.002  # added to the time of a beat, so that the deadline for which it is made is certainly over


class Beats:
    """Beats regularly, and when the owner of a session that is due waits to hear from this daemon."""

    def __init__(
        self,
        projection: Projection,
        company: Company,
        writer: Writer[Batch],
        hints: Hints,
        signals: Signals,
        paces: Paces,
    ) -> None:
        self._projection = projection
        self._company = company
        self._writer = writer
        self._hints = hints
        self._signals = signals
        self._paces = paces
        self._rng = Random()  # noqa: S311 - jitter, not secrets

    async def run(self) -> None:
        """Beats, for ever."""
        loop, commits, waiting = asyncio.get_running_loop(), -1, self._company.waiting
        last_at = soon_at = loop.time()
        soon_s, jitter = BEAT_MIN_S, 1.0
        while True:
            if self._writer.commits != commits:
                commits, last_at, jitter = self._writer.commits, loop.time(), self._rng.uniform(0.6, 1.4)
                soon_at = last_at + soon_s
            regular_s = self._hints.idle_s if self._projection.is_idle else self._paces.beat_s
            regular_at = last_at + regular_s * jitter
            if self._company.waiting != waiting:
                waiting, soon_s = self._company.waiting, BEAT_MIN_S
                soon_at = min(soon_at, loop.time() + soon_s)
            due_in_s = self._others_due_in_s()
            beat_at = regular_at if due_in_s is None else min(regular_at, max(loop.time() + due_in_s, soon_at))
            self._signals.beat.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(beat_at + BEAT_AFTER_S):
                    await self._signals.beat.wait()
                continue
            # The beat is for a deadline of another daemon's operator. While the deadline stays, its owner is not ready:
            # beat less often
            if beat_at < regular_at:
                soon_s = min(soon_s * 2, self._paces.beat_s)
            if self._writer.commits != commits and self._company.told_ms >= (waiting[0] or 0):
                continue
            if self._writer.failure is not None:
                await asyncio.sleep(self._paces.beat_s)
                continue
            with suppress(StoreError):
                await self._writer.write(Probe())

    def _others_due_in_s(self) -> float | None:
        """Seconds until this daemon has heard past the next deadline of the other daemons' operators; None if there is
        none. It stays 0 after this daemon has told that it has, because the owner then ends sessions, and the deadline
        after those may be near.
        """
        due_ms = self._company.next_due_ms
        if due_ms is None or not self._projection.live:
            return None
        return max(0.0, (due_ms - self._projection.service_clock.now_ms()) / 1000)
