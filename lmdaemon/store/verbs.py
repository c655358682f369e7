"""The verbs of `store.contract` that change something, as operations for the writer. They are the same for every
engine.

The store of an engine is a subclass that knows how to begin a batch and how to read.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmdaemon.clock import Clock
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import (
    Closing,
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
    Sweep,
    Swept,
    Touched,
    Touching,
)
from lmdaemon.store.projection import Projection
from lmdaemon.store.rules import RETRY_ROWS
from lmdaemon.store.writer import Writer

RETRIES_MAX = 100_000  # dead deliveries made due again by one call


class Died(NamedTuple):
    """Ids of dead deliveries that can be sent again, and the (settled_at, id) after which to go on; None at the end."""

    ids: list[int]
    after: tuple[int, int] | None


class Verbs(Projection):
    """The verbs, described in `lmdaemon.store.contract`. Nothing is written unless `run` is running."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._writer: Writer[Any]  # the engine's

    @abstractmethod
    async def _died(self, operator: str, after: tuple[int, int], limit: int) -> Died:
        """Reads dead deliveries of an operator in the order in which they died, beginning after `after`.

        Raises StoreError.
        """

    @property
    def failure(self) -> str | None:
        return self._writer.failure

    @property
    def writing_since(self) -> float | None:
        return self._writer.writing_since

    @property
    def waiting(self) -> int:
        return self._writer.waiting

    @property
    def refused(self) -> Mapping[str, int]:
        return self._writer.refused

    async def open_session(self, opening: Opening) -> Opened:
        return await self._writer.write(opening)

    async def touch(self, operator: str, session_ids: Sequence[str]) -> Touched:
        return await self._writer.write(Touching(operator, session_ids))

    async def end(self, operator: str, session_id: str, request_id: str | None = None) -> Session | None:
        return await self._writer.write(Closing(operator, session_id, request_id))

    async def record(self, recording: Recording) -> Recorded:
        return await self._writer.write(recording)

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        # The time is that of the queueing, not of the writing. So any sweep that could end a session is queued after
        # every touch that came before the session's deadline, however long the engine takes.
        as_of_ms = self.service_clock.now_ms() if idle else None
        return await self._writer.write(Sweep(as_of_ms, crowd))

    async def settle(self, settlement: Settlement) -> Settled:
        return await self._writer.write(settlement)

    async def set_gate(self, operator: str, change: Callable[[Gate], Gate]) -> Gate:
        return await self._writer.write(GateChange(operator, change))

    async def retry_dead(self, operator: str, since_at: int) -> int:
        # They are found by reads and changed in steps, so that other operations are not delayed
        retried, after = 0, (since_at, 0)
        while retried < RETRIES_MAX:
            found = await self._died(operator, after, min(RETRY_ROWS, RETRIES_MAX - retried))
            if found.ids:
                retried += await self._writer.write(RetryDead(operator, found.ids))
            if found.after is None:
                break
            after = found.after
        return retried

    async def retry_one(self, webhook_id: str) -> Delivery | None:
        return await self._writer.write(RetryOne(webhook_id))

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        return await self._writer.write(Pruning(before_at, after))

    async def probe(self) -> None:
        try:
            await self._writer.write(Probe())
        except StoreError:
            raise
        except Exception as error:  # an error of the engine that is not an outage
            raise StoreError(f"writing failed: {error}") from error
