"""The writer of a store: a queue of operations, written in batches of one transaction each. It knows no engine.

It takes what is queued, has the engine commit it as one transaction, and answers the callers after that. So changes
take effect in the order of the queue. A broken operation fails alone. During an outage operations are refused, the
outage is logged once, and one write a second tries whether it is over.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from lmdaemon.limits import StoreLimits
from lmdaemon.log import Log, place
from lmdaemon.store.contract import BATCH_ROWS, Answer, DatabaseError, Done, Operation, StoreError

BATCH_MAX = 1000  # most operations in one transaction: bounds how long one commit takes
JOIN_MAX = 64  # a batch of fewer operations waits for others. For a larger one, waiting would only keep the writer idle
# Turns of the event loop that a small batch waits for more operations: in that time, requests of clients that were just
# answered can arrive and be read
JOIN_TURNS = 4
REFUSALS = ("queue_full", "readers_full", "reading_too_slow", "writing_failed", "reading_failed", "stopping")
PROBE_S = 1.0  # between attempts to write during an outage

log = Log("store")

Work = TypeVar("Work")


class Owner(Protocol[Work]):
    """The store that the batches belong to. Everything is called on the event loop."""

    def begin(self, operations: Sequence[Operation[Any]]) -> Work:
        """Returns what the engine has to commit for these operations."""

    def committed(self, work: Work) -> None:
        """Is called after the commit, before the callers are answered."""

    def available(self, available: bool) -> None:
        """Is called when the engine stops accepting writes, and when it accepts them again."""

    def measured(self, operations: int, took_s: float) -> None:
        """Is called with the duration of each transaction, in seconds."""


_TheirWork = TypeVar("_TheirWork", contravariant=True)


class Engine(Protocol[_TheirWork]):
    """What the writer needs of a database engine."""

    @property
    def database(self) -> str:
        """A name of the database for log lines."""

    async def check(self) -> None:
        """Is called before each batch is begun. Raises DatabaseError when the database is gone, so that later commits
        would be lost, and any other exception for an outage.
        """

    async def commit(self, work: _TheirWork) -> list[Any]:
        """Commits a batch and returns an answer for each operation.

        An answer that is a StoreError is raised to the caller of that operation. Raises any exception when nothing was
        stored.
        """

    def is_outage(self, error: Exception) -> bool:
        """Whether the disk, the network or a machine is at fault, and not the operation."""

    def has_room(self) -> bool:
        """Whether the disk had room for a batch of any size at the last attempt to commit, as far as the engine can
        see.
        """

    async def give_up(self) -> None:
        """Is called last, after a DatabaseError, to save what can be saved."""


# An operation in the queue, the number of rows it names, and who takes its answer. It is no NamedTuple, because making
# one costs a call.
_Queued = tuple[Operation[Any], int, Done]


class Writer(Generic[Work]):
    """The queue and its writer. Nothing is written unless `run` is running.

    `refused` counts refused operations by reason; reads that are refused are counted in it as well.
    """

    def __init__(self, owner: Owner[Work], engine: Engine[Work], limits: StoreLimits) -> None:
        self._owner = owner
        self._engine = engine
        self._queue_max, self._queue_rows_max, self._hung_s = limits.queue_max, limits.queue_rows, limits.hung_s
        self._queue: deque[_Queued] = deque()
        self._queued_rows = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._is_available = True
        self.refused = dict.fromkeys(REFUSALS, 0)
        self.failure: str | None = None  # why the last write was refused; None while writes work
        # Monotonic time of the first write that was refused; None while writes work
        self.failing_since: float | None = None
        self.writing_since: float | None = None  # monotonic time at which the current transaction began
        self.commits = 0
        self.committed_something = asyncio.Event()  # set by each commit; the waiting task clears it
        # Set by each commit that changes more than the clock; the waiting task clears it
        self.changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        """The number of operations that wait for the writer."""
        return len(self._queue)

    def write(self, operation: Operation[Answer]) -> asyncio.Future[Answer]:
        """Queues one operation. The future is done when the operation is committed; it raises StoreError if that fails.

        Cancelling the future does not cancel the operation.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.submit(operation, partial(_settle, answer))
        return answer

    def submit(self, operation: Operation[Any], done: Done) -> None:
        """Queues one operation; see `Store.submit`."""
        if self._closing:
            self.refused["stopping"] += 1
            done(StoreError("the store is closed"))
        elif len(self._queue) >= self._queue_max or self._queued_rows >= self._queue_rows_max:
            self.refused["queue_full"] += 1
            log.warning("store.overloaded", reason="queue_full", waiting=len(self._queue), ids=self._queued_rows)
            done(StoreError("too many operations are waiting"))
        else:
            self._queue.append((operation, rows := operation.rows, done))
            self._queued_rows += rows
            self._wake.set()

    async def run(self) -> None:
        """Writes what is queued, for ever. During an outage it tries an empty batch every PROBE_S."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S if self.failure else None):
                    await self._wake.wait()
            self._wake.clear()
            while self._queue or self.failure:
                await self._let_others_join()
                await self.write_batch()
                if self.failure:
                    break

    async def _let_others_join(self) -> None:
        """Waits some turns of the event loop for more operations, if there are few: a transaction takes almost as long
        for one operation as for many.
        """
        for _ in range(JOIN_TURNS):
            if len(self._queue) >= JOIN_MAX:
                break
            await asyncio.sleep(0)

    def stop_taking(self, error: StoreError) -> None:
        """Refuses what is queued, and everything after it."""
        self._closing = True
        self._refuse(self._queue, error)

    async def write_batch(self) -> None:
        """Writes one batch of what is queued, which may be empty, and answers its callers.

        Raises DatabaseError when the database was taken away.
        """
        batch = self._next_batch()
        try:
            await self._write_and_answer(batch)
        except asyncio.CancelledError:
            self._refuse(batch, StoreError("the daemon is stopping"))
            raise

    async def _write_and_answer(self, batch: list[_Queued]) -> None:
        try:
            work, results = await self._write(batch)
        except DatabaseError as error:
            await self._give_up(batch, error)
        except Exception as error:
            if self._engine.is_outage(error):
                self._failed(batch, error)
            else:
                await self._one_by_one(batch, error)
        else:
            self._answered(work, batch, results)

    def _next_batch(self) -> list[_Queued]:
        queue = self._queue
        if len(queue) <= BATCH_MAX and self._queued_rows <= BATCH_ROWS:  # the usual case: all that is queued
            batch = list(queue)
            queue.clear()
            self._queued_rows = 0
            return batch
        batch, rows = [], 0
        while queue and len(batch) < BATCH_MAX and (not batch or rows + queue[0][1] <= BATCH_ROWS):
            batch.append(queued := queue.popleft())
            rows += queued[1]
        self._queued_rows -= rows
        return batch

    async def _write(self, batch: list[_Queued]) -> tuple[Work, list[Any]]:
        """Writes one transaction. Raises what the engine raises."""
        loop = asyncio.get_running_loop()
        # Called on the event loop and not on the engine's thread, because the event loop has the interpreter's lock
        # already
        await self._engine.check()
        work = self._owner.begin([operation for operation, _, _ in batch])
        self.writing_since = time.monotonic()
        hung = loop.call_later(self._hung_s, self._look_if_hung, self.writing_since)
        try:
            results = await self._engine.commit(work)
            self._owner.measured(len(batch), time.monotonic() - self.writing_since)
            return work, results
        finally:
            hung.cancel()
            self.writing_since = None

    def _answered(self, work: Work, batch: list[_Queued], results: list[Any]) -> None:
        self.commits += 1
        self.committed_something.set()
        if any(rows for _, rows, _ in batch):
            self.changed.set()
        if not self._is_available and self._works_again(batch):
            log.info("store.recovered", after=self.failure or "a write that hung")
            self.failure = self.failing_since = None
            self._set_available(True)
        self._owner.committed(work)
        untold = [result for result in results if isinstance(result, StoreError)]
        if untold:
            self.refused["reading_failed"] += len(untold)
            log.error("store.reading_failed", reason=str(untold[0]), database=self._engine.database)
        for (_, _, done), result in zip(batch, results, strict=True):
            done(result)

    def _works_again(self, batch: list[_Queued]) -> bool:
        """Whether a commit after a failure shows that writes work. On a full disk a small commit, such as a probe's,
        may fit while others do not.
        """
        return self.failure is None or self._engine.has_room() or any(rows for _, rows, _ in batch)

    def _look_if_hung(self, since: float) -> None:
        # Checked in the next turn of the loop: if the loop itself was late, the result may have arrived by now
        asyncio.get_running_loop().call_soon(self._hung, since)

    def _hung(self, since: float) -> None:
        if self.writing_since != since:
            return
        if self._is_available:
            log.error("store.hanging", waited_s=self._hung_s, waiting=len(self._queue), database=self._engine.database)
        self._set_available(False)

    def _failed(self, batch: list[_Queued], error: Exception) -> None:
        failure = str(error)
        # Writing failed twice in a row; operations that wait would fail in the same way, so they are refused now
        if self.failure is not None:
            self.refused["writing_failed"] += len(self._queue)
            self._queued_rows = 0
            self._refuse(self._queue, StoreError(f"writing failed: {error}"))
        if self.failing_since is None:
            self.failing_since = time.monotonic()
        if failure != self.failure:  # logged once, and again if the text changes; not at every attempt
            log.error("store.failing", reason=failure, refused=len(batch), database=self._engine.database)
        self._set_available(False)
        self.failure = failure
        self.refused["writing_failed"] += len(batch)
        self._refuse(batch, StoreError(f"writing failed: {error}"))

    def _set_available(self, available: bool) -> None:
        if available != self._is_available:
            self._is_available = available
            self._owner.available(available)

    async def _one_by_one(self, batch: list[_Queued], error: Exception) -> None:
        """Writes each operation in a transaction of its own, after one of them broke the batch, so that it alone
        fails.
        """
        if len(batch) == 1:
            facts = {"operation": type(batch[0][0]).__name__, "error": type(error).__name__}
            log.error("store.operation_failed", **facts, where=place(error))
            return self._refuse(batch, error)
        while batch:
            try:
                work, results = await self._write(batch[:1])
            except DatabaseError as lost:
                await self._give_up(batch, lost)
            except Exception as broken:
                if self._engine.is_outage(broken):
                    self._failed([batch.pop(0)], broken)
                else:
                    await self._one_by_one([batch.pop(0)], broken)
            else:
                self._answered(work, [batch.pop(0)], results)
        return None

    async def _give_up(self, batch: list[_Queued], lost: DatabaseError) -> NoReturn:
        """Refuses everything and raises: further commits would be lost when the process ends, so the daemon must end
        now.
        """
        log.error("store.lost_file", reason=str(lost))
        self._set_available(False)
        self.failure = str(lost)
        self._refuse(batch, StoreError(self.failure))
        self.stop_taking(StoreError(self.failure))
        await self._engine.give_up()
        raise lost

    @staticmethod
    def _refuse(batch: list[_Queued] | deque[_Queued], error: Exception) -> None:
        refused = list(batch)
        batch.clear()  # so that none of them is answered again, whatever happens next
        for _, _, done in refused:
            done(error)


def _settle(answer: "asyncio.Future[Any]", result: Any) -> None:
    """Gives a future its result, or the exception that is in the place of a result."""
    if answer.done():  # its caller was cancelled
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
