"""Changes of an operator's gate for which no answer is needed: a hold whose time is over, a breaker for which nothing
waits, and a new URL.
"""

import asyncio
from collections.abc import Sequence

from lmdaemon import gates, retry
from lmdaemon.clock import Clock
from lmdaemon.delivery.attempts import log_gate
from lmdaemon.delivery.lanes import Lane
from lmdaemon.model import Gate
from lmdaemon.store.contract import Store


class TimedGates:
    """Finds and stores the changes of gates for which no answer is needed."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def let_time_pass(self, lanes: Sequence[Lane], now_at: int) -> None:
        """Ends holds whose time is over, closes the breaker of an operator for which nothing waits any more, and
        notes a new URL. Raises StoreError.
        """
        changing = [lane for lane in lanes if not lane.is_url_noted or self._is_changed_by_time(lane, now_at)]
        if changing:
            await asyncio.gather(*(self._change(lane, now_at) for lane in changing))

    def _is_changed_by_time(self, lane: Lane, now_at: int) -> bool:
        gate = self._store.gate(lane.operator.name)
        if gate.held_until_at is None and gate.failures < retry.BREAKER_OPENS_AT:
            return False  # the usual case; checked first, because this is asked in every round
        is_waiting = self._store.figures_of(lane.operator.name).pending > 0
        return retry.settled_by_time(gate, now_at, is_waiting=is_waiting) is not gate

    async def _change(self, lane: Lane, now_at: int) -> None:
        name, url, since_at = lane.operator.name, lane.url or "", lane.url_since_at

        def alter(gate: Gate) -> Gate:
            is_waiting = self._store.figures_of(name).pending > 0
            return gates.with_url(retry.settled_by_time(gate, now_at, is_waiting=is_waiting), url, since_at)

        before = self._store.gate(name)
        if alter(before) is not before:
            after = await self._store.set_gate(name, alter)
            log_gate(self._store, self._clock, lane.operator, before, after, cause="time")
        lane.is_url_noted = lane.url_since_at == since_at
