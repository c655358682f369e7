"""Runs attempts, each from taking a slot to storing its result."""

import asyncio
from typing import Protocol

from lmdaemon import retry
from lmdaemon.clock import Clock
from lmdaemon.delivery.attempts import AttemptObserver, Attempts, log_gate
from lmdaemon.delivery.lanes import Lane
from lmdaemon.delivery.underway import Underway
from lmdaemon.log import Log
from lmdaemon.model import Delivery
from lmdaemon.store.contract import Settled, Settlement, Store, StoreError

STORE_RETRY_S = 1.0  # before the store is tried again after it has refused

log = Log("delivery")


class Owner(Protocol):
    """What begins attempts: the dispatcher. Everything is called on the event loop."""

    def slot_freed(self, operator: str, sink: str) -> None:
        """Another attempt of the lane may begin."""

    def attempt_ended(self, lane: Lane, row: Delivery) -> None:
        """An attempt has ended and its row is no longer in flight. `lane` is the one in which it began; a reload may
        have replaced it since.
        """

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        """A row that was in flight is due again at this wall time (ms)."""

    def crashed(self, error: Exception) -> None:
        """An attempt has raised an exception that no attempt may raise, which is a bug."""


class RunningAttempts:
    """Runs attempts in tasks of their own, and stores their results."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        attempts: Attempts,
        observer: AttemptObserver | None,
        underway: Underway,
        owner: Owner,
    ) -> None:
        self._store = store
        self._clock = clock
        self._attempts = attempts
        self._observer = observer
        self._underway = underway
        self._owner = owner
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """The number of attempts whose results are not stored yet."""
        return len(self._tasks)

    def start(self, lane: Lane, row: Delivery, *, probe: bool) -> asyncio.Task[None]:
        """Begins an attempt. The task is done when its result is stored."""
        lane.in_flight.add(row.id)
        task = asyncio.create_task(self._deliver(lane, row, probe=probe))
        self._tasks.add(task)
        return task

    async def _deliver(self, lane: Lane, row: Delivery, *, probe: bool) -> None:
        """Delivers one row, from taking a slot to storing the result.

        After an answer that holds or delays the operator, no attempt of the lane begins until the result is stored.
        """
        closing = False
        try:
            gate = self._store.gate(lane.operator.name)
            now_at = self._clock.wall_ms()
            if retry.age_ms(row.aged_from_at, row.held_base_ms, gate, now_at) > round(lane.policy.max_age_s * 1000):
                settlement = self._attempts.too_old(lane, row)
            else:
                self._underway.begin(row, now_at)
                outcome = await self._attempts.make(lane, row)
                closing = lane.gated and (outcome.verdict == "hold" or bool(outcome.retry_after_s))
                lane.closing += closing
                settlement = self._attempts.settlement(lane, row, outcome, now_at, probe=probe)
            settled = await self._record(lane, settlement)
            self._underway.end(row.id)
            self._note_pace(lane, settlement)
            due_at = settled.due_at if settlement.state == "pending" else None
        except StoreError:  # the session for a plug-in could not be read: nothing was tried, no attempt is counted
            self._underway.end(row.id)
            await asyncio.sleep(STORE_RETRY_S)
            due_at = row.due_at
        except Exception as error:
            self._owner.crashed(error)
            due_at = None
        finally:
            self._tasks.discard(asyncio.current_task())
            lane.in_flight.discard(row.id)
            lane.closing -= closing
            self._owner.attempt_ended(lane, row)
        # A round between the commit and this line may have left out the row, because it was still in flight. So its due
        # time is noted again.
        if due_at is not None:
            self._owner.delivery_due(row.operator, row.sink, due_at)

    async def _record(self, lane: Lane, settlement: Settlement) -> Settled:
        """Stores a result.

        A success frees its slot before it is stored, so that the next attempt need not wait for the disk. A failure
        keeps its slot until it is stored, because it may close the gate.
        """
        if settlement.state != "delivered":
            return await self._settle(lane, settlement)
        lane.delivered += 1
        self._owner.slot_freed(lane.operator.name, lane.sink)
        try:
            return await self._settle(lane, settlement)
        finally:
            lane.delivered -= 1

    async def _settle(self, lane: Lane, settlement: Settlement) -> Settled:
        """Stores a result. While the store refuses, the row stays in flight, so that it is not sent again."""
        while True:
            try:
                settled = await self._store.settle(settlement)
            except StoreError:
                await asyncio.sleep(STORE_RETRY_S)
            else:
                log_gate(self._store, self._clock, lane.operator, settled.before, settled.after, cause="answer")
                if self._observer is not None:
                    self._observer.settled(settlement, settled)
                return settled

    def _note_pace(self, lane: Lane, settlement: Settlement) -> None:
        """Logs when a lane falls behind because it has too few slots, and when it has caught up."""
        name, now_s = lane.operator.name, self._clock.monotonic()
        pending, took_s = self._store.figures_of(name).pending, (settlement.attempt or {}).get("durationMs", 0) / 1000
        if not lane.pace.note(now_s, took_s, pending, is_settled=settlement.state != "pending"):
            return
        gate, now_at = self._store.gate(name), self._clock.wall_ms()
        overdue_s = lane.overdue_s(gate, now_at)
        if lane.pace.turned(overdue_s):
            facts = {"operator": name, "sink": lane.sink, "pending": pending}
            if lane.pace.is_behind:
                said = lane.pace_in_words(gate, now_at, now_s)
                log.warning("delivery.behind", **facts, overdue_s=overdue_s, pace=said)
            else:
                log.info("delivery.caught_up", **facts)

    async def drain(self, within_s: float) -> None:
        """Waits for attempts in flight, for `within_s` at most. Those that have not ended by then are cancelled and
        sent again later.
        """
        if not self._tasks:
            return
        log.info("delivery.draining", in_flight=len(self._tasks))
        _, late = await asyncio.wait(set(self._tasks), timeout=within_s)
        for task in late:
            task.cancel()
        if late:
            log.warning("delivery.given_back", count=len(late))
            await asyncio.wait(late)
