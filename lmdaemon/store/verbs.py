"""The verbs of `store.contract` that change something, as operations for the writer. They are the same for every
engine.

Each engine's store is a subclass that implements how to begin a batch and how to read.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmdaemon.clock import Clock
from lmdaemon.limits import StoreLimits
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import (
    Closing,
    Dead,
    Discard,
    FoundDead,
    GateChange,
    Opened,
    Opening,
    Probe,
    Pruned,
    Pruning,
    Recorded,
    Recording,
    RetryDead,
    RetryOne,
    Settled,
    Settlement,
    StoreError,
    Submit,
    Sweep,
    Swept,
    Touched,
    Touching,
)
from lmdaemon.store.projection import Projection
from lmdaemon.store.writer import Writer


class DiedRow(NamedTuple):
    """A dead delivery that is not discarded."""

    id: int
    settled_at: int
    can_be_sent: bool
    cause: str


class Died(NamedTuple):
    """Dead deliveries, and the (settled_at, id) after which to go on; None at the end."""

    rows: list[DiedRow]
    after: tuple[int, int] | None


class Verbs(Projection):
    """The verbs, described in `lmdaemon.store.contract`. Nothing is written unless `run` is running."""

    def __init__(self, clock: Clock, name: str, limits: StoreLimits) -> None:
        super().__init__(clock, name)
        self._limits = limits
        self.writer: Writer[Any]  # set by the engine's store

    @abstractmethod
    async def _died(self, operator: str, dead: Dead, after: tuple[int, int], limit: int) -> Died:
        """Reads dead deliveries of an operator in the order in which they died, beginning after `after`.

        Raises StoreError.
        """

    async def _all_died(self, operator: str, dead: Dead) -> AsyncIterator[list[DiedRow]]:
        """All dead deliveries that are chosen, `dead_max` at most. They are read in steps, so that other operations are
        not delayed.
        """
        left: int = self._limits.dead_max
        after: tuple[int, int] | None = (dead.since_at, 0)
        while after is not None and left > 0:
            found = await self._died(operator, dead, after, min(self._limits.dead_rows, left))
            yield found.rows
            left -= len(found.rows)
            after = found.after

    @abstractmethod
    async def delivery(self, webhook_id: str) -> Delivery | None:
        """One delivery by its public id."""

    @property
    def failure(self) -> str | None:
        return self.writer.failure

    @property
    def failing_since(self) -> float | None:
        return self.writer.failing_since

    @property
    def writing_since(self) -> float | None:
        return self.writer.writing_since

    @property
    def waiting(self) -> int:
        return self.writer.waiting

    @property
    def refused(self) -> Mapping[str, int]:
        return self.writer.refused

    @property
    def submit(self) -> Submit:
        return self.writer.submit

    async def open_session(self, opening: Opening) -> Opened:
        return await self.writer.write(opening)

    async def touch(self, operator: str, session_ids: Sequence[str]) -> Touched:
        return await self.writer.write(Touching(operator, session_ids))

    async def end(self, operator: str, session_id: str, request_id: str | None = None) -> Session | None:
        return await self.writer.write(Closing(operator, session_id, request_id))

    async def record(self, recording: Recording) -> Recorded:
        return await self.writer.write(recording)

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        # The service time is read when the sweep is queued, not when it is written. So touches that came before a
        # session's deadline are in the queue before any sweep that could end the session, however slow the engine is.
        as_of_ms = self.service_clock.now_ms() if idle else None
        return await self.writer.write(Sweep(as_of_ms, crowd))

    async def settle(self, settlement: Settlement) -> Settled:
        return await self.writer.write(settlement)

    async def set_gate(self, operator: str, change: Callable[[Gate], Gate]) -> Gate:
        return await self.writer.write(GateChange(operator, change))

    async def retry_dead(self, operator: str, dead: Dead, most: int | None = None) -> int:
        retried, left = 0, self._limits.dead_max if most is None else most
        async for rows in self._all_died(operator, dead):
            ids = [row.id for row in rows if row.can_be_sent][:left]
            if ids:
                retried += await self.writer.write(RetryDead(operator, ids))
                left -= len(ids)
            if left <= 0:
                break
        return retried

    async def discard(self, operator: str, dead: Dead, by: str | None, note: str) -> int:
        discarded = 0
        async for rows in self._all_died(operator, dead):
            if rows:
                discarded += await self.writer.write(Discard([row.id for row in rows], by, note))
        return discarded

    async def discard_one(self, webhook_id: str, by: str | None, note: str) -> Delivery | None:
        before = await self.delivery(webhook_id)
        if before is not None and before.state == "dead" and before.discarded is None:
            await self.writer.write(Discard([before.id], by, note))
        return before

    async def find_dead(self, operator: str, dead: Dead) -> FoundDead:
        count, can_be_sent, oldest_at = 0, 0, None
        causes: Counter[str] = Counter()
        async for rows in self._all_died(operator, dead):
            count += len(rows)
            can_be_sent += sum(row.can_be_sent for row in rows)
            causes.update(row.cause for row in rows)
            if oldest_at is None and rows:
                oldest_at = rows[0].settled_at
        return FoundDead(count, can_be_sent, oldest_at, dict(causes.most_common()))

    async def retry_one(self, webhook_id: str) -> Delivery | None:
        return await self.writer.write(RetryOne(webhook_id))

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        return await self.writer.write(Pruning(before_at, after))

    async def probe(self) -> None:
        try:
            await self.writer.write(Probe())
        except StoreError:
            raise
        except Exception as error:  # an error of the engine that is not an outage
            raise StoreError(f"writing failed: {error}") from error
