"""Deletes what ended longer ago than is kept, in small batches, the oldest first. Started by `daemon`."""

import asyncio
from collections.abc import Callable

from lmdaemon.clock import Clock
from lmdaemon.log import Log
from lmdaemon.store.contract import Store, StoreError

EVERY_MAX_S = 3600.0
EVERY_MIN_S = 1.0  # each is a commit, whatever keep_ended says
PAUSE_S = 0.05  # between two batches, so that pruning a million rows is nobody's problem

log = Log("store")


def every_s(keep_ended_s: float) -> float:
    """The wait between two prunings: a tenth of what is kept, within bounds."""
    return min(max(keep_ended_s / 10, EVERY_MIN_S), EVERY_MAX_S)


class Pruner:
    """`once` deletes all that is old enough now; `run` is `once` for ever. `keep_ended_s` gives what is in force."""

    def __init__(self, store: Store, clock: Clock, keep_ended_s: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._keep_ended_s = keep_ended_s

    async def run(self) -> None:
        while True:
            try:
                await self.once()
            except StoreError as error:
                log.warning("store.not_pruned", reason=str(error))
            await asyncio.sleep(every_s(self._keep_ended_s()))

    async def once(self) -> None:
        """Raises StoreError; what was deleted before stays so."""
        before_at = self._clock.wall_ms() - int(self._keep_ended_s() * 1000)
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
