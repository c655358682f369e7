"""Deletes sessions that ended longer ago than `keep_ended`, in small batches, the oldest first."""

import asyncio
from collections.abc import Callable

from lmdaemon.clock import Clock
from lmdaemon.log import Log
from lmdaemon.store.contract import Store, StoreError

EVERY_MAX_S = 3600.0
EVERY_MIN_S = 1.0  # the least time between two prunings, because each is at least one commit
PAUSE_S = 0.05  # between two batches, so that pruning a million rows delays nothing else

log = Log("store")


def every_s(keep_ended_s: float) -> float:
    """Seconds between two prunings: a tenth of `keep_ended_s`, within the bounds above."""
    return min(max(keep_ended_s / 10, EVERY_MIN_S), EVERY_MAX_S)


class Pruner:
    """Deletes old sessions. `keep_ended_s` returns the setting in force."""

    def __init__(self, store: Store, clock: Clock, keep_ended_s: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._keep_ended_s = keep_ended_s

    async def run(self) -> None:
        """Prunes for ever. Failures are logged and tried again the next time."""
        while True:
            try:
                await self.once()
            except StoreError as error:
                log.warning("store.not_pruned", reason=str(error))
            await asyncio.sleep(every_s(self._keep_ended_s()))

    async def once(self) -> None:
        """Deletes everything that is old enough now. Raises StoreError; batches deleted before that stay deleted."""
        before_at = self._clock.wall_ms() - round(self._keep_ended_s() * 1000)
        pruned, after = 0, (0, 0)
        while True:
            count, go_on = await self._store.prune(before_at, after)
            pruned += count
            if go_on is None:
                break
            after = go_on
            await asyncio.sleep(PAUSE_S)
        if pruned:
            log.info("store.pruned", sessions=pruned)
